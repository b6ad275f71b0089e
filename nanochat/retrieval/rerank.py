"""Rerankers: a second, closer look at the candidates that a search found.

A reranker is any object with `name` and `scores(query, documents)`, higher being better; the documents come best first.
Two attributes are optional: `depth`, how many candidates it looks at, and `weight`, its say against the scores of the
search (1: the reranker alone decides).

    FeedbackReranker        needs no model: learns from the best candidates which words matter
    CrossEncoderReranker    a model that reads query and document together: sentence-transformers, or an ONNX directory
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.document import Document, Hit, Reranker
from nanochat.retrieval.fusion import unit_scores

DEPTH = 50  # candidates that are looked at, unless the reranker says otherwise
FEEDBACK_DEPTH = 40  # as good as 50 (docs/retrieval-design.md), for a fifth less time
MAX_CHARACTERS = 10_000  # of a document that feedback reads: passages are far shorter


def depth_of(reranker: Reranker, candidates: int | None = None) -> int:
    """How many candidates are judged: so many, or as many as the reranker says."""
    return int(getattr(reranker, "depth", DEPTH) if candidates is None else candidates)


def rerank(reranker: Reranker, query: str, hits: Sequence[Hit], k: int, candidates: int | None = None) -> list[Hit]:
    """The best k of the first max(k, `depth_of`) hits, judged anew. With a weight below 1 a score is the weighted mean
    of both, each brought to 0..1, else the reranker's own. Of equal scores the former order stays.

    Raises NanochatError when the reranker does not give one finite number for each document."""
    judged = list(hits[: max(k, depth_of(reranker, candidates))])
    if not judged or k < 1:
        return []
    scores = np.asarray(reranker.scores(query, [hit.document for hit in judged]), dtype=np.float64)
    if scores.shape != (len(judged),) or not np.isfinite(scores).all():
        raise NanochatError(f"reranker {reranker.name} must give one finite score for each of {len(judged)} documents")
    weight = getattr(reranker, "weight", 1.0)
    if weight < 1:
        before = unit_scores(np.array([hit.score for hit in judged]))
        scores = (1 - weight) * before + weight * unit_scores(scores)
    order = np.argsort(-scores, kind="stable")[:k].tolist()
    return [Hit(judged[i].id, float(scores[i]), rank, judged[i].document) for rank, i in enumerate(order, 1)]


class FeedbackReranker:
    """Pseudo-relevance feedback (Rocchio 1971) among the candidates: the words of the `n_feedback` best join the query,
    and every candidate is scored by cosine with it. A word counts the more, the fewer candidates have it: what all of
    them share tells nothing. Finds second hops too, whose words stand in the first document and not in the question.

    `share` is the part of the best documents in the new query, and `analyser` (the knowledge base's) makes terms of
    texts. The defaults were tuned on half of the queries of two collections: see docs/retrieval-design.md."""

    name = "feedback"

    def __init__(
        self,
        analyser: Analyser | Mapping[str, Any] | str | None = None,
        *,
        n_feedback: int = 2,
        share: float = 0.7,
        weight: float = 0.7,
        depth: int = FEEDBACK_DEPTH,
    ) -> None:
        if n_feedback < 1 or depth < 1 or not 0 <= share <= 1 or not 0 <= weight <= 1:
            raise UsageError("feedback needs n_feedback and depth of 1 or more, share and weight from 0 to 1")
        self.analyser = Analyser.of(analyser)
        self.n_feedback, self.share, self.weight, self.depth = n_feedback, share, weight, depth

    def scores(self, query: str, documents: Sequence[Document]) -> list[float]:
        """One number from 0 to 1 for each document."""
        texts = [self.analyser.query_terms(document.text[:MAX_CHARACTERS]) for document in documents]
        if not any(texts):
            return [0.0] * len(documents)
        vocabulary: dict[str, int] = defaultdict(count().__next__)
        ids = np.fromiter(map(vocabulary.__getitem__, chain.from_iterable(texts)), np.int64)
        n, n_terms = len(documents), len(vocabulary)
        owners = np.repeat(np.arange(n), [len(terms) for terms in texts])
        pairs, counts = np.unique(owners * n_terms + ids, return_counts=True)  # each document's each term
        owners, ids = pairs // n_terms, pairs % n_terms
        idf = np.log((n + 1) / np.bincount(ids, minlength=n_terms))
        values = (1 + np.log(counts)) * idf[ids]
        values /= _nonzero(np.sqrt(np.bincount(owners, values**2, minlength=n)))[owners]
        best = owners < self.n_feedback
        centre = _unit(np.bincount(ids[best], values[best], minlength=n_terms))
        asked = [vocabulary[term] for term in self.analyser.query_terms(query) if term in vocabulary]
        wanted = _unit(np.bincount(asked, idf[asked], minlength=n_terms)) if asked else np.zeros(n_terms)
        target = (1 - self.share) * wanted + self.share * centre
        return np.bincount(owners, values * target[ids], minlength=n).tolist()


def _unit(x: np.ndarray) -> np.ndarray:
    return x / _nonzero(np.linalg.norm(x))


def _nonzero(x: Any) -> Any:
    return np.where(x == 0, 1.0, x)


class CrossEncoderReranker:
    """A cross-encoder: `model` is a directory with tokenizer.json and an .onnx file (needs onnxruntime and
    tokenizers), or whatever sentence-transformers' CrossEncoder accepts (needs that package, which brings torch).

    `depth` candidates are judged, their first `max_length` tokens at most, `batch_size` at a time. Scores are the
    model's logits; a model with two classes gives the second's over the first's."""

    weight = 1.0

    def __init__(self, model: str | Path, *, depth: int = DEPTH, max_length: int = 512, batch_size: int = 32) -> None:
        self.name, self.depth = f"cross-encoder:{model}", depth
        onnx = _onnx_file(Path(model))
        build = _onnx_judge if onnx else _sentence_transformers_judge
        self._judge = build(str(onnx or model), max_length)
        self._batch_size = batch_size

    def scores(self, query: str, documents: Sequence[Document]) -> list[float]:
        """One number for each document, on the model's own scale."""
        texts = [document.text for document in documents]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths together: little padding
        scores = np.empty(len(texts))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            logits = np.asarray(self._judge(query, [texts[i] for i in batch]), dtype=np.float64).reshape(len(batch), -1)
            if logits.shape[1] > 2:
                raise UsageError(f"{self.name} has {logits.shape[1]} classes: a reranker has one or two")
            scores[batch] = logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0.0)
        return scores.tolist()


