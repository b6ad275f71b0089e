"""FusedRetriever: any retrievers, fused like a dictionary would, filtered by them, reranked if wished."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Document, Found, Hit, Retriever
from nanochat.retrieval.fusion import rrf
from nanochat.retrieval.hybrid import FusedRetriever, fuse_hits

WORDS = ["moon", "air", "dust", "rock", "water", "ice", "sun", "light"]


class Counting:
    """Finds documents by how often the query's words occur: a retriever in a few lines."""

    def __init__(self, factor: float = 1.0, documents=()):
        self.factor, self.documents, self.asked = factor, {d.id: d for d in documents}, []

    def search(self, queries, k=5, filter=None):
        if isinstance(queries, str):
            return self.search([queries], k, filter)[0]
        self.asked.append((list(queries), k, filter))
        return [self._one(query, k, filter or {}) for query in queries]

    def _one(self, query, k, filter):
        scored = []
        for d in self.documents.values():
            score = self.factor * sum(d.text.split().count(word) for word in query.split())
            if score and all(d.metadata.get(key) == value for key, value in filter.items()):
                scored.append((-score, d.id, d))
        return [Hit(d.id, -score, rank, d) for rank, (score, _, d) in enumerate(sorted(scored)[:k], 1)]

    def add(self, documents):
        self.documents |= {d.id: d for d in documents}

    def delete(self, ids):
        for name in [ids] if isinstance(ids, str) else ids:
            self.documents.pop(name)

    def save(self, directory):
        directory.mkdir()
        (directory / "documents").write_text("\n".join(d.content for d in self.documents.values()))

    @classmethod
    def load(cls, directory):
        return cls(1.0, documents_of((directory / "documents").read_text().splitlines()))


texts = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


def documents_of(contents):
    return [Document(f"d{i}", text, metadata={"even": i % 2 == 0}) for i, text in enumerate(contents)]


@given(st.lists(texts, max_size=12), texts, st.integers(1, 15), st.sampled_from(["rrf", "weighted"]))
def test_fused_from_what_each_retriever_found(contents, query, k, fusion):
    documents = documents_of(contents)
    retrievers = [Counting(1.0, documents[::2] + documents[:3]), Counting(-0.5 + 1, documents)]
    hybrid = FusedRetriever(retrievers, fusion=fusion, reranker=None)
    assert isinstance(hybrid, Retriever)
    hits = hybrid.search(query, k)
    known = {hit.id for retriever in retrievers for hit in retriever.search(query, 100)}
    assert len(hits) == min(k, len(known))
    assert {hit.id for hit in hits} <= known
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(hit.id == hit.document.id and documents[int(hit.id[1:])] == hit.document for hit in hits)
    assert hybrid.search([query, "moon"], k) == [hits, hybrid.search("moon", k)]


def test_rrf_of_hits_is_rrf_of_rows():
    documents = documents_of("abcdef")
    ranked = ([3, 1, 2], [2, 5])
    lists = [[Hit(f"d{row}", 1.0, i, documents[row]) for i, row in enumerate(rows, 1)] for rows in ranked]
    fused = fuse_hits(lists, 4, "rrf")
    rows = rrf([Found(np.array(rows), np.ones(len(rows), np.float32)) for rows in ranked], 4)
    assert {hit.id: hit.score for hit in fused} == pytest.approx(
        {f"d{row}": score for row, score in zip(rows.rows.tolist(), rows.scores.tolist())}
    )
    assert fused[0].id == "d2"


def test_passages_of_one_document_stay_apart():
    passages = [Document("d", text, span=span) for text, span in (("one", (0, 3)), ("two", (3, 6)))]
    lists = [[Hit("d", 1.0, i, p) for i, p in enumerate(ps, 1)] for ps in (passages, passages[::-1])]
    assert sorted(hit.document.span for hit in fuse_hits(lists, 5)) == [(0, 3), (3, 6)]


def test_depth_filter_and_batches_reach_the_retrievers():
    one = Counting(1.0, documents_of(["moon"] * 6))
    hybrid = FusedRetriever([one], depth=3, reranker=None)
    assert len(hybrid.search("moon", 5)) == 5
    assert [h.id for h in hybrid.search(["moon"], 2, {"even": True})[0]] == ["d0", "d2"]
    assert [(k, f) for _, k, f in one.asked] == [(5, None), (3, {"even": True})]
    assert hybrid.search([], 2) == []
    assert hybrid.search("venus", 2) == []


