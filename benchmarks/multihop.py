"""Retrieval in hops by the template hook against one search for as many documents, on HotpotQA.

    python -m benchmarks.multihop [--questions FILE] [--knowledge_base DIRECTORY]

FILE: HotpotQA's records (default: 200 of its distractor set). All their paragraphs make one hybrid knowledge base, or
an existing one is searched. A question counts when all its gold paragraphs are among the first k (all-gold recall@k).
Variants of the template were compared with both halves of the questions in sight: `second half` is a check, not a
held-out set. Ratios:

    hops_over_one_shot_5          all-gold recall@5 of the template with selection, minus the best one-shot search's
    hops_over_selected_5          minus that of one search with the same selection
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import SHARED, report
from nanochat.intervals import share
from nanochat.rag.multihop import Asking, search_in_hops
from nanochat.rag.questions import RagQuestion, load_questions
from nanochat.rag.template import named_first, template_query
from nanochat.retrieval import KnowledgeBase

DEPTH = 10  # hits to select from
K = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Retrieval in hops against one search")
    parser.add_argument("--questions", default=str(SHARED / "hotpotqa" / "sample200.jsonl"))
    parser.add_argument("--knowledge_base", help="an existing one, built of the questions' paragraphs")
    args = parser.parse_args()
    if not Path(args.questions).is_file():
        parser.exit(2, f"error: no questions at {args.questions}: give --questions FILE in HotpotQA's form\n")
    questions = load_questions(args.questions)
    with ExitStack() as stack:
        if args.knowledge_base:
            knowledge = KnowledgeBase.open(args.knowledge_base)
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="nanochat-hotpotqa-"))
            knowledge = stack.enter_context(KnowledgeBase.create(Path(directory) / "kb", kind="hybrid"))
            knowledge.add(paragraphs(questions))
        rows, recall = compare(knowledge, questions)
    one_shot = max(recall[f"one search, {mode}"] for mode in ("bm25", "dense", "hybrid"))
    hops = recall["template, selection"]
    ratios = {
        "hops_over_one_shot_5": hops - one_shot,
        "hops_over_selected_5": hops - recall["one search, selection"],
    }
    report("multihop", rows, ratios)


def paragraphs(questions: Iterable[RagQuestion]) -> list[Any]:
    """Each paragraph once."""
    return list({document.id: document for question in questions for document in question.documents}.values())


def compare(knowledge: Any, questions: Sequence[RagQuestion]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each way to search; all-gold recall@5 by name."""
    asked = [question.question for question in questions]

    def once(mode: str, k: int) -> list[list[str]]:
        return [[hit.id for hit in hits] for hits in knowledge.search(asked, k, mode=mode)]

    def hops(max_hops: int, top_k: int, **hooks: Any) -> list[list[str]]:
        found = search_in_hops(knowledge, asked, max_hops, top_k, query=template_query, depth=DEPTH, **hooks)
        return [[document.id for hop in each for document in hop.documents] for each in found]

    ways: dict[str, Callable[[], list[list[str]]]] = {
        **{f"one search, {mode}": lambda mode=mode: once(mode, 2 * K) for mode in ("bm25", "dense", "hybrid")},
        "one search, selection": lambda: hops(1, K, select=lambda asking, hits: named_first(asking, hits, K)),
        "template": lambda: hops(4, 2, select=best),
        "template, selection": lambda: hops(4, 2, select=named_first),
    }
    rows, recall = [], {}
    for name, way in ways.items():
        began = time.perf_counter()
        found = way()
        seconds = time.perf_counter() - began
        right = [set(q.gold) <= set(ids[:K]) for q, ids in zip(questions, found)]
        half = right[len(right) // 2 :]
        metric = share(sum(right), len(right))
        recall[name] = metric.value
        rows.append({
            "search": name, "documents": K, "all gold": metric.value, "low": metric.low, "high": metric.high,
            "second half": sum(half) / len(half), "ms a question": 1e3 * seconds / len(questions),
        })  # fmt: skip
        if max(map(len, found)) > K:
            ten = share(sum(set(q.gold) <= set(ids) for q, ids in zip(questions, found)), len(questions))
            rows.append({"search": name, "documents": 2 * K, "all gold": ten.value, "low": ten.low, "high": ten.high})
    return rows, recall


def best(asking: Asking, hits: Sequence[Any]) -> list[Any]:
    """Two documents in the first hop and one in each other, as `named_first` does, without its choice."""
    return list(hits[: 1 if asking.hops else 2])


if __name__ == "__main__":
    main()
