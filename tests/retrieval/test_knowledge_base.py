"""KnowledgeBase: what is added is found, versions stay as they were, bad input and damage are clear errors."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import generation, manifest, opening, staging, writer
from nanochat.retrieval.document import Document
from nanochat.retrieval.filters import check, matches
from nanochat.retrieval.knowledge_base import KnowledgeBase

MOON = Document("moon", "The Moon has no air.", "The Moon", "book.txt", {"year": 1969, "tags": ["sky", "rock"]})
SUN = Document("sun", "The Sun is a hot star.", metadata={"year": 1919, "tags": ["sky"]})
SEA = Document("../sea/..", "The sea is salt water.", metadata={"year": 1969})


class Letters:
    """An embedder for tests: counts of letters. It remembers what it embedded."""

    def __init__(self, name: str = "letters", dimension: int = 26) -> None:
        self.name, self.dimension = name, dimension
        self.embedded: list[str] = []
        self.fail_after = 10**9

    def embed(self, texts: list[str]) -> np.ndarray:
        if len(self.embedded) + len(texts) > self.fail_after:
            raise KeyboardInterrupt
        self.embedded += texts
        return self.embed_queries(texts)

    def embed_queries(self, texts: list[str]) -> np.ndarray:
        counts = np.zeros((len(texts), self.dimension), np.float32)
        for line, text in zip(counts, texts):
            for letter in text.lower():
                if "a" <= letter <= "z":
                    line[(ord(letter) - 97) % self.dimension] += 1
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.create(tmp_path / "kb", kind="simple") as made:
        yield made


def ids(hits: list) -> list[str]:
    return [hit.id for hit in hits]


def write_lines(path: Path, documents: list[Document]) -> Path:
    path.write_text("".join(json.dumps({"id": d.id, "content": d.content}) + "\n" for d in documents))
    return path


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


@pytest.fixture
def hybrid(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.create(tmp_path / "kb", embedder=Letters(), fusion="rrf") as made:
        made.add([MOON, SUN, SEA])
        yield made


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


def test_another_embedder_or_analyser_is_refused(hybrid: KnowledgeBase, tmp_path: Path) -> None:
    path = hybrid.path
    for other in (Letters("other"), Letters(dimension=7)):
        with pytest.raises(UsageError, match="was built with the embedder 'letters'"):
            KnowledgeBase.open(path, embedder=other)
    with pytest.raises(UsageError, match="was built with the analyser"):
        KnowledgeBase.open(path, analyser={"stem": False})
    with KnowledgeBase.open(path) as kb, pytest.raises(UsageError, match="of your own: give it"):
        kb.search("moon")
    with KnowledgeBase.open(path, embedder=Letters(), analyser="english") as kb:
        assert kb.search("moon")[0].id == "moon"
    KnowledgeBase.create(tmp_path / "simple", kind="simple").close()
    with pytest.raises(UsageError, match="has no embedder"):
        KnowledgeBase.open(tmp_path / "simple", embedder=Letters())


def test_an_embedder_that_breaks_its_promise(tmp_path: Path) -> None:
    embedder = Letters()
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


# -- ingestion ---------------------------------------------------------------------------------------------------------


def test_ingestion_commits_now_and_then_and_resumes(tmp_path: Path) -> None:
    documents = [Document(f"d{i}", f"text {i} " + "abcdefghijklmnopqrstuvwxyz"[i % 26] * (i % 40)) for i in range(5000)]
    path = write_lines(tmp_path / "docs.jsonl", documents)
    embedder = Letters()
    embedder.fail_after = 3000
    kb = KnowledgeBase.create(tmp_path / "kb", kind="dense", embedder=embedder)
    with pytest.raises(KeyboardInterrupt):
        kb.ingest(path, commit_every=2500, progress=False)
    assert (len(kb), kb.version) == (2500, 1)
    assert not kb.verify()
    assert kb.stats()["staged_bytes"] > 0
    kb.close()
    embedder.fail_after = 10**9
    kb = KnowledgeBase.open(tmp_path / "kb", embedder=embedder)
    change = kb.ingest(path, commit_every=2500, progress=False)
    assert (change.added, change.unchanged, len(kb)) == (2500, 2500, 5000)
    assert len(embedder.embedded) == len(set(embedder.embedded)) == 5000  # nothing twice
    assert kb.stats()["staged_bytes"] == 0
    assert kb.search(documents[77].content, k=1)[0].id == "d77"
    kb.close()


def test_ingestion_of_bad_lines(kb: KnowledgeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "docs.jsonl"
    lines = ['{"id": "a", "text": "moon"}', "{broken", '{"id": "b\\ud800", "text": "x"}', '{"id": "a", "text": "sun"}']
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"docs\.jsonl, line 2: not JSON"):
        kb.ingest(path, progress=False)
    assert len(kb) == 0
    change = kb.ingest(path, on_error="skip", progress=False)
    assert (change.added, change.skipped) == (1, 3)
    change = kb.ingest(path, on_error="skip", progress=False, update=True)
    assert (change.updated, change.skipped, kb.get("a").content) == (1, 2, "sun")
    with pytest.raises(UsageError, match="commit_every"):
        kb.ingest(path, commit_every=0)


def test_the_progress_bar_counts_bytes(kb: KnowledgeBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kb.ingest(write_lines(tmp_path / "docs.jsonl", [MOON, SUN]))
    assert "ingest: 100%" in capsys.readouterr().err


def test_vectors_computed_elsewhere_are_taken(tmp_path: Path) -> None:
    embedder = Letters()
    kb = KnowledgeBase.create(tmp_path / "kb", kind="dense", embedder=embedder, chunk_words=3, overlap_words=1)
    texts = [text for document in (MOON, SUN) for text in kb.passages(document)]
    kb.stage(texts, embedder.embed_queries(texts))
    kb.add([MOON, SUN])
    assert embedder.embedded == []
    assert kb.stats()["staged_bytes"] == 0
    kb.close()


def test_damaged_staged_vectors_are_computed_again(tmp_path: Path) -> None:
    embedder = Letters()
    kb = KnowledgeBase.create(tmp_path / "kb", kind="dense", embedder=embedder)
    kb.stage([MOON.text, SUN.text], embedder.embed_queries([MOON.text, SUN.text]))
    path = kb.path / staging.NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "damaged after 1 vectors" in kb.verify()[0]
    kb.add([MOON, SUN])
    assert embedder.embedded == [SUN.text]
    path.write_bytes(whole[: len(whole) - 40])  # a kill in the middle of a write: no damage
    assert not kb.verify()
    path.write_bytes(b"#" + whole[1:])
    assert "of another embedder" in kb.verify()[0]
    kb.add([SEA])
    assert not kb.verify()
    kb.close()


# -- tags, compaction, indexes anew ------------------------------------------------------------------------------------


def test_tags_name_versions_and_compaction_keeps_them(kb: KnowledgeBase) -> None:
    kb.add([MOON])
    kb.tag("first")
    kb.update([Document("moon", "dust")])
    kb.add([SUN])
    kb.delete("sun")
    kb.add([SEA])
    reader = KnowledgeBase.open(kb.path, version=3)
    assert kb.compact() == 4
    assert [(v.number, v.tags) for v in kb.versions()] == [(1, ("first",)), (5, ())]
    with kb.at("first") as old:
        assert list(old.documents()) == [MOON]
        assert ids(old.search("moon")) == ["moon"]
    assert [d.id for d in kb.documents()] == ["moon", "../sea/.."]
    assert ids(reader.search("star")) == ["sun"]  # it keeps what it has open
    reader.close()
    with pytest.raises(UsageError, match="version 3 was compacted away; the versions are 1, 5"):
        kb.at(3)
    with pytest.raises(UsageError, match="does not exist yet"):
        kb.at(9)
    with pytest.raises(UsageError, match=r"no tag 'last'.*first"):
        kb.at("last")
    kb.untag("first")
    assert kb.compact() == 1
    assert not kb.verify()
    assert kb.stats()["removed_passages"] == 0
    for bad in ("", "12", 3):
        with pytest.raises(UsageError, match="a tag is"):
            kb.tag(bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="keep must"):
        kb.compact(0)


def test_a_change_that_leaves_mostly_dead_rows_drops_them(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MERGE_DEAD", 10)
    monkeypatch.setattr(generation, "SMALL", 0)
    documents = [Document(f"d{i}", f"moon number{i}") for i in range(40)]
    kb.add(documents)
    for round in range(1, 8):
        kb.update([Document(d.id, f"{d.content} again{round}") for d in documents])
        newest = kb._view.manifest.generations[-1]
        assert newest.passages <= 2 * len(documents) + 10
    assert newest.from_version > 1
    for number in range(1, 9):
        with kb.at(number) as old:
            assert len(old.search("moon", k=99)) == 40
            assert len(old.search(f"again{number - 1}", k=99)) == (40 if number > 1 else 0)
    kb.compact(keep=[2, 5])
    for number in (2, 5, 8):
        with kb.at(number) as old:
            assert len(old.search("moon", k=99)) == len(old.search(f"again{number - 1}", k=99)) == 40
    assert not kb.verify()


def test_many_small_changes_merge_segments(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MERGE_SEGMENTS", 3)
    for i in range(20):
        kb.add([Document(str(i), f"moon {i}", metadata={f"k{i % 3}": i})])
    assert len(kb._view.manifest.segments) <= 6
    assert len(kb.search("moon", k=99)) == 20
    assert ids(kb.search("moon", k=99, filter={"k1": {"gte": 15}})) == ["16", "19"]
    assert kb.at(13).get("12").metadata == {"k0": 12}
    kb.compact()
    assert len(kb._view.manifest.segments) == 1
    assert [d.id for d in kb.documents()] == [str(i) for i in range(20)]
    assert not kb.verify()


def test_a_large_change_becomes_several_segments(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SEGMENT_DOCUMENTS", 10)
    monkeypatch.setattr("nanochat.retrieval.prepare.AT_ONCE", 7)
    documents = [Document(str(i), f"moon {i}") for i in range(50)]
    changed = [Document("3", "changed moon"), Document("48", "changed moon too")]
    change = kb.update([*documents, *changed, documents[5], Document("twin", "moon 7")])
    assert (change.added, change.updated, change.unchanged) == (51, 2, 1)
    assert len(kb._view.manifest.segments) > 3
    assert set(ids(kb.search("changed", k=9))) == {"3", "48"}
    assert len(kb.search("moon", k=99)) == len(kb) == 51
    assert kb.add([Document("other", "moon 7")]).duplicates == 1
    assert not kb.verify()


def test_indexes_can_be_built_anew(hybrid: KnowledgeBase) -> None:
    hybrid.delete("sun")
    hybrid.reindex(analyser={"stem": False}, embedder=Letters("others", 13))
    assert hybrid.settings["embedder"]["name"] == "others"
    assert ids(hybrid.search("stars", mode="bm25")) == []
    assert ids(hybrid.at(1).search("star", mode="bm25")) == ["sun"]
    assert len(hybrid.search("moon", mode="dense", k=9)) == 2
    assert not hybrid.verify()
    for path in hybrid.path.glob("gen-*/bm25/*"):
        path.unlink()
    assert hybrid.verify()
    hybrid.reindex()
    assert not hybrid.verify()
    assert ids(hybrid.search("moon", k=1)) == ["moon"]


def test_a_copy_is_whole(kb: KnowledgeBase, tmp_path: Path) -> None:
    kb.add([MOON, SUN])
    kb.delete("sun")
    kb.save(tmp_path / "copy")
    with KnowledgeBase.open(tmp_path / "copy") as copy:
        assert not copy.verify()
        assert list(copy.documents()) == [MOON]
        assert ids(copy.at(1).search("star")) == ["sun"]
    with pytest.raises(UsageError, match="holds a knowledge base already"):
        kb.save(tmp_path / "copy")


# -- readers and writers -----------------------------------------------------------------------------------------------


def test_a_reader_keeps_its_version_until_it_refreshes(kb: KnowledgeBase) -> None:
    kb.add([MOON])
    with KnowledgeBase.open(kb.path) as reader, KnowledgeBase.open(kb.path, version=1) as pinned:
        kb.add([SUN])
        kb.delete("moon")
        kb.compact()
        for one in (reader, pinned):
            assert (ids(one.search("moon")), one.search("star"), one.version) == (["moon"], [], 1)
        assert reader.refresh()
        assert not reader.refresh()
        assert not pinned.refresh()
        assert (reader.search("moon"), ids(reader.search("star")), reader.version) == ([], ["sun"], 3)


def test_two_writers_take_turns(kb: KnowledgeBase) -> None:
    with KnowledgeBase.open(kb.path, lock_timeout=0.05) as second:
        kb.add([MOON])
        assert second.add([SUN]).version == 2  # on top of what the first one wrote
        with kb._writing(), pytest.raises(NanochatError, match=r"another process is writing to .*wait for it"):
            second.add([SEA])
        assert kb.add([SEA]).version == 3
    held, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[Document]:
        held.set()
        go_on.wait(10)
        yield Document("slow", "snail")

    with KnowledgeBase.open(kb.path, lock_timeout=10) as second:
        thread = threading.Thread(target=lambda: kb.add(slow()))
        thread.start()
        held.wait(10)
        threading.Timer(0.1, go_on.set).start()
        assert second.add([Document("late", "hare")]).version == 5  # it waited
        thread.join()
        assert sorted(d.id for d in second.documents()) == ["../sea/..", "late", "moon", "slow", "sun"]


def test_read_only(kb: KnowledgeBase) -> None:
    kb.add([MOON])
    with KnowledgeBase.open(kb.path, read_only=True) as reader:
        for change in (lambda: reader.add([SUN]), lambda: reader.delete("moon"), lambda: reader.at(1).tag("x")):
            with pytest.raises(UsageError, match="read-only"):
                change()
    kb.close()
    for use in (lambda: kb.search("moon"), lambda: kb.add([SUN]), kb.versions, kb.refresh):
        with pytest.raises(UsageError, match="was closed"):
            use()


def test_opening_survives_a_writer_that_deletes(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the manifest and opening what it names, two commits pass."""
    kb.add([MOON])
    real, overtaken = opening.View, []

    def slow(path: Path, now: manifest.Manifest, *rest: object) -> object:
        if not overtaken:
            overtaken.append(now.serial)
            for name in now.paths():
                generation.remove(path / name)
            monkeypatch.undo()
            shutil.copytree(backup, path, dirs_exist_ok=True)
            raise FileNotFoundError("a segment")
        return real(path, now, *rest)  # type: ignore[arg-type]

    backup = kb.path.parent / "later"
    kb.save(backup)
    with KnowledgeBase.open(backup) as later:
        later.update([Document("moon", "dust")])
    monkeypatch.setattr(opening, "View", slow)
    with KnowledgeBase.open(kb.path) as reader:
        assert (reader.version, reader.get("moon").content) == (2, "dust")


