"""RAG tasks: questions whose answers stand in the documents of the prompt, or nowhere.

    RagWorld    contexts of the tiny world, each from a world of its own: reading is the only way to know
    Retrieved   questions against a knowledge base: what the retriever finds, sometimes without the gold document
    Given       questions that bring their documents
    Wrapped     any chat task, with what a knowledge base finds for its questions put before them
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nanochat.data.answers import contains_answer, exact_match, is_abstention
from nanochat.data.shuffle import Draws, mix
from nanochat.data.world import VAL_WORDING, Question, World
from nanochat.rag.citations import number_of
from nanochat.rag.knowledge import Library, Searcher
from nanochat.rag.prompt import Block, document_parts, heading, retrieval_message
from nanochat.rag.questions import RagQuestion
from nanochat.retrieval.document import Document
from nanochat.tasks.task import Task, check_index, message_text
from nanochat.tasks.world import abstention
from nanochat.tokenizer import Tokenizer


def cited_answer(headings: Sequence[str], sentence: str) -> list[dict[str, str]]:
    """Citations first, then the sentence that rests on them: two look-ups, each of which can be learnt by itself. The
    blank in front gives a name at the beginning the same tokens as in the documents."""
    return [*map(cite, headings), {"type": "text", "text": f" {sentence}"}]


def cite(label: str) -> dict[str, str]:
    """A citation; before an abstention it says what was looked for, with the number of the document where it was found.
    To look first and decide then takes one step at a time; such citations count for nothing."""
    return {"type": "cite", "text": label}


_CITED = re.compile(r"\s*<\|cite_start\|>(.*?)<\|cite_end\|>", re.DOTALL)


def judge(conversation: dict[str, Any], completion: str) -> bool:
    """Whether an answer (special tokens by name) abstains where it should, or else cites only documents that are gold,
    at least one, and says an answer that is right."""
    if conversation["abstain"]:
        return is_abstention(_CITED.sub("", completion))
    cited: list[int] = []
    while match := _CITED.match(completion):
        cited.append(number_of(match[1]))
        completion = completion[match.end() :]
    said = _CITED.sub("", completion)
    right = any(exact_match(said, a) or contains_answer(said, a) for a in conversation["answers"])
    return right and bool(cited) and set(cited) <= set(conversation["gold_numbers"])


ALIKE = 0.5  # of the contexts and absent questions: names that share a word, as a search by words would bring them


def namesakes(world: World, pool: range, entity: int) -> list[int]:
    """Other entities whose names share a word with this one's."""
    words = set(world.name(entity).split())
    return [i for i in pool if i != entity and not words.isdisjoint(world.name(i).split())]


class RagWorld:
    """`n` contexts of given documents, each with several questions.

    Every context comes from a world of its own (seeds from `seed` on), so that nothing can be known by heart. Half of
    them hold one document, under any number, as when a cited document is read again (`rag.prompt.focused`); the others
    two to `documents` documents, half of the time of namesakes (`ALIKE`). `absent`: share of the questions that the
    documents do not answer: about somebody else, or about something that no document states. `facts` > 0 cuts documents
    to so many sentences and takes them from entities of one kind: then only the names tell them apart.
    """

    eval_type = "generative"

    def __init__(
        self,
        seed: int = 0,
        n: int = 100_000,
        documents: int = 3,
        questions: int = 6,
        absent: float = 0.15,
        facts: int = 0,
    ) -> None:
        self.seed, self.n, self.n_documents, self.n_questions, self.absent = seed, n, documents, questions, absent
        self.facts = facts
        self.name = f"rag-world-{documents}" + (f"x{facts}" if facts else "")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = check_index(i, self.n)
        draws = Draws(mix(mix(0x4A6, self.seed), i))
        world = World(draws.bits() >> 8, 10, 1000)
        pool = world.pool("new")
        entities = self.entities(world, pool, draws)
        stated: list[list[str]] = []
        documents: list[Document] = []
        for entity in entities:
            relations, document = self.document(world, entity, draws)
            stated.append(relations)
            documents.append(document)
        first = 1 + draws.below(self.n_documents) if len(documents) == 1 else 1
        messages: list[dict[str, Any]] = [{"role": "retrieval", "content": document_parts(documents, first)}]
        for _ in range(self.n_questions):
            question, number = self.ask(world, pool, entities, stated, draws, first)
            assert question.entity is not None
            about = entities.index(question.entity) if question.entity in entities else None
            name = world.name(question.entity)
            label = f" {name}" if about is None else heading(documents[about].title, first + about)
            answer = cited_answer([label], question.sentence) if number else [cite(label), *abstention()]
            messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}]
        return {
            "messages": messages,
            "abstain": number == 0,
            "answers": [question.answer],
            "gold_numbers": [number] if number else [],
        }

    def entities(self, world: World, pool: range, draws: Draws) -> list[int]:
        """Different entities, at most `documents` of them."""
        n = 1 if draws.below(2) or self.n_documents == 1 else 2 + draws.below(self.n_documents - 1)
        shown = [draws.choice(pool)]
        kind = world.entity(shown[0]).kind if self.facts else None
        alike = namesakes(world, pool, shown[0]) if n > 1 and draws.below(1000) < 1000 * ALIKE else []
        while len(shown) < n:
            entity = draws.choice([i for i in alike if i not in shown] or pool)
            if entity not in shown and (kind is None or world.entity(entity).kind == kind):
                shown.append(entity)
        return shown

    def document(self, world: World, entity: int, draws: Draws) -> tuple[list[str], Document]:
        """The relations that a document states, and the document."""
        wording = draws.bits() % VAL_WORDING
        record = world.document(entity, wording)
        statements = list(world.statements(entity, wording).items())
        if self.facts:
            first = draws.below(max(1, len(statements) - self.facts + 1))
            statements = statements[first : first + self.facts]
            record["content"] = " ".join(sentence for _, sentence in statements)
        return [relation for relation, _ in statements], as_document(record)

    def ask(
        self, world: World, pool: range, shown: list[int], stated: list[list[str]], draws: Draws, first: int = 1
    ) -> tuple[Question, int]:
        """A question, and the number of the document that answers it (0: none)."""
        kind = draws.below(1000)
        if kind < 400 * self.absent:
            return world.unstated(draws.choice(shown), draws.bits()), 0
        if kind < 1000 * self.absent:
            alike = namesakes(world, pool, draws.choice(shown)) if draws.below(1000) < 1000 * ALIKE else []
            entity = draws.choice([i for i in alike or pool if i not in shown] or [i for i in pool if i not in shown])
            return world.question(entity, (draws.choice(list(world.entity(entity).facts)),), draws.bits()), 0
        place = draws.below(len(shown))
        return world.question(shown[place], (draws.choice(stated[place]),), draws.bits()), first + place

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """See `judge`."""
        return judge(conversation, completion)


