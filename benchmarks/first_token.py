"""Time to the first token of an answer from documents: cold, and with their states kept (engine/prefix.py).

    python -m benchmarks.first_token [--pattern T M M2 hybrid] [--documents 5 10 20] [--depth 4] [--width 256]

Random weights; documents and questions of the tiny world, laid out and tokenized as in chat; the time runs from the
messages to the first sampled token, so it includes tokenizing, which no cache saves. Milliseconds, the fastest of
several, every time another question:

    cold      no cache
    storing   an empty cache: the same, and the states after each document are stored
    cached    the documents are known, the question is new

Ratios: `cached_over_cold_<pattern>_<documents>` and `storing_over_cold_...`; the snapshots of all documents together in
KB, and the tokens of the prompt, stand in the table. Greedy answers are checked to be equal with and without cache.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch

from benchmarks.common import report
from nanochat.data.world import World
from nanochat.engine.generate import Engine
from nanochat.engine.prefix import PrefixCache
from nanochat.engine.sampling import Sampling
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.rag.prompt import retrieval_message
from nanochat.rag.tasks import as_document
from nanochat.tokenizer import Tokenizer

PATTERNS = ("T", "M", "M2", "hybrid")
FIRST = Sampling(max_tokens=1, temperature=0.0)
ANSWER = Sampling(max_tokens=16, temperature=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first token, cold and with kept states")
    parser.add_argument("--pattern", nargs="*", default=list(PATTERNS), help="patterns as in ModelConfig")
    parser.add_argument("--documents", nargs="*", type=int, default=[5, 10, 20])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    world = World(seed=1, n_known=400, n_new=400)
    tokenizer = Tokenizer.train((d["content"] for d in world.documents("known", 2)), args.vocab_size)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for pattern in args.pattern:
        model = build(pattern, args, tokenizer)
        for n in args.documents:
            row = measure(model, tokenizer, world, n, args.repeats)
            rows.append({"pattern": pattern, "parameters": model.n_params()["total"], "documents": n, **row})
            ratios[f"cached_over_cold_{pattern}_{n}"] = row["cached"] / row["cold"]
            ratios[f"storing_over_cold_{pattern}_{n}"] = row["storing"] / row["cold"]
    report("first_token", rows, ratios)


def build(pattern: str, args: argparse.Namespace, tokenizer: Tokenizer) -> LM:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, sequence_len=8192, depth=args.depth, d_model=args.width, pattern=pattern
    )
    model = LM.build(config, args.device, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(0.0, 0.02)
    return model.eval().requires_grad_(False)


def measure(model: LM, tokenizer: Tokenizer, world: World, n: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of the three ways, interleaved, so that a machine that slows down slows all of them."""
    engine = Engine(model, tokenizer, eos=())
    entities = list(world.pool("new"))[:n]
    block = retrieval_message([as_document(world.document(e)) for e in entities])
    asked = [
        world.question(e, (relation,), wording).text
        for wording in range(5)
        for e in entities
        for relation in world.entity(e).facts
    ]
    kept, questions = PrefixCache(), iter(asked)
    times: dict[str, list[float]] = {"cold": [], "storing": [], "cached": []}

    def run(way: str, cache: PrefixCache | None) -> None:
        messages = [block.message, {"role": "user", "content": next(questions)}]
        synchronize(model)
        began = time.perf_counter()
        prompt = tokenizer.render_prompt({"messages": messages}).ids
        engine.generate_batch([prompt], FIRST, prefix_cache=cache)
        synchronize(model)
        times[way].append(time.perf_counter() - began)

    # What stays is out of the collector's sight: to walk over it between any two runs would empty the CPU's caches,
    # which costs the shortest of the three ways most.
    gc.collect()
    gc.freeze()
    for _ in range(repeats + 1):  # the first round warms up
        for way, cache in (("cold", None), ("storing", PrefixCache()), ("cached", kept)):
            run(way, cache)
            gc.collect()
    gc.unfreeze()
    best = {way: 1000 * min(found[1:]) for way, found in times.items()}
    prompt = tokenizer.render_prompt({"messages": [block.message, {"role": "user", "content": asked[-1]}]}).ids
    cold, cached = (engine.generate_batch([prompt], ANSWER, prefix_cache=cache)[0].ids for cache in (None, kept))
    assert cold == cached, "the cache changed a greedy answer"
    return {"tokens": len(prompt), **best, "kilobytes": kept.nbytes / 1024}


def synchronize(model: LM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


if __name__ == "__main__":
    main()
