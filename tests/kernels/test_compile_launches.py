"""The kernels as they are launched, through the compiler down to an H100's machine code: no GPU is needed for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
HERE = Path(__file__).parent
# bytes that a thread may put aside for want of registers; the loss holds a whole row of 32,768 logits in them
SPILLED = {"triton_ssd": 256, "triton_norm": 0, "triton_loss": 600}


@pytest.mark.parametrize(
    "module", [m if m == "triton_norm" else pytest.param(m, marks=pytest.mark.slow) for m in SPILLED]
)
def test_compiles_for_a_gpu(module: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(HERE.parents[1])
    command = [sys.executable, str(HERE / "compile_for_gpu.py"), module, str(SPILLED[module])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
