"""Whole Mamba mixers on the Triton kernels (in the interpreter) against the same mixers on plain torch."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from nanochat.kernels import triton_conv, triton_scan
from nanochat.model.config import ModelConfig
from nanochat.model.layers import Ragged
from nanochat.model.lm import LM
from nanochat.model.mixer import Mixer

OPS = ("SELECTIVE_SCAN", "SELECTIVE_SCAN_STEP", "SSD", "SSD_STEP", "CAUSAL_CONV", "CAUSAL_CONV_STEP")
SEGMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])


@pytest.fixture(params=["M", "M2"])
def mixer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mixer:
    for name, value in {"BLOCK": 16, "KEEP": 4, "UNROLL": 2}.items():
        monkeypatch.setattr(triton_scan, name, value)
    monkeypatch.setattr(triton_conv, "STRETCH", 8)
    config = ModelConfig(vocab_size=8, depth=1, d_model=8, head_dim=4, pattern=request.param, d_state=4, d_state2=4)
    mixer = LM.build(config, seed=0).blocks[0].mixer
    torch.nn.init.normal_(mixer.out_proj.weight, generator=torch.Generator().manual_seed(1))
    return mixer


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in OPS:
        monkeypatch.setenv(f"NANOCHAT_KERNEL_{op}", "triton")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def gradients(run, mixer: Mixer, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(run(x).square().sum(), [x, *mixer.parameters()]))


def test_packed_training_in_one_graph(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(2, 5, 8).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return mixer(x, None, SEGMENTS)

    wanted = gradients(run, mixer, x)
    use_triton(monkeypatch)
    found = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), mixer, x)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_ragged_prefill_then_steps(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, tokens = noise(1, 5, 8), noise(2, 2, 8)

    def run() -> list[Tensor]:
        state = mixer.init_state(2, 8, prompt.device, torch.float32)
        ys = [mixer(prompt, state, ragged=Ragged([4, 1], "cpu"))]
        ys += [mixer(tokens[:, t : t + 1], state) for t in range(2)]
        return [*ys, *state.tensors().values()]

    wanted = run()
    use_triton(monkeypatch)
    for a, b in zip(run(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