READER = """
import sys
from nanochat.retrieval.knowledge_base import KnowledgeBase
from nanochat.retrieval import manifest
kb = KnowledgeBase.open(sys.argv[1])
last, seen = -1, 0
while last < int(sys.argv[2]):
    kb.refresh()
    n = kb.version
    assert n >= last, (n, last)
    hits = kb.search("moon", k=50)
    found = sorted((h.id, h.document.content) for h in hits)
    expected = sorted((f"d{i}", f"moon round{n}") for i in range(7)) if n else []
    assert found == expected, (n, found)
    assert sorted(d.id for d in kb.documents()) == [id for id, _ in expected]
    seen += n != last
    last = n
print(seen)
"""


@pytest.mark.parametrize(("n_readers", "rounds"), [(2, 15), pytest.param(4, 1000, marks=pytest.mark.slow)])
def test_readers_in_other_processes_see_whole_versions_only(kb: KnowledgeBase, n_readers: int, rounds: int) -> None:
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(kb.path), str(rounds)], stdout=subprocess.PIPE, text=True)
        for _ in range(n_readers)
    ]
    for number in range(1, rounds + 1):
        kb.update([Document(f"d{i}", f"moon round{number}") for i in range(7)])
        if number % 5 == 0:
            kb.compact()
    for reader in readers:
        out, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        assert int(out) >= 1


