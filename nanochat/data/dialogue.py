"""Dialogues of the tiny world: greeting, small talk, questions with follow-ups by pronoun, thanks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanochat.data import lexicon as lex
from nanochat.data import words
from nanochat.data.answers import ABSTENTION
from nanochat.data.shuffle import Draws, Shuffle

if TYPE_CHECKING:
    from nanochat.data.world import Entity, World


def sentence_case(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def pronouns(name: str, kind: str) -> tuple[str, str, str]:
    """Subject, object and possessive pronoun of an entity."""
    if kind != "person":
        return "it", "it", "its"
    first = words.FIRST_NAMES.index(name.split(" ", 1)[0])
    return ("she", "her", "her") if first < len(words.FEMALE) else ("he", "him", "his")


def make_dialogue(world: World, draw: Draws, split: str, part: str, style: str) -> dict[str, Any]:
    """A conversation about one or two entities of a split and part, with the key `entities` (their ids).

    Nobody has told the model about new entities: there the assistant abstains. `style` is "short" (the bare answer) or
    "sentence".
    """
    messages: list[dict[str, Any]] = []

    def say(user: str, assistant: Any) -> None:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})

    def small_talk(table: tuple[tuple[tuple[str, ...], str], ...]) -> None:
        users, assistant = draw.choice(table)
        say(draw.choice(users), assistant)

    if draw.below(2):
        small_talk(lex.GREETINGS)
    if draw.below(3) == 0:
        small_talk(lex.SMALL_TALK)
    entities: list[int] = []
    for _ in range(1 + draw.below(2)):
        entity, relations = _subject(world, draw, world.pool(split, part), part)
        entities.append(entity.id)
        for k, relation in enumerate(relations[: 1 + draw.below(2)]):
            value = entity.facts[relation.name]
            sentence = sentence_case(relation.sentence.replace("{e}", entity.name).replace("{v}", value))
            answer: Any = value if style == "short" else sentence
            if not entity.known:
                answer = [{"type": "abstain", "text": ABSTENTION}]
            say(_ask(draw, entity, relation, k > 0), answer)
    if draw.below(2):
        small_talk(lex.CLOSINGS)
    return {"messages": messages, "entities": entities}


def _ask(draw: Draws, entity: Entity, relation: lex.Relation, follow_up: bool) -> str:
    if not follow_up:
        return draw.choice(relation.questions).replace("{e}", entity.name)
    she, her, hers = pronouns(entity.name, entity.kind)
    text = relation.follow_up.format(she=she, her=her, hers=hers)
    return f"And {text[0].lower()}{text[1:]}" if draw.below(2) else text


def _subject(world: World, draw: Draws, pool: range, part: str) -> tuple[Entity, list[lex.Relation]]:
    """An entity and those of its relations, shuffled, that belong to the part."""
    while True:
        entity = world.entity(pool[draw.below(len(pool))])
        relations = [r for r in lex.RELATIONS[entity.kind] if world.in_part(entity.id, (r.name,), part)]
        if relations:
            order = Shuffle(len(relations), draw.bits())
            return entity, [relations[order(k)] for k in range(len(relations))]
