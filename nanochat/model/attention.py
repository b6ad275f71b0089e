"""The attention mixer: causal, multi-head, multi-query or grouped-query, with rotary positions; and its KV state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.errors import UsageError
from nanochat.kernels.attention import attention, attention_step
from nanochat.kernels.segments import resets
from nanochat.model.config import ModelConfig
from nanochat.model.layers import Linear, Ragged, Rotary, rms_norm
from nanochat.model.mixer import Mixer, State


class KVState(State):
    """Keys and values of the past, (B, G, S, P) each with spare room behind, and how many tokens each row holds.
    `last` (B, G, P - R): the part of the last token's key that goes to the next one's place.

    A head's keys lie together: with 32 rows of 4 heads and 512 tokens, attention of one more token takes a quarter of
    the time that it takes over (B, S, G, P) (1.9 against 8.0 ms on 2 CPU cores).
    """

    def __init__(self, k: Tensor, v: Tensor, last: Tensor, lengths: list[int]) -> None:
        self.k, self.v, self.last, self.lengths = k, v, last, lengths

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def uniform(self) -> bool:
        """All rows hold equally many tokens."""
        return min(self.lengths, default=0) == self.longest

    def tensors(self) -> dict[str, Tensor]:
        rows = torch.tensor(self.lengths, dtype=torch.int64, device=self.k.device)
        now = slice(self.longest)
        return {"k": self.k[:, :, now], "v": self.v[:, :, now], "last": self.last, "lengths": rows}

    def map(self, fn: Callable[[Tensor], Tensor]) -> KVState:
        now = self.tensors()
        return KVState(fn(now["k"]), fn(now["v"]), fn(now["last"]), fn(now["lengths"]).tolist())

    def restore(self, snapshot: State) -> None:
        assert isinstance(snapshot, KVState)
        self.k, self.v, self.last = snapshot.k.clone(), snapshot.v.clone(), snapshot.last.clone()
        self.lengths = list(snapshot.lengths)

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.k.device)  # the spare room stays
        self.k, self.v, self.last = (x.index_select(0, rows) for x in (self.k, self.v, self.last))
        self.lengths = [self.lengths[i] for i in rows.tolist()]

    def reserve(self, n: int) -> None:
        need = self.longest + n
        now = self.k.size(2)
        if now >= need:
            return
        room = max(need, min(2 * now, now + 1024))
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], room, old.size(3))
            new[:, :, : self.longest] = old[:, :, : self.longest]
            setattr(self, name, new)

    def append(self, k: Tensor, v: Tensor, added: list[int] | None = None) -> None:
        """Write (B, T, G, P) behind each row's end. `added`: how many of the T are real in each row (default all)."""
        T = k.size(1)
        self.reserve(T)
        if self.uniform:
            at = self.longest
            self.k[:, :, at : at + T] = k.transpose(1, 2)
            self.v[:, :, at : at + T] = v.transpose(1, 2)
        else:
            B, G, room, P = self.k.shape  # flat (B G S, P): half the time of indexing [i, :, j]
            heads = torch.arange(0, B * G * room, room, device=k.device).view(B, 1, G)
            places = (self.positions(T)[:, :, None] + heads).flatten()
            for whole, new in ((self.k, k), (self.v, v)):
                whole.view(-1, P).index_copy_(0, places, new.reshape(-1, P))
        self.lengths = [n + (T if added is None else added[i]) for i, n in enumerate(self.lengths)]

    def push(self, k: Tensor, v: Tensor) -> None:
        """Write one token (B, G, P) behind rows of one length."""
        self.reserve(1)
        at = self.longest
        self.k.select(2, at).copy_(k)
        self.v.select(2, at).copy_(v)
        self.lengths = [at + 1] * len(self.lengths)

    def positions(self, T: int) -> Tensor:
        """(B, T): the positions that the next T tokens of each row take."""
        start = torch.tensor(self.lengths, device=self.k.device)
        return start[:, None] + torch.arange(T, device=self.k.device)


