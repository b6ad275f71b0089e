"""The Mamba-2 mixer, beyond the contract of all mixers."""

import pytest
import torch
from models import config, mixer, noise

from nanochat.errors import UsageError
from nanochat.model.mamba2 import Mamba2


def test_heads_of_a_group_share_b_and_c_and_groups_do_not() -> None:
    """Changing the B of group 1 changes only the heads of group 1, before the output mixes them."""
    module = mixer("M2", n_groups=2)
    assert isinstance(module, Mamba2)
    caught: list[torch.Tensor] = []
    module.out_proj.register_forward_hook(lambda _, inputs, output: caught.append(inputs[0].detach().clone()))
    x = noise(1, 5, 32)
    with torch.no_grad():
        module(x)
        rows = slice(2 * module.E + module.N, 2 * module.E + 2 * module.N)  # the second group's B
        module.in_proj.weight[rows] += 1.0
        module(x)
    half = module.E // 2
    changed = (caught[0] - caught[1]).abs().amax((0, 1))
    assert (changed[:half] == 0).all()
    assert (changed[half:] > 0).any()


def test_the_gate_is_inside_the_norm() -> None:
    """As in the paper's code: norm(y * silu(z)), so the size of the gate does not reach the output."""
    module = mixer("M2")
    assert isinstance(module, Mamba2)
    y, z = noise(1, 3, module.E), noise(1, 3, module.E, seed=1).abs() + 5  # silu(z) is nearly z there
    with torch.no_grad():
        torch.testing.assert_close(module.gate(y, z), module.gate(y, 7 * z), rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"head_dim2": 24}, "--head_dim2 24 does not divide"), ({"n_groups": 3}, "--n_groups 3 does not divide")],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        config(pattern="M2", **options)
