"""Tasks of the tiny world, closed book: answer what the pretraining text told, abstain on all else."""

from __future__ import annotations

from typing import Any

from nanochat.data.answers import ABSTENTION, exact_match, is_abstention
from nanochat.data.shuffle import mix
from nanochat.data.world import Question, World
from nanochat.errors import UsageError
from nanochat.tasks.task import chat, check_index, message_text


def abstention() -> list[dict[str, str]]:
    """The content of a message that abstains."""
    return [{"type": "abstain", "text": ABSTENTION}]


def _conversation(question: Question, abstain: bool, style: str) -> dict[str, Any]:
    answer = question.answer if style == "short" else question.sentence
    return chat(
        question.text,
        abstention() if abstain else answer,
        abstain=abstain,
        answer=question.answer,
        sentence=question.sentence,
        entity=question.entity,
        relation=question.relation,
        hops=question.hops,
        gold_documents=question.gold_documents,
    )


def _judge(conversation: dict[str, Any], completion: str) -> bool:
    if conversation["abstain"]:
        return is_abstention(completion)
    return exact_match(completion, conversation["answer"]) or exact_match(completion, conversation["sentence"])


class WorldQuestions:
    """Questions of one split, part and number of hops. About new entities the answer is the abstention.

    Args:
        limit: how many (entity, chain) pairs; all when None.
        draw: chooses which pairs come first and how they are worded.
        wordings: each pair is asked this often, differently (up to 5 wordings for one hop).
        style: "short" answers, or "sentence".
    """

    eval_type = "generative"

    def __init__(
        self,
        world: World,
        split: str = "known",
        part: str = "train",
        hops: int = 1,
        limit: int | None = None,
        draw: int = 0,
        wordings: int = 1,
        style: str = "short",
    ) -> None:
        _check_style(style)
        self.world, self.draw, self.style, self.wordings = world, draw, style, wordings
        self.abstain = split == "new"
        self.name = f"world-qa-{split}-{part}-{hops}hop"
        self._pairs: list[tuple[int, tuple[str, ...]]] = []
        for pair in world.pairs(hops, split, part, draw):
            if limit is not None and len(self._pairs) >= limit:
                break
            self._pairs.append(pair)

    def __len__(self) -> int:
        return len(self._pairs) * self.wordings

    def question(self, i: int) -> Question:
        """Question i with its gold answer, documents and hops."""
        turn, place = divmod(check_index(i, len(self)), len(self._pairs))
        entity, chain = self._pairs[place]
        return self.world.question(entity, chain, mix(self.draw, place) + turn)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return _conversation(self.question(i), self.abstain, self.style)

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Exact match with the short answer or the sentence; for new entities: whether it abstains."""
        return _judge(conversation, completion)


class WorldUnanswerable:
    """Questions that nothing answers: a relation that no document states, or a name that nobody bears."""

    eval_type = "generative"

    def __init__(self, world: World, split: str = "known", part: str = "train", n: int = 500, draw: int = 0) -> None:
        self.name = f"world-unanswerable-{split}-{part}"
        self._questions = list(world.unanswerable(split, part, draw, n))

    def __len__(self) -> int:
        return len(self._questions)

    def question(self, i: int) -> Question:
        """Question i."""
        return self._questions[i]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return _conversation(self._questions[i], True, "short")

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Whether the completion abstains."""
        return _judge(conversation, completion)


class WorldDialogues:
    """`n` chats of several turns."""

    eval_type = "generative"

    def __init__(
        self,
        world: World,
        split: str = "known",
        part: str = "train",
        n: int = 1000,
        draw: int = 0,
        style: str = "short",
    ) -> None:
        _check_style(style)
        self.world, self.split, self.part, self.n, self.draw, self.style = world, split, part, n, draw, style
        self.name = f"world-chat-{split}-{part}"

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.world.dialogue(check_index(i, self.n), self.split, self.part, self.draw, self.style)

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Exact match with the last message."""
        gold = message_text(conversation["messages"][-1])
        return is_abstention(completion) if gold == ABSTENTION else exact_match(completion, gold)


def _check_style(style: str) -> None:
    if style not in ("short", "sentence"):
        raise UsageError(f"style must be 'short' or 'sentence', got {style!r}")
