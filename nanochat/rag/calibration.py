"""From the parts of support (lexical, embedding, contrast) to one probability: a logistic function fitted to examples.

Logistic regression is Platt's scaling (Platt 1999) when there is one part, and its plain generalisation for several.
`nanochat.rag.support.calibrate` fits to examples: those of `world_examples`, sentences about the tiny world of which it
is known whether the documents state them, or your own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nanochat.data import lexicon
from nanochat.data.dialogue import sentence_case
from nanochat.data.shuffle import Draws, mix
from nanochat.data.world import KINDS, World
from nanochat.errors import UsageError
from nanochat.retrieval.document import Document

PARTS = ("lexical", "embedding", "contrast")
class Weights(NamedTuple):
    """Of the logistic function: score = 1 / (1 + exp(-(bias + sum of weight * part)))."""

    bias: float
    lexical: float = 0.0
    embedding: float = 0.0
    contrast: float = 0.0


Calibration = Mapping[frozenset[str], Weights]  # the parts that were measured -> weights

# Without contrast: fitted to world_examples(0, 3000), embeddings by hashed:256. With contrast: to 1,352 answers (46%
# supported) of two half-trained models of 1.1M parameters to questions about worlds 11 and 12, labelled by whether they
# are right and a cited document states them. Figures on other examples: docs/rag-design.md, "Support".
DEFAULT: Calibration = {
    frozenset({"lexical"}): Weights(-3.80, lexical=10.63),
    frozenset({"lexical", "embedding"}): Weights(-4.23, lexical=10.35, embedding=0.77),
    frozenset({"lexical", "contrast"}): Weights(-8.35, lexical=10.76, contrast=4.23),
    frozenset({"lexical", "embedding", "contrast"}): Weights(-10.64, lexical=8.95, embedding=4.96, contrast=3.79),
}


class Example(NamedTuple):
    """A sentence with the documents that it claims to rest on."""

    question: str
    sentence: str
    documents: tuple[Document, ...]
    supported: bool


def features(lexical: float, embedding: float | None, contrast: float | None) -> dict[str, float]:
    """The parts that were measured, as the logistic function takes them."""
    found = {"lexical": lexical}
    if embedding is not None:
        found["embedding"] = embedding
    if contrast is not None:
        found["contrast"] = contrast
    return found


def probability(parts: Mapping[str, float], calibration: Calibration = DEFAULT) -> float:
    """The probability that a sentence with these parts is supported.

    Raises UsageError when the calibration has no weights for this choice of parts."""
    names = frozenset(parts)
    if names not in calibration:
        known = "; ".join(", ".join(sorted(key)) for key in calibration)
        raise UsageError(f"this calibration has no weights for {', '.join(sorted(names))}, only for: {known}")
    weights = calibration[names]
    z = weights.bias + sum(getattr(weights, name) * value for name, value in parts.items())
    return float(1 / (1 + np.exp(-np.clip(z, -60, 60))))


def fit(parts: Sequence[Mapping[str, float]], supported: Sequence[bool], l2: float = 1e-2) -> Weights:
    """Weights by penalised maximum likelihood (Newton's method). `l2`, on all weights but the bias, keeps them finite
    where a part separates the examples perfectly.

    Raises UsageError unless all examples have the same parts and there are supported and unsupported ones."""
    names = sorted(parts[0]) if parts else []
    if not parts or any(sorted(row) != names for row in parts) or len(parts) != len(supported):
        raise UsageError("a calibration needs examples that all have the same parts, and a label for each")
    if not any(supported) or all(supported):
        raise UsageError("a calibration needs supported and unsupported examples")
    x = np.array([[1.0, *(row[name] for name in names)] for row in parts])
    y = np.asarray(supported, dtype=np.float64)
    penalty = l2 * len(y) / 100 * np.eye(x.shape[1])
    penalty[0, 0] = 0.0
    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + penalty + 1e-9 * np.eye(len(w))
        step = np.linalg.solve(hessian, x.T @ (y - p) - penalty @ w)
        w += step / max(1.0, float(np.abs(step).max()) / 5)  # far from the optimum a whole step may overshoot
        if float(np.abs(step).max()) < 1e-8:
            break
    return Weights(float(w[0]), **{name: float(value) for name, value in zip(names, w[1:])})


class Reliability(NamedTuple):
    """How good probabilities are. `ece`: expected calibration error, ten bins of equal counts (Naeini et al. 2015);
    `auc`: how often a supported example scores above an unsupported one; `brier`: mean squared error."""

    n: int
    auc: float
    ece: float
    brier: float
    accuracy: float  # at 0.5


def reliability(scores: Sequence[float], supported: Sequence[bool]) -> Reliability:
    """Judge probabilities by labels. Raises UsageError for one-sided or missing labels."""
    p, y = np.asarray(scores, dtype=np.float64), np.asarray(supported, dtype=bool)
    if len(p) != len(y) or y.all() or not y.any():
        raise UsageError("reliability needs scores with supported and unsupported examples")
    order = np.argsort(p, kind="stable")
    bins = [b for b in np.array_split(order, 10) if len(b)]
    ece = sum(len(b) * abs(p[b].mean() - y[b].mean()) for b in bins) / len(p)
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # equal scores share the mean of their ranks
    n_yes, n_no = int(y.sum()), int((~y).sum())
    auc = (ranks[y].sum() - n_yes * (n_yes + 1) / 2) / (n_yes * n_no)
    return Reliability(
        len(p), float(auc), float(ece), float(((p - y) ** 2).mean()), float(((p >= 0.5) == y).mean())
    )


# ---- examples from the tiny world


def world_examples(seed: int, n: int, documents: int = 3) -> Iterator[Example]:
    """`n` sentences about documents of worlds that nothing else uses; half of them are supported.

    Supported: the document's own sentence, the same fact in the words of another document or of a short answer.
    Unsupported: another value, another entity's name, what another document of the prompt says about its entity under
    this entity's name, or a relation that no document states. All name the entity in full or as the document does.
    """
    for i in range(n):
        draws = Draws(mix(mix(0xCA11B, seed), i))
        world = World(draws.bits() >> 8, 10, 200)
        pool = world.pool("new")
        shown: list[int] = []
        while len(shown) < documents:
            entity = pool[draws.below(len(pool))]
            if entity not in shown:
                shown.append(entity)
        yield _example(world, shown, draws, supported=i % 2 == 0)


def _example(world: World, shown: Sequence[int], draws: Draws, supported: bool) -> Example:
    e, wording = shown[0], draws.bits() >> 8
    entity = world.entity(e)
    relation = draws.choice(lexicon.RELATIONS[entity.kind])
    question = world.question(e, (relation.name,), draws.bits()).text
    value, name = entity.facts[relation.name], entity.name
    records = [world.document(i, wording) for i in shown]
    documents = tuple(Document(r["id"], r["content"], r["title"]) for r in records)
    templates = (*relation.documents, relation.sentence)
    if supported and draws.below(2):
        return Example(question, world.statements(e, wording)[relation.name], documents, True)
    if not supported:
        kind = draws.below(4)
        if kind == 0:
            value = _other_value(world, e, relation, draws)
        elif kind == 1:
            name = world.name(_alike(world, e, draws))
        elif kind == 2 and (others := [i for i in shown[1:] if KINDS[i % 5] == entity.kind]):
            other = draws.choice(others)
            value = world.entity(other).facts[relation.name]
            if value == entity.facts[relation.name]:
                value = _other_value(world, e, relation, draws)
        else:
            unstated = draws.choice(list(lexicon.UNSTATED[entity.kind].values()))
            question = draws.choice(unstated).replace("{e}", name)
            value = _other_value(world, e, relation, draws)
    sentence = draws.choice(templates).replace("{e}", name).replace("{v}", value)
    return Example(question, sentence_case(sentence), documents, supported)


def _other_value(world: World, e: int, relation: lexicon.Relation, draws: Draws) -> str:
    """A value of this relation that is not entity e's."""
    own = world.entity(e).facts[relation.name]
    while True:
        value = world.entity(_alike(world, e, draws)).facts[relation.name]
        if value != own:
            return value


def _alike(world: World, e: int, draws: Draws) -> int:
    """Another entity of the same kind."""
    pool = world.pool("new")
    while True:
        other = pool[draws.below(len(pool))]
        if other != e and KINDS[other % 5] == KINDS[e % 5]:
            return other
