"""Readers and writers at once: threads, processes, locks, files that vanish."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import generation, manifest, opening
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase

MOON = Document("moon", "The Moon has no air.", "The Moon", "book.txt", {"year": 1969, "tags": ["sky", "rock"]})
SUN = Document("sun", "The Sun is a hot star.", metadata={"year": 1919, "tags": ["sky"]})
SEA = Document("../sea/..", "The sea is salt water.", metadata={"year": 1969})


def ids(hits: list) -> list[str]:
    return [hit.id for hit in hits]


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


def test_a_change_that_takes_long_keeps_no_reader_waiting(kb: KnowledgeBase) -> None:
    kb.add([MOON])
    held, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[Document]:
        held.set()
        go_on.wait(20)
        yield SUN

    found: list[list[str]] = []

    def read() -> None:
        kb.refresh()
        found.append(ids(kb.search("moon")))

    writer = threading.Thread(target=lambda: kb.add(slow()))
    writer.start()
    try:
        assert held.wait(10)
        reader = threading.Thread(target=read)
        reader.start()
        reader.join(10)
        assert found == [["moon"]]
    finally:
        go_on.set()
        writer.join(20)
    assert not kb.refresh()  # the change has moved it on
    assert ids(kb.search("star")) == ["sun"]


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
