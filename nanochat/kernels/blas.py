"""Which library multiplies matrices on a CPU. `runtime.setup` lets oneDNN do it where it is twice as fast as MKL; with
a single row it is half as fast (1 x 512 times 512 x 2048 in fp32, one core with AVX512: 119 against 55 us).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_rows() -> Iterator[None]:
    """fp32 products go to MKL meanwhile, in every thread; where they do so anyway nothing happens."""
    if torch.compiler.is_compiling() or torch.get_float32_matmul_precision() != "medium":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:  # not what was there before: two threads that restore each other's would end with MKL for good
        torch.set_float32_matmul_precision("medium")
