"""RAG tasks of the tiny world: questions whose answers stand in the documents of the prompt, or nowhere."""

from __future__ import annotations

import re
from typing import Any

from nanochat.data.answers import exact_match, is_abstention
from nanochat.data.shuffle import Draws, mix
from nanochat.data.world import VAL_WORDING, Question, World
from nanochat.rag.prompt import retrieval_message
from nanochat.retrieval.document import Document
from nanochat.tasks.task import check_index
from nanochat.tasks.world import abstention


def cited_answer(number: int, sentence: str) -> list[dict[str, str]]:
    """Citation first, then the sentence that rests on it: two look-ups, each of which can be learnt by itself."""
    return [{"type": "cite", "text": str(number)}, {"type": "text", "text": sentence}]


class RagWorld:
    """`n` contexts of given documents, each with several questions.

    Every context comes from a world of its own (seeds from `seed` on), so that nothing can be known by heart: the
    answer has to be read. `absent`: share of the questions that the documents do not answer.
    """

    eval_type = "generative"

    def __init__(
        self, seed: int, n: int, documents: int = 3, questions: int = 6, absent: float = 0.15, draw: int = 0
    ) -> None:
        self.seed, self.n, self.n_documents, self.n_questions = seed, n, documents, questions
        self.absent, self.draw = absent, draw
        self.name = f"rag-world-{documents}"

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = check_index(i, self.n)
        draws = Draws(mix(mix(self.seed, self.draw), i))
        world = World(draws.bits() >> 8, 10, 200)
        pool = world.pool("new")
        n_documents = 1 + draws.below(self.n_documents)
        shown: list[int] = []
        while len(shown) < n_documents:
            entity = pool[draws.below(len(pool))]
            if entity not in shown:
                shown.append(entity)
        wordings = [draws.bits() % VAL_WORDING for _ in shown]
        documents = [as_document(world.document(e, w)) for e, w in zip(shown, wordings)]
        messages: list[dict[str, Any]] = [retrieval_message(documents).message]
        for _ in range(self.n_questions):
            absent = draws.below(1000) < 1000 * self.absent
            question, number = self.ask(world, pool, shown, absent, draws)
            answer = abstention()
            if number:
                stated = world.statements(shown[number - 1], wordings[number - 1])
                answer = cited_answer(number, stated[question.relation])
            messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "abstain": answer == abstention()}

    def ask(self, world: World, pool: range, shown: list[int], absent: bool, draws: Draws) -> tuple[Question, int]:
        """A question, and the number of the document that answers it (0: none)."""
        if absent and draws.below(3) == 0:
            return next(q for q in world.unanswerable("new", "train", draws.bits(), 2) if q.entity >= 0), 0
        if absent:
            while (entity := pool[draws.below(len(pool))]) in shown:
                pass
            number = 0
        else:
            pick = draws.below(len(shown))
            entity, number = shown[pick], pick + 1
        chains = list(world.entity(entity).facts)
        return world.question(entity, (draws.choice(chains),), draws.bits()), number

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Whether the last answer is right: it abstains where it should, or cites the document and repeats what it
        says."""
        if conversation["abstain"]:
            return is_abstention(completion)
        cite, said = conversation["messages"][-1]["content"]
        found = re.match(r"\s*<\|cite_start\|>\s*(\d+)\s*<\|cite_end\|>(.*)", completion, re.DOTALL)
        return found is not None and found[1] == cite["text"] and exact_match(found[2], said["text"])


def as_document(record: dict[str, Any]) -> Document:
    """A document of the world as a document of a knowledge base."""
    return Document(record["id"], record["content"], record["title"], "tiny world", {"entity": record["entity"]})
