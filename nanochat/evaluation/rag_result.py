"""What became of the questions of a RAG evaluation, summed up: one column a condition, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanochat.intervals import Metric, exact, mean, ratio, share
from nanochat.rag.calibration import reliability
from nanochat.rag.questions import RagQuestion

CONDITIONS = {
    "closed_book": "closed book",
    "rag": "RAG",
    "rag_gold": "gold documents",
    "rag_shuffled": "shuffled documents",
    "no_documents": "no documents",
}
SEARCHING = {"refrag": "REFRAG", "refrag_shuffled": "REFRAG, shuffled"}  # the model searches on its own
HEADINGS = {**SEARCHING, **CONDITIONS}


class Judged(NamedTuple):
    """A question and what became of it."""

    number: int
    question: RagQuestion
    answer: str  # with its citations as [n]
    documents: tuple[str, ...]  # titles or ids
    right: bool
    f1: float
    abstained: bool
    hallucinated: bool
    citations: int
    right_citations: int
    sentences: int
    cited_sentences: int  # with a right citation
    gold_found: int  # gold documents in the prompt
    first: bool  # document 1 states the answer
    answer_found: bool  # some document in the prompt holds the answer's words
    supported: bool  # right, and a document that it cites states it (any document where it cites none)
    score: float  # rag.support's hallucination score, to be compared with that
    cut: bool
    queries: int = 0  # searches that the model made itself


@dataclass(frozen=True)
class Column:
    """What one condition came to."""

    metrics: dict[str, Metric]
    judged: list[Judged] = field(repr=False)
    seconds: float = 0.0


@dataclass(frozen=True)
class RagResult:
    """The columns by condition. `multihop`: the model could search on its own, and `rag` is the one search that it is
    compared with."""

    columns: dict[str, Column]
    multihop: bool = False

    def metrics(self, new: bool = True) -> dict[str, Metric]:
        """Flat names: `rag_em`, `rag_gold_em`, …; those about RAG's errors without a prefix (`hallucination_rate`,
        `citation_precision`, `citation_recall`, `abstain_unanswerable`, `retrieval_recall`). new: the questions are
        about what no training told, and closed book is named `closed_book_new`. With `multihop` it is `refrag_em`,
        `refrag_all_gold_recall`, …, and `multihop_one_shot_em` for RAG, whose names all have that prefix then."""
        found: dict[str, Metric] = {}
        prefixes = {"closed_book": "closed_book_new"} if new else {}
        if self.multihop:
            prefixes["rag"] = "multihop_one_shot"
        for condition, column in self.columns.items():
            prefix = prefixes.get(condition, condition)
            for name, metric in column.metrics.items():
                bare = condition == prefix == "rag" and name in PLAIN
                name = "all_gold_recall" if self.multihop and name == "retrieval_all_gold" else name
                found[name if bare else f"{prefix}_{name}"] = metric
        return found

    def table(self) -> str:
        """A column a condition, a row a metric: value and 95% interval."""
        names = [name for name in ROWS if any(name in c.metrics for c in self.columns.values())]
        rows = [["", *(HEADINGS[condition] for condition in self.columns)]]
        rows += [[ROWS[name], *(_cell(c.metrics.get(name)) for c in self.columns.values())] for name in names]
        rows.append(["questions", *(str(len(c.judged)) for c in self.columns.values())])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        cells = [[f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])] for row in rows]
        lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(rest) for row, rest in zip(rows, cells)]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def samples(self, n: int) -> list[dict[str, Any]]:
        """The first `n` of each condition."""
        return [
            {
                "condition": condition, "question": j.question.question, "answer": j.answer,
                "gold": list(j.question.answers), "documents": list(j.documents), "right": j.right,
                "abstained": j.abstained, "hallucinated": j.hallucinated, "hallucination_score": round(j.score, 4),
            }
            for condition, column in self.columns.items()
            for j in [*column.judged[: n - n // 3], *[j for j in column.judged if not j.question.answerable][: n // 3]]
        ]  # fmt: skip


ROWS = {
    "em": "right answer",
    "em_1_hops": "  one hop",
    "em_2_hops": "  two hops",
    "em_3_hops": "  three hops",
    "f1": "token F1",
    "hallucination_rate": "hallucination",
    "abstain_answerable": "abstains, answerable",
    "abstain_unanswerable": "abstains, unanswerable",
    "citation_precision": "citation precision",
    "citation_recall": "citation recall",
    "always_cite_first": "always citing [1]",
    "retrieval_recall": "gold in prompt",
    "retrieval_all_gold": "all gold in prompt",
    "answer_in_prompt": "answer in prompt",
    "support_auc": "support score, AUC",
    "support_ece": "support score, ECE",
    "queries": "searches a question",
    "retrieval_ms": "search, ms",
    "latency_ms": "answer, ms",
}
PLAIN = (
    "hallucination_rate", "citation_precision", "citation_recall", "abstain_unanswerable", "retrieval_recall",
    "retrieval_all_gold", "answer_in_prompt", "always_cite_first", "retrieval_ms", "support_auc", "support_ece",
)  # fmt: skip


def summarize(judged: Sequence[Judged], condition: str, seed: int = 0) -> dict[str, Metric]:
    """The metrics of one condition. What there is nothing to measure on is left out."""
    answerable = [j for j in judged if j.question.answerable]
    others = [j for j in judged if not j.question.answerable]
    given = [j for j in judged if not j.abstained]
    found: dict[str, Metric] = {"hallucination_rate": share(sum(j.hallucinated for j in judged), len(judged))}
    if answerable:
        found["em"] = share(sum(j.right for j in answerable), len(answerable))
        found |= by_hops(answerable)
        found["f1"] = mean([j.f1 for j in answerable], seed)
        found["abstain_answerable"] = share(sum(j.abstained for j in answerable), len(answerable))
    if others:
        found["abstain_unanswerable"] = share(sum(j.abstained for j in others), len(others))
    if condition in ("closed_book", "no_documents"):
        return found
    if condition in SEARCHING:
        found["queries"] = mean([float(j.queries) for j in judged], seed)
    found |= parts("citation_precision", [(j.right_citations, j.citations) for j in given], seed)
    found |= parts("citation_recall", [(j.cited_sentences, j.sentences) for j in given], seed)
    known = [j for j in answerable if j.question.gold]
    found |= parts("retrieval_recall", [(j.gold_found, len(set(j.question.gold))) for j in known], seed)
    if any(len(set(j.question.gold)) > 1 for j in known):
        whole = sum(j.gold_found == len(set(j.question.gold)) for j in known)
        found["retrieval_all_gold"] = share(whole, len(known))
    if answerable:
        found["always_cite_first"] = share(sum(j.first for j in answerable), len(answerable))
        found["answer_in_prompt"] = share(sum(j.answer_found for j in answerable), len(answerable))
    labels = [j.supported for j in given]
    if condition in ("rag", "refrag") and any(labels) and not all(labels):
        quality = reliability([1 - j.score for j in given], labels)
        found |= {"support_auc": exact(quality.auc, quality.n), "support_ece": exact(quality.ece, quality.n)}
    return found


def by_hops(judged: Sequence[Judged]) -> dict[str, Metric]:
    """Right answers by the number of gold documents, where it is not the same for all questions."""
    groups: dict[int, list[bool]] = {}
    for j in judged:
        groups.setdefault(len(set(j.question.gold)), []).append(j.right)
    groups.pop(0, None)  # gold documents are not known
    if len(groups) < 2:
        return {}
    return {f"em_{n}_hops": share(sum(right), len(right)) for n, right in sorted(groups.items())}


def parts(name: str, pairs: Sequence[tuple[int, int]], seed: int) -> dict[str, Metric]:
    """A share of things of which each question has a few: Wilson's interval where none has more than one, else the
    questions are resampled. Nothing when there is no such thing."""
    above, below = [a for a, _ in pairs], [b for _, b in pairs]
    if not sum(below):
        return {}
    if max(below) == 1:
        return {name: share(sum(above), sum(below))}
    return {name: ratio(above, below, seed)}


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    if metric.value > 1:
        return f"{metric.value:.3g}"
    return f"{metric.value:.3f}" + ("" if metric.low == metric.high else f" [{metric.low:.3f}, {metric.high:.3f}]")
