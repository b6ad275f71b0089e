"""Few rows times a transposed weight, split over threads or by MKL: the product of torch."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.kernels.linear import linear


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_row", [1, 2, 3, 8, 70])
@torch.no_grad()
def test_is_torchs_product(n_row: int, threads: int) -> None:
    g = torch.Generator().manual_seed(n_row)
    x, weight = torch.randn(1, n_row, 96, generator=g), torch.randn(200, 96, generator=g)
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")
    try:
        y = linear(x, weight)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
    torch.testing.assert_close(y, F.linear(x.double(), weight.double()).float(), rtol=1e-4, atol=1e-4)
