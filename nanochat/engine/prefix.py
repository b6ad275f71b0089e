"""States of the beginnings of prompts, kept so that the same documents need not be read twice.

A prompt that begins with documents is read up to its question once; the states after each document stay here, and the
next prompt with exactly these tokens in front goes on from there. The store is a tree: a node holds the states after
its tokens, without what its parent already holds. What a state adds token by token (keys and values) is therefore kept
once, however many boundaries there are; what has one size whatever the past (the state of a Mamba block) once for each
boundary. Nothing here asks what kind a state is: a tensor grows along the dimension in which it differs from an empty
state's.

When the store is full, what is worth least leaves: what saves the fewest tokens for its bytes, counting how often it
was used and how long ago (GreedyDual-Size-Frequency, Cherkasova 1998). A node without children leaves as a whole; one
with children only loses its tensors of one size: the rest belongs to the children too.
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

from nanochat.engine import cache
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

    __slots__ = ("children", "fixed", "fixed_bytes", "grown", "hits", "n", "nbytes", "parent", "segment", "used")

    def __init__(self, parent: _Node | None, segment: bytes, n: int, grown: list[Tensor | None]) -> None:
        self.parent, self.segment, self.n = parent, segment, n
        self.grown = grown  # what the tokens added to each tensor; None where its size is always the same
        self.fixed: list[Tensor] | None = None  # those other tensors; None: they have left, nothing goes on from here
        self.nbytes = self.fixed_bytes = self.hits = 0
        self.used = 0.0
        self.children: dict[int, dict[bytes, _Node]] = {}  # by length, then by the tokens themselves

    def path(self) -> list[_Node]:
        """From below the root to here."""
        nodes: list[_Node] = []
        node: _Node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def can_free(self) -> int:
        """Bytes that can leave."""
        return (self.fixed_bytes if self.fixed is not None else 0) if self.children else self.nbytes

    def worth(self) -> float:
        """What leaves last is worth most; `used` is what the last to leave was worth when this was used."""
        before = self.parent
        while before is not None and before.fixed is None:
            before = before.parent
        saved = self.n - (before.n if before is not None else 0)
        return self.used + (1 + self.hits) * saved / self.can_free()


class PrefixCache:
    """Snapshots of the states after exact beginnings of prompts, at most `max_bytes` of them.

    One cache serves one model, and any number of conversations and threads. `spacing`: least tokens between two
    snapshots of a prompt; every one costs a pass of its own (with one after each 66 tokens, reading them for the first
    time took 1.5 times as long). `hits` and `misses` count
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
            self._root = _Node(None, b"", 0, [])
            self._root.fixed = []
            self._order: OrderedDict[_Node, None] = OrderedDict()  # least recently used first
            self._nbytes = 0
            self._left = 0.0  # the worth of what left last

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
            self.hits += node.n > 0
            self.misses += node.n == 0
            self.tokens_saved += node.n
            if not node.n:
                return Begun(0, model.init_states(1, capacity))
            node.hits += 1
            self._touch(node)
            assert node.fixed is not None
            grown, fixed = [step.grown for step in node.path()], node.fixed
        # stored tensors never change, and those that leave meanwhile live as long as these lists
        return Begun(node.n, _assemble(model.init_states(1), grown, fixed, capacity))

    def put(self, ids: Sequence[int], states: Sequence[State]) -> bool:
        """Store copies of the states of one row that has read exactly `ids`. False when they are too large."""
        key = _bytes(ids)
        full = [(x, cache.growing(x, e)) for x, e in zip(_tensors(states), _tensors(self._bound().init_states(1)))]
        fixed = [x for x, d in full if d is None]
        with self._lock:
            found = self._longest(key, whole=False)
            if found.n == len(ids) and found.fixed is not None:
                self._touch(found)
                return True
            node, need = found, _nbytes(fixed)
            if found.n < len(ids):
                grown = [None if d is None else x.narrow(d, found.n, x.size(d) - found.n) for x, d in full]
                node = _Node(found, key[found.n * _ID.itemsize :], len(ids), grown)
                need += len(node.segment) + _nbytes([x for x in grown if x is not None])
            if not self._make_room(need, found):
                return False
            if node is not found:
                node.grown = [None if x is None else _copy(x) for x in node.grown]
                found.children.setdefault(len(node.segment), {})[node.segment] = node
                self._order[node] = None
            node.fixed, node.fixed_bytes = [_copy(x) for x in fixed], _nbytes(fixed)
            node.nbytes += need
            self._nbytes += need
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

    def _longest(self, key: bytes, whole: bool = True) -> _Node:
        """The deepest node whose tokens `key` begins with, `whole`: that states can be made of. Several children may
        fit: one may begin with another."""
        best, waiting = self._root, [self._root]
        while waiting:
            node = waiting.pop()
            if node.n > best.n and (node.fixed is not None or not whole):
                best = node
            at = node.n * _ID.itemsize
            for length, children in node.children.items():
                child = children.get(key[at : at + length])
                if child is not None:
                    waiting.append(child)
        return best

    def _touch(self, node: _Node) -> None:
        """Mark as used now."""
        node.used = self._left
        self._order.move_to_end(node)

    def _make_room(self, nbytes: int, found: _Node) -> bool:
        """Let the least worthy leave until `nbytes` more fit, sparing `found` and what it stands on. False when they
        cannot."""
        spared = found.path()
        least = sum(node.nbytes - (node.fixed_bytes if node.fixed is not None else 0) for node in spared[:-1])
        if nbytes + least + (found.nbytes if spared else 0) > self.max_bytes:
            return False
        while self._nbytes + nbytes > self.max_bytes:
            ranked = sorted((n.worth(), i, n) for i, n in enumerate(self._order) if n.can_free() and n is not found)
            for worth, _, node in ranked:
                self._left = max(self._left, worth)
                self._free(node, found)
                if self._nbytes + nbytes <= self.max_bytes:
                    break
        return True

    def _free(self, node: _Node, spared: _Node) -> None:
        """What can leave of this node leaves, and what before it was only kept for it."""
        if node.children:
            node.fixed = None
            node.nbytes -= node.fixed_bytes
            self._nbytes -= node.fixed_bytes
            return
        while node.parent is not None and not node.children:
            parent = node.parent
            siblings = parent.children[len(node.segment)]
            del siblings[node.segment], self._order[node]
            if not siblings:
                del parent.children[len(node.segment)]
            self._nbytes -= node.nbytes
            if parent.fixed is not None or parent is spared:
                break
            node = parent

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


