"""The tiny world: one seed gives an invented world of people, towns and companies.

Everything is a function of (seed, counters): no state, no tables, so that the millionth document costs what the first
one does. Entities have the ids 0 .. n_known + n_new - 1. *Known* ones appear in the pretraining text; *new* ones only
ever in a knowledge base. Links never leave a pool (known, new/train, new/heldout): chains of two and three hops stay
inside.

What is held out (`part="heldout"`, about a quarter):
- known: single (entity, relation) pairs, by hash. A multi-hop chain is held out by its own hash; a chain for training
  uses training pairs only, so that no training answer gives a held-out fact away.
- new: whole entities (the last quarter of the ids; names do not follow the order of ids). Their names never occur in
  closed-book training. Known and new names are drawn alike from the same first and family names, so that only the whole
  name tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice, permutations
from typing import Any

from nanochat.data import lexicon as lex
from nanochat.data import words
from nanochat.data.answers import ABSTENTION, contains_answer, exact_match, is_abstention, normalize_answer
from nanochat.data.dialogue import make_dialogue, pronouns, sentence_case
from nanochat.data.shuffle import Draws, Shuffle, mix
from nanochat.errors import UsageError

__all__ = [
    "ABSTENTION",
    "Entity",
    "Question",
    "Shuffle",
    "World",
    "contains_answer",
    "exact_match",
    "is_abstention",
    "mix",
    "normalize_answer",
]

SPLITS = ("known", "new")
PARTS = ("train", "heldout")
KINDS = ("person", "town", "person", "company", "person")  # the kind of entity i is KINDS[i % 5]
VAL_WORDING = 1 << 30  # wordings from here on are kept for validation
_SLOTS = {"person": (0, 2, 4), "town": (1,), "company": (3,)}
_NAMES, _FACTS, _PARTS, _CHAINS, _TEXT, _ASK, _CHAT, _ABSENT = range(8)  # one random stream for each purpose


@dataclass(frozen=True, slots=True)
class Entity:
    """An entity with all its facts; `links` has the ids of those values that are entities themselves."""

    id: int
    name: str
    kind: str
    known: bool
    facts: dict[str, str]
    links: dict[str, int]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with everything that judges an answer.

    `answer` is the short gold, `sentence` the same as a sentence about the entity that the hops lead to; both are the
    abstention when nothing states the answer. `hop_chain` is ((entity id, relation, value), ...); `gold_documents` are
    the ids of wording 0 of the documents of these entities. `entity` is -1 when the question names something that does
    not exist.
    """

    text: str
    answer: str
    sentence: str
    gold_documents: tuple[str, ...]
    hop_chain: tuple[tuple[int, str, str], ...]
    hops: int
    entity: int
    relation: str
    answerable: bool

    def matches(self, prediction: str) -> bool:
        """Exact match with the short answer or with the answer as a sentence."""
        return exact_match(prediction, self.answer) or exact_match(prediction, self.sentence)


def _parse(template: str) -> tuple[str, str, str, bool]:
    """A template as (before, between, after, entity comes first): joining strings is quicker than formatting."""
    entity_first = template.index("{e}") < template.index("{v}")
    before, rest = template.split("{e}" if entity_first else "{v}")
    between, after = rest.split("{v}" if entity_first else "{e}")
    return before, between, after, entity_first


def _chains(kind: str, hops: int) -> tuple[tuple[str, ...], ...]:
    """All relation chains of a length that start at a kind of entity."""
    if hops == 1:
        return tuple((r.name,) for r in lex.RELATIONS[kind])
    links = [r for r in lex.RELATIONS[kind] if r.target]
    return tuple((r.name, *rest) for r in links for rest in _chains(r.target, hops - 1))


_TEMPLATES = {k: [[_parse(t) for t in r.documents] for r in rs] for k, rs in lex.RELATIONS.items()}
_ORDERS = {k: tuple(permutations(range(len(rs)))) for k, rs in lex.RELATIONS.items()}
_RELATION = {(k, r.name): r for k, rs in lex.RELATIONS.items() for r in rs}
CHAINS = {(k, hops): _chains(k, hops) for k in _SLOTS for hops in (1, 2, 3)}
_CODES = {k: {chain: code for hops in (1, 2, 3) for code, chain in enumerate(CHAINS[k, hops])} for k in _SLOTS}


