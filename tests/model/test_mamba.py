"""The Mamba mixer, beyond the contract of all mixers: its state does not grow, its initial values are the paper's."""

import pytest
import torch
import torch.nn.functional as F
from models import config, mixer, noise

from nanochat.model.lm import LM
from nanochat.model.mamba import DT_MAX, DT_MIN, Mamba, SSMState
from nanochat.model.mamba2 import Mamba2


@pytest.mark.parametrize("letter", ["M", "M2"])
def test_the_state_has_one_size(letter: str) -> None:
    module = mixer(letter)
    state = module.init_state(3, 0, torch.device("cpu"), torch.float32)
    size = state.nbytes
    with torch.no_grad():
        for n in (1, 7, 1, 2):
            module(noise(3, n, 32), state)
            assert state.nbytes == size
    assert state.fork(4).nbytes == 4 * size
    state.reserve(10_000)
    assert state.nbytes == size


def test_half_precision_keeps_the_hidden_state_in_fp32() -> None:
    for letter in ("M", "M2"):
        state = mixer(letter).init_state(1, 0, torch.device("cpu"), torch.bfloat16)
        assert isinstance(state, SSMState)
        assert (state.conv.dtype, state.h.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("letter", ["M", "M2"])
def test_initial_step_sizes_and_decays(letter: str) -> None:
    module = LM.build(config(pattern=letter, d_model=128), seed=0).blocks[0].mixer
    assert isinstance(module, Mamba | Mamba2)
    steps = F.softplus(module.dt_bias.detach())
    assert DT_MIN * 0.999 <= steps.min() < 2 * DT_MIN + 0.01
    assert 0.03 < steps.max() <= DT_MAX * 1.001
    assert (module.D == 1).all()
    decay = module.A_log.detach().exp()
    if letter == "M":
        torch.testing.assert_close(decay, torch.arange(1.0, 6.0).expand(256, 5))
    else:
        assert decay.min() >= 1
        assert decay.max() <= 16


def test_without_the_norm_dt_b_and_c_are_raw() -> None:
    x = noise(1, 4, 64)
    with torch.no_grad():
        plain, normed = mixer("M", ssm_norm=False), mixer("M")
        assert isinstance(plain, Mamba)
        assert isinstance(normed, Mamba)
        _, B, C = plain.maps(x)
        torch.testing.assert_close(torch.cat((B, C), -1), plain.x_proj(x)[..., 3:])
        _, B, _ = normed.maps(x)
        torch.testing.assert_close(B.square().mean(-1), torch.ones(1, 4), rtol=1e-3, atol=1e-3)


def test_long_memory_decays_but_never_blows_up() -> None:
    """Thousands of steps with large inputs: the state stays finite (decays are below one)."""
    for letter in ("M", "M2"):
        module = mixer(letter)
        with torch.no_grad():
            y = module(30 * noise(1, 3000, 32))
        assert torch.isfinite(y).all()
