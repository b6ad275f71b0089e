"""Multi-hop tasks: questions whose answers take several searches, with the traces of an ideal searcher.

    MultiHopWorld      questions over the tiny world, every few of them over a world of its own
    MultiHopQuestions  questions against a knowledge base: gold chains of the world, or supporting facts (HotpotQA)

A conversation is one question and one message that searches hop by hop, reads, and answers with citations. A trace is
made by the tool that the model will use (`SearchTool`), with the queries of somebody who knows the way: what a model is
trained on is what it meets. `searcher(i)` is what question i is searched in.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import log, sqrt
from typing import Any, Protocol

from nanochat.data.answers import ABSTENTION, exact_match, is_abstention
from nanochat.data.shuffle import Draws, mix
from nanochat.data.world import Question, World
from nanochat.engine.tools import Call, Request
from nanochat.errors import UsageError
from nanochat.rag.knowledge import Library, Searcher
from nanochat.rag.multihop import THEN, SearchTool, documents_of
from nanochat.rag.prompt import heading
from nanochat.rag.questions import RagQuestion
from nanochat.rag.tasks import as_document, cite, cited_answer
from nanochat.retrieval.document import Document, Hit
from nanochat.tasks.task import Task, check_index
from nanochat.tasks.world import abstention
from nanochat.tokenizer import Tokenizer

_WORD = re.compile(r"\w+")
_CITED = re.compile(r"<\|cite_start\|>.*?<\|cite_end\|>", flags=re.S)


class SearchTask(Task, Protocol):
    """A task whose questions are answered by searching."""

    def searcher(self, i: int) -> Searcher:
        """What question i is searched in."""


class MemorySearcher:
    """TF-IDF over a few hundred documents, in memory and without numpy: words weigh 1 + ln(count) in a document and
    ln(1 + N / documents with the word) in a query, documents have length 1 (as `retrieval.simple`)."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents = list(documents)
        self.postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for i, document in enumerate(self.documents):
            weights = {word: 1 + log(n) for word, n in Counter(_words(document.text)).items()}
            norm = sqrt(sum(weight * weight for weight in weights.values()))
            for word, weight in weights.items():
                self.postings[word].append((i, weight / norm))

    def __len__(self) -> int:
        return len(self.documents)

    def search(self, queries: Sequence[str], k: int = 5) -> list[list[Hit]]:
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[Hit]:
        scores: dict[int, float] = defaultdict(float)
        for word in set(_words(query)):
            found = self.postings.get(word, ())
            rarity = log(1 + len(self.documents) / len(found)) if found else 0.0
            for i, weight in found:
                scores[i] += rarity * weight
        best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]
        documents = self.documents
        return [Hit(documents[i].id, score, rank, documents[i]) for rank, (i, score) in enumerate(best, 1)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def judge(conversation: dict[str, Any], completion: str) -> bool:
    """Whether the answer (special tokens by name; calls and results may stand before it) is exactly one of the gold
    answers, or the gold sentence; an abstention where nothing answers the question."""
    said = _CITED.sub(" ", completion.rpartition("<|result_end|>")[2]).strip()
    if conversation["abstain"]:
        return is_abstention(said)
    gold = [*conversation["answers"], conversation["sentence"]]
    return any(bool(one) and exact_match(said, one) for one in gold)


def trace(
    queries: Sequence[str],
    searcher: Searcher,
    gold: Sequence[str],
    sentence: str,
    top_k: int,
    tokenizer: Tokenizer | None = None,
    max_result_tokens: int = 0,
    sought: str = "",
) -> list[dict[str, Any]]:
    """The content of an ideal answer: each query with what it finds, then the sentence behind the headings of the gold
    documents, or the abstention where there are none, or not all were found; before it a citation of the name that was
    `sought`, with the number of its document where there is one: to look first and decide then (`tasks.cite`)."""
    tool = SearchTool(tokenizer, searcher, top_k)
    parts: list[dict[str, Any]] = []
    calls: tuple[Call, ...] = ()
    for query in queries:
        result = tool.run([Request(query, 0, calls, max_result_tokens)])[0]
        calls = (*calls, Call(0, query, result.value, 0, tool.name))
        parts += [{"type": "search", "text": f" {query}"}, *result.parts]  # names have the tokens of the question's
    headings = {document.id: heading(document.title, n) for n, document in enumerate(documents_of(calls), 1)}
    if not gold or not set(gold) <= set(headings):
        found = {document.title: headings[document.id] for document in documents_of(calls)}
        return [*parts, *([cite(found.get(sought, f" {sought}"))] if sought else []), *abstention()]
    return [*parts, *cited_answer([headings[one] for one in gold], sentence)]


def as_conversation(
    question: str,
    content: list[dict[str, Any]],
    answers: Sequence[str],
    sentence: str,
    gold: Sequence[str],
    hops: int,
) -> dict[str, Any]:
    """A conversation with all that judges and rewards ask for; without answers, one to abstain from."""
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": content}],
        "abstain": not answers,
        "answers": list(answers) or [ABSTENTION],
        "sentence": sentence if answers else ABSTENTION,
        "gold_documents": list(gold),
        "hops": hops,
    }