def test_threads_share_one(kb: KnowledgeBase) -> None:
    kb.add([Document(f"d{i}", f"moon number{i}", metadata={"i": i}) for i in range(200)])
    failures: list[Exception] = []

    def search(start: int) -> None:
        try:
            for i in range(start, 200, 4):
                assert ids(kb.search(f"number{i}", k=1)) == [f"d{i}"]
                assert len(kb.search("moon", k=9, filter={"i": {"lt": i}})) == min(9, i)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=search, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for i in range(5):
        kb.add([Document(f"new{i}", "star")])
    for thread in threads:
        thread.join()
    assert not failures


# -- bad places and damage ---------------------------------------------------------------------------------------------


def test_places_that_are_no_knowledge_base(tmp_path: Path, kb: KnowledgeBase) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path in ("missing", "full", "full/file"):
        with pytest.raises(UsageError, match="does not exist" if path == "missing" else "is no knowledge base"):
            KnowledgeBase.open(tmp_path / path)
    with pytest.raises(UsageError, match="is not empty"):
        KnowledgeBase.create(tmp_path / "full", kind="simple")
    with pytest.raises(UsageError, match="holds a knowledge base already"):
        KnowledgeBase.create(kb.path, kind="simple")
    with pytest.raises(NanochatError, match="cannot make"):
        KnowledgeBase.create(tmp_path / "full" / "file" / "kb", kind="simple")
    for bad in ({"kind": "sparse"}, {"chunk_words": 5}, {"kind": "simple", "embedder": Letters()},
                {"kind": "dense", "analyser": "english", "embedder": Letters()},
                {"embedder": Letters(), "fusion": "sum"}, {"embedder": Letters(), "weights": [1]},
                {"embedder": Letters(), "depth": 0}):  # fmt: skip
        with pytest.raises(UsageError):
            KnowledgeBase.create(tmp_path / "new", **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3", None])
def test_k_must_be_a_count(kb: KnowledgeBase, k: object) -> None:
    with pytest.raises(UsageError, match="k must be a whole number"):
        kb.search("moon", k=k)  # type: ignore[call-overload]


def test_queries_must_be_texts(kb: KnowledgeBase) -> None:
    kb.add([MOON])
    for bad in ([3], [b"moon"], [None]):
        with pytest.raises(UsageError, match="a query must be a text"):
            kb.search(bad)  # type: ignore[call-overload]


def test_a_newer_format_is_named(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "FORMAT", 2)
    kb.add([MOON])
    monkeypatch.undo()
    with pytest.raises(UsageError, match="has format 2, this nanochat reads formats up to 1: install a newer"):
        KnowledgeBase.open(kb.path)


def test_a_lost_manifest_has_a_backup(kb: KnowledgeBase) -> None:
    kb.add([MOON])
    kb.delete("moon")
    path = kb.path / manifest.NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + whole[-4:])
    with pytest.raises(NanochatError, match=r"manifest\.json is damaged .*manifest\.backup\.json"):
        KnowledgeBase.open(kb.path)
    os.replace(kb.path / manifest.BACKUP, path)
    with KnowledgeBase.open(kb.path) as restored:
        assert ids(restored.search("moon")) == ["moon"]


