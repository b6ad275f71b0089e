"""Triton's kernels run here in its interpreter, which must be asked for before the first of them is imported."""

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["default", "triton"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation that the operation of the test's module takes: `OP` names it, else the module `test_<op>`."""
    if request.param == "triton":
        if find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        op = getattr(request.module, "OP", request.module.__name__.removeprefix("test_"))
        monkeypatch.setenv(f"NANOCHAT_KERNEL_{op.upper()}", "triton")
    return str(request.param)
