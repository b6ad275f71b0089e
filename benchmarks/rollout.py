"""Rollouts with two searches each: all at once, against row by row, and against Hugging Face's `generate`.

    python -m benchmarks.rollout [--rows 256] [--pattern transformer] [--no-hf]

Random weights of one shape (depth 4, width 256 unless told otherwise); before each query and the answer some thinking,
all of different lengths; documents out of a BM25 knowledge base of the tiny world. What is sampled is replaced by a
script, so that all sides write the same tokens: the work of sampling is done, its outcome ignored. `generate` gets the
same prompts, sorted by length and padded on the left, in the batch size that suits it best; between its turns results
are appended, and it reads the whole conversation again, as loops over `generate` do (Search-R1's); its rows all write
as long as the longest of the batch. All sides compute in fp32, with the same threads and the same matmul precision. Row
by row and `generate` are measured on the first --baseline_rows and --generate_rows rollouts and scaled. Ratios:

    batched_over_row_by_row   seconds of the rollouts one after the other / all at once
    batched_over_generate     seconds of `generate` / all at once
    retrieval_share           of the seconds of all at once, those in the search tool
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import report
from nanochat.data.corpus import open_corpus
from nanochat.data.world import World
from nanochat.engine.rollout import Limits, Rollout, _Runner
from nanochat.engine.sampling import Sampling
from nanochat.engine.tools import Request, Result
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.rag.multihop import SearchTool
from nanochat.rag.tasks import as_document
from nanochat.retrieval import KnowledgeBase
from nanochat.runtime import setup
from nanochat.tokenizer import Tokenizer

WORLD = World(3, 20, 400)


class Plan(NamedTuple):
    """One rollout: its prompt, what it searches for, and what it writes up to each result and after the last."""

    prompt: list[int]
    queries: list[str]
    turns: list[list[int]]


class TimedSearch(SearchTool):
    """Counts its own seconds."""

    seconds = 0.0

    def run(self, requests: Sequence[Request]) -> list[Result]:
        began = time.perf_counter()
        found = super().run(requests)
        self.seconds += time.perf_counter() - began
        return found


class Scripted(_Runner):
    """Samples, and then writes what the script says."""

    def __init__(self, model: LM, tokenizer: Tokenizer, tool: SearchTool, scripts: Sequence[Sequence[int]]) -> None:
        sampling = Sampling(max_tokens=max(map(len, scripts)), temperature=1.0, seed=0)
        super().__init__(model, tokenizer, sampling, [tool], Limits(max_calls=2), None, None, None)
        self.scripts = scripts

    def sample(self) -> tuple[list[int], list[float]]:
        _, logprobs = super().sample()
        return [self.scripts[row.number][row.n_sampled] for row in self.batch.rows], logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of rollouts with searches")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--max_rows", type=int, default=256, help="rows that decode together")
    parser.add_argument("--baseline_rows", type=int, default=64, help="rollouts that are made row by row")
    parser.add_argument("--generate_rows", type=int, default=64, help="rollouts that generate makes")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--pattern", default="transformer")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--thinking", type=int, default=40, help="tokens before each query and the answer")
    parser.add_argument("--top_k", type=int, default=2, help="documents a search")
    parser.add_argument("--hf", action=argparse.BooleanOptionalAction, default=True, help="measure generate as well")
    args = parser.parse_args()
    setup("cpu", "float32")
    tokenizer = Tokenizer.train(open_corpus("world:seed=3,known=400,new=400").documents("train"), 2048)
    plans = make_plans(tokenizer, args.rows, args.thinking)
    some, others = plans[: args.baseline_rows], plans[: args.generate_rows]
    with (
        tempfile.TemporaryDirectory(prefix="nanochat-rollout-") as directory,
        KnowledgeBase.create(Path(directory) / "kb", kind="bm25") as knowledge,
    ):
        knowledge.add(map(as_document, WORLD.documents("new")))
        tool = TimedSearch(tokenizer, knowledge, args.top_k)
        model = build(args)
        roll(model, tokenizer, tool, plans[:8], args.max_rows)  # everything is loaded once
        tool.seconds = 0.0
        found, batched = timed(lambda: roll(model, tokenizer, tool, plans, args.max_rows))
        searching = tool.seconds
        _, alone = timed(lambda: [roll(model, tokenizer, tool, [plan], 1) for plan in some])
        rows = [row("all at once", len(plans), batched, found), row("row by row", len(some), alone, found)]
        ratios = {
            "batched_over_row_by_row": len(plans) / len(some) * alone / batched,
            "retrieval_share": searching / batched,
        }
        if args.hf:
            sizes = sorted({min(size, len(others)) for size in (32, 64, 128)})
            times = {size: measure_generate(args, tokenizer, tool, others, size) for size in sizes}
            rows += [row(f"generate, {size} together", len(others), s, found) for size, s in times.items()]
            ratios["batched_over_generate"] = len(plans) / len(others) * min(times.values()) / batched
    report("rollout", rows, ratios)


def make_plans(tokenizer: Tokenizer, n: int, thinking: int) -> list[Plan]:
    """Ragged: questions of two hops; before each query and the answer, `thinking` tokens on average."""
    rng, plans = random.Random(0), []
    start, end = tokenizer.special(SearchTool.start), tokenizer.special(SearchTool.end)
    words = tokenizer.encode(" ".join(WORLD.document(entity)["content"] for entity in list(WORLD.pool("new"))[:50]))
    for question in WORLD.questions(2, "new", "train", 0, n):
        prompt = tokenizer.render_prompt({"messages": [{"role": "user", "content": question.text}]}).ids
        names = [WORLD.name(entity) for entity, _, _ in question.hop_chain]
        said = [[start, *tokenizer.encode(name), end] for name in names]
        said.append([*tokenizer.encode(question.sentence), tokenizer.eot])
        thoughts = [rng.sample(words, rng.randint(thinking // 2, thinking + thinking // 2)) for _ in said]
        plans.append(Plan(prompt, names, [[*a, *b] for a, b in zip(thoughts, said)]))
    return plans


def build(args: argparse.Namespace) -> LM:
    config = ModelConfig(
        vocab_size=args.vocab_size, sequence_len=1024, depth=args.depth, d_model=args.width, pattern=args.pattern
    )
    model = LM.build(config, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(0.0, 0.02)
    return model.requires_grad_(False)


def roll(model: LM, tokenizer: Tokenizer, tool: SearchTool, plans: Sequence[Plan], max_rows: int) -> list[Rollout]:
    runner = Scripted(model, tokenizer, tool, [[token for turn in plan.turns for token in turn] for plan in plans])
    steps = runner.run([plan.prompt for plan in plans], 1, max_rows)
    found = [step.finished for some in steps for step in some if step.finished]
    assert all(len(one.calls) == 2 and one.finish_reason == "stop" for one in found)
    return found


def measure_generate(
    args: argparse.Namespace, tokenizer: Tokenizer, tool: SearchTool, plans: Sequence[Plan], size: int
) -> float:
    """Seconds of a loop over `generate` with a Llama of the same depth, width, heads, vocabulary and parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, args.width // 64)
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.width, intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.depth, num_attention_heads=heads, max_position_embeddings=1024,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    order = sorted(plans, key=lambda plan: len(plan.prompt))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    generate_batch(model, tokenizer, tool, batches[0][:2])
    return timed(lambda: [generate_batch(model, tokenizer, tool, batch) for batch in batches])[1]


