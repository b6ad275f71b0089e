"""States of the beginnings of prompts, kept so that the same documents need not be read twice.

A prompt that begins with documents is read up to its question once; the states after each document stay here, and the
next prompt with exactly these tokens in front goes on from there. The store is a tree: a node holds the states after
its tokens, without what its parent already holds. What a state adds token by token (keys and values) is therefore kept
once, however many boundaries there are; what has one size whatever the past (the state of a Mamba block) once for each
boundary. Nothing here asks what kind a state is: a tensor grows along the dimension in which it differs from an empty
state's.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.model.lm import LM
from nanochat.model.mixer import State
from nanochat.tokenizer import Tokenizer

NODE_BYTES = 1024  # what a node costs beside its tensors and tokens, and each tensor's own record


class Begun(NamedTuple):
    """States of one row that have read the first `n` tokens of a prompt."""

    n: int
    states: list[State]


class _Node:
    """The tokens of one prefix after those of its parent, and what they add to the states."""

    __slots__ = ("children", "n", "nbytes", "parent", "parts", "segment")

    def __init__(self, parent: _Node | None, segment: bytes, n: int, parts: list[list[Tensor]], nbytes: int) -> None:
        self.parent, self.segment, self.n, self.parts, self.nbytes = parent, segment, n, parts, nbytes
        self.children: dict[int, dict[bytes, _Node]] = {}  # by length, then by the tokens themselves

    def path(self) -> list[_Node]:
        """From below the root to here."""
        nodes: list[_Node] = []
        node: _Node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixCache:
    """Snapshots of the states after exact beginnings of prompts, at most `max_bytes` of them.

    One cache serves one model, and any number of conversations and threads. What was not used for longest leaves
    first. `spacing`: least tokens between two snapshots after documents of a prompt; every one costs a pass of its own
    (with one after each 66 tokens, reading them for the first time took 1.5 times as long). `hits` and `misses` count
    look-ups, `tokens_saved` the tokens that needed no reading. After the model's weights changed, call `clear`. Raises
    UsageError for negative numbers, and for a second model.
    """

    def __init__(self, max_bytes: int = 256 << 20, spacing: int = 128) -> None:
        for name, value in (("max_bytes", max_bytes), ("spacing", spacing)):
            if value < 0:
                raise UsageError(f"PrefixCache({name}={value}): expected at least 0")
        self.max_bytes, self.spacing = max_bytes, spacing
        self.hits = self.misses = self.tokens_saved = 0
        self._lock = threading.Lock()
        self._model: weakref.ref[LM] | None = None
        self.clear()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._root = _Node(None, b"", 0, [], 0)
            self._order: OrderedDict[_Node, None] = OrderedDict()  # least recently used first
            self._nbytes = 0

    def bind(self, model: LM) -> None:
        """Serve this model. Raises UsageError when the cache already serves another one."""
        with self._lock:
            if self._model is None:
                self._model = weakref.ref(model)
            elif self._model() is not model:
                raise UsageError("this PrefixCache holds states of another model; give each model a cache of its own")

    def get(self, ids: Sequence[int], capacity: int = 0) -> Begun:
        """The states of the longest stored beginning of `ids`, as one row of their own with room for `capacity` tokens
        in all; empty states when there is none."""
        model = self._bound()
        with self._lock:
            node = self._longest(_bytes(ids))
            self._touch(node)
            self.hits += node.n > 0
            self.misses += node.n == 0
            self.tokens_saved += node.n
            path = node.path()
        # nodes never change, and those that are evicted meanwhile live as long as `path`
        if not path:
            return Begun(0, model.init_states(1, capacity))
        return Begun(node.n, _assemble(model.init_states(1), path, capacity))

    def put(self, ids: Sequence[int], states: Sequence[State]) -> bool:
        """Store copies of the states of one row that has read exactly `ids`. False when they are too large."""
        key = _bytes(ids)
        empty = [list(state.tensors().values()) for state in self._bound().init_states(1)]
        full = [list(state.tensors().values()) for state in states]
        with self._lock:
            parent = self._longest(key)
            self._touch(parent)
            if parent.n == len(ids):
                return True
            added = [[_after(x, e, parent.n) for x, e in zip(xs, es)] for xs, es in zip(full, empty)]
            segment = key[parent.n * _ID.itemsize :]
            nbytes = len(segment) + sum(NODE_BYTES + x.numel() * x.element_size() for xs in added for x in xs)
            if not self._make_room(nbytes, parent):
                return False
            parts = [[x.detach().clone(memory_format=torch.contiguous_format) for x in xs] for xs in added]
            node = _Node(parent, segment, len(ids), parts, nbytes)
            parent.children.setdefault(len(segment), {})[segment] = node
            self._order[node] = None
            self._nbytes += nbytes
            self._touch(node)
            return True

    def begin(self, ids: Sequence[int], boundaries: Iterable[int], room: int = 0, chunk: int = 2048) -> Begun:
        """Read `ids` up to the last of the `boundaries` (offsets; those outside are ignored), from the longest stored
        beginning on, and store the states at each boundary. The last token is always left to be read."""
        model, ids = self._bound(), list(ids)
        n, states = self.get(ids[:-1], len(ids) + room)
        for end in sorted({b for b in boundaries if n < b < len(ids)}):
            for part_1N in torch.tensor([ids[n:end]], device=model.device).split(chunk, dim=1):
                model(part_1N, states)
            self.put(ids[:end], states)
            n = end
        return Begun(n, states)

    # ---- under the lock

    def _longest(self, key: bytes) -> _Node:
        """The deepest node whose tokens `key` begins with. Several children may fit: one may begin with another."""
        best, waiting = self._root, [self._root]
        while waiting:
            node = waiting.pop()
            if node.n > best.n:
                best = node
            at = node.n * _ID.itemsize
            for length, children in node.children.items():
                child = children.get(key[at : at + length])
                if child is not None:
                    waiting.append(child)
        return best

    def _touch(self, node: _Node) -> None:
        """Mark as used, parents last: so the first in the order has no children."""
        while node.parent is not None:
            self._order.move_to_end(node)
            node = node.parent

    def _make_room(self, nbytes: int, parent: _Node) -> bool:
        """Evict until `nbytes` more fit, sparing the path to `parent`, which was just touched."""
        if nbytes + sum(node.nbytes for node in parent.path()) > self.max_bytes:
            return False
        while self._nbytes + nbytes > self.max_bytes:
            node, _ = self._order.popitem(last=False)
            assert node.parent is not None
            assert not node.children
            siblings = node.parent.children[len(node.segment)]
            del siblings[node.segment]
            if not siblings:
                del node.parent.children[len(node.segment)]
            self._nbytes -= node.nbytes
        return True

    def _bound(self) -> LM:
        model = self._model() if self._model is not None else None
        if model is None:
            raise UsageError("this PrefixCache serves no model yet: call bind(model)")
        return model


def document_boundaries(ids: Sequence[int], tokenizer: Tokenizer, spacing: int = 0) -> list[int]:
    """Offsets right after documents of a prompt: after the last one, and after those before that lie at least `spacing`
    tokens apart."""
    doc_end = tokenizer.special("doc_end")
    ends = [i + 1 for i, token in enumerate(ids) if token == doc_end]
    chosen: list[int] = []
    for end in ends:
        if end - (chosen[-1] if chosen else 0) >= spacing:
            chosen.append(end)
    return chosen if chosen[-1:] == ends[-1:] else [*chosen, ends[-1]]


def message_boundaries(ids: Sequence[int], tokenizer: Tokenizer, spacing: int = 0, start: int = 0) -> list[int]:
    """Offsets right after messages and documents of a prompt that lie at least `spacing` tokens behind each other, and
    behind `start`."""
    ends = {tokenizer.special(f"{name}_end") for name in ("system", "user", "assistant", "retrieval", "doc")}
    chosen = [start]
    for i, token in enumerate(ids[start:], start + 1):
        if token in ends and i - chosen[-1] >= spacing:
            chosen.append(i)
    return chosen[1:]


_ID = np.dtype(np.int32)


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype=_ID).tobytes()


def _growing(x: Tensor, empty: Tensor) -> int | None:
    """The dimension along which a state's tensor grows with every token; None when its size never changes."""
    return next((d for d in range(1, x.dim()) if x.size(d) != empty.size(d)), None)