class CarriedKeys(State):
    """What one training row hands to the next: the last keys and values, (B, M, G, P) each, before rotation, at the end
    of M places; and how many of them are of the row's last document."""

    def __init__(self, k: Tensor, v: Tensor, valid: Tensor) -> None:
        self.k, self.v, self.valid = k, v, valid

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v, "valid": self.valid}

    def map(self, fn: Callable[[Tensor], Tensor]) -> CarriedKeys:
        return CarriedKeys(fn(self.k), fn(self.v), fn(self.valid))

    def restore(self, snapshot: State) -> None:
        assert isinstance(snapshot, CarriedKeys)
        self.k, self.v, self.valid = snapshot.k.clone(), snapshot.v.clone(), snapshot.valid.clone()

    def documents(self, segments_BT: Tensor) -> Tensor:
        """(B, M + T): the documents of the carried places (-1: nothing there) and of the row behind them. The first
        `valid` are counted on: from now on they are those behind this row."""
        document_BT = resets(segments_BT).cumsum(1)
        n_place = self.k.size(1)
        place = torch.arange(n_place, device=segments_BT.device)
        before = torch.where(place >= n_place - self.valid[:, None], 0, -1)
        last = document_BT[:, -1:]
        self.valid = ((document_BT == last).sum(1) + torch.where(last[:, 0] == 0, self.valid, 0)).clamp(max=n_place)
        return torch.cat((before, document_BT), 1)


