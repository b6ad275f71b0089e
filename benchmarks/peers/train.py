"""karpathy/nanochat's training step, compiled as its own script does: prints one JSON object.

    python benchmarks/peers/train.py CHECKOUT DEPTH WIDTH VOCAB T ROWS STEPS DTYPE DEVICE
"""

import importlib.util
import json
import os
import sys
import time
import types

root, dtype, device = sys.argv[1], sys.argv[8], sys.argv[9]
depth, width, vocab, T, rows, steps = map(int, sys.argv[2:8])
sys.path[0] = root
os.environ["NANOCHAT_DTYPE"] = dtype
if importlib.util.find_spec("filelock") is None:
    filelock = types.ModuleType("filelock")
    filelock.FileLock = object  # type: ignore[attr-defined]
    sys.modules["filelock"] = filelock

import torch  # noqa: E402
from nanochat.gpt import GPT, GPTConfig  # type: ignore[attr-defined]  # noqa: E402

config = GPTConfig(
    sequence_len=T, vocab_size=vocab, n_layer=depth, n_head=width // 64, n_kv_head=width // 64, n_embd=width,
    window_pattern="L",
)  # fmt: skip
with torch.device("meta"):
    model = GPT(config)
model.to_empty(device=device)
model.init_weights()
optimizer = model.setup_optimizer()
compiled = torch.compile(model, dynamic=False)
ids = torch.randint(0, vocab, (rows, T + 1), device=device)
times = []
for _ in range(steps + 3):
    began = time.perf_counter()
    loss = compiled(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - began)
print(json.dumps({"seconds": min(times[3:]), "flops_per_token": model.estimate_flops(), "first_step": times[0]}))
