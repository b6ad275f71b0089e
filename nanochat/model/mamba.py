"""The Mamba mixer (S6, arXiv 2312.00752): a state space whose step, input and output maps depend on the token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.kernels.conv import causal_conv, causal_conv_step
from nanochat.kernels.scan import selective_scan, selective_scan_step
from nanochat.kernels.segments import last_document, state_dtype
from nanochat.model.config import ModelConfig
from nanochat.model.layers import Linear, Ragged, rms_norm
from nanochat.model.mixer import Mixer, State

DT_MIN, DT_MAX = 1e-3, 0.1  # the range of step sizes at initialisation


class SSMState(State):
    """The last K-1 inputs of the convolution and the hidden state: the same size whatever the length of the past.

    `derived`: what single steps take from the layer's weights, made at the first of them. A state is of no use to other
    weights, so it lives as long as what it is made of.
    """

    def __init__(self, conv: Tensor, h: Tensor) -> None:
        self.conv, self.h = conv, h
        self.derived: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {"conv": self.conv, "h": self.h}

    def map(self, fn: Callable[[Tensor], Tensor]) -> SSMState:
        return SSMState(fn(self.conv), fn(self.h))

    def restore(self, snapshot: State) -> None:
        assert isinstance(snapshot, SSMState)
        self.conv, self.h = snapshot.conv.clone(), snapshot.h.clone()

    def of_weights(self, A_log: Tensor, conv_weight_EK: Tensor) -> tuple[Tensor, Tensor]:
        """A and the convolution's weight, on a CPU with its taps one after the other."""
        if self.derived is None:
            weight = conv_weight_EK if A_log.is_cuda else conv_weight_EK.t().contiguous().t()
            self.derived = -torch.exp(A_log.to(self.h.dtype)), weight
        return self.derived


def init_dt_bias(bias: Tensor) -> None:
    """softplus(bias) is log-uniform between DT_MIN and DT_MAX."""
    dt = torch.exp(torch.rand(bias.shape, device=bias.device) * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN))
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class Mamba(Mixer):
    """In-projection to (x, gate), causal convolution, scan over E = expand * D channels of N states, gate, out."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        E, N, R = config.d_inner, config.d_state, config.dt_rank
        self.E, self.N, self.R, self.K = E, N, R, config.d_conv
        self.norm, self.eps = config.ssm_norm, config.norm_eps
        self.in_proj = Linear(config.d_model, 2 * E, splits=(E, E))
        self.conv_weight = nn.Parameter(torch.empty(E, self.K))
        self.conv_bias = nn.Parameter(torch.empty(E))
        self.x_proj = Linear(E, R + 2 * N, splits=(R, N, N))
        self.dt_proj = Linear(R, E)
        self.dt_bias = nn.Parameter(torch.empty(E))
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = Linear(E, config.d_model)

    def init_weights(self) -> None:
        self.in_proj.init_uniform()
        bound = self.K**-0.5
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.zero_()
        self.x_proj.init_uniform()
        self.dt_proj.weight.uniform_(-(self.R**-0.5), self.R**-0.5)
        init_dt_bias(self.dt_bias)
        steps = torch.arange(1, self.N + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(steps.log().expand(self.E, self.N))
        self.D.fill_(1.0)
        self.out_proj.init_zero()

    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> SSMState:
        conv = torch.zeros(batch, self.K - 1, self.E, device=device, dtype=dtype)
        return SSMState(conv, torch.zeros(batch, self.E, self.N, device=device, dtype=state_dtype(dtype)))

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the token's inner activations: step size (before bias and softplus), input map B and output map C."""
        dt, B, C = self.x_proj(x).split((self.R, self.N, self.N), dim=-1)
        if self.norm:
            dt, B, C = rms_norm(dt, self.eps), rms_norm(B, self.eps), rms_norm(C, self.eps)
        return self.dt_proj(dt), B, C

    def forward(
        self,
        x_BTD: Tensor,
        state: State | None = None,
        segments_BT: Tensor | None = None,
        ragged: Ragged | None = None,
        value_BTC: Tensor | None = None,
    ) -> Tensor:
        x, z = self.in_proj(x_BTD).chunk(2, dim=-1)
        if state is not None and x.size(1) == 1 and ragged is None and segments_BT is None:
            assert isinstance(state, SSMState)
            return self.out_proj(self.step(x[:, 0], z[:, 0], state)[:, None])
        A = -torch.exp(self.A_log.to(state_dtype(x_BTD.dtype)))
        if state is None:
            x, _ = causal_conv(x, self.conv_weight, self.conv_bias, segments_BT=segments_BT)
            delta, B, C = self.maps(x)
            y, _ = selective_scan(
                x, delta, A, B, C, self.D, segments_BT=segments_BT, bias_E=self.dt_bias, gate_BTE=z
            )
            return self.out_proj(y)
        assert isinstance(state, SSMState)
        lengths = None
        if ragged is not None:
            x, lengths = ragged.pad(x), ragged.tensor
        x, state.conv = causal_conv(x, self.conv_weight, self.conv_bias, state.conv, segments_BT, lengths)
        if segments_BT is not None:
            state.conv = last_document(state.conv, segments_BT)
        if ragged is not None:
            x = ragged.flat(x)
        delta, B, C = self.maps(x)
        if ragged is not None:
            x, delta, B, C, z = (ragged.pad(part) for part in (x, delta, B, C, z))
        y, state.h = selective_scan(x, delta, A, B, C, self.D, state.h, segments_BT, lengths, self.dt_bias, z)
        return self.out_proj(ragged.flat(y) if ragged is not None else y)

    def step(self, x_BE: Tensor, z_BE: Tensor, state: SSMState) -> Tensor:
        """One token of every row, the state updated in place."""
        A, conv_weight = state.of_weights(self.A_log, self.conv_weight)
        x = causal_conv_step(x_BE, conv_weight, self.conv_bias, state.conv)
        delta, B, C = self.maps(x)
        return selective_scan_step(x, delta, A, B, C, self.D, state.h, self.dt_bias, z_BE)