class _Move(torch.autograd.Function):
    """Keys (B, T, G, P), what lies behind their first R coordinates one token later; zeros where `first_BT`."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, first_BT: Tensor | None, R: int) -> Tensor:
        out = torch.empty_like(k, memory_format=torch.contiguous_format)
        out[..., :R] = k[..., :R]
        out[:, :1, :, R:] = 0
        out[:, 1:, :, R:] = k[:, :-1, :, R:]
        if first_BT is not None:
            out[..., R:].masked_fill_(first_BT[:, :, None, None], 0)
        ctx.save_for_backward(first_BT)
        ctx.R = R
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (first_BT,), R = ctx.saved_tensors, ctx.R
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        out[..., :R] = grad[..., :R]
        out[:, -1:, :, R:] = 0
        out[:, :-1, :, R:] = grad[:, 1:, :, R:]
        if first_BT is not None:
            out[:, :-1, :, R:].masked_fill_(first_BT[:, 1:, None, None], 0)
        return out, None, None


class Attention(Mixer):
    """Causal attention with `n_head` query heads over `n_kv_head` key and value heads.

    Queries and keys are normalised (QK-norm, arXiv 2010.04245) and, unless `rope=False`, rotated. With `window > 0` a
    query sees the last `window` tokens only, on the layers that `window_pattern` marks S.

    `key_offset`: the second half of a head's width is not rotated, and a token's key has there what belongs to the
    token before it ("partial key offset", modded-nanogpt). So one layer can ask "what came after a token like this?",
    which takes two layers otherwise; and keys begin as the queries of their token, so that equal tokens find each other
    from the first step on. A tiny model learns to look names up in its prompt within a hundred steps; without either it
    does not in thousands (dev/LOG.md).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.n_kv, self.P = config.n_head, config.n_kv_head, config.head_dim
        self.eps, self.qk_norm = config.norm_eps, config.qk_norm
        self.window = config.window_of(layer)
        q, kv = self.n_head * self.P, self.n_kv * self.P
        self.qkv = Linear(config.d_model, q + 2 * kv, splits=(q, kv, kv))
        self.out = Linear(q, config.d_model)
        self.offset = config.key_offset
        self.R = self.P // 2 if self.offset else self.P  # the width that is rotated, and not moved
        self.rotary = Rotary(self.R, config.rope_base) if config.rope else None
        # Normalised queries and keys have length sqrt(P); 1.2 each lets the softmax become sharp enough.
        self.scale = (1.44 if self.qk_norm else 1.0) / self.P**0.5

    def init_weights(self) -> None:
        self.qkv.init_uniform(copies=self.copies() if self.offset else None)
        self.out.init_zero()

    def copies(self) -> Tensor:
        """For each row of `qkv` the row that it begins as: a key's is that of the first query that it answers."""
        rows = torch.arange(self.qkv.out_features).view(-1, self.P)
        shared = self.n_head // self.n_kv
        rows[self.n_head : self.n_head + self.n_kv] = rows[: self.n_head : shared]
        return rows.flatten()

    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> KVState:
        shape = (batch, self.n_kv, max_len, self.P)
        k = torch.zeros(shape, device=device, dtype=dtype)
        last = torch.zeros((batch, self.n_kv, self.P - self.R), device=device, dtype=dtype)
        return KVState(k, torch.zeros_like(k), last, [0] * batch)

    def init_carry(self, batch: int, room: int, device: torch.device, dtype: torch.dtype) -> CarriedKeys:
        if self.window:  # a query sees itself and so many before it, whose keys may need the one before them
            room = self.window - 1 + self.offset
        k = torch.zeros((batch, room, self.n_kv, self.P), device=device, dtype=dtype)
        return CarriedKeys(k, torch.zeros_like(k), torch.zeros(batch, dtype=torch.int64, device=device))

    def project(
        self, x_BTD: Tensor, positions: int | Tensor | None, n: int, value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; rotated unless `positions` is None."""
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, self.n_head + 2 * self.n_kv, self.P)
        qk, v = qkv.split((self.n_head + self.n_kv, self.n_kv), dim=2)
        if self.qk_norm:
            qk = rms_norm(qk, self.eps)
        if positions is not None:
            qk = self.rotate(qk, positions, n)
        if value is not None:
            v = v + value.view(B, T, self.n_kv, self.P)
        q, k = qk.split((self.n_head, self.n_kv), dim=2)
        return q, k, v

    def rotate(self, x: Tensor, positions: int | Tensor, n: int) -> Tensor:
        """x (B, T, H, P) with its first R coordinates rotated."""
        return x if self.rotary is None else self.rotary(x, positions, n)

    def move(self, k: Tensor, last: Tensor | None = None, segments_BT: Tensor | None = None) -> Tensor:
        """Keys (B, T, G, P), each with its second half from the token before it; `last` (B, G, P - R) is that of the
        first one. Zeros before the first token of a document."""
        if not self.offset:
            return k
        if last is None and k.device.type == "cpu" and not torch.compiler.is_compiling():
            moved: Tensor = _Move.apply(k, None if segments_BT is None else resets(segments_BT), self.R)
            return moved
        before = k.new_zeros(k[:, :1, :, self.R :].shape) if last is None else last[:, None]
        before = torch.cat((before, k[:, :-1, :, self.R :]), 1)
        if segments_BT is not None:
            before = before.masked_fill(resets(segments_BT)[:, :, None, None], 0.0)
        return torch.cat((k[..., : self.R], before), -1)

    def forward(
        self,
        x_BTD: Tensor,
        state: State | None = None,
        segments_BT: Tensor | None = None,
        ragged: Ragged | None = None,
        value_BTC: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        if state is None:
            q, k, v = self.project(x_BTD, 0, T, value_BTC)
            k = self.move(k, None, segments_BT)
            y = attention(q, k, v, segments_BT=segments_BT, window=self.window, scale=self.scale)
            return self.out(y.reshape(B, T, -1))
        if segments_BT is not None:
            if not isinstance(state, CarriedKeys):
                raise UsageError("a KV cache holds one document a row: with segments, rows go on from LM.init_carry")
            return self.out(self.go_on(x_BTD, state, segments_BT, value_BTC).reshape(B, T, -1))
        assert isinstance(state, KVState)
        if ragged is None:
            y = self.extend(x_BTD, state, value_BTC)
        else:
            y = self.extend_ragged(x_BTD, state, ragged, value_BTC)
        return self.out(y.reshape(B, T, -1))

    def extend(self, x_BTD: Tensor, state: KVState, value: Tensor | None) -> Tensor:
        """T more tokens of every row."""
        T, uniform, past = x_BTD.size(1), state.uniform, state.longest
        if T == 1 and uniform and past and value is None and not torch.is_grad_enabled():
            return self.extend_one(x_BTD, state)
        start = None if uniform else torch.tensor(state.lengths, device=x_BTD.device)
        q, k, v = self.project(x_BTD, past if uniform else state.positions(T), past + T, value)
        k, state.last = self.move(k, state.last), k[:, -1, :, self.R :]
        state.append(k, v)
        if past == 0:
            return attention(q, k, v, window=self.window, scale=self.scale)
        return self.attend(q, state, past + T, start)

    def extend_one(self, x_B1D: Tensor, state: KVState) -> Tensor:
        """One more token of rows of one length, (B, H, 1, P): decoding a row of a small model takes as long as torch
        needs to begin this many operations, so they are few."""
        at, n_key = state.longest, self.n_head + self.n_kv
        qkv_BHP = self.qkv(x_B1D).view(x_B1D.size(0), n_key + self.n_kv, self.P)
        qk_BHP, v_BGP = qkv_BHP[:, :n_key], qkv_BHP[:, n_key:]
        if self.qk_norm:
            qk_BHP = rms_norm(qk_BHP, self.eps)
        if self.rotary is not None:
            qk_BHP = self.rotary.step(qk_BHP, at)
        q_BHP, k_BGP = qk_BHP[:, : self.n_head], qk_BHP[:, self.n_head :]
        if self.offset:
            k_BGP, state.last = torch.cat((k_BGP[..., : self.R], state.last), -1), k_BGP[..., self.R :]
        state.push(k_BGP, v_BGP)
        first = max(0, at + 1 - self.window) if self.window else 0
        k_BGSP, v_BGSP = state.k[:, :, first : at + 1], state.v[:, :, first : at + 1]
        return attention_step(q_BHP, k_BGSP, v_BGSP, self.scale)

    def extend_ragged(self, x_1ND: Tensor, state: KVState, ragged: Ragged, value: Tensor | None) -> Tensor:
        """A different number of tokens for each row, laid end to end."""
        past, T = state.longest, ragged.longest
        start = torch.tensor(state.lengths, device=x_1ND.device)
        positions_1N = ragged.flat(state.positions(T))
        q, k, v = (ragged.pad(part) for part in self.project(x_1ND, positions_1N, past + T, value))
        if self.offset:
            ends = torch.tensor(ragged.lengths, device=k.device) - 1
            k, state.last = self.move(k, state.last), k[torch.arange(k.size(0), device=k.device), ends, :, self.R :]
        state.append(k, v, ragged.lengths)
        if past == 0:  # right-padded rows: causality alone keeps real tokens from seeing padding
            return ragged.flat(attention(q, k, v, window=self.window, scale=self.scale))
        return ragged.flat(self.attend(q, state, past + T, start))

    def go_on(self, x_BTD: Tensor, carried: CarriedKeys, segments_BT: Tensor, value: Tensor | None) -> Tensor:
        """Training rows behind what was carried to them, as Transformer-XL reads (arXiv 1901.02860).

        Carried keys and the row's own are one packed row to the kernel, whose first queries are zeros and whose first
        outputs are thrown away: it needs no mask, and no other kernel.
        """
        M, T = carried.k.size(1), x_BTD.size(1)
        documents = carried.documents(segments_BT)
        q, k, v = self.project(x_BTD, None, T, value)
        q = torch.cat((q.new_zeros(q.size(0), M, *q.shape[2:]), q), 1)
        k, v = torch.cat((carried.k.to(k.dtype), k), 1), torch.cat((carried.v.to(v.dtype), v), 1)
        carried.k, carried.v = k[:, T:], v[:, T:]
        q, k = self.rotate(q, 0, M + T), self.rotate(self.move(k, None, documents), 0, M + T)
        return attention(q, k, v, segments_BT=documents, window=self.window, scale=self.scale)[:, M:]

    def attend(self, q: Tensor, state: KVState, n_keys: int, start: Tensor | None) -> Tensor:
        """Queries against the cache; without `start` they stand at the end of the first `n_keys` keys of every row."""
        first = 0
        if start is None and self.window:  # keys that no query of these can see
            first = max(0, n_keys - self.window - q.size(1) + 1)
        k, v = state.k[:, :, first:n_keys], state.v[:, :, first:n_keys]
        return attention(q, k.transpose(1, 2), v.transpose(1, 2), window=self.window, start=start, scale=self.scale)
