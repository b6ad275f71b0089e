"""x W^T for a few rows on a CPU, where BLAS runs one thread and leaves half of the memory bandwidth unused.

Measured with torch 2.13 and MKL on 2 AVX2 cores (24-29 GB/s), weights larger than the cache, microseconds:

    rows                     1      8     32
    3072 x 768   F.linear  768   1385   2383       32768 x 768   F.linear  7512  21406  38183
                 split     390    800   1610                     split     5040  12600  22000

The weight's rows are cut into equal parts (a view, nothing is copied) and multiplied as a batch, which torch spreads
over the threads; with one thread there is nothing to spread. One or two rows are for MKL (`blas`): on 2 cores with
AVX512 a layer of attention 512 wide takes .46 ms a token with oneDNN, .19 without.

Letters: M rows of x, N outputs, K inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.blas import single_rows
from nanochat.kernels.dispatch import choose

# With AVX512, larger products go to oneDNN, which does use all threads.
MAX_ROWS = 64 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 8
FEW_ROWS = 2  # with which MKL is faster than oneDNN
MIN_WEIGHTS = 1 << 14  # below this the calls cost more than the product
MANY = 8192  # outputs (a head's) from which smaller parts pay: 3.5 instead of 4.4 ms for 1 row of 32768 x 768


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x (..., K) times the transposed weight: (..., N), both of the same dtype."""
    if (
        weight_NK.device.type != "cpu"
        or weight_NK.dtype != torch.float32
        or torch.is_grad_enabled()
        or x.numel() > MAX_ROWS * x.size(-1)
        or weight_NK.numel() < MIN_WEIGHTS
    ):
        return F.linear(x, weight_NK)
    op = choose("linear", LINEAR, "split")
    if x.numel() > FEW_ROWS * x.size(-1):
        return op(x, weight_NK)
    with single_rows():
        return op(x, weight_NK) if torch.get_num_threads() > 1 else F.linear(x, weight_NK)


def linear_ref(x: Tensor, weight_NK: Tensor) -> Tensor:
    return F.linear(x, weight_NK)


def linear_split(x: Tensor, weight_NK: Tensor) -> Tensor:
    n_out, n_in = weight_NK.shape
    n_parts = next(n for n in ((32, 8, 2, 1) if n_out >= MANY else (8, 2, 1)) if n_out % n == 0)
    parts = weight_NK.view(n_parts, n_out // n_parts, n_in)
    x_MK = x.reshape(-1, n_in)
    n_rows = x_MK.size(0)
    if n_rows < 8:
        y = torch.bmm(parts, x_MK.t().expand(n_parts, n_in, n_rows)).view(n_out, n_rows).t()
    else:
        y = torch.bmm(x_MK.expand(n_parts, n_rows, n_in), parts.transpose(1, 2)).transpose(0, 1)
    return y.reshape(*x.shape[:-1], n_out)


LINEAR = {"split": linear_split, "ref": linear_ref}