def test_weights_decide():
    one, two = Counting(1.0, [Document("a", "moon")]), Counting(1.0, [Document("b", "moon")])
    for fusion in ("rrf", "weighted"):
        for weights, first in (([3, 1], "a"), ([1, 3], "b")):
            hits = FusedRetriever([one, two], fusion=fusion, weights=weights, reranker=None).search("moon")
            assert hits[0].id == first
            assert len(hits) == 2


def test_a_reranker_has_the_last_word():
    class Shortest:
        name, weight, depth = "shortest", 1.0, 3

        def scores(self, query, documents):
            assert len(documents) <= 4
            return [-len(d.content) for d in documents]

    documents = [Document(name, "moon " * n) for name, n in (("a", 4), ("b", 3), ("c", 2), ("d", 1))]
    hybrid = FusedRetriever([Counting(1.0, documents)], reranker=Shortest())
    assert [hit.id for hit in hybrid.search("moon", 2)] == ["c", "b"]  # "d" is fourth, beyond the reranker's depth
    assert [hit.id for hit in hybrid.search("moon", 4)] == ["d", "c", "b", "a"]
    assert [(hit.rank, hit.score) for hit in hybrid.search("moon", 2)] == [(1, -10.0), (2, -15.0)]


def test_the_default_reranker_finds_the_second_hop():
    documents = [
        Document("film", "Selene film director Ada Quill of Tallinn"),
        Document("x0", "director born Oslo banking railway merger"),
        Document("x1", "director born Lima museum painting auction"),
        Document("x2", "director born Rome football season transfer"),
        Document("quill", "Ada Quill born Tallinn"),
    ]
    query = "Selene film director born"
    plain = FusedRetriever([Counting(1.0, documents)], reranker=None).search(query, 3)
    found = FusedRetriever([Counting(1.0, documents)]).search(query, 3)
    assert [hit.id for hit in plain] == ["film", "x0", "x1"]
    assert [hit.id for hit in found] == ["film", "x0", "quill"]


def test_adding_and_deleting_goes_to_all():
    one, two = Counting(), Counting()
    hybrid = FusedRetriever([one, two])
    hybrid.add(Document(name, "moon") for name in "ab")
    hybrid.delete("a")
    hybrid.delete(name for name in "b")
    hybrid.add(iter([Document("c", "moon")]))
    assert list(one.documents) == list(two.documents) == ["c"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"retrievers": []}, "at least one"),
        ({"fusion": "sum"}, "rrf"),
        ({"weights": [1, 2]}, "2 fusion weights for 1"),
        ({"depth": 0}, "depth"),
        ({"reranker": "best"}, "unknown reranker 'best'"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(UsageError, match=says):
        FusedRetriever(**{"retrievers": [Counting()], **settings})


def test_bad_k():
    with pytest.raises(UsageError, match="k must be"):
        FusedRetriever([Counting()]).search("moon", 0)


def test_saved_and_loaded(tmp_path):
    hybrid = FusedRetriever([Counting(1.0, documents_of(["moon air", "moon moon"])) for _ in "ab"], weights=(1, 2))
    hybrid.save(tmp_path / "a" / "b")
    again = FusedRetriever.load(tmp_path / "a" / "b", kinds={"Counting": Counting})
    assert again.search("moon") == hybrid.search("moon")
    assert (again.weights, again.fusion, again.depth) == ([1, 2], "weighted", 100)
    with pytest.raises(UsageError, match="exists already"):
        hybrid.save(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        ('{"format": 2, "retrievers": [], "fusion": "", "weights": null, "depth": 1}', "has format 2"),
    ],
)
def test_damaged_files(tmp_path, text, says):
    (tmp_path / "hybrid.json").write_text(text)
    with pytest.raises(NanochatError, match=says):
        FusedRetriever.load(tmp_path)
    with pytest.raises(NanochatError, match="no hybrid retriever at"):
        FusedRetriever.load(tmp_path / "nowhere")
