"""Where the questions of a RAG evaluation come from: the tiny world, or a file; all is checked before anything runs.

Files are JSONL as `nanochat.rag.questions` describes (HotpotQA's records included), or one JSON list of such records,
the form in which HotpotQA's authors publish it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from nanochat.data.world import Question, World
from nanochat.errors import UsageError
from nanochat.rag.questions import RagQuestion, complain
from nanochat.retrieval.document import Document
from nanochat.tokenizer import Tokenizer

LEAST_ROOM = 32  # tokens that a prompt must leave for documents


# ---- the tiny world


def world_questions(
    world: World, n: int = 500, n_unanswerable: int = 500, seed: int = 0, hops: Sequence[int] = (1,)
) -> list[RagQuestion]:
    """`n` questions about new entities, three of four from the part that training may use, one from the held-out part
    (as the entities themselves are divided), with each number of hops by turns; and `n_unanswerable` that no document
    answers: by turns a relation that no document states and a name that nobody bears. Gold documents are those of
    wording 0.

    Raises UsageError for a world without so many questions."""
    if not world.n_new:
        raise UsageError("world: new=0 leaves no new entity to ask about; give at least 40")
    parts = ("train", "heldout")
    some = [_by_turns([world.questions(h, "new", part, seed, n) for part in parts]) for h in hops]
    answerable = list(islice((q for group in zip(*some) for q in group), n))
    absent = _by_turns([world.unanswerable("new", part, seed, n_unanswerable) for part in parts])
    if len(answerable) < n:
        enough = world.n_new * n // max(1, len(answerable)) + 10
        raise UsageError(
            f"world: {world.n_new} new entities give only {len(answerable)} questions, not {n}: give the world more of "
            f"them (new={enough}), or ask fewer"
        )
    return [_of_world(q, f"world-{i}") for i, q in enumerate([*answerable, *islice(absent, n_unanswerable)])]


def _by_turns(parts: Sequence[Iterator[Question]]) -> Iterator[Question]:
    """Three of the first, one of the second, and so on; then what is left."""
    while some := [*islice(parts[0], 3), *islice(parts[1], 1)]:
        yield from some


def _of_world(question: Question, name: str) -> RagQuestion:
    if not question.answerable:
        return RagQuestion(name, question.text, (), "", ())
    return RagQuestion(name, question.text, (question.answer,), question.sentence, question.gold_documents)


# ---- before generation


def with_own_ids(question: RagQuestion) -> RagQuestion:
    """The question with ids of its documents that no other question's documents have."""
    named = tuple(replace(d, id=f"{question.id}/{d.id}") for d in question.documents)
    return replace(question, documents=named, gold=tuple(f"{question.id}/{g}" for g in question.gold))


def gold_documents(question: RagQuestion, knowledge: Any) -> list[Document]:
    """The documents that state the answer, from the question itself or from the knowledge base."""
    own = {document.id: document for document in question.documents}
    return [own[i] if i in own else knowledge.get(i) for i in question.gold]


def check_questions(
    questions: Sequence[RagQuestion], knowledge: Any, tokenizer: Tokenizer, context: int, room: int
) -> None:
    """Everything that would fail or mean nothing later, in one UsageError.

    knowledge: None when the questions bring their documents. room: tokens kept for the answer."""
    problems: list[str] = []
    if not questions:
        problems.append("there is no question")
    if knowledge is not None and hasattr(knowledge, "__len__") and not len(knowledge):
        problems.append("the knowledge base is empty: add documents to it first")
    for question in questions:
        name_of = f"{question.place}, question {question.id}" if question.place else f"question {question.id}"
        if knowledge is None and not question.documents:
            problems.append(f"{name_of}: brings no documents, and no knowledge base was given to search")
            continue
        own = {document.id for document in question.documents}
        for name in question.gold:
            if name not in own and not (hasattr(knowledge, "__contains__") and name in knowledge):
                where = "the question's documents" if knowledge is None else "the knowledge base"
                problems.append(f"{name_of}: its gold document {name!r} is not in {where}")
        needed = prompt_tokens(question, tokenizer) + room + LEAST_ROOM
        if needed > context:
            problems.append(
                f"{name_of}: needs {needed} tokens ({room} for the answer, {LEAST_ROOM} for documents), "
                f"the model's context has {context}"
            )
    complain(problems, "nothing was evaluated")


def prompt_tokens(question: RagQuestion, tokenizer: Tokenizer) -> int:
    """Length of the prompt without documents."""
    return len(tokenizer.render_prompt({"messages": [{"role": "user", "content": question.question}]}).ids)