def _after(x: Tensor, empty: Tensor, n: int) -> Tensor:
    """What came after the first n tokens."""
    d = _growing(x, empty)
    return x if d is None else x.narrow(d, n, x.size(d) - n)


def _assemble(empty: list[State], path: list[_Node], capacity: int) -> list[State]:
    """States of one row after all tokens of the path."""
    states = []
    for i, state in enumerate(empty):
        # `State.map` visits the tensors in the order of `State.tensors`
        whole = _tensors(list(state.tensors().values()), [node.parts[i] for node in path], capacity)
        states.append(state.map(lambda _, whole=whole: next(whole)))  # type: ignore[misc]
    return states


def _tensors(empties: list[Tensor], parts: list[list[Tensor]], capacity: int) -> Iterator[Tensor]:
    for j, empty in enumerate(empties):
        pieces = [part[j] for part in parts]
        d = _growing(pieces[-1], empty)
        if d is None:
            yield pieces[-1].clone()
            continue
        n, shape = 0, list(empty.shape)
        shape[d] = max(capacity, sum(piece.size(d) for piece in pieces))
        out = empty.new_zeros(shape)  # `empty` has the dtype and device
        for piece in pieces:
            out.narrow(d, n, piece.size(d)).copy_(piece)
            n += piece.size(d)
        yield out
