"""What every retriever promises, run over all of them.

A backend joins by one more row in BACKENDS: a function that makes an empty one in a directory, with `chunk_words` and
`overlap_words` if given. EXACT ones find nothing but what has a word of the query; the others rank everything."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import RETRIEVERS, KnowledgeBase, Retriever
from nanochat.retrieval.document import Document, Hit
from nanochat.retrieval.filters import check, matches

Made = Any  # a retriever with `add`, `delete`, `search`; `save` and `load` where it is in SAVED


def stored(name: str, directory: Path, **options: Any) -> Made:
    if name in ("dense", "hybrid"):
        pytest.importorskip("faiss")
        options = {"embedder": "hashed-256", **options}
    if name in ("bm25", "hybrid"):
        pytest.importorskip("tantivy")
    return RETRIEVERS[name](path=directory / "kb", **options)


def joined(directory: Path, **options: Any) -> Made:
    parts = [stored("bm25", directory / "first", **options), stored("simple", directory / "second", **options)]
    return RETRIEVERS["hybrid"](parts)


def milvus(directory: Path, **options: Any) -> Made:
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    from nanochat.retrieval.milvus import MilvusKnowledgeBase

    return MilvusKnowledgeBase.create(server(), collection=f"kb{os.urandom(6).hex()}", **options)


@cache
def server() -> str:
    """A milvus-lite that runs as long as the tests."""
    from nanochat.retrieval.milvus_client import Connection

    place = str(Path(tempfile.mkdtemp()) / "lite.db")
    connection = Connection(place)
    atexit.register(shutil.rmtree, Path(place).parent, ignore_errors=True)
    atexit.register(connection.close)
    return place


BACKENDS: dict[str, Callable[..., Made]] = {
    **{name: lambda directory, name=name, **options: stored(name, directory, **options) for name in RETRIEVERS},
    "joined": joined,
    "knowledge base": lambda directory, **options: KnowledgeBase.create(directory / "kb", kind="bm25", **options),
    "milvus": lambda directory, **options: milvus(directory, kind="bm25", **options),
    "milvus hybrid": lambda directory, **options: milvus(directory, embedder="hashed-256", **options),
}
EXACT = {"simple", "bm25", "joined", "knowledge base", "milvus"}
SAVED = {*RETRIEVERS, "joined", "knowledge base"}  # a cluster keeps what it has
DOCUMENTS = [
    Document("moon", "The Moon has no air and no water.", "Moon", "a.txt", {"year": 1969, "tags": ["sky", "rock"]}),
    Document("sun", "The Sun is a hot star.", "Sun", "a.txt", {"year": 1919, "tags": ["sky"]}),
    Document("../sea/..", "The sea is salt water.", "", "b.txt", {"year": 1969}),
    Document("fish", "Fish swim in salt water.", "", "", {"year": 2001.5, "flag": True}),
    Document("empty", ""),
]


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty(name: str, tmp_path: Path) -> Iterator[Made]:
    with BACKENDS[name](tmp_path) as made:
        yield made


@pytest.fixture
def retriever(empty: Made) -> Made:
    empty.add(DOCUMENTS)
    return empty


def ids(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def test_it_is_a_retriever(empty: Made) -> None:
    assert isinstance(empty, Retriever)
    assert len(empty) == 0
    assert empty.search("moon") == []
    assert empty.search(["moon", "sun"]) == [[], []]


def test_the_best_comes_first_with_its_document(retriever: Made) -> None:
    for query, best in [("hot star", 1), ("salt sea", 2), ("fish swim", 3), ("moon air", 0)]:
        hits = retriever.search(query, k=3)
        assert (hits[0].id, hits[0].document) == (DOCUMENTS[best].id, DOCUMENTS[best])
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert all(isinstance(hit.score, float) for hit in hits)
        assert all(hit.document == next(d for d in DOCUMENTS if d.id == hit.id) for hit in hits)


def test_scores_can_be_from_0_to_1(retriever: Made) -> None:
    plain = retriever.search("moon air star sea", k=4)
    for how in (True, "minmax", "max", "rank"):
        hits = retriever.search("moon air star sea", k=4, normalize=how)
        assert [hit.document for hit in hits] == [hit.document for hit in plain]
        assert all(0 <= hit.score <= 1 for hit in hits)
        assert hits[0].score == pytest.approx(1.0)
        assert retriever.search(["moon air star sea"], k=4, normalize=how) == [hits]


def test_one_query_is_one_list_and_many_are_many(retriever: Made) -> None:
    queries = ["hot star", "", "salt water", "xyzzy", "the"]
    many = retriever.search(queries, k=2)
    assert many == [retriever.search(query, k=2) for query in queries]
    assert retriever.search([]) == []
    assert retriever.search(("hot star",), k=2) == many[:1]


def test_k_may_exceed_what_there_is(name: str, retriever: Made) -> None:
    hits = retriever.search("water", k=1000)
    assert len(hits) == len(set(ids(hits))) <= 5
    assert set(ids(hits)) >= {"moon", "../sea/..", "fish"}
    for k in (1, 2, 3):
        assert ids(retriever.search("water", k=k)) == ids(hits)[:k]
    if name in EXACT:
        assert len(hits) == 3
    for bad in (0, -3, 1.5, True, "2"):
        with pytest.raises(UsageError, match="k must be"):
            retriever.search("water", k=bad)


def test_queries_without_a_word_that_is_known(name: str, retriever: Made) -> None:
    for query in ("", "   ", "\n\t", "!?", "xyzzyq"):
        hits = retriever.search(query)
        assert isinstance(hits, list)
        if name in EXACT:
            assert hits == []
    assert isinstance(retriever.search("the of and"), list)
    for bad in ([None], [3]):
        with pytest.raises(UsageError):
            retriever.search(bad)


def test_stop_words_do_not_decide(name: str, retriever: Made) -> None:
    if name in EXACT:
        assert ids(retriever.search("is the a star")) == ids(retriever.search("star")) == ["sun"]


@pytest.mark.parametrize(
    "filter",
    [
        {"year": 1969},
        {"year": [1919, 1969]},
        {"year": {"gt": 1919, "lte": 1969}},
        {"year": {"ne": 1969}},
        {"tags": "sky"},
        {"tags": ["rock"], "year": 1969},
        {"flag": True},
        {"source": "a.txt"},
        {"id": ["moon", "fish", "nobody"]},
        {"title": {"gte": "N"}},
        {"year": "1969"},
        {"missing": 1},
        {},
    ],
)
def test_filters_are_exact_at_any_k(name: str, retriever: Made, filter: dict[str, Any]) -> None:
    allowed = {document.id for document in DOCUMENTS if matches(document, check(filter))}
    words = {"moon", "../sea/..", "fish"}  # those that hold the word
    for k in (1, 2, 50):
        found = ids(retriever.search("water", k=k, filter=filter))
        assert set(found) <= allowed
        assert len(found) >= min(k, len(allowed & words))
        if name in EXACT:
            assert set(found) <= words
    assert set(ids(retriever.search("water", k=50, filter=filter))) >= allowed & words


def test_a_bad_filter_is_refused(retriever: Made) -> None:
    for bad in ("year", {"year": {"over": 3}}, {"year": None}):
        with pytest.raises(UsageError, match="filter"):
            retriever.search("water", filter=bad)


def test_queries_that_are_no_texts_are_refused(retriever: Made) -> None:
    for bad in (None, 3, b"moon", {"moon": 1}):
        with pytest.raises(UsageError, match="a query must be a text"):
            retriever.search(bad)  # type: ignore[arg-type]


def test_deleted_documents_are_gone_and_may_come_back(name: str, retriever: Made) -> None:
    retriever.delete("moon")
    retriever.delete(["../sea/..", "nobody", "empty"])
    assert len(retriever) == 2
    assert {"moon", "../sea/.."}.isdisjoint(ids(retriever.search("salt water moon", k=50)))
    retriever.add([DOCUMENTS[0]])
    assert ids(retriever.search("moon air", k=1)) == ["moon"]
    retriever.delete([document.id for document in DOCUMENTS])
    assert retriever.search("salt water moon", k=50) == []
    assert len(retriever) == 0


def test_the_same_document_twice_is_one(retriever: Made) -> None:
    retriever.add(DOCUMENTS)
    copy = Document("copy", DOCUMENTS[3].content, "", "elsewhere", DOCUMENTS[3].metadata)
    retriever.add([DOCUMENTS[0], DOCUMENTS[0], copy])
    assert len(retriever) == 5
    assert ids(retriever.search("moon", k=50)).count("moon") == 1


def test_the_same_id_with_other_content_is_an_error(retriever: Made) -> None:
    with pytest.raises(UsageError, match="'moon' is already there with other content"):
        retriever.add([Document("new", "a planet"), Document("moon", "made of cheese")])
    assert len(retriever) == 5
    assert "new" not in ids(retriever.search("planet", k=50))


def test_strange_ids_and_texts(retriever: Made) -> None:
    strange = [
        Document("/etc/passwd", "alpha \ud800 beta"),
        Document("a\nb", "gamma\x00delta"),
        Document("\U0001f600", "\U0001f600 epsilon " * 30),
        Document("x" * 3000, "zeta"),
        Document(" ", "eta théta"),
    ]
    retriever.add(strange)
    for document, word in zip(strange, ("alpha", "delta", "epsilon", "zeta", "théta")):
        [hit] = retriever.search(word, k=1)
        assert hit.id == document.id
    assert retriever.search("alpha \ud800", k=1)[0].document.content == "alpha \ufffd beta"
    for bad in (Document("", "x"), Document("half\ud800", "x"), {"id": "x"}):
        with pytest.raises(UsageError):
            retriever.add([bad])


def test_long_documents_are_found_by_their_passages(name: str, tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(200)]
    content = " ".join(words)
    with BACKENDS[name](tmp_path, chunk_words=20, overlap_words=5) as made:
        made.add([Document("long", content, "Title", metadata={"n": 1}), *DOCUMENTS])
        hit = made.search("word111", k=1, filter={"n": 1})[0]
        assert hit.document.span is not None
        assert hit.document.content == content[slice(*hit.document.span)]
        assert "word111" in hit.document.content.split()
        assert (hit.id, hit.document.title) == ("long", "Title")


def test_what_is_saved_comes_back(name: str, retriever: Made, tmp_path: Path) -> None:
    if name not in SAVED:
        pytest.skip("nothing is copied")
    retriever.delete("sun")
    retriever.save(tmp_path / "saved")
    queries = ["salt water", "hot star", "moon"]
    with type(retriever).load(tmp_path / "saved") as again:
        assert again.search(queries, k=9) == retriever.search(queries, k=9)
        assert len(again) == 4
        again.add([DOCUMENTS[1]])
        assert (len(again), len(retriever)) == (5, 4)
    with pytest.raises(NanochatError):
        retriever.save(tmp_path / "saved")
    with pytest.raises(UsageError):
        type(retriever).load(tmp_path / "nothing")


def test_closed_is_closed(empty: Made) -> None:
    empty.close()
    with pytest.raises(UsageError, match="was closed"):
        empty.search("moon")


TEXTS = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(["moon rock", "sun", "a moon"])


@pytest.mark.parametrize("kind", RETRIEVERS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.text(min_size=1, max_size=5), TEXTS, max_size=4), TEXTS, st.integers(1, 9))
def test_any_text_any_k(
    tmp_path_factory: pytest.TempPathFactory, kind: str, contents: dict[str, str], query: str, k: int
) -> None:
    with BACKENDS[kind](tmp_path_factory.mktemp("any")) as made:
        made.add([Document(id, content) for id, content in contents.items()])
        hits = made.search(query, k=k)
        assert len(hits) <= min(k, len(made)) <= len(contents)
        assert len(set(ids(hits))) == len(hits)
        assert set(ids(hits)) <= contents.keys()
