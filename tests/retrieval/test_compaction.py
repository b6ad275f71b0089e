"""Tags and compaction, segments that merge, rows that are dropped, indexes built anew, copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanochat.errors import UsageError
from nanochat.retrieval import generation, writer
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase

MOON = Document("moon", "The Moon has no air.", "The Moon", "book.txt", {"year": 1969, "tags": ["sky", "rock"]})
SUN = Document("sun", "The Sun is a hot star.", metadata={"year": 1919, "tags": ["sky"]})
SEA = Document("../sea/..", "The sea is salt water.", metadata={"year": 1969})


def ids(hits: list) -> list[str]:
    return [hit.id for hit in hits]


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


def test_indexes_can_be_built_anew(hybrid: KnowledgeBase, letters: Any) -> None:
    hybrid.delete("sun")
    hybrid.reindex(analyser={"stem": False}, embedder=letters("others", 13))
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