def test_a_missing_file_is_named(kb: KnowledgeBase) -> None:
    kb.add([MOON])
    kb.delete("moon")
    for name, (folder, files) in enumerate(kb._view.manifest.directories().items()):
        for file in files:
            os.rename(kb.path / folder / file, kb.path / "away")
            assert any(file in problem and "missing" in problem for problem in kb.verify()), name
            os.rename(kb.path / "away", kb.path / folder / file)
    assert not kb.verify()
    removed = next(kb.path.glob("removed-*"))
    removed.unlink()
    assert f"{removed} is missing." in kb.verify()
    with pytest.raises(NanochatError, match=r"is damaged: .*verify"):
        KnowledgeBase.open(kb.path)


def flip(path: Path, place: int) -> Callable[[], None]:
    """Flip one bit of a file in place; the function returned flips it back."""

    def toggle() -> None:
        with open(path, "r+b") as file:
            file.seek(place // 8)
            byte = file.read(1)[0]
            file.seek(place // 8)
            file.write(bytes([byte ^ (1 << place % 8)]))

    toggle()
    return toggle


@pytest.mark.parametrize("kind", ["simple", "hybrid"])
def test_any_flipped_bit_is_reported(tmp_path: Path, kind: str) -> None:
    embedder = Letters() if kind == "hybrid" else None
    kb = KnowledgeBase.create(tmp_path / "kb", kind=kind, embedder=embedder)
    kb.add([MOON, SUN, Document("long", "one two three " * 100)])
    kb.update([Document("moon", "dust")])
    kb.delete("sun")
    if embedder:
        kb.stage(["left over"], embedder.embed_queries(["left over"]))
    kb.close()
    assert not verify(tmp_path / "kb")
    draws = np.random.default_rng(0)
    files = [path for path in (tmp_path / "kb").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 10
    for path in files:
        for place in draws.integers(0, 8 * path.stat().st_size, 3):
            back = flip(path, int(place))
            assert verify(tmp_path / "kb"), f"bit {place} of {path}"
            back()
    assert not verify(tmp_path / "kb")


def verify(path: Path) -> list[str]:
    from nanochat.retrieval.verification import problems

    return problems(path)


FULL_DISK = """
import resource, signal, sys
from nanochat.errors import NanochatError
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
kb = KnowledgeBase.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    kb.add([Document(f"d{i}", f"word{i} " * 50) for i in range(3000)])
except NanochatError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert len(kb) == 1 and kb.search("moon"), len(kb)
assert not kb.verify(), kb.verify()
assert kb.add([Document("new", "star")]).added == 1
"""


@pytest.mark.parametrize("kind", ["simple", "bm25"])
@pytest.mark.parametrize("limit", [100, 20_000, 300_000])
def test_a_full_disk_loses_nothing(tmp_path: Path, kind: str, limit: int) -> None:
    """A limit on the size of files stands for the full disk: writing fails at the same places."""
    assert resource.RLIM_INFINITY
    assert signal.SIGXFSZ
    with KnowledgeBase.create(tmp_path / "kb", kind=kind) as kb:
        kb.add([MOON])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(kb.path), str(limit)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout
    left = {path.name for path in kb.path.iterdir() if path.name.startswith(("seg-", "gen-"))}
    assert left == {"seg-000001-0", "gen-000001", "seg-000002-0", "gen-000002"}


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
