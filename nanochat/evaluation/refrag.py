"""How well a model answers that searches on its own, beside the conditions of `rag.py`.

refrag            the question alone; the model searches hop by hop, reads, and answers
refrag_shuffled   as refrag, but every search brings what was found for another question, without gold documents

The one-shot search that it is compared with (`rag`) brings as many documents as all hops together may.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from nanochat.engine.rollout import MAX_CALL_TOKENS, Rollout, rollouts
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.rag import Asker, Options, Prepared, measure_rag
from nanochat.evaluation.rag_questions import gold_documents
from nanochat.evaluation.rag_result import HEADINGS, SEARCHING, Judged, RagResult
from nanochat.intervals import Metric, exact
from nanochat.model.lm import LM
from nanochat.rag.knowledge import Searcher
from nanochat.rag.multihop import (
    Asking,
    Query,
    SearchTool,
    as_written,
    believed,
    documents_of,
    hops_of,
    read_answer,
)
from nanochat.rag.questions import RagQuestion
from nanochat.rag.template import template_query
from nanochat.retrieval.document import Hit
from nanochat.runtime import log
from nanochat.tokenizer import Tokenizer

QUERIES: dict[str, Query] = {"model": as_written, "template": template_query}


class Hops(NamedTuple):
    """How the model may search."""

    max_hops: int = 3
    top_k: int = 2  # documents a search
    query: Query = as_written
    max_result_tokens: int = 512  # of one search


def measure_refrag(
    model: LM,
    tokenizer: Tokenizer,
    knowledge: Searcher | None,
    questions: Sequence[RagQuestion],
    options: Options,
    hops: Hops,
    conditions: Sequence[str] = tuple(HEADINGS),
) -> RagResult:
    """As `measure_rag`, with the conditions in which the model searches. `options.top_k` is ignored: one search brings
    max_hops * top_k documents. Raises UsageError without anything to search."""
    if knowledge is None:
        raise UsageError("a model that searches needs something to search: give a knowledge base")
    if hops.max_hops < 1:
        raise UsageError(f"--max_hops {hops.max_hops}: must be at least 1 to compare searching with anything")
    options = replace(options, top_k=hops.max_hops * hops.top_k)
    return measure_rag(model, tokenizer, knowledge, questions, options, conditions, partial(HopAsker, hops=hops))


class HopAsker(Asker):
    """Lets the model search."""

    def __init__(self, *arguments: Any, hops: Hops) -> None:
        super().__init__(*arguments)
        self.hops = hops

    def ask(self, condition: str, numbers: Sequence[int]) -> Iterator[Judged]:
        if condition not in SEARCHING:
            yield from super().ask(condition, numbers)
            return
        found = self.roll(condition, numbers)
        failed = [rollout.error for rollout in found if rollout.error]
        if len(failed) == len(found):
            raise NanochatError(f"{HEADINGS[condition]}: no question could be answered: {failed[0]}")
        if failed:
            log.warning("%s: %d of %d answers failed, and count as wrong: %s", HEADINGS[condition], len(failed),
                        len(found), failed[0])  # fmt: skip
        for i, rollout in zip(numbers, found):
            hops, documents = hops_of(rollout.calls), documents_of(rollout.calls)
            messages = [{"role": "user", "content": self.questions[i].question}]
            seconds, cut = sum(call.seconds for call in rollout.calls), any(hop.cut for hop in hops)
            prepared = Prepared(self.questions[i], messages, rollout.prompt, documents, cut, seconds)
            answer = read_answer(rollout, self.tokenizer)
            answer = answer if rollout.error else believed(answer)  # what failed is no abstention
            yield self.judge(condition, i, prepared, answer)._replace(queries=len(hops))

    def roll(self, condition: str, numbers: Sequence[int]) -> list[Rollout]:
        """The questions with these numbers, all at once."""
        limit = self.model.config.sequence_len // 2
        messages = [[{"role": "user", "content": self.questions[i].question}] for i in numbers]
        prompts = [self.tokenizer.render_prompt({"messages": each}, limit).ids for each in messages]
        sampling = self.options.sampling
        longest = sampling.max_tokens + self.hops.max_hops * (MAX_CALL_TOKENS + 2)
        return rollouts(
            self.model, self.tokenizer, prompts, replace(sampling, max_tokens=longest), 1,
            [self.tool(condition, numbers)], self.hops.max_hops, max_rows=self.options.batch_size,
            max_result_tokens=self.hops.max_result_tokens, at_limit="forbid",
        )  # fmt: skip

    def tool(self, condition: str, numbers: Sequence[int]) -> SearchTool:
        make = partial(
            SearchTool, self.tokenizer, self.knowledge, self.hops.top_k,
            questions=[self.questions[i].question for i in numbers],
        )  # fmt: skip
        if condition == "refrag":
            return make(query=self.hops.query)
        elsewhere = [next(self.others(i), i) for i in numbers]  # by prompt: two questions may have the same words

        def other(asking: Asking) -> str:
            return self.questions[elsewhere[asking.prompt]].question

        def wrong(asking: Asking, hits: Sequence[Hit]) -> list[Hit]:
            gold = {d.text for d in gold_documents(self.questions[numbers[asking.prompt]], self.knowledge)}
            return [hit for hit in hits if hit.document.text not in gold]

        return make(query=other, select=wrong, depth=self.options.top_k)

    def latency(self, condition: str, numbers: Sequence[int]) -> dict[str, Metric]:
        if condition not in SEARCHING:
            return super().latency(condition, numbers)
        times, searches = [], []
        for i in numbers[: self.options.n_latency]:
            began = time.perf_counter()
            rollout = self.roll(condition, [i])[0]
            times.append(time.perf_counter() - began)
            searches.append(sum(call.seconds for call in rollout.calls))
        if not times:
            return {}
        return {
            "latency_ms": exact(1e3 * statistics.median(times), len(times)),
            "retrieval_ms": exact(1e3 * statistics.median(searches), len(searches)),
        }
