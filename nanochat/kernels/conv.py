"""Causal depthwise convolution over time, then SiLU: the short convolution of the Mamba blocks.

    y[t, e] = silu(bias[e] + sum_k weight[e, k] * x[t - K + 1 + k, e])

Letters: B batch, T time, E inner width, K kernel width. The state is the last K-1 inputs, oldest first: (B, K-1, E).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.dispatch import choose
from nanochat.kernels.segments import resets


def causal_conv(
    x_BTE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None = None,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    """Convolve, add the bias and (with `activation`) apply SiLU; returns `y_BTE` and the new state (B, K-1, E).

    `state` holds the K-1 inputs before the first token (zeros when None). `segments_BT` (int) numbers documents: the
    window never reaches into an earlier one. `lengths` (B,): rows are right-padded, the returned state holds the last
    K-1 inputs before position `lengths`.
    """
    op = choose("causal_conv", CAUSAL_CONV, "shifted")
    return op(x_BTE, weight_EK, bias_E, state, segments_BT, lengths, activation)


def causal_conv_ref(
    x_BTE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None = None,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    """The oracle: a window a step, gradients by plain autograd."""
    n_kernel = weight_EK.shape[1]
    padded = _with_state(x_BTE, n_kernel, state)
    document = None if segments_BT is None else resets(segments_BT).cumsum(1)
    ys = []
    for t in range(x_BTE.shape[1]):
        window_BKE = padded[:, t : t + n_kernel]
        if document is not None:
            inside = F.pad(document, (n_kernel - 1, 0))[:, t : t + n_kernel] == document[:, t, None]
            window_BKE = torch.where(inside[:, :, None], window_BKE, 0.0)
        y_BE = (window_BKE * weight_EK.t().to(x_BTE.dtype)).sum(1)
        ys.append(y_BE if bias_E is None else y_BE + bias_E.to(x_BTE.dtype))
    y_BTE = torch.stack(ys, 1)
    return (F.silu(y_BTE) if activation else y_BTE), _final_state(padded, n_kernel, lengths)


def causal_conv_step(
    x_BE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, state: Tensor, activation: bool = True
) -> Tensor:
    """One token of decoding, no gradient: shifts `state` (B, K-1, E) in place and returns `y_BE`."""
    weight_KE = weight_EK.t().to(x_BE.dtype)
    y_BE = x_BE * weight_KE[-1]
    for k, past in enumerate(state.to(x_BE.dtype).unbind(1)):
        y_BE.addcmul_(past, weight_KE[k])
    if bias_E is not None:
        y_BE += bias_E.to(x_BE.dtype)
    if state.shape[1]:
        state.copy_(torch.cat((state[:, 1:], x_BE[:, None].to(state.dtype)), 1))
    return F.silu(y_BE, inplace=True) if activation else y_BE


def _with_state(x_BTE: Tensor, n_kernel: int, state: Tensor | None) -> Tensor:
    """The inputs with the K-1 before them in front: (B, K-1+T, E)."""
    if state is None:
        return F.pad(x_BTE, (0, 0, n_kernel - 1, 0))
    return torch.cat((state.to(x_BTE.dtype), x_BTE), 1)


def _final_state(padded: Tensor, n_kernel: int, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return padded[:, padded.shape[1] - (n_kernel - 1) :].clone()
    index = lengths[:, None].to(torch.int64) + torch.arange(n_kernel - 1, device=padded.device)
    return padded.gather(1, index[:, :, None].expand(-1, -1, padded.shape[2]))


def _causal_conv_shifted(
    x_BTE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None = None,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    n_kernel, n_time = weight_EK.shape[1], x_BTE.shape[1]
    padded = _with_state(x_BTE, n_kernel, state)
    weight_KE = weight_EK.t().to(x_BTE.dtype)
    y_BTE = x_BTE * weight_KE[-1]
    document = None
    if segments_BT is not None:
        document = F.pad(resets(segments_BT).cumsum(1), (n_kernel - 1, 0))
    for k in range(n_kernel - 1):
        past = padded[:, k : k + n_time]
        if document is not None:
            inside = document[:, k : k + n_time] == document[:, n_kernel - 1 :]
            past = past * inside[:, :, None]
        y_BTE = y_BTE + past * weight_KE[k]
    if bias_E is not None:
        y_BTE = y_BTE + bias_E.to(x_BTE.dtype)
    return (F.silu(y_BTE) if activation else y_BTE), _final_state(padded, n_kernel, lengths)


CAUSAL_CONV = {"shifted": _causal_conv_shifted, "ref": causal_conv_ref}