@torch.inference_mode()
def generate_batch(model: Any, tokenizer: Tokenizer, tool: SearchTool, plans: Sequence[Plan]) -> None:
    """Two searches and an answer for each of these prompts."""
    rows = [list(plan.prompt) for plan in plans]
    for turn in range(3):
        said = [plan.turns[turn] for plan in plans]
        longest, width = max(map(len, said)), max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=True,
            temperature=1.0, top_k=0, pad_token_id=0,
        )  # fmt: skip
        assert made.shape[1] == width + longest
        if turn < 2:
            results = tool.run([Request(plan.queries[turn], max_tokens=512) for plan in plans])
            blocks = [tokenizer.render_parts(result.parts).ids for result in results]
            rows = [row + each + block for row, each, block in zip(rows, said, blocks)]


def timed(work: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    made = work()
    return made, time.perf_counter() - began


def row(name: str, n: int, seconds: float, found: Sequence[Rollout]) -> dict[str, Any]:
    sampled = sum(sum(one.sampled) for one in found) / len(found)
    read = sum(len(one.ids) - sum(one.sampled) + len(one.prompt) for one in found) / len(found)
    return {"rollouts": name, "n": n, "seconds": seconds, "a second": n / seconds,
            "sampled each": sampled, "read each": read}  # fmt: skip


if __name__ == "__main__":
    main()
