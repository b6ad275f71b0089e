"""Compile every kernel that a module's self-check starts for an H100, on a machine without a GPU: a line for each.

    python tests/kernels/compile_for_gpu.py triton_ssd [bytes]

The interpreter forgives what the compiler does not: a variable that changes its type in a loop, shapes that a matrix
product cannot take. Prints the kernel, its warps, shared memory and the bytes of registers that it spills to memory;
fails when one needs more shared memory than an H100 has or spills more than so many bytes.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanochat.kernels import triton_common

HOPPER, SHARED_MEMORY = GPUTarget("cuda", 90, 32), 227 << 10
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
         torch.bool: "i1"}  # fmt: skip
compiled: set[str] = set()


def source(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> ASTSource:
    """What Triton's own launcher makes of arguments: None and 1 are constants, multiples of 16 are known as such."""
    values = {**dict(zip(kernel.arg_names, args)), **options}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name], attributes[i,] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[i,] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


def spilled(code: bytes) -> int:
    """Bytes a thread keeps in memory for want of registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(code)
        said = subprocess.run([str(tool), "-res-usage", str(file)], capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", said.stdout + said.stderr)[0])


def compile_instead(
    kernel: Any, grid: Any, *args: Any, num_warps: int = 4, num_stages: int = 3, **options: Any
) -> None:
    what = source(kernel, args, options)
    key = f"{kernel.__name__} {what.signature} {what.constants} {num_warps} {num_stages}"
    if key in compiled:
        return
    compiled.add(key)
    made = triton.compile(what, target=HOPPER, options={"num_warps": num_warps, "num_stages": num_stages})
    shared, spill = made.metadata.shared, spilled(made.asm["cubin"])
    print(f"{kernel.__name__}: {num_warps} warps, {shared} bytes of shared memory, {spill} bytes spilled", flush=True)
    assert shared <= SHARED_MEMORY, "more shared memory than an H100 has"
    assert spill <= LIMIT, f"more than {LIMIT} bytes spilled"


def run(kernel: Any, oracle: Any, inputs: list[Tensor], *_: Any, **__: Any) -> None:
    """In place of the self-check's comparison: forward and backward, whatever comes out."""
    given = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = kernel(*given)
    outputs = [y for y in ((outputs,) if isinstance(outputs, Tensor) else outputs) if y.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, given, [torch.zeros_like(y) for y in outputs], allow_unused=True)


if __name__ == "__main__":
    LIMIT = int(sys.argv[2]) if len(sys.argv) > 2 else 1 << 30
    torch.set_float32_matmul_precision("high")  # as on a GPU
    triton_common.launch, triton_common.compare = compile_instead, run
    importlib.import_module(f"nanochat.kernels.{sys.argv[1]}").self_check(torch.device("cpu"))
    assert compiled, "no kernel was started"