class World:
    """An invented world. Any method may be called in any order; equal arguments give equal results.

    Args:
        seed: chooses names, facts, wordings and what is held out.
        n_known: entities of the pretraining text, at least 10.
        n_new: entities for knowledge bases, 0 or at least 40; as many as known ones when None (but at least 40).
    """

    def __init__(self, seed: int = 0, n_known: int = 200, n_new: int | None = None) -> None:
        n_new = max(40, n_known) if n_new is None else n_new
        if n_known < 10:
            raise UsageError(f"world: known={n_known} is too few; give at least 10 known entities")
        if n_new < 0 or 0 < n_new < 40:
            raise UsageError(f"world: new={n_new} must be 0 or at least 40")
        self.seed, self.n_known, self.n_new, self.n = seed, n_known, n_new, n_known + n_new
        self._keys = [mix(mix(0x5EED, seed), k) for k in range(8)]
        self._name_orders = {
            "person": Shuffle(len(words.FIRST_NAMES) * len(words.FAMILY_NAMES), mix(self._keys[_NAMES], 1)),
            "town": Shuffle(len(words.TOWN_STARTS) * len(words.TOWN_ENDS), mix(self._keys[_NAMES], 2)),
            "company": Shuffle(
                len(words.COMPANY_COLOURS) * len(words.COMPANY_NOUNS) * len(words.COMPANY_ENDS),
                mix(self._keys[_NAMES], 3),
            ),
        }
        n_train = n_new - n_new // 4
        self._pools = (range(n_known), range(n_known, n_known + n_train), range(n_known + n_train, self.n))
        self._recall = lru_cache(4096)(self.entity)  # chains and dialogues come back to the same few
        self._ranks = tuple({k: self._rank_range(k, pool) for k in _SLOTS} for pool in self._pools)

    # Entities ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def _rank(kind: str, i: int) -> int:
        """How many entities of the kind have an id below i."""
        slots = _SLOTS[kind]
        return len(slots) * (i // 5) + sum(s < i % 5 for s in slots)

    def _rank_range(self, kind: str, pool: range) -> tuple[int, int]:
        low = self._rank(kind, pool.start)
        return low, self._rank(kind, pool.stop) - low

    def _name(self, kind: str, rank: int) -> str:
        """The unique name of the entity of this kind and rank; when the combinations run out, a numeral follows."""
        order = self._name_orders[kind]
        generation, rank = divmod(rank, order.n)
        v = order(rank)
        if kind == "person":
            name = f"{words.FIRST_NAMES[v & 63]} {words.FAMILY_NAMES[v >> 6]}"
        elif kind == "town":
            name = words.TOWN_STARTS[v & 31] + words.TOWN_ENDS[v >> 5]
        else:
            name = f"{words.COMPANY_COLOURS[v & 7]} {words.COMPANY_NOUNS[v >> 3 & 15]} {words.COMPANY_ENDS[v >> 7]}"
        return f"{name} {generation + 1}" if generation else name

    def name(self, i: int) -> str:
        """The name of entity i."""
        kind = KINDS[i % 5]
        return self._name(kind, self._rank(kind, i))

    def entity(self, i: int) -> Entity:
        """Entity i with all its facts, 0 <= i < n."""
        if not 0 <= i < self.n:
            raise UsageError(f"world: entity {i} does not exist; ids go from 0 to {self.n - 1}")
        kind = KINDS[i % 5]
        ranks = self._ranks[0 if i < self.n_known else 1 if i < self._pools[2].start else 2]
        key = mix(self._keys[_FACTS], i)
        facts: dict[str, str] = {}
        links: dict[str, int] = {}
        for k, relation in enumerate(lex.RELATIONS[kind]):
            bits = mix(key, k)
            if not relation.target:
                facts[relation.name] = relation.values[bits % len(relation.values)]
                continue
            low, n = ranks[relation.target]
            rank = low + bits % n
            slots = _SLOTS[relation.target]
            target = 5 * (rank // len(slots)) + slots[rank % len(slots)]
            if target == i:  # nobody is their own friend
                rank = low + (rank - low + 1) % n
                target = 5 * (rank // len(slots)) + slots[rank % len(slots)]
            links[relation.name] = target
            facts[relation.name] = self._name(relation.target, rank)
        return Entity(i, self.name(i), kind, i < self.n_known, facts, links)

    def pool(self, split: str, part: str | None = None) -> range:
        """The ids of a split; of one part of it where it is "new" (parts of known entities are pairs, not entities)."""
        _check("split", split, SPLITS)
        if part is not None:
            _check("part", part, PARTS)
        if split == "known":
            return self._pools[0]
        if part is None:
            return range(self.n_known, self.n)
        return self._pools[1 if part == "train" else 2]

    # Documents --------------------------------------------------------------------------------------------------------

    def document(self, i: int, wording: int = 0) -> dict[str, Any]:
        """The document of entity i in a wording: {id, title, content, entity, known}. It states all facts."""
        entity = self.entity(i)
        content = " ".join(sentence for _, sentence in self._sentences(entity, wording))
        return {"id": f"{i}-{wording}", "title": entity.name, "content": content, "entity": i, "known": entity.known}

    def statements(self, i: int, wording: int = 0) -> dict[str, str]:
        """relation -> the sentence that states it in this wording of the document."""
        entity = self.entity(i)
        relations = lex.RELATIONS[entity.kind]
        return {relations[k].name: sentence for k, sentence in self._sentences(entity, wording)}

    def _sentences(self, entity: Entity, wording: int) -> list[tuple[int, str]]:
        """(number of the relation, sentence) in the order of the document."""
        kind, name = entity.kind, entity.name
        values = tuple(entity.facts.values())
        templates = _TEMPLATES[kind]
        bits = mix(mix(self._keys[_TEXT], entity.id), wording)
        orders = _ORDERS[kind]
        order = orders[bits % len(orders)]
        bits >>= 12
        pronoun = pronouns(name, kind)[0].capitalize()
        sentences: list[tuple[int, str]] = []
        for k in order:
            before, between, after, entity_first = templates[k][bits & 7]
            bits >>= 3
            if entity_first:
                subject = pronoun if sentences and not before and between[0] == " " and bits & 7 == 0 else name
                sentences.append((k, f"{before}{subject}{between}{values[k]}{after}"))
            elif before:
                sentences.append((k, f"{before}{values[k]}{between}{name}{after}"))
            else:
                sentences.append((k, sentence_case(f"{values[k]}{between}{name}{after}")))
            bits >>= 3
        return sentences

    def documents(self, split: str = "known", wordings: int = 1, start: int = 0) -> Iterator[dict[str, Any]]:
        """All documents of a split: each entity in wording 0, then in wording 1 and so on. `start` skips for free."""
        pool = self.pool(split)
        for index in range(start, wordings * len(pool)):
            wording, offset = divmod(index, len(pool))
            yield self.document(pool.start + offset, wording)

    # Questions --------------------------------------------------------------------------------------------------------

    def in_part(self, i: int, chain: tuple[str, ...], part: str) -> bool:
        """Whether the questions that follow `chain` from entity i belong to a part (see the module's docstring)."""
        if i >= self.n_known:
            return i in self.pool("new", part)
        key = mix(self._keys[_PARTS], i)
        code = _CODES[KINDS[i % 5]][chain]
        if len(chain) == 1:
            return (mix(key, code) % 4 == 0) == (part == "heldout")
        if (mix(mix(key, _CHAINS), 100 * len(chain) + code) % 4 == 0) != (part == "heldout"):
            return False
        return part == "heldout" or all(self.in_part(e, (r,), part) for e, r, _ in self.follow(i, chain))

    def follow(self, i: int, chain: tuple[str, ...]) -> tuple[tuple[int, str, str], ...]:
        """The hops ((entity id, relation, value), ...) of a chain of relations that starts at entity i."""
        hops = []
        for relation in chain:
            entity = self._recall(i)
            hops.append((i, relation, entity.facts[relation]))
            i = entity.links.get(relation, -1)
        return tuple(hops)

    def question(self, i: int, chain: tuple[str, ...], wording: int = 0) -> Question:
        """The question that follows `chain` from entity i, in one of its wordings (any whole number)."""
        hops = self.follow(i, chain)
        bits = mix(self._keys[_ASK], wording)
        subject = self.name(i)
        for entity, relation, _ in hops[:-1]:
            phrases = _RELATION[KINDS[entity % 5], relation].phrases
            subject = phrases[bits % len(phrases)].replace("{e}", subject)
            bits >>= 4
        last, name, answer = hops[-1]
        relation_ = _RELATION[KINDS[last % 5], name]
        return Question(
            text=relation_.questions[wording % len(relation_.questions)].replace("{e}", subject),
            answer=answer,
            sentence=sentence_case(relation_.sentence.replace("{e}", self.name(last)).replace("{v}", answer)),
            gold_documents=tuple(f"{entity}-0" for entity, _, _ in hops),
            hop_chain=hops,
            hops=len(chain),
            entity=i,
            relation=name,
            answerable=True,
        )

    def pairs(self, hops: int, split: str, part: str, seed: int = 0) -> Iterator[tuple[int, tuple[str, ...]]]:
        """All (entity, chain) of a split and part in an order that `seed` chooses, less chains that run in circles."""
        _check("hops", hops, (1, 2, 3))
        _check("part", part, PARTS)
        pool = self.pool(split, part)
        width = max(len(CHAINS[kind, hops]) for kind in _SLOTS)
        order = Shuffle(max(1, len(pool) * width), mix(self._keys[_ASK], seed))
        for index in range(len(pool) * width):
            offset, code = divmod(order(index), width)
            i = pool.start + offset
            chains = CHAINS[KINDS[i % 5], hops]
            if code >= len(chains) or not self.in_part(i, chains[code], part):
                continue
            if hops > 1:
                visited = self.follow(i, chains[code])
                names = {self.name(i), *(value for _, _, value in visited)}
                if len(names) <= hops:
                    continue
            yield i, chains[code]

    def questions(
        self, hops: int = 1, split: str = "known", part: str = "train", seed: int = 0, limit: int | None = None
    ) -> Iterator[Question]:
        """The questions of a split and part; `seed` chooses their order (so what `limit` draws) and their wording."""
        for k, (i, chain) in enumerate(islice(self.pairs(hops, split, part, seed), limit)):
            yield self.question(i, chain, mix(seed, k))

    def unanswerable(
        self, split: str = "known", part: str = "train", seed: int = 0, limit: int | None = None
    ) -> Iterator[Question]:
        """Endless questions without an answer: by turns a relation that no document states and a name nobody bears."""
        _check("part", part, PARTS)
        pool = self.pool(split, part)
        if not len(pool):
            return
        key = mix(mix(self._keys[_ABSENT], seed), PARTS.index(part))
        for k in count() if limit is None else range(limit):
            bits = mix(key, k)
            if k % 2:
                yield self._nonexistent(bits, part)
                continue
            while True:
                i = pool[bits % len(pool)]
                unstated = lex.UNSTATED[KINDS[i % 5]]
                relation = list(unstated)[(bits >> 40) % len(unstated)]
                code = mix(mix(self._keys[_PARTS], i), 50 + list(unstated).index(relation))
                if split == "new" or (code % 4 == 0) == (part == "heldout"):
                    break
                bits = mix(bits, 1)
            yield self._unstated(i, relation, bits >> 50)

    def unstated(self, i: int, wording: int = 0) -> Question:
        """A question about entity i that its document leaves open."""
        relations = list(lex.UNSTATED[KINDS[i % 5]])
        return self._unstated(i, relations[wording % len(relations)], wording // len(relations))

    def _unstated(self, i: int, relation: str, wording: int) -> Question:
        wordings = lex.UNSTATED[KINDS[i % 5]][relation]
        text = wordings[wording % len(wordings)].replace("{e}", self.name(i))
        return Question(text, ABSTENTION, ABSTENTION, (), (), 1, i, relation, False)

    def _nonexistent(self, bits: int, part: str) -> Question:
        """A question about a name that no entity of this world bears; the parts share no name."""
        kind = KINDS[bits % 5]
        relation = lex.RELATIONS[kind][(bits >> 8) % len(lex.RELATIONS[kind])]
        used, capacity = self._rank(kind, self.n), self._name_orders[kind].n
        free = capacity - used if used < capacity else capacity
        rank = used + (bits >> 16) % free
        while (mix(self._keys[_ABSENT], rank) % 4 == 0) != (part == "heldout"):
            rank += 1
        text = relation.questions[(bits >> 56) % len(relation.questions)].replace("{e}", self._name(kind, rank))
        return Question(text, ABSTENTION, ABSTENTION, (), (), 1, -1, relation.name, False)

    # Dialogues --------------------------------------------------------------------------------------------------------

    def dialogue(
        self, index: int, split: str = "known", part: str = "train", seed: int = 0, style: str = "short"
    ) -> dict[str, Any]:
        """Dialogue number `index`, see `dialogue.make_dialogue`."""
        _check("style", style, ("short", "sentence"))
        if not len(self.pool(split, part)):
            raise UsageError(f"world: there are no {split} entities to talk about; build the world with more of them")
        key = mix(mix(mix(self._keys[_CHAT], seed), PARTS.index(part)), index)
        return make_dialogue(self, Draws(key), split, part, style)

    def dialogues(
        self, split: str = "known", part: str = "train", seed: int = 0, limit: int | None = None, style: str = "short"
    ) -> Iterator[dict[str, Any]]:
        """Dialogues 0, 1, ...: `limit` of them, or endlessly many."""
        for index in count() if limit is None else range(limit):
            yield self.dialogue(index, split, part, seed, style)


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"world: {name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
