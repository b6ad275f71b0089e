"""karpathy/nanochat's Engine, driven as its own scripts do: prints one JSON object a batch size.

    python benchmarks/peers/decode.py CHECKOUT DEPTH WIDTH PROMPT N_TOKENS BATCH,BATCH...
"""

import importlib.util
import json
import os
import sys
import time
import types

root, depth, width, prompt, n_tokens = sys.argv[1], *map(int, sys.argv[2:6])
batches = [int(b) for b in sys.argv[6].split(",")]
sys.path[0] = root
os.environ["NANOCHAT_DTYPE"] = "float32"


def stub(name: str, **attributes: object) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


stub("nanochat.checkpoint_manager", load_model=None)  # the engine imports it for its own __main__ only
if importlib.util.find_spec("filelock") is None:
    stub("filelock", FileLock=object)

import torch  # noqa: E402
from nanochat.gpt import GPT, GPTConfig  # type: ignore[attr-defined]  # noqa: E402

from nanochat.engine import Engine  # noqa: E402


class NoTools:
    """A tokenizer whose special tokens never come up."""

    def encode_special(self, name: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


config = GPTConfig(
    sequence_len=2048, vocab_size=32768, n_layer=depth, n_head=width // 64, n_kv_head=width // 64, n_embd=width,
    window_pattern="L",
)  # fmt: skip
with torch.device("meta"):
    model = GPT(config)
model.to_empty(device="cpu")
model.init_weights()
for p in model.parameters():
    if p.ndim == 2 and not p.any():
        torch.nn.init.normal_(p, std=0.02)
engine = Engine(model.eval(), NoTools())
ids = torch.randint(0, 32768, (prompt,)).tolist()
for batch in batches:
    steps = engine.generate(ids, num_samples=batch, max_tokens=n_tokens, temperature=1.0, seed=1)
    times = []
    for _ in range(n_tokens):
        began = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - began)
    decode = min(times[2:])  # the first is the prefill, the second warms up
    print(json.dumps({"batch": batch, "prefill": prompt / times[0], "decode": batch / decode}), flush=True)
