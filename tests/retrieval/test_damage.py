"""Bad places, damage and full disks: every one is told, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import manifest
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase
from nanochat.retrieval.verification import problems

MOON = Document("moon", "The Moon has no air.", "The Moon", "book.txt", {"year": 1969, "tags": ["sky", "rock"]})
SUN = Document("sun", "The Sun is a hot star.", metadata={"year": 1919, "tags": ["sky"]})
SEA = Document("../sea/..", "The sea is salt water.", metadata={"year": 1969})


def ids(hits: list) -> list[str]:
    return [hit.id for hit in hits]


def test_places_that_are_no_knowledge_base(tmp_path: Path, kb: KnowledgeBase, letters: Any) -> None:
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
    for bad in ({"kind": "sparse"}, {"chunk_words": 5}, {"kind": "simple", "embedder": letters()},
                {"kind": "dense", "analyser": "english", "embedder": letters()},
                {"embedder": letters(), "fusion": "sum"}, {"embedder": letters(), "weights": [1]},
                {"embedder": letters(), "depth": 0}):  # fmt: skip
        with pytest.raises(UsageError):
            KnowledgeBase.create(tmp_path / "new", **bad)  # type: ignore[arg-type]


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
    path.unlink()
    with pytest.raises(NanochatError, match=r"manifest\.json is gone; manifest\.backup\.json .* put a copy"):
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
def test_any_flipped_bit_is_reported(tmp_path: Path, kind: str, letters: Any) -> None:
    embedder = letters() if kind == "hybrid" else None
    kb = KnowledgeBase.create(tmp_path / "kb", kind=kind, embedder=embedder)
    kb.add([MOON, SUN, Document("long", "one two three " * 100)])
    kb.update([Document("moon", "dust")])
    kb.delete("sun")
    if embedder:
        kb.stage(["left over"], embedder.embed_queries(["left over"]))
    kb.close()
    assert not problems(tmp_path / "kb")
    draws = np.random.default_rng(0)
    files = [path for path in (tmp_path / "kb").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 10
    for path in files:
        for place in draws.integers(0, 8 * path.stat().st_size, 3):
            back = flip(path, int(place))
            assert problems(tmp_path / "kb"), f"bit {place} of {path}"
            back()
    assert not problems(tmp_path / "kb")


@pytest.mark.parametrize("kind", ["simple", "hybrid"])
def test_what_a_flipped_bit_does_to_readers_is_one_error(tmp_path: Path, kind: str, letters: Any) -> None:
    """Headers of arrays are Python that numpy parses, and counts reserve memory: anything could be raised."""
    embedder = letters() if kind == "hybrid" else None
    with KnowledgeBase.create(tmp_path / "kb", kind=kind, embedder=embedder) as kb:
        kb.add([MOON, SUN, Document("long", "one two three " * 100)])
        kb.update([Document("moon", "dust")])
    draws = np.random.default_rng(0)
    for path in sorted((tmp_path / "kb").rglob("*")):
        if not path.is_file() or not path.stat().st_size or path.suffix in (".faiss", ".lock"):
            continue
        if "bm25" in path.parts and path.suffix not in (".fast", ".json"):
            continue  # tantivy's own formats: its panics are tested with its index
        n = 8 * path.stat().st_size
        for place in (*draws.integers(0, min(n, 1024), 20), *draws.integers(0, n, 10)):
            back = flip(path, int(place))
            try:
                with KnowledgeBase.open(tmp_path / "kb", embedder=embedder) as kb:
                    kb.search(["dust", "sun"], 5, unique=True)
                    kb.get("long")
                    kb.at(1).search("moon", 3)
            except NanochatError:
                pass
            finally:
                back()


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
    with KnowledgeBase.create(tmp_path / "kb", kind=kind) as kb:
        kb.add([MOON])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(kb.path), str(limit)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout
    left = {path.name for path in kb.path.iterdir() if path.name.startswith(("seg-", "gen-"))}
    assert left == {"seg-000001-0", "gen-000001", "seg-000002-0", "gen-000002"}


@pytest.mark.slow
def test_a_flip_in_every_byte_is_reported(tmp_path: Path) -> None:
    with KnowledgeBase.create(tmp_path / "kb", kind="simple") as kb:
        kb.add([MOON, SUN])
        kb.delete("sun")
    draws = np.random.default_rng(0)
    for path in sorted(path for path in kb.path.rglob("*") if path.is_file()):
        for byte, bit in enumerate(draws.integers(0, 8, path.stat().st_size)):
            back = flip(path, 8 * byte + int(bit))
            assert problems(kb.path), f"bit {bit} of byte {byte} of {path}"
            back()
    assert not problems(kb.path)
