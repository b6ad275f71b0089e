"""Does the answer rest on the documents? Support for each sentence, from three independent signs and a calibration.

lexical     how much of the sentence one passage of a document says: content words, names and numbers above all, in
            their order; what the sentence adds to the question counts most (`lexical_support`)
embedding   cosine of the sentence and the nearest passage, under any `Embedder`
contrast    how much of the model's own surprise at the sentence the documents take away (`explained`): its likelihood
            with and without them, the two sides of context-aware decoding (Shi et al. 2023, arXiv 2305.14739)

A logistic function fitted to examples makes one probability of the signs that were measured (`calibration.py`). An
external judge (`judges.py`) may take its place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from nanochat.data.answers import is_abstention
from nanochat.errors import UsageError
from nanochat.model.lm import LM
from nanochat.rag.calibration import DEFAULT, Calibration, Example, Weights, features, fit, probability
from nanochat.rag.citations import Answer, Sentence
from nanochat.retrieval.analysis import prepare
from nanochat.retrieval.document import Document, Embedder
from nanochat.retrieval.english import STOP_WORDS, stem
from nanochat.tokenizer import Tokenizer

T = TypeVar("T")
SUPPORTED = 0.5  # a sentence whose score reaches this counts as supported


class Support(NamedTuple):
    """Of one sentence. `score`: the probability, 0 to 1, that the documents support it; then its parts, None where one
    was not measured. `contrast` is `explained`: at most 1."""

    score: float
    lexical: float
    embedding: float | None = None
    contrast: float | None = None


class Judge(Protocol):
    """An external judge of one claim."""

    name: str

    def judge(self, question: str, claim: str, documents: Sequence[Document]) -> float:
        """The probability, 0 to 1, that the documents support the claim. Raises NanochatError when it cannot say."""


# ---- lexical

_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*|[^\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+|(?<=[。！？])|\n+")
_NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "without", "cannot", "none", "nobody", "nothing"})
_VERBS = frozenset({"is", "was", "are", "were", "has", "had"})
_ANCHOR, _PLAIN, _STOP = 2.0, 1.0, 0.1  # weight of names and numbers, of other words, of stop words
ORDER_SHARE = 0.3  # of the score that words in another order lose
MISSING_ANCHOR = 0.5  # factor for each name or number that the passage lacks
NEGATED = 0.25  # factor when one of the two is negated and the other is not


class Word(NamedTuple):
    stem: str
    weight: float
    anchor: bool = False  # a name or a number
    capital: bool = False  # also of a sentence's first word; numbers count as capitals


def words(text: str) -> list[Word]:
    """The words of a text. A capital marks a name; at the beginning only where a capital follows, a verb such as "is",
    or nothing (a title)."""
    found: list[Word] = []
    for sentence in sentences(prepare(text)):
        raw = [match.group() for match in _WORD.finditer(sentence)]
        for i, word in enumerate(raw):
            plain = word.lower().replace("’", "'").removesuffix("'s")
            if word[0].isdigit():
                found.append(Word(plain.replace(",", ""), _ANCHOR, True, True))
            elif plain in STOP_WORDS or plain.split("'")[0] in STOP_WORDS:
                found.append(Word(plain, _STOP))
            else:
                follows = raw[i + 1] if i + 1 < len(raw) else "Is"
                capital = word[0].isupper()
                name = capital and (i > 0 or follows[0].isupper() or follows in _VERBS)
                found.append(Word(stem(plain), _ANCHOR if name else _PLAIN, name, capital))
    return found


def sentences(text: str) -> list[str]:
    """A rough cut into sentences: ends at . ! ? before a blank, and at line ends."""
    return [piece.strip() for piece in _SENTENCE_END.split(text) if piece and piece.strip()]


class Passage(NamedTuple):
    """What a claim may rest on, read."""

    said: list[Word]
    held: Counter[str]  # stem -> how often one sentence says it
    named: frozenset[str]  # stems that are written with a capital

    @classmethod
    def of(cls, parts: Sequence[list[Word]]) -> Passage:
        held: Counter[str] = Counter()
        for part in parts:
            held |= Counter(word.stem for word in part)
        said = [word for part in parts for word in part]
        return cls(said, held, frozenset(word.stem for word in said if word.capital))


def passages(document: Document) -> list[str]:
    """Each sentence of the document and each two neighbours, under the title."""
    said = sentences(document.content) or [""]
    return ["\n".join(filter(None, [document.title, *span])) for span in _spans(said)]


def _spans(said: Sequence[T]) -> list[tuple[T, ...]]:
    return [*((one,) for one in said), *pairwise(said)]


def lexical_support(sentence: str, documents: Sequence[Document], question: str = "") -> float:
    """How much of the sentence the best passage of the documents says, 0 to 1; 1 for a sentence that it repeats.

    The share of the sentence's words that the passage holds, by weight (a word said twice has to be there twice); times
    the share of those words that the question does not hold (what the answer *adds* has to come from somewhere); less
    up to ORDER_SHARE where the order differs; halved for each name or number that the passage lacks, and a quarter
    where only one of the two is negated. Two documents count together when they share a name, as the hops of a chain
    do. A paraphrase scores lower than a quotation, and a false word among many true ones lowers the score little unless
    the question is given.
    """
    claim = words(sentence)
    if not claim:
        return 0.0
    asked = frozenset(word.stem for word in words(question))
    best: list[tuple[float, Passage]] = []
    for document in documents:
        title, said = words(document.title), [words(one) for one in sentences(document.content) or [""]]
        read = [Passage.of([title, *span]) for span in _spans(said)]
        best.append(max(((_agreement(claim, p, asked), p) for p in read), key=lambda pair: pair[0]))
    pairs = [Passage.of([a.said, b.said]) for i, (_, a) in enumerate(best) for _, b in best[:i] if _share_name(a, b)]
    return max([score for score, _ in best] + [_agreement(claim, pair, asked) for pair in pairs], default=0.0)


def _agreement(claim: Sequence[Word], passage: Passage, asked: frozenset[str]) -> float:
    left = Counter(passage.held)
    kept: list[Word] = []
    for word in claim:
        if left[word.stem] and (not word.anchor or word.stem in passage.named):  # "Mill" is no "mill"
            kept.append(word)
            left[word.stem] -= word.weight > _STOP
    added = [word for word in claim if word.stem not in asked and word.weight > _STOP]
    score = _weight(kept) / _weight(claim)
    if asked and added:
        score *= _weight(word for word in added if word in kept) / _weight(added)
    if not score:
        return 0.0
    for name in {word.stem for word in claim if word.anchor}:
        score *= 1.0 if name in passage.named else MISSING_ANCHOR
    if _negated(claim) != _negated(passage.said):
        score *= NEGATED
    return score * (1 - ORDER_SHARE * (1 - _order(kept, passage.said)))


def _weight(text: Iterable[Word]) -> float:
    return sum(word.weight for word in text)


def _order(kept: Sequence[Word], passage: Sequence[Word]) -> float:
    """The heaviest common subsequence, as a share of the claim's words that the passage holds."""
    heaviest = [0.0] * (len(passage) + 1)
    for word in kept:
        diagonal = 0.0
        for j, other in enumerate(passage, 1):
            above = heaviest[j]
            here = diagonal + word.weight if word.stem == other.stem else max(above, heaviest[j - 1])
            heaviest[j], diagonal = here, above
    return heaviest[-1] / _weight(kept)