def turn_boundaries(ids: Sequence[int], tokenizer: Tokenizer, spacing: int = 0) -> list[int]:
    """As `message_boundaries`, and before the last token, however few come before: the next turn of the conversation
    goes on from there."""
    return [*message_boundaries(ids, tokenizer, spacing), len(ids) - 1]


_ID = np.dtype(np.int32)


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype=_ID).tobytes()


def _tensors(states: Iterable[State]) -> list[Tensor]:
    return [x for state in states for x in state.tensors().values()]


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(NODE_BYTES + x.numel() * x.element_size() for x in tensors)


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _assemble(
    empty: list[State], grown: list[list[Tensor | None]], fixed: list[Tensor], capacity: int
) -> list[State]:
    """States of one row after all tokens of a path."""
    rest = iter(fixed)
    whole = iter([_join(list(parts), e, rest, capacity) for e, *parts in zip(_tensors(empty), *grown)])
    # `State.map` visits the tensors in the order of `State.tensors`
    return [state.map(lambda _: next(whole)) for state in empty]


def _join(parts: list[Tensor | None], empty: Tensor, rest: Iterator[Tensor], capacity: int) -> Tensor:
    pieces = [part for part in parts if part is not None]
    if not pieces:
        return next(rest).clone()
    d, n = cache.growing(pieces[0], empty), 0
    assert d is not None
    shape = list(empty.shape)
    shape[d] = max(capacity, sum(piece.size(d) for piece in pieces))
    out = empty.new_zeros(shape)  # `empty` has the dtype and device
    for piece in pieces:
        out.narrow(d, n, piece.size(d)).copy_(piece)
        n += piece.size(d)
    return out
