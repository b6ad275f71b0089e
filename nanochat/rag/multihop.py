"""Search in several hops: the tool with which a model searches while it answers, and the same loop without a model.

    search = SearchTool(tokenizer, knowledge, top_k=2)
    rollouts(model, tokenizer, prompts, sampling, tools=[search], max_calls=3)

The model writes a query between <|search_start|> and <|search_end|> and reads what it finds between <|result_start|>
and <|result_end|>. Documents are numbered on through all hops of an answer, and one that was shown is not shown again.
Who writes the queries, which hits are shown and when to stop can be put into other hands: a `Query`, `Select` or
`Stop`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple, TypeAlias

from nanochat.engine.rollout import Rollout
from nanochat.engine.tools import Call, Request, Result
from nanochat.errors import UsageError
from nanochat.rag.citations import ABSTAINED, Answer, parse
from nanochat.rag.knowledge import Searcher, hits_of
from nanochat.rag.prompt import aggregate, distinct, fit, headings, result_part, said
from nanochat.retrieval.document import Document, Hit
from nanochat.tokenizer import Tokenizer

MAX_QUERY = 1000  # characters that are searched for; a longer query loses its end
THEN = " > "  # behind it a query says what is to be looked for next: a plan for whoever goes on, not searched for


class Hop(NamedTuple):
    """One search of an answer."""

    query: str  # as it was searched; empty: nothing was
    hits: tuple[Hit, ...]  # those that are shown, best first
    documents: tuple[Document, ...]  # what the model sees of them: joined by source and cut to fit
    first: int = 1  # the number of the first of them
    cut: bool = False  # documents were shortened or left out to fit


class Asking(NamedTuple):
    """Where an answer stands when it searches."""

    question: str  # empty where nobody told the tool
    written: str  # by the model; the question itself where no model writes
    hops: tuple[Hop, ...]  # the searches before
    prompt: int = 0  # the number of the prompt that is answered: two may ask the same


Query: TypeAlias = Callable[[Asking], str]  # what to search for; empty: nothing
Select: TypeAlias = Callable[[Asking, Sequence[Hit]], Sequence[Hit]]  # of the hits that are new, those to show
Stop: TypeAlias = Callable[[Asking], bool]  # after a hop (the last of `hops`): whether it was the last one


def as_written(asking: Asking) -> str:
    """The query that the model wrote, without its plan (`THEN`)."""
    return asking.written.partition(THEN)[0]


def found_nothing(asking: Asking) -> bool:
    """Whether the latest search brought nothing new: more of the same will not help."""
    return not asking.hops[-1].documents


class SearchTool:
    """Searches for all rows that wait, in one batch.

    knowledge: one searcher for all prompts, or one for each. top_k: documents a hop. query, select, stop: see above;
    by default the model's own words, the best, and never. questions: of each prompt, for these three. depth: hits to
    select from (0: top_k; those already shown come on top). tokenizer: to cut documents to what a row has room for;
    None: they stay whole. Raises UsageError for values out of range.
    """

    name: str = "search"
    start: str = "search_start"
    end: str = "search_end"

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        knowledge: Searcher | Sequence[Searcher],
        top_k: int = 3,
        *,
        query: Query = as_written,
        select: Select | None = None,
        stop: Stop | None = None,
        questions: Sequence[str] = (),
        depth: int = 0,
    ) -> None:
        if top_k < 1:
            raise UsageError(f"top_k {top_k}: expected at least 1 document a hop")
        if depth < 0:
            raise UsageError(f"depth {depth}: expected 0 (as top_k) or more")
        self.tokenizer, self.knowledge, self.top_k = tokenizer, knowledge, top_k
        self.query, self.select, self.stop = query, select, stop
        self.questions, self.depth = questions, max(depth, top_k)

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """The result of each request; its value is a `Hop`."""
        askings = [self.asking(request) for request in requests]
        queries = [" ".join(self.query(asking).split())[:MAX_QUERY] for asking in askings]
        known = max((sum(len(hop.hits) for hop in asking.hops) for asking in askings), default=0)
        found = self.search(queries, requests, known)
        return [self.result(*each) for each in zip(requests, askings, queries, found)]

    def asking(self, request: Request) -> Asking:
        question = self.questions[request.prompt] if self.questions else ""
        return Asking(question, request.text, hops_of(request.earlier), request.prompt)

    def search(self, queries: Sequence[str], requests: Sequence[Request], known: int) -> list[list[Hit]]:
        """Hits for each query that is not empty, in one search for each searcher; `known`: how many of them may have
        been chosen before."""
        groups: dict[int, tuple[Searcher, list[int]]] = {}
        for i, (query, request) in enumerate(zip(queries, requests)):
            searcher = self.knowledge[request.prompt] if isinstance(self.knowledge, Sequence) else self.knowledge
            if query:
                groups.setdefault(id(searcher), (searcher, []))[1].append(i)
        found: list[list[Hit]] = [[] for _ in queries]
        for searcher, members in groups.values():
            for i, hits in zip(members, hits_of(searcher, [queries[i] for i in members], self.depth + known)):
                found[i] = hits
        return found

    def result(self, request: Request, asking: Asking, query: str, hits: Sequence[Hit]) -> Result:
        """What is new among the hits, numbered on and cut to fit."""
        before = {said(hit.document) for hop in asking.hops for hit in hop.hits}
        new = [hit for hit in hits if said(hit.document) not in before][: self.depth]
        chosen = tuple(new if self.select is None else self.select(asking, new))[: self.top_k]
        documents = distinct(aggregate([hit.document for hit in chosen]))
        first = n_shown(asking.hops) + 1
        trimmed = dropped = 0
        if request.max_tokens and self.tokenizer is not None:
            whole = documents
            documents, trimmed, dropped = fit(whole, self.tokenizer, request.max_tokens, first)
            chosen = _shown(chosen, whole[: len(documents)])
        hop = Hop(query, chosen, tuple(documents), first, bool(trimmed or dropped))
        last = self.stop is not None and self.stop(asking._replace(hops=(*asking.hops, hop)))
        return Result([result_part(documents, first)], hop, last)


def _shown(hits: Sequence[Hit], documents: Sequence[Document]) -> tuple[Hit, ...]:
    """The hits that are among the documents: what did not fit may be found again."""
    ids, texts = {document.id for document in documents}, {said(document) for document in documents}
    return tuple(hit for hit in hits if hit.document.id in ids or said(hit.document) in texts)


def hops_of(calls: Sequence[Call]) -> tuple[Hop, ...]:
    """The searches among the calls of a rollout."""
    return tuple(call.result for call in calls if isinstance(call.result, Hop))


def n_shown(hops: Sequence[Hop]) -> int:
    return sum(len(hop.documents) for hop in hops)


def documents_of(calls: Sequence[Call]) -> tuple[Document, ...]:
    """All documents that a rollout saw: number n is [n - 1]."""
    return tuple(document for hop in hops_of(calls) for document in hop.documents)


def answer_ids(rollout: Rollout, tokenizer: Tokenizer) -> list[int]:
    """The tokens of the answer: what the model said after its last result, up to a query that it began and did not
    end."""
    start = max((call.at + call.n_tokens for call in rollout.calls), default=0)
    search = tokenizer.special(SearchTool.start)
    return list(takewhile(lambda token: token != search, rollout.ids[start:]))


def read_answer(rollout: Rollout, tokenizer: Tokenizer) -> Answer:
    """The answer with its citations, which name the documents of all hops. A row that ended in a search said none."""
    return parse(answer_ids(rollout, tokenizer), tokenizer, headings(documents_of(rollout.calls)))


def believed(answer: Answer) -> Answer:
    """The answer, or an abstention in its place where it says nothing, or rests on a document that was not found: each
    citation is a link of the chain that led to it."""
    return answer if answer.text and not answer.adrift else ABSTAINED


def search_in_hops(
    knowledge: Searcher,
    questions: Sequence[str],
    max_hops: int = 2,
    top_k: int = 3,
    *,
    query: Query,
    select: Select | None = None,
    stop: Stop | None = found_nothing,
    depth: int = 0,
) -> list[tuple[Hop, ...]]:
    """The searches for each question when no model takes part: what `query` asks for, hop by hop, all questions
    together. `written` is the question."""
    tool = SearchTool(None, knowledge, top_k, query=query, select=select, stop=stop, questions=questions, depth=depth)
    calls: list[tuple[Call, ...]] = [() for _ in questions]
    going = list(range(len(questions)))
    for _ in range(max_hops):
        results = tool.run([Request(questions[i], i, calls[i]) for i in going])
        for i, result in zip(going, results):
            calls[i] = (*calls[i], Call(0, questions[i], result.value, 0, tool.name))
        going = [i for i, result in zip(going, results) if not result.last]
    return [hops_of(each) for each in calls]