def _negated(text: Iterable[Word]) -> bool:
    return sum(word.stem in _NEGATIONS or word.stem.endswith("n't") for word in text) % 2 == 1


def _share_name(a: Passage, b: Passage) -> bool:
    return not _names(a.said).isdisjoint(_names(b.said))


def _names(text: Sequence[Word]) -> set[tuple[str, ...]]:
    """Whole names: runs of words that are anchors."""
    runs = [list(text[:1])]
    for before, word in pairwise(text):
        if before.anchor != word.anchor:
            runs.append([])
        runs[-1].append(word)
    return {tuple(word.stem for word in run) for run in runs if run and run[0].anchor}


# ---- embedding


def embedding_support(sentence: str, documents: Sequence[Document], embedder: Embedder) -> float:
    """Cosine of the sentence and the passage of the documents that is nearest to it; 0 without documents."""
    texts = [passage for document in documents for passage in passages(document)]
    if not texts:
        return 0.0
    return float(np.max(embedder.embed(texts) @ embedder.embed_queries([sentence])[0]))


# ---- contrast


def contrast(
    model: LM,
    tokenizer: Tokenizer,
    prompt_with: Sequence[int],
    prompt_without: Sequence[int],
    answer_ids: Sequence[int],
) -> float:
    """Nats a token that the documents add: the mean over the answer's text tokens of log p(token | prompt with
    documents) - log p(token | prompt without), each prompt followed by the answer so far.

    Above 0: the documents make the answer likelier; about 0: the model would have said it anyway. Citations and other
    special tokens are read but not counted. 0 for an answer without text. Raises UsageError when prompt and answer are
    longer than the context."""
    with_, without = surprises(model, prompt_with, prompt_without, answer_ids)
    counted = [b - a for a, b, token in zip(with_, without, answer_ids) if not tokenizer.is_special(token)]
    return float(np.mean(counted)) if counted else 0.0


