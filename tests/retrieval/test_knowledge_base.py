"""KnowledgeBase: what is added is found, versions stay as they were, bad documents are clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.retrieval.document import Document
from nanochat.retrieval.filters import check, matches
from nanochat.retrieval.knowledge_base import KnowledgeBase

MOON = Document("moon", "The Moon has no air.", "The Moon", "book.txt", {"year": 1969, "tags": ["sky", "rock"]})
SUN = Document("sun", "The Sun is a hot star.", metadata={"year": 1919, "tags": ["sky"]})
SEA = Document("../sea/..", "The sea is salt water.", metadata={"year": 1969})


def ids(hits: list) -> list[str]:
    return [hit.id for hit in hits]


# -- search and versions -----------------------------------------------------------------------------------------------


def test_add_search_get_and_the_way_back(kb: KnowledgeBase) -> None:
    change = kb.add([MOON, SUN, SEA])
    assert (change.version, change.added, len(kb), str(change)) == (1, 3, 3, "version 1: 3 added")
    [hit] = kb.search("moon air", k=1)
    assert (hit.id, hit.rank, hit.document) == ("moon", 1, MOON)
    assert hit.score > 0
    assert kb.get("../sea/..") == SEA
    assert list(kb.documents()) == [MOON, SUN, SEA]
    assert "sun" in kb
    assert "mars" not in kb
    assert 3 not in kb
    assert sorted(path.name for path in kb.path.iterdir()) == [
        "gen-000001", "manifest.backup.json", "manifest.json", "seg-000001-0", "writer.lock"
    ]  # fmt: skip


def test_one_query_or_many(kb: KnowledgeBase) -> None:
    assert kb.search("moon") == []
    assert kb.search([]) == []
    kb.add([MOON, SUN])
    answers = kb.search(["moon", "sun star", "", "xyzzy", "the"], k=9)
    assert [ids(hits) for hits in answers[:4]] == [["moon"], ["sun"], [], []]
    assert kb.search("moon", k=9) == answers[0]


def test_every_version_stays_as_it_was(kb: KnowledgeBase) -> None:
    kb.add([MOON, SUN])
    kb.update([Document("moon", "A moon of Mars.", "Phobos")])
    kb.delete("sun")
    kb.add([SEA])
    assert [v.number for v in kb.versions()] == [0, 1, 2, 3, 4]
    assert [v.documents for v in kb.versions()] == [0, 2, 2, 1, 2]
    expected = {0: [[], [], []], 1: [["moon"], ["sun"], []], 2: [["moon"], ["sun"], []], 3: [["moon"], [], []]}
    for number, answer in {**expected, 4: [["moon"], [], ["../sea/.."]]}.items():
        with kb.at(number) as old:
            assert [ids(hits) for hits in old.search(["moon", "star", "salt"])] == answer
            assert old.version == number
            assert len(old) == len(list(old.documents())) == kb.versions()[number].documents
    assert kb.at(1).get("moon") == MOON
    assert kb.at(2).get("moon").title == "Phobos"
    with pytest.raises(UsageError, match="no document 'sun' in version 3"):
        kb.at(3).get("sun")


def test_what_a_change_counts(kb: KnowledgeBase) -> None:
    twin = Document("twin", MOON.content, MOON.title, "elsewhere", MOON.metadata)
    change = kb.add([MOON, twin, MOON, SUN])
    assert (change.added, change.duplicates, change.unchanged) == (2, 1, 1)
    assert kb.add([twin, SUN]).version == 1  # nothing to change: no version
    change = kb.add([twin], on_duplicate="keep")
    assert (change.version, change.added) == (2, 1)
    change = kb.update([SEA, Document("moon", "first"), Document("moon", "last"), SUN])
    assert (change.added, change.updated, change.unchanged) == (1, 1, 1)
    assert kb.get("moon").content == "last"
    change = kb.delete(["moon", "moon", "mars", "twin"])
    assert (change.deleted, change.unchanged) == (2, 1)
    assert kb.delete("mars").version == change.version
    assert kb.add([MOON]).added == 1  # gone, so no duplicate
    assert not kb.verify()


def test_conflicts_and_bad_documents_change_nothing(kb: KnowledgeBase) -> None:
    kb.add([MOON])
    for bad, why in [
        ([SUN, Document("moon", "other")], "'moon' is already there with other content: `update`"),
        ([SUN, Document("", "x")], "id must be a text that is not empty"),
        ([SUN, Document("a\ud800", "x")], "half a character"),
        ([SUN, {"id": "x"}], "Document records, not dict"),
        ([SUN, Document("x", None)], "content of document 'x' must be a text"),  # type: ignore[arg-type]
        ([SUN, Document("x", "", metadata={"a": {1}})], "metadata of document 'x' is not JSON"),
        ([SUN, Document("x", "", metadata={"a": float("inf")})], "metadata of document 'x' is not JSON"),
    ]:
        with pytest.raises(UsageError, match=why):
            kb.add(bad)  # type: ignore[arg-type]
        assert list(kb.documents()) == [MOON]
    change = kb.add([Document("", "x"), SUN, Document("moon", "other")], on_error="skip")
    assert (change.added, change.skipped) == (1, 2)
    with pytest.raises(UsageError, match="of another one"):
        kb.add([Document("twin", SUN.content, metadata=SUN.metadata)], on_duplicate="raise")
    with pytest.raises(UsageError, match="on_duplicate"):
        kb.add([SEA], on_duplicate="drop")
    assert not kb.verify()
    assert not list(kb.path.glob("*000003*"))


def test_an_iterator_that_fails_changes_nothing(kb: KnowledgeBase) -> None:
    def broken() -> Iterator[Document]:
        yield from (Document(str(i), f"text {i}") for i in range(5000))
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        kb.add(broken())
    assert (len(kb), kb.version) == (0, 0)
    assert sorted(path.name for path in kb.path.iterdir()) == ["manifest.json", "writer.lock"]
    assert kb.add([MOON]).added == 1


def test_strange_texts(kb: KnowledgeBase) -> None:
    strange = [
        Document("empty", ""),
        Document("space", " \n\t"),
        Document("half", "moon \ud800", "t\udc00", "s\ud800", {"k\ud800": "v\ud800", "n": "é"}),
        Document("nul\x00", "moon\x00light", "a\x00b", metadata={"z": "x\x00y"}),
        Document("long/" * 500, "moon " * 3),
        Document("emoji \U0001f600", "\U0001f600 moon"),
    ]
    kb.add(strange)
    assert len(kb) == 6
    assert kb.get("half") == Document("half", "moon \ufffd", "t\ufffd", "s\ufffd", {"k\ufffd": "v\ufffd", "n": "é"})
    for document in (*strange[:2], *strange[3:]):
        assert kb.get(document.id) == document
    assert ids(kb.search("half moon\ud800", k=9, filter={"k\ud800": "v\ud800"})) == ["half"]
    assert ids(kb.search("moon", k=9, filter={"z": "x\x00y"})) == ["nul\x00"]
    assert set(ids(kb.search("moon", k=9))) >= {"half", "long/" * 500, "emoji \U0001f600"}
    assert not kb.verify()


def test_only_empty_documents_then_others(kb: KnowledgeBase) -> None:
    kb.add([Document("e1", "")])
    assert kb.search("moon") == []
    kb.add([MOON])
    kb.add([Document("e2", "", "", "", {"x": 1})])
    assert ids(kb.search("moon")) == ["moon"]
    assert len(kb) == 3
    assert ids(kb.at(2).search("moon")) == ["moon"]
    assert kb.at(1).search("moon") == []
    assert not kb.verify()


def test_long_documents_are_cut_and_put_together_again(tmp_path: Path) -> None:
    content = "  " + " ".join(f"w{i}" + ("\n" if i % 7 == 0 else "") for i in range(1000)) + " end\n "
    kb = KnowledgeBase.create(tmp_path / "kb", kind="bm25", chunk_words=20, overlap_words=5)
    kb.add([Document("long", content, "Title", metadata={"x": 1}), MOON])
    assert kb.get("long").content == content
    hits = kb.search("w500 w511", k=9)
    assert len(hits) > 1
    for hit in hits:
        assert hit.document.span is not None
        assert hit.document.content == content[slice(*hit.document.span)]
        assert (hit.document.title, hit.document.metadata) == ("Title", {"x": 1})
    assert ids(kb.search("w500 w501 w600 moon", k=9, unique=True)) == ["long", "moon"]
    assert len(kb.search("w500 w501 w600 moon", k=200)) > 3
    assert kb.passages(kb.get("long"))[0].startswith("Title\nw0")
    assert len(kb) == 2
    assert kb.delete("long").deleted == 1
    assert kb.search("w500") == []
    kb.close()


def test_a_document_of_many_megabytes(tmp_path: Path) -> None:
    kb = KnowledgeBase.create(tmp_path / "kb", kind="bm25")
    content = "moon " * 400_000 + "needle " + "sun " * 400_000
    kb.add([Document("huge", content)])
    [hit] = kb.search("needle", k=1)
    assert "needle" in hit.document.content
    assert len(hit.document.content) < 2000
    assert kb.get("huge").content == content
    kb.close()


# -- filters -----------------------------------------------------------------------------------------------------------


def test_filters_are_exact_at_any_k(kb: KnowledgeBase) -> None:
    documents = [Document(str(i), "moon " * (1 + i % 5), metadata={"n": i, "odd": i % 2 == 1}) for i in range(300)]
    kb.add(documents)
    kb.delete([str(i) for i in range(0, 300, 3)])
    for filter in ({"n": {"gte": 290}}, {"odd": True}, {"n": [4, 5, 6]}, {"id": ["7", "8", "9"]}, {"n": -1}):
        expected = [d.id for d in documents if matches(d, check(filter)) and int(d.id) % 3]
        for k in (1, 2, 1000):
            found = kb.search("moon", k=k, filter=filter)
            assert set(ids(found)) <= set(expected)
            assert len(found) == min(k, len(expected))
    with pytest.raises(UsageError, match="unknown comparison"):
        kb.search("moon", filter={"n": {"over": 3}})


# -- fused, normalised, reranked ---------------------------------------------------------------------------------------


def test_a_hybrid_asks_both_or_one(hybrid: KnowledgeBase) -> None:
    assert ids(hybrid.search("salt", k=1, mode="bm25")) == ["../sea/.."]
    assert ids(hybrid.search("salt", mode="bm25")) == ["../sea/.."]
    assert len(hybrid.search("salt", mode="dense")) == 3
    both = hybrid.search("salt", reranker=None)
    assert (both[0].id, len(both)) == ("../sea/..", 3)
    place = ids(hybrid.search("salt", mode="dense")).index(both[0].id)
    assert both[0].score == pytest.approx(1 / 61 + 1 / (61 + place))
    assert hybrid.search("salt", mode="hybrid", reranker=None) == both
    assert hybrid.search("salt") == hybrid.search("salt", reranker="feedback")  # what a hybrid does unless told not to
    assert hybrid.search("salt", mode="bm25") == hybrid.search("salt", mode="bm25", reranker=None)
    with pytest.raises(UsageError, match="no mode 'simple'"):
        hybrid.search("salt", mode="simple")
    hybrid.delete("../sea/..")
    assert "../sea/.." not in ids(hybrid.search("salt", k=9))
    assert not hybrid.verify()


def test_normalised_scores_stay_with_their_documents(hybrid: KnowledgeBase) -> None:
    plain, unit = hybrid.search("moon sun", mode="dense"), hybrid.search("moon sun", mode="dense", normalize=True)
    assert ids(plain) == ids(unit)
    assert (unit[0].score, unit[-1].score) == (1.0, 0.0)
    assert hybrid.search("moon", normalize="rank")[0].score == 1.0


def test_a_reranker_has_the_last_word(hybrid: KnowledgeBase) -> None:
    class Shortest:
        name = "shortest"

        def scores(self, query: str, documents: list[Document]) -> list[float]:
            return [-len(document.content) for document in documents]

    hits = hybrid.search("moon", k=2, reranker=Shortest())
    assert [(hit.id, hit.rank, hit.score) for hit in hits] == [("moon", 1, -20.0), ("sun", 2, -22.0)]


def test_another_embedder_or_analyser_is_refused(hybrid: KnowledgeBase, tmp_path: Path, letters: Any) -> None:
    path = hybrid.path
    for other in (letters("other"), letters(dimension=7)):
        with pytest.raises(UsageError, match="was built with the embedder 'letters'"):
            KnowledgeBase.open(path, embedder=other)
    with pytest.raises(UsageError, match="was built with the analyser"):
        KnowledgeBase.open(path, analyser={"stem": False})
    with KnowledgeBase.open(path) as kb, pytest.raises(UsageError, match="of your own: give it"):
        kb.search("moon")
    with KnowledgeBase.open(path, embedder=letters(), analyser="english") as kb:
        assert kb.search("moon")[0].id == "moon"
    KnowledgeBase.create(tmp_path / "simple", kind="simple").close()
    with pytest.raises(UsageError, match="has no embedder"):
        KnowledgeBase.open(tmp_path / "simple", embedder=letters())


def test_an_embedder_that_breaks_its_promise(tmp_path: Path, letters: Any) -> None:
    embedder = letters()
    kb = KnowledgeBase.create(tmp_path / "kb", kind="dense", embedder=embedder)
    kb.add([MOON])
    good = embedder.embed_queries
    for bad in (
        lambda texts: good(texts)[:, :5],
        lambda texts: good(texts)[:0],
        lambda texts: good(texts) * np.float32("nan"),
    ):
        embedder.embed_queries = bad  # type: ignore[method-assign]
        with pytest.raises(UsageError, match="the embedder 'letters' gave"):
            kb.add([SUN])
        with pytest.raises(UsageError, match="the embedder 'letters' gave"):
            kb.search("moon")
    embedder.embed_queries = good  # type: ignore[method-assign]
    assert kb.add([SUN]).added == 1
    kb.close()


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3", None])
def test_k_must_be_a_count(kb: KnowledgeBase, k: object) -> None:
    with pytest.raises(UsageError, match="k must be a whole number"):
        kb.search("moon", k=k)  # type: ignore[call-overload]


def test_queries_must_be_texts(kb: KnowledgeBase) -> None:
    kb.add([MOON])
    for bad in ([3], [b"moon"], [None], 3, None, b"moon", {"moon": 1}):
        with pytest.raises(UsageError, match="a query must be a text"):
            kb.search(bad)  # type: ignore[call-overload]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=()), max_size=8), st.text(st.characters(exclude_categories=()))
        ),
        max_size=5,
    ),
    st.text(max_size=20),
    st.integers(1, 9),
)
def test_any_text_any_id_any_k(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], query: str, k: int
) -> None:
    with KnowledgeBase.create(tmp_path_factory.mktemp("kb") / "kb", kind="simple") as kb:
        kb.update([Document(*pair) for pair in pairs], on_error="skip")
        good = {id: content for id, content in pairs if id and not any("\ud800" <= c <= "\udfff" for c in id)}
        assert sorted(d.id for d in kb.documents()) == sorted(good)
        hits = kb.search(query, k=k)
        assert len(hits) <= min(k, len(good))
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
        assert not kb.verify()
