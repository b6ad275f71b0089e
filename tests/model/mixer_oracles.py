"""Each mixer written down again: float64, one token after the other, plain formulas, no kernel of the package."""

import math

import torch
from torch import Tensor

from nanochat.model.attention import Attention
from nanochat.model.mamba import Mamba
from nanochat.model.mamba2 import Mamba2
from nanochat.model.mixer import Mixer

EPS = 1e-5


def weights(module: Mixer) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in module.named_parameters()}


def norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def attention(module: Attention, x_TD: Tensor) -> Tensor:
    """softmax(s q k) v with every pair written out; a window, groups, rotation, offset and norm as the
    module has them."""
    w, H, G, P = weights(module), module.n_head, module.n_kv, module.P
    keys, values, out = [], [], []
    before = torch.zeros(G, P // 2 if module.offset else 0, dtype=torch.float64)
    for t, x in enumerate(x_TD):
        projected = w["qkv.weight"] @ x
        q = projected[: H * P].view(H, P)
        k, v = projected[H * P :].view(2, G, P)
        if module.qk_norm:
            q, k = norm(q), norm(k)
        R = P // 2 if module.offset else P
        if module.rotary is not None:
            base = module.rotary.base
            q, k = (torch.cat((rotate(part[:, :R], t, base), part[:, R:]), 1) for part in (q, k))
        keys.append(torch.cat((k[:, :R], before), 1))
        before = k[:, R:]
        values.append(v)
        first = max(0, t + 1 - module.window) if module.window else 0
        heads = []
        for h in range(H):
            g = h * G // H
            scores = torch.stack([module.scale * (q[h] @ keys[s][g]) for s in range(first, t + 1)])
            share = torch.exp(scores - scores.max())
            share = share / share.sum()
            heads.append(sum(share[s - first] * values[s][g] for s in range(first, t + 1)))
        out.append(w["out.weight"] @ torch.cat(heads))
    return torch.stack(out)


def rotate(x_HP: Tensor, t: int, base: float) -> Tensor:
    """Pairs (i, i + P/2) turn by t * base ** (-2i / P)."""
    half = x_HP.size(1) // 2
    y = x_HP.clone()
    for i in range(half):
        angle = t * base ** (-2 * i / (2 * half))
        a, b = x_HP[:, i], x_HP[:, i + half]
        y[:, i], y[:, i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return y


def convolve(window: list[Tensor], weight_EK: Tensor, bias_E: Tensor) -> Tensor:
    """SiLU of bias + sum over the last K inputs."""
    K = weight_EK.size(1)
    y = bias_E.clone()
    for k in range(K):
        if len(window) >= K - k:
            y = y + weight_EK[:, k] * window[len(window) - K + k]
    return silu(y)


def mamba(module: Mamba, x_TD: Tensor) -> Tensor:
    w, E, N, R = weights(module), module.E, module.N, module.R
    h = torch.zeros(E, N, dtype=torch.float64)
    A = -torch.exp(w["A_log"])
    past: list[Tensor] = []
    out = []
    for x in x_TD:
        u, z = (w["in_proj.weight"] @ x).split(E)
        past.append(u)
        u = convolve(past, w["conv_weight"], w["conv_bias"])
        dt, B, C = (w["x_proj.weight"] @ u).split((R, N, N))
        if module.norm:
            dt, B, C = norm(dt), norm(B), norm(C)
        delta = softplus(w["dt_proj.weight"] @ dt + w["dt_bias"])
        h = torch.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
        out.append(w["out_proj.weight"] @ ((h @ C + w["D"] * u) * silu(z)))
    return torch.stack(out)


def mamba2(module: Mamba2, x_TD: Tensor) -> Tensor:
    w, E, P, N, G, H = weights(module), module.E, module.P, module.N, module.G, module.H
    h = torch.zeros(H, P, N, dtype=torch.float64)
    A = -torch.exp(w["A_log"])
    past: list[Tensor] = []
    out = []
    for x in x_TD:
        z, xBC, dt = (w["in_proj.weight"] @ x).split((E, E + 2 * G * N, H))
        past.append(xBC)
        u, B, C = convolve(past, w["conv_weight"], w["conv_bias"]).split((E, G * N, G * N))
        u, B, C = u.view(H, P), B.view(G, N), C.view(G, N)
        dt = softplus(dt + w["dt_bias"])
        y = torch.empty(H, P, dtype=torch.float64)
        for i in range(H):
            g = i * G // H
            h[i] = torch.exp(dt[i] * A[i]) * h[i] + dt[i] * u[i][:, None] * B[g]
            y[i] = h[i] @ C[g] + w["D"][i] * u[i]
        out.append(w["out_proj.weight"] @ norm((y.flatten() * silu(z)).view(G, E // G)).flatten())
    return torch.stack(out)


def oracle(module: Mixer, x_TD: Tensor) -> Tensor:
    """What `module` makes of one row x (T, D), in float64."""
    if isinstance(module, Attention):
        return attention(module, x_TD.double())
    if isinstance(module, Mamba):
        return mamba(module, x_TD.double())
    assert isinstance(module, Mamba2)
    return mamba2(module, x_TD.double())