def explained(
    model: LM,
    tokenizer: Tokenizer,
    prompt_with: Sequence[int],
    prompt_without: Sequence[int],
    answer_ids: Sequence[int],
) -> float:
    """The share of the model's surprise at the answer that the documents take away: 1 - nats with / nats without, over
    the answer's text tokens. 1: with the documents nothing surprises; 0: they change nothing; below 0 (cut at -1): they
    make the answer less likely. Unlike `contrast` it does not depend on how predictable the answer is anyhow. 0 for an
    answer without text. Raises UsageError as `contrast` does."""
    with_, without = surprises(model, prompt_with, prompt_without, answer_ids)
    text = [not tokenizer.is_special(token) for token in answer_ids]
    nats_with, nats_without = (sum(n for n, is_text in zip(nats, text) if is_text) for nats in (with_, without))
    return max(-1.0, 1.0 - (nats_with + 1e-6) / (nats_without + 1e-6))


def surprises(
    model: LM, prompt_with: Sequence[int], prompt_without: Sequence[int], answer_ids: Sequence[int]
) -> tuple[list[float], list[float]]:
    """-log p of each of the answer's tokens behind either prompt, in nats."""
    if not answer_ids:
        return [], []
    rows = [[*prompt, *answer_ids] for prompt in (prompt_with, prompt_without)]
    longest = max(map(len, rows)) - 1
    if longest > model.config.sequence_len:
        raise UsageError(
            f"prompt and answer have {longest + 1} tokens, the model's context only {model.config.sequence_len}"
        )
    inputs = torch.zeros(2, longest, dtype=torch.long)
    targets = torch.full((2, longest), -1, dtype=torch.long)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, len(row) - 1 - len(answer_ids) : len(row) - 1] = torch.tensor(answer_ids)
    with torch.no_grad():
        nll = model.nll(inputs.to(model.device), targets.to(model.device)).cpu()
    with_, without = (row[target >= 0].tolist() for row, target in zip(nll, targets))
    return with_, without


# ---- all together


