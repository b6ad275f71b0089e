"""The language model: embedding, blocks of any pattern of mixers, head. `MIXERS` is the table of block kinds.

Shape suffixes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanochat.errors import UsageError
from nanochat.kernels.linear import linear
from nanochat.kernels.loss import linear_cross_entropy, linear_nll
from nanochat.model.attention import Attention
from nanochat.model.config import ModelConfig
from nanochat.model.layers import MLP, Embedding, Linear, Ragged, rms_norm
from nanochat.model.mamba import Mamba
from nanochat.model.mamba2 import Mamba2
from nanochat.model.mixer import Mixer, State

MIXERS: dict[str, type[Mixer]] = {"T": Attention, "M": Mamba, "M2": Mamba2}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where the config gives this kind of block an MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.letter = config.blocks[layer]
        self.eps = config.norm_eps
        self.mixer = MIXERS[self.letter](config, layer)
        ratio = config.mlp_ratio(self.letter)
        self.mlp = MLP(config.d_model, ratio, config.activation) if ratio else None

    def forward(
        self, x: Tensor, state: State | None, segments: Tensor | None, ragged: Ragged | None, value: Tensor | None
    ) -> Tensor:
        x = x + self.mixer(rms_norm(x, self.eps), state, segments, ragged, value)
        if self.mlp is not None:
            x = x + self.mlp(rms_norm(x, self.eps))
        return x


class LM(nn.Module):
    """A causal language model. Build one with `LM.build`, which initialises every parameter exactly once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass: less memory, about a quarter slower
        self.compute_dtype = torch.float32
        self.source = ""  # checksum of the checkpoint that its weights came from, when training began
        self.suggestions: list[str] = []  # questions that it was trained to answer, for people who do not know it
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.depth)])
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)
        self.value_layers = self._value_layers()
        width = config.n_kv_head * config.head_dim
        self.values = nn.ModuleDict({str(i): Embedding(config.vocab_size, width) for i in self.value_layers})
        if config.x0_residual:
            self.stream_scale = nn.Parameter(torch.empty(config.depth))
            self.x0_scale = nn.Parameter(torch.empty(config.depth))

    def _value_layers(self) -> tuple[int, ...]:
        """Every other attention layer, counted so that the last one is among them."""
        layers = [i for i, letter in enumerate(self.config.blocks) if letter == "T"]
        return tuple(layers[::-1][::2][::-1]) if self.config.value_embeds else ()

    @classmethod
    def build(cls, config: ModelConfig, device: torch.device | str = "cpu", seed: int | None = None) -> LM:
        """The model on `device`, in fp32. Made on the meta device, filled with NaN, then initialised; a parameter that
        is left out or written twice is a bug and raises AssertionError."""
        if seed is not None:
            torch.manual_seed(seed)
        with torch.device("meta"):
            model = cls(config.resolved())
        model.to_empty(device=device)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
            before = {name: p._version for name, p in model.named_parameters()}
            model.init_weights()
        for name, p in model.named_parameters():
            writes = p._version - before[name]
            assert writes == 1, f"{name} was initialised {writes} times"
            assert not torch.isnan(p).any(), f"{name} was not initialised whole"
        return model

    @torch.no_grad()
    def init_weights(self) -> None:
        # A tied embedding is also the head: with unit variance its logits would start at +-sqrt(D).
        self.embed.weight.normal_(0.0, 0.02 if self.config.tie_embeddings else 1.0)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.mixer.init_weights()
            if block.mlp is not None:
                block.mlp.init_weights()
        if self.head is not None:
            self.head.weight.normal_(0.0, 0.001)
        for table in self.values.values():
            assert isinstance(table, nn.Embedding)
            table.weight.uniform_(-((3.0 / self.config.d_model) ** 0.5), (3.0 / self.config.d_model) ** 0.5)
        if self.config.x0_residual:
            self.stream_scale.fill_(1.0)
            self.x0_scale.fill_(0.0)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def n_params(self) -> dict[str, int]:
        """Parameters by role: embedding, blocks, head, total."""
        count = {
            "embedding": self.embed.weight.numel() + sum(p.numel() for p in self.values.parameters()),
            "blocks": sum(p.numel() for p in self.blocks.parameters()),
            "head": 0 if self.head is None else self.head.weight.numel(),
        }
        return {**count, "total": sum(p.numel() for p in self.parameters())}

    def flops_per_token(self, sequence_len: int | None = None) -> float:
        """Training FLOPs a token: 6 per matrix weight, plus the attention products (12 * H * P * mean keys, not halved
        for causality, the convention of PaLM's appendix B) and the state updates of M (3 * 6 * E * N) and M2 (as many,
        plus the products inside a chunk of 64)."""
        c, T = self.config, sequence_len or self.config.sequence_len
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2) + self.head_weight.numel()
        total = 6.0 * matrices
        for layer, letter in enumerate(c.blocks):
            if letter == "T":
                window = c.window_of(layer)
                total += 12.0 * c.n_head * c.head_dim * (min(window, T) if window else T)
            elif letter == "M":
                total += 18.0 * c.d_inner * c.d_state
            else:
                total += 12.0 * c.d_inner * c.d_state2 + 6.0 * 64 * (c.d_inner + c.n_groups * c.d_state2)
        return total

    def init_states(self, batch: int, max_len: int = 0) -> list[State]:
        """Empty states, one a layer, for `batch` rows with room for `max_len` tokens."""
        return [b.mixer.init_state(batch, max_len, self.device, self.compute_dtype) for b in self.blocks]  # type: ignore[union-attr,operator]

    def init_carry(self, batch: int, room: int = 0) -> list[State]:
        """Empty states that `batch` training rows hand to the next ones (see `Mixer.forward`); attention keeps the last
        `room` tokens (default: a row's), or its window."""
        room = room or self.config.sequence_len
        return [b.mixer.init_carry(batch, room, self.device, self.compute_dtype) for b in self.blocks]  # type: ignore[union-attr,operator]

    def forward(
        self,
        ids_BT: Tensor,
        states: Sequence[State] | None = None,
        segments_BT: Tensor | None = None,
        lengths: Sequence[int] | Ragged | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm, in the compute dtype.

        `states` continue each row (and advance); `segments_BT` keeps packed documents apart, and with both the first
        document of a row goes on (states of `init_carry`); `lengths` says that ids are (1, sum(lengths)), rows of
        different lengths end to end, one for each row of `states`. Raises UsageError for an empty sequence, and for
        arguments that contradict each other.
        """
        if ids_BT.size(1) == 0:
            raise UsageError("the model was given an empty sequence")
        if segments_BT is not None and lengths is not None:
            raise UsageError("segments are for training, lengths for inference: give one of them")
        if lengths is not None and states is None:
            raise UsageError("lengths need states: without them nothing keeps the rows apart; use segments_BT")
        ragged = lengths if isinstance(lengths, Ragged) or lengths is None else Ragged(lengths, ids_BT.device)
        if ragged is not None and (1, ragged.total) != ids_BT.shape:
            raise UsageError(f"lengths {ragged.lengths} add up to {ragged.total}, but ids are {tuple(ids_BT.shape)}")
        x = self.embed(ids_BT).to(self.compute_dtype)
        if self.config.embed_norm:
            x = rms_norm(x, self.config.norm_eps)
        x0 = x
        scales = self._scales(x.dtype)
        for i, block in enumerate(self.blocks):
            if scales and i > 0:
                x = torch.addcmul(x * scales[0][i], x0, scales[1][i])
            value = self.values[str(i)](ids_BT).to(x.dtype) if i in self.value_layers else None
            arguments = (x, None if states is None else states[i], segments_BT, ragged, value)
            if self.checkpointing and states is None and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return rms_norm(x, self.config.norm_eps)

    def _scales(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """For each block the factors of the stream and of the embedding."""
        if not self.config.x0_residual:
            return None
        return self.stream_scale.to(dtype).unbind(), self.x0_scale.to(dtype).unbind()

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) to soft-capped fp32 logits (…, V)."""
        if self.head is None:
            out = linear(hidden, self.embed.weight.to(hidden.dtype)).float()
        else:
            out = self.head(hidden).float()
        cap = self.config.softcap
        if cap and not torch.is_grad_enabled():  # cap * tanh(out / cap); on a CPU sigmoid takes a tenth of tanh's time
            return out.mul_(2 / cap).sigmoid_().mul_(2 * cap).sub_(cap)
        return cap * torch.tanh(out / cap) if cap else out

    def loss(
        self,
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor,
        segments: Tensor | None = None,
        states: Sequence[State] | None = None,
    ) -> Tensor:
        """sum(weights * nll) in nats over the targets that are not -1; all arguments (B, T). `states`: see `forward`.
        The logits are never held whole."""
        hidden = self(inputs, states, segments)
        flat = hidden.reshape(-1, hidden.size(-1))
        return linear_cross_entropy(
            flat, self.head_weight, targets.reshape(-1), weights.reshape(-1), self.config.softcap
        )

    @torch.no_grad()
    def nll(
        self,
        inputs: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        states: Sequence[State] | None = None,
    ) -> Tensor:
        """Negative log-likelihood of each target in nats, (B, T) fp32, 0 where the target is -1. `states`: see
        `forward`."""
        hidden = self(inputs, states, segments)
        flat = hidden.reshape(-1, hidden.size(-1))
        return linear_nll(flat, self.head_weight, targets.reshape(-1), self.config.softcap).view(targets.shape)