def chain_queries(world: World, question: Question) -> list[str]:
    """What somebody who knows the way searches for: the name of each entity of the chain, what to learn about it, and
    behind `THEN` what is left to learn after that. To know the way is read off the question once, then the next query
    only goes on with the one before. For a question that nothing answers: the name that it asks about."""
    chain = question.hop_chain
    if chain:
        plans = (THEN.join(relation for _, relation, _ in chain[at:]) for at in range(len(chain)))
        return [f"{world.name(entity)} {plan}" for (entity, _, _), plan in zip(chain, plans)]
    return [f"{asked_about(world, question)} {question.relation}"]


def asked_about(world: World, question: Question) -> str:
    """The name in a question of one hop."""
    if question.entity >= 0:
        return world.name(question.entity)
    names = re.findall(r"[A-Z]\w*(?: [A-Z0-9]\w*)*", question.text[1:])  # the first letter is a capital anyway
    return max(names, key=len)


class MultiHopWorld:
    """`n` questions, each group of `per_world` over a world of its own with `entities` documents.

    hops: how many, by turns (several: mixed). absent: share of the questions that no document answers. short: the
    answer is the bare value instead of a sentence. The worlds' seeds follow from `seed`.
    """

    eval_type = "generative"

    def __init__(
        self,
        hops: Sequence[int] = (1, 2, 3),
        seed: int = 0,
        n: int = 100_000,
        *,
        top_k: int = 2,
        entities: int = 120,
        per_world: int = 16,
        absent: float = 0.1,
        short: bool = False,
        tokenizer: Tokenizer | None = None,
        max_result_tokens: int = 0,
    ) -> None:
        if not hops or not set(hops) <= {1, 2, 3}:
            raise UsageError(f"multi-hop: hops={tuple(hops)}: must be some of 1, 2 and 3")
        if n < 1 or entities < 60 or per_world < 1 or not 0 <= absent < 1:
            raise UsageError(
                f"multi-hop: n={n}, entities={entities}, per_world={per_world}, absent={absent}: at least 1; at least "
                "60; at least 1; at least 0 and below 1"
            )
        self.hops, self.seed, self.n, self.top_k, self.entities = tuple(hops), seed, n, top_k, entities
        self.per_world, self.absent, self.short = per_world, absent, short
        self.tokenizer, self.max_result_tokens = tokenizer, max_result_tokens
        self.name = "multihop-world-" + "".join(map(str, self.hops))
        self._recent = lru_cache(4)(self._world)

    def __len__(self) -> int:
        return self.n

    def _world(self, number: int) -> tuple[World, MemorySearcher]:
        """World `number`: its seed, and the wording of each document."""
        draws = Draws(mix(mix(0x40B, self.seed), number))
        world = World(draws.bits() >> 8, 10, self.entities)
        bits = draws.bits()
        documents = (self._document(world, i, mix(bits, i) >> 40) for i in world.pool("new"))
        return world, MemorySearcher(documents)

    @staticmethod
    def _document(world: World, entity: int, wording: int) -> Document:
        document = as_document(world.document(entity, wording))
        return Document(f"{entity}-0", document.content, document.title, document.source, document.metadata)

    def world(self, i: int) -> tuple[World, MemorySearcher]:
        """The world of question i, and what searches in it."""
        return self._recent(check_index(i, self.n) // self.per_world)

    def searcher(self, i: int) -> Searcher:
        """See `SearchTask`."""
        return self.world(i)[1]

    def question(self, i: int) -> Question:
        """Question i: about training's entities of its world."""
        world, _ = self.world(i)
        draws = Draws(mix(mix(0x40C, self.seed), check_index(i, self.n)))
        if draws.below(1000) < 1000 * self.absent:
            both = list(world.unanswerable("new", "train", draws.bits(), 2))  # nothing states it; nobody has the name
            return both[draws.below(2)]
        return next(iter(world.questions(draws.choice(self.hops), "new", "train", draws.bits() >> 8, 1)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        world, searcher = self.world(i)
        question = self.question(i)
        said = question.answer if self.short else question.sentence
        content = trace(
            chain_queries(world, question), searcher, question.gold_documents, said, self.top_k, self.tokenizer,
            self.max_result_tokens, "" if question.answerable else asked_about(world, question),
        )  # fmt: skip
        answers = [question.answer] if question.answerable else []
        return as_conversation(
            question.text, content, answers, question.sentence, question.gold_documents, question.hops
        )

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """See `judge`."""
        return judge(conversation, completion)


class MultiHopQuestions:
    """Questions of a file against a knowledge base, with traces through their gold documents (`gold_queries`).

    Where the gold documents are not all found, the trace abstains; the judge still wants the answer. hops: only
    questions with so many gold documents (0: without any are among them too).
    """

    eval_type = "generative"

    def __init__(
        self,
        questions: Sequence[RagQuestion],
        knowledge: Library,
        *,
        hops: Sequence[int] = (),
        top_k: int = 2,
        tokenizer: Tokenizer | None = None,
        max_result_tokens: int = 0,
        name: str = "multihop-questions",
    ) -> None:
        self.questions = [question for question in questions if not hops or len(question.gold) in hops]
        if not self.questions:
            raise UsageError(f"{name}: none of {len(questions)} questions has {' or '.join(map(str, hops))} hop(s)")
        self.knowledge, self.top_k, self.name = knowledge, top_k, name
        self.tokenizer, self.max_result_tokens = tokenizer, max_result_tokens

    def __len__(self) -> int:
        return len(self.questions)

    def searcher(self, i: int) -> Searcher:
        """See `SearchTask`."""
        return self.knowledge

    def __getitem__(self, i: int) -> dict[str, Any]:
        question = self.questions[check_index(i, len(self))]
        queries, gold = gold_queries(question, self.knowledge)
        content = trace(
            queries, self.knowledge, gold, question.sentence, self.top_k, self.tokenizer, self.max_result_tokens
        )
        hops = max(1, len(gold))
        return as_conversation(question.question, content, question.answers, question.sentence, gold, hops)

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """See `judge`."""
        return judge(conversation, completion)


def gold_queries(question: RagQuestion, knowledge: Library) -> tuple[list[str], list[str]]:
    """Queries that lead to the gold documents one by one, and these in that order: the title of one that the question
    names, then of one that a document before names; the question itself where no title is known yet."""
    rest = [knowledge.get(one) for one in question.gold]
    known, queries, order = question.question.lower(), [], []
    while rest:
        named = [document for document in rest if _bare(document.title) and _bare(document.title).lower() in known]
        document = (named or rest)[0]
        asked = question.question in queries
        queries.append(_bare(document.title) if named or (asked and document.title) else question.question)
        order.append(document.id)
        known += f" {document.text.lower()}"
        rest.remove(document)
    return queries or [question.question], order


def _bare(title: str) -> str:
    """A title without the brackets that tell it from others: `Rush (band)`."""
    return re.sub(r"\s*\([^)]*\)$", "", title).strip()
