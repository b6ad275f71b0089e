"""What a model is made of: `ModelConfig`, its sensible defaults from one dial (`depth`), and block patterns."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from nanochat.errors import UsageError
from nanochat.model.layers import ACTIVATIONS

LETTERS = ("T", "M", "M2")  # attention, Mamba (S6), Mamba-2 (SSD)


def _one_in(n: int, depth: int, ssm: str) -> list[str]:
    """One attention block in every `n`, at the end of each group: layer 0 stays an SSM, where they matter most."""
    blocks = ["T" if i % n == n - 1 else ssm for i in range(depth)]
    if "T" not in blocks and depth > 1:
        blocks[-1] = "T"
    return blocks


def named_patterns(depth: int, ssm: str) -> dict[str, list[str]]:
    """The named patterns at this depth; `ssm` is the letter of the state-space blocks in the hybrid ones."""
    half = depth // 2
    edge = max(1, depth // 4)
    return {
        "transformer": ["T"] * depth,
        "mamba": ["M"] * depth,
        "mamba2": ["M2"] * depth,
        "hybrid": _one_in(4, depth, ssm),
        "early": ["T"] * half + [ssm] * (depth - half),
        "late": [ssm] * (depth - half) + ["T"] * half,
        "alternate": ["T" if i % 2 else ssm for i in range(depth)],
        "sandwich": ["T"] * edge + [ssm] * (depth - 2 * edge) + ["T"] * edge if depth > 2 else _one_in(2, depth, ssm),
        **{f"1in{n}": _one_in(n, depth, ssm) for n in (2, 3, 4, 6, 8)},
    }


def expand_pattern(pattern: str, depth: int, ssm: str) -> tuple[str, ...]:
    """The block letters of each layer. `pattern` is a name (`hybrid`, `early`, `1in4`…) or the letters themselves
    (`MMMT`, `M2 M2 T`), repeated when the depth is a multiple of their number.

    Raises UsageError for an unknown letter or name, or a number of letters that does not divide the depth.
    """
    names = named_patterns(depth, ssm)
    if pattern in names:
        return tuple(names[pattern])
    compact = re.sub(r"[\s,\-]+", "", pattern)
    letters = re.findall(r"M2|M|T", compact)
    if "".join(letters) != compact or not letters:
        bad = re.sub(r"M2|M|T", "", compact)
        near = get_close_matches(pattern, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"--pattern {pattern!r}: unknown block letter {bad[:1]!r}. Letters are T (attention), M (Mamba), "
            f"M2 (Mamba-2); names are {', '.join(names)}.{hint}"
        )
    if depth % len(letters):
        raise UsageError(f"--pattern {pattern!r} names {len(letters)} blocks, which does not divide --depth {depth}")
    return tuple(letters * (depth // len(letters)))


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. It travels in the checkpoint; zeros are filled from `depth` by `resolved()`."""

    vocab_size: int = 32768
    sequence_len: int = 1024
    depth: int = 4
    d_model: int = 0  # 0: 64 per layer of depth
    pattern: str = "hybrid"
    ssm: str = "M2"  # the letter of state-space blocks in named hybrid patterns
    n_head: int = 0  # 0: d_model / head_dim
    n_kv_head: int = 0  # 0: n_head; 1 is multi-query attention
    head_dim: int = 64
    rope: bool = True
    rope_base: float = 10000.0
    qk_norm: bool = True
    key_offset: bool = True  # half of a key is that of the token before
    window: int = 0  # sliding window in tokens, 0: full attention
    window_pattern: str = "S"  # over attention layers, S: window, L: full
    softcap: float = 15.0  # logits = softcap * tanh(logits / softcap), 0: off
    value_embeds: bool = False  # a second embedding added to the values of every other attention layer
    x0_residual: bool = True  # learned per-layer weights of the stream and of the embedding
    embed_norm: bool = True
    activation: str = "relu2"
    mlp_t: float = 4.0  # hidden width of the MLP behind a T, M or M2 block, in multiples of d_model; 0: no MLP
    mlp_m: float = 2.0
    mlp_m2: float = 2.0
    tie_embeddings: bool = False
    expand: int = 2  # inner width of M and M2 in multiples of d_model
    d_state: int = 16  # N of M
    d_state2: int = 64  # N of M2
    head_dim2: int = 64  # head width of M2
    n_groups: int = 1  # B, C groups of M2
    d_conv: int = 4
    dt_rank: int = 0  # 0: d_model / 16
    ssm_norm: bool = True  # RMSNorm on dt, B, C of M
    norm_eps: float = 1e-5

    @property
    def blocks(self) -> tuple[str, ...]:
        """The letter of each layer's mixer."""
        return expand_pattern(self.pattern, self.depth, self.ssm)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    def mlp_ratio(self, letter: str) -> float:
        return {"T": self.mlp_t, "M": self.mlp_m, "M2": self.mlp_m2}[letter]

    def window_of(self, layer: int) -> int:
        """The sliding window of this (attention) layer, 0 for full attention."""
        nth = self.blocks[:layer].count("T")
        return self.window if self.window_pattern[nth % len(self.window_pattern)] == "S" else 0

    def resolved(self) -> ModelConfig:
        """Every zero filled in from `depth`, and everything checked.

        Raises UsageError naming the flag, its value and what is allowed.
        """
        if self.depth < 1:
            raise UsageError(f"--depth {self.depth}: a model needs at least one block")
        if self.d_model < 0:
            raise UsageError(f"--d_model {self.d_model}: must be 0 (64 x depth) or a number of channels")
        for flag in ("head_dim", "head_dim2"):
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        d_model = self.d_model or 64 * self.depth
        head_dim = min(self.head_dim, d_model)
        n_head = self.n_head or max(1, d_model // head_dim)
        inner = self.expand * d_model
        odd = self.head_dim2 == ModelConfig.head_dim2 and inner % self.head_dim2  # the default does not fit this width
        config = replace(
            self,
            d_model=d_model,
            head_dim=head_dim,
            n_head=n_head,
            n_kv_head=self.n_kv_head or n_head,
            head_dim2=head_dim if odd else self.head_dim2,
            dt_rank=self.dt_rank or max(1, -(-d_model // 16)),
        )
        config.check()
        return config

    def check(self) -> None:
        blocks = self.blocks
        for flag in (
            "vocab_size", "sequence_len", "n_head", "n_kv_head", "head_dim", "expand", "d_state", "d_state2", "d_conv",
            "n_groups", "dt_rank",
        ):  # fmt: skip
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        for flag in ("softcap", "mlp_t", "mlp_m", "mlp_m2"):
            if not getattr(self, flag) >= 0:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must be 0 (none) or a positive number")
        for flag in ("rope_base", "norm_eps"):
            if not getattr(self, flag) > 0:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must be a positive number")
        if self.ssm not in ("M", "M2"):
            raise UsageError(f"--ssm {self.ssm!r}: must be M or M2")
        if self.n_head % self.n_kv_head:
            raise UsageError(f"--n_kv_head {self.n_kv_head} does not divide --n_head {self.n_head}")
        if self.head_dim % 2 and self.rope and "T" in blocks:
            raise UsageError(f"--head_dim {self.head_dim}: rotary positions need an even head width")
        if self.head_dim % 4 and self.key_offset and "T" in blocks:
            raise UsageError(f"--head_dim {self.head_dim}: a key offset needs a multiple of 4; or --key_offset False")
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"--activation {self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise UsageError(f"--window_pattern {self.window_pattern!r}: letters are S (window) and L (full)")
        if self.window < 0:
            raise UsageError(f"--window {self.window}: must be 0 (full attention) or a number of tokens")
        if "M2" in blocks and self.d_inner % self.head_dim2:
            raise UsageError(f"--head_dim2 {self.head_dim2} does not divide the inner width {self.d_inner}")
        if "M2" in blocks and (self.d_inner // self.head_dim2) % self.n_groups:
            n_heads = self.d_inner // self.head_dim2
            raise UsageError(f"--n_groups {self.n_groups} does not divide the {n_heads} heads of M2")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ModelConfig:
        """From a checkpoint. Raises UsageError for a name that this version does not know."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(saved) - known)
        if unknown:
            raise UsageError(
                f"the checkpoint's architecture has unknown options {', '.join(unknown)}: it needs a newer nanochat"
            )
        return cls(**saved)