def as_document(record: dict[str, Any]) -> Document:
    """A document of the world as a document of a knowledge base."""
    return Document(record["id"], record["content"], record["title"], "tiny world", {"entity": record["entity"]})


class Given:
    """Questions that bring their documents: the prompt holds these, shuffled."""

    eval_type = "generative"

    def __init__(
        self,
        questions: Sequence[RagQuestion],
        tokenizer: Tokenizer | None = None,
        max_tokens: int = 0,
        absent: float = 0.0,
        seed: int = 0,
        name: str = "rag-given",
    ) -> None:
        self.questions, self.tokenizer, self.max_tokens = questions, tokenizer, max_tokens
        self.absent, self.seed, self.name = absent, seed, name

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = check_index(i, len(self))
        question, draws = self.questions[i], Draws(mix(mix(0x61F, self.seed), i))
        documents = list(self.documents(question, i))
        if draws.below(1000) < 1000 * self.absent:
            documents = [d for d in documents if d.id not in question.gold]
        block = retrieval_message(documents, self.tokenizer, self.max_tokens, "shuffled", draws.bits() >> 1)
        return ask_about(question, block)

    def documents(self, question: RagQuestion, i: int) -> Sequence[Document]:
        """The documents of the prompt, best first."""
        return question.documents

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """See `judge`."""
        return judge(conversation, completion)


class Retrieved(Given):
    """Questions against a knowledge base: the prompt holds what it finds.

    In training (`keep_gold`) a gold document that was not found takes the place of the worst that was, except in the
    share `absent` of the prompts, where gold documents are left out and the answer is to abstain. Searches are made for
    many questions at once and remembered.
    """

    AHEAD = 64  # questions searched together

    def __init__(
        self,
        questions: Sequence[RagQuestion],
        knowledge: Library,
        top_k: int = 5,
        keep_gold: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(questions, **options)
        self.knowledge, self.top_k, self.keep_gold = knowledge, top_k, keep_gold
        self.name = options.get("name", "rag-retrieved")
        self._found: dict[int, tuple[Document, ...]] = {}

    def documents(self, question: RagQuestion, i: int) -> Sequence[Document]:
        if i not in self._found:
            ahead = [j for j in range(i, min(i + self.AHEAD, len(self))) if j not in self._found]
            hits = self.knowledge.search([self.questions[j].question for j in ahead], self.top_k)
            for j, found in zip(ahead, hits):
                self._found[j] = tuple(hit.document for hit in found)
        found_ = self._found[i]
        missing = [g for g in question.gold if g not in {d.id for d in found_}]
        if not (self.keep_gold and missing):
            return found_
        gold = [self.knowledge.get(g) for g in missing]
        return [*found_[: max(0, self.top_k - len(gold))], *gold]


def ask_about(question: RagQuestion, block: Block) -> dict[str, Any]:
    """A conversation of one question about the documents of a block: cited when one of them is gold, else abstaining.
    A question with answers but no gold document named is answered without a citation."""
    numbers = [n for n, document in enumerate(block.documents, 1) if document.id in question.gold]
    needed = set(question.gold)
    known = needed <= {block.documents[n - 1].id for n in numbers} and bool(question.answers)
    headings = [heading(block.documents[n - 1].title, n) for n in numbers]
    answer = cited_answer(headings, question.sentence) if known else abstention()
    return {
        "messages": [
            block.message,
            {"role": "user", "content": question.question},
            {"role": "assistant", "content": answer},
        ],
        "abstain": not known,
        "answers": list(question.answers),
        "gold_numbers": numbers,
    }


class Wrapped:
    """Any chat task with retrieval: what the knowledge base finds for the first question stands before it."""

    def __init__(
        self, task: Task, knowledge: Searcher, top_k: int = 5, tokenizer: Tokenizer | None = None, max_tokens: int = 0
    ) -> None:
        self.task, self.knowledge, self.top_k = task, knowledge, top_k
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.name, self.eval_type = f"{task.name}+retrieval", task.eval_type

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, i: int) -> dict[str, Any]:
        conversation = self.task[i]
        messages = list(conversation["messages"])
        place = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
        if place is None:
            return conversation
        hits = self.knowledge.search([message_text(messages[place])], self.top_k)[0]
        block = retrieval_message([hit.document for hit in hits], self.tokenizer, self.max_tokens)
        messages.insert(place, block.message)
        return {**conversation, "messages": messages}

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """As the task that is wrapped."""
        return self.task.evaluate(conversation, completion)