def support(
    answer: Answer,
    documents: Sequence[Document],
    *,
    question: str = "",
    embedder: Embedder | None = None,
    model: LM | None = None,
    tokenizer: Tokenizer | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    judge: Judge | None = None,
    calibration: Calibration = DEFAULT,
) -> list[Support]:
    """Support of each sentence of the answer by the documents that it cites, or by any of them where it cites none.
    `documents`: those of the prompt, in order (number n is documents[n - 1]).

    Contrast needs the model, its tokenizer and the messages up to the question, with the retrieval block. `question`:
    taken from the messages when left out. A judge's word replaces the calibrated score; the parts stay. Raises
    UsageError when only some of model, tokenizer and messages are given."""
    if len({model is None, tokenizer is None, messages is None}) > 1:
        raise UsageError("contrast needs all three: model, tokenizer and messages")
    question = question or _question(messages or ())
    found = []
    for i, sentence in enumerate(answer.sentences):
        cited = _cited(sentence, documents)
        lexical = lexical_support(sentence.text, cited, question)
        embedding = None if embedder is None else embedding_support(sentence.text, cited, embedder)
        gain = None
        if model is not None and tokenizer is not None and messages is not None:
            gain = _sentence_explained(model, tokenizer, messages, answer.sentences[: i + 1])
        if judge is not None:
            score = judge.judge(question, sentence.text, cited)
        else:
            score = probability(features(lexical, embedding, gain), calibration)
        found.append(Support(score, lexical, embedding, gain))
    return found


def hallucination_score(answer: Answer, documents: Sequence[Document], **options: Any) -> float:
    """The probability, 0 to 1, that the answer says something that its documents do not: 1 - the score of its weakest
    sentence. 0 for an abstention and for silence, which say nothing. Options as for `support`."""
    if answer.abstained or is_abstention(answer.text) or not answer.sentences:
        return 0.0
    return 1.0 - min(each.score for each in support(answer, documents, **options))


def citation_scores(
    answer: Answer, documents: Sequence[Document], question: str = "", calibration: Calibration = DEFAULT
) -> list[dict[int, float]]:
    """For each sentence: cited number -> the probability that this document alone supports the sentence."""
    return [
        {
            n: probability(features(lexical_support(s.text, documents[n - 1 : n], question), None, None), calibration)
            for n in s.cited
        }
        for s in answer.sentences
    ]


def calibrate(
    examples: Sequence[Example],
    *,
    embedder: Embedder | None = None,
    contrast: Callable[[Example], float] | None = None,
    l2: float = 1e-2,
) -> dict[frozenset[str], Weights]:
    """A calibration fitted to examples, for every choice of the parts that the arguments allow.

    contrast: a function that measures it for an example. Raises UsageError for one-sided examples."""
    rows = [
        features(
            lexical_support(e.sentence, e.documents, e.question),
            None if embedder is None else embedding_support(e.sentence, e.documents, embedder),
            None if contrast is None else contrast(e),
        )
        for e in examples
    ]
    labels = [e.supported for e in examples]
    others = [name for name in (rows[0] if rows else {}) if name != "lexical"]
    choices = [{"lexical", *(n for j, n in enumerate(others) if i >> j & 1)} for i in range(1 << len(others))]
    return {frozenset(c): fit([{n: row[n] for n in c} for row in rows], labels, l2) for c in choices}


def _cited(sentence: Sentence, documents: Sequence[Document]) -> list[Document]:
    return [documents[n - 1] for n in sentence.cited if 1 <= n <= len(documents)] or list(documents)


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    said = [m["content"] for m in messages if m["role"] == "user"]
    if not said:
        return ""
    last = said[-1]
    return last if isinstance(last, str) else " ".join(part["text"] for part in last)


def without_documents(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without their retrieval blocks: what the model would have been asked closed book."""
    return [dict(message) for message in messages if message["role"] != "retrieval"]


def _sentence_explained(
    model: LM, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], said: Sequence[Sentence]
) -> float:
    """Of the last of the sentences said, behind the others and its own citations."""
    with_ = tokenizer.render_prompt({"messages": [dict(m) for m in messages]}).ids
    without = tokenizer.render_prompt({"messages": without_documents(messages)}).ids
    blocks = (message["content"] for message in messages if message["role"] == "retrieval")
    headings = [part["title"] for block in blocks for part in block if part["type"] == "document"]
    before: list[int] = []
    for i, sentence in enumerate(said):
        for number in sentence.cited:
            before += [tokenizer.special("cite_start"), *tokenizer.encode(headings[number - 1])]
            before.append(tokenizer.special("cite_end"))
        ids = tokenizer.encode(sentence.text)
        if i < len(said) - 1:
            before += ids
    return explained(model, tokenizer, [*with_, *before], [*without, *before], ids)