Judge = Callable[[str, list[str]], Any]  # query, texts -> (n, 1 or 2) logits


def _onnx_file(directory: Path) -> Path | None:
    """The only .onnx file in the directory or its onnx/ folder, or the one called model.onnx; None without any."""
    found = sorted([*directory.glob("*.onnx"), *directory.glob("onnx/*.onnx")]) if directory.is_dir() else []
    named = [path for path in found if path.name == "model.onnx"]
    if len(found) > 1 and len(named) != 1:
        raise UsageError(f"{directory} holds several .onnx files, none of them model.onnx: keep one in a directory")
    return next(iter(named or found), None)


def _onnx_judge(file: str, max_length: int) -> Judge:
    try:
        import onnxruntime
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError(f"an ONNX reranker needs {error.name}: pip install 'nanochat[rag]'") from error
    folders = (Path(file).parent, Path(file).parent.parent)
    recipe = next((folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").exists()), None)
    if recipe is None:
        raise NanochatError(f"{folders[0]} has no tokenizer.json beside {Path(file).name}")
    try:
        tokenizer = Tokenizer.from_file(str(recipe))
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # both raise their own kinds
        raise NanochatError(f"cannot load the reranker in {folders[0]}: {error}") from error
    padding = tokenizer.padding or {}
    tokenizer.enable_truncation(max_length, strategy="only_second")
    tokenizer.enable_padding(pad_id=padding.get("pad_id", 0), pad_token=padding.get("pad_token", "[PAD]"))
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    inputs = [name for name in (entry.name for entry in session.get_inputs()) if name in fields]

    def judge(query: str, texts: list[str]) -> Any:
        encoded = tokenizer.encode_batch([(query, text) for text in texts])
        return session.run(
            None, {name: np.array([getattr(e, fields[name]) for e in encoded], np.int64) for name in inputs}
        )[0]

    return judge


def _sentence_transformers_judge(model: str, max_length: int) -> Judge:
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise UsageError("this reranker needs sentence-transformers: pip install sentence-transformers") from error
    try:
        encoder = CrossEncoder(model, max_length=max_length)
    except Exception as error:  # a missing file, a bad configuration, no network
        raise NanochatError(f"cannot load the reranker {model}: {error}") from error
    return lambda query, texts: encoder.predict([(query, text) for text in texts], show_progress_bar=False)


def make_reranker(
    spec: str | Reranker | None, analyser: Analyser | Mapping[str, Any] | str | None = None
) -> Reranker | None:
    """A reranker from a name: "feedback", "cross-encoder:DIRECTORY", "none"; a reranker stays what it is. Feedback
    cuts texts into words by the `analyser`, which should be the knowledge base's.

    Raises UsageError for another name."""
    if spec is None or spec == "none":
        return None
    if not isinstance(spec, str):
        return spec
    kind, _, model = spec.partition(":")
    if kind == "feedback" and not model:
        return FeedbackReranker(analyser)
    if kind == "cross-encoder" and model:
        if not Path(model).is_dir():
            raise UsageError(
                f"reranker {spec}: there is no directory {model}; a model of a hub is "
                "CrossEncoderReranker(NAME) in Python, or a directory that it was saved to"
            )
        return CrossEncoderReranker(model)
    raise UsageError(f"unknown reranker {spec!r}: choose from none, feedback, cross-encoder:DIRECTORY")
