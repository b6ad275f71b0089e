"""The four names: where they keep things, what they refuse. What they promise in common is in test_contract.py."""

from pathlib import Path

import pytest

from nanochat.errors import UsageError
from nanochat.retrieval import (
    RETRIEVERS,
    BM25Retriever,
    DenseRetriever,
    Document,
    HybridRetriever,
    SimpleRetriever,
)

MOON, SUN = Document("moon", "The Moon has no air."), Document("sun", "The Sun is a hot star.")


def test_the_table_names_all_four() -> None:
    kinds = {"simple": SimpleRetriever, "bm25": BM25Retriever, "dense": DenseRetriever, "hybrid": HybridRetriever}
    assert kinds == RETRIEVERS


def test_without_a_path_it_is_temporary() -> None:
    retriever = SimpleRetriever()
    retriever.add([MOON])
    place = retriever.kb.path
    assert place.exists()
    retriever.close()
    assert not place.exists()


def test_with_a_path_it_stays(tmp_path: Path) -> None:
    with SimpleRetriever(tmp_path / "kb", chunk_words=50) as retriever:
        retriever.add([MOON, SUN])
    with SimpleRetriever(tmp_path / "kb", chunk_words=50) as again:
        assert [hit.id for hit in again.search("star")] == ["sun"]
    with pytest.raises(UsageError, match="made with another chunk_words"):
        SimpleRetriever(tmp_path / "kb", chunk_words=60)
    with pytest.raises(UsageError, match="is a knowledge base of kind simple, not bm25"):
        BM25Retriever(tmp_path / "kb")
    with pytest.raises(UsageError, match="does not exist"):
        SimpleRetriever.load(tmp_path / "other")


def test_a_hybrid_over_one_knowledge_base_or_over_retrievers(tmp_path: Path) -> None:
    pytest.importorskip("tantivy")
    pytest.importorskip("faiss")
    with HybridRetriever(path=tmp_path / "kb", embedder="hashed-256", fusion="rrf") as one:
        assert one.add([MOON, SUN]).added == 2
        assert one.search("star")[0].id == "sun"
        assert one.inner.kb.kind == "hybrid"
    with pytest.raises(UsageError, match="another fusion"):
        HybridRetriever(path=tmp_path / "kb", fusion="weighted")
    with SimpleRetriever() as simple, BM25Retriever() as bm25:
        both = HybridRetriever([simple, bm25], fusion="rrf", reranker=None)
        assert [change.added for change in both.add([MOON, SUN])] == [2, 2]
        assert both.search("star")[0].score == pytest.approx(2 / 61)
        assert len(both) == 2
    with pytest.raises(UsageError, match="not both"):
        HybridRetriever([simple], path=tmp_path)


def test_a_hybrid_reranks(tmp_path: Path) -> None:
    pytest.importorskip("tantivy")
    pytest.importorskip("faiss")

    class Shortest:
        name = "shortest"

        def scores(self, query: str, documents: list[Document]) -> list[float]:
            return [-len(document.content) for document in documents]

    with HybridRetriever(embedder="hashed-256", reranker=Shortest()) as retriever:
        retriever.add([MOON, SUN])
        assert [hit.id for hit in retriever.search("star", k=1)] == ["moon"]
