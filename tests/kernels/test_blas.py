"""Products of single rows go to MKL for as long as they take, and no longer."""

import threading

import pytest
import torch

from nanochat.kernels.blas import single_rows


@pytest.fixture(params=["medium", "highest"])
def precision(request: pytest.FixtureRequest) -> object:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_precision_is_as_before(precision: str) -> None:
    with single_rows():
        assert torch.get_float32_matmul_precision() == "highest"
        with single_rows():
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == precision
    with pytest.raises(ZeroDivisionError), single_rows():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == precision


def test_threads_do_not_keep_each_others(precision: str) -> None:
    first, second = single_rows(), single_rows()
    inside, over = threading.Event(), threading.Event()

    def other() -> None:
        with second:
            inside.set()
            over.wait(10)

    with first:
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
    over.set()  # the first ended before the second, which began in it
    thread.join()
    assert torch.get_float32_matmul_precision() == precision
