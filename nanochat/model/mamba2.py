"""The Mamba-2 mixer (SSD, arXiv 2405.21060): a state space with one decay a head, as matrix products over chunks."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.conv import causal_conv, causal_conv_step
from nanochat.kernels.norm import gated_rms_norm
from nanochat.kernels.segments import last_document, state_dtype
from nanochat.kernels.ssd import ssd, ssd_step
from nanochat.model.config import ModelConfig
from nanochat.model.layers import Linear, Ragged
from nanochat.model.mamba import SSMState, init_dt_bias
from nanochat.model.mixer import Mixer, State


class Mamba2(Mixer):
    """One in-projection to (gate z, x, B, C, dt), convolution over (x, B, C), SSD over H heads of width P, norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.E, self.P, self.N = config.d_inner, config.head_dim2, config.d_state2
        self.G, self.K = config.n_groups, config.d_conv
        self.H = self.E // self.P
        self.eps = config.norm_eps
        GN = self.G * self.N
        self.n_conv = self.E + 2 * GN
        self.in_proj = Linear(config.d_model, self.E + self.n_conv + self.H, splits=(self.E, self.E, GN, GN, self.H))
        self.conv_weight = nn.Parameter(torch.empty(self.n_conv, self.K))
        self.conv_bias = nn.Parameter(torch.empty(self.n_conv))
        self.dt_bias = nn.Parameter(torch.empty(self.H))
        self.A_log = nn.Parameter(torch.empty(self.H))
        self.D = nn.Parameter(torch.empty(self.H))
        self.out_proj = Linear(self.E, config.d_model)

    def init_weights(self) -> None:
        self.in_proj.init_uniform()
        bound = self.K**-0.5
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.zero_()
        init_dt_bias(self.dt_bias)
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
        self.D.fill_(1.0)
        self.out_proj.init_zero()

    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> SSMState:
        conv = torch.zeros(batch, self.K - 1, self.n_conv, device=device, dtype=dtype)
        return SSMState(conv, torch.zeros(batch, self.H, self.P, self.N, device=device, dtype=state_dtype(dtype)))

    def split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, E + 2GN) to x (…, H, P), B and C (…, G, N)."""
        x, B, C = xBC.split((self.E, self.G * self.N, self.G * self.N), dim=-1)
        return x.unflatten(-1, (self.H, self.P)), B.unflatten(-1, (self.G, self.N)), C.unflatten(-1, (self.G, self.N))

    def forward(
        self,
        x_BTD: Tensor,
        state: State | None = None,
        segments_BT: Tensor | None = None,
        ragged: Ragged | None = None,
        value_BTC: Tensor | None = None,
    ) -> Tensor:
        z, xBC, dt = self.in_proj(x_BTD).split((self.E, self.n_conv, self.H), dim=-1)
        dt = F.softplus(dt.to(state_dtype(dt.dtype)) + self.dt_bias)
        if state is not None and xBC.size(1) == 1 and ragged is None and segments_BT is None:
            assert isinstance(state, SSMState)
            return self.gate(self.step(xBC[:, 0], dt[:, 0], state)[:, None], z)
        A = -torch.exp(self.A_log.to(state_dtype(x_BTD.dtype)))
        if state is None:
            xBC, _ = causal_conv(xBC, self.conv_weight, self.conv_bias, segments_BT=segments_BT)
            y, _ = ssd(*self.arguments(xBC, dt, A), segments_BT=segments_BT)
            return self.gate(y.flatten(-2), z)
        assert isinstance(state, SSMState)
        lengths = None
        if ragged is not None:
            xBC, dt, lengths = ragged.pad(xBC), ragged.pad(dt), ragged.tensor
        xBC, state.conv = causal_conv(xBC, self.conv_weight, self.conv_bias, state.conv, segments_BT, lengths)
        if segments_BT is not None:
            state.conv = last_document(state.conv, segments_BT)
        y, state.h = ssd(*self.arguments(xBC, dt, A), state.h, segments_BT, lengths)
        y = y.flatten(-2)
        return self.gate(ragged.flat(y) if ragged is not None else y, z)

    def step(self, xBC: Tensor, dt_BH: Tensor, state: SSMState) -> Tensor:
        """One token of every row, (B, E), the state updated in place."""
        A, conv_weight = state.of_weights(self.A_log, self.conv_weight)
        xBC = causal_conv_step(xBC, conv_weight, self.conv_bias, state.conv)
        return ssd_step(*self.arguments(xBC, dt_BH, A), state.h).flatten(-2)

    def arguments(self, xBC: Tensor, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, B, C = self.split(xBC)
        return x, dt, A, B, C, self.D

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """The output, gated, then normalised within each group as in the paper's own code."""
        return self.out_proj(gated_rms_norm(y, z, self.G, self.eps))
