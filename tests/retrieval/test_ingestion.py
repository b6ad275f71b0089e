"""Ingestion: files of documents, commits on the way, resuming, vectors that were staged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat.errors import UsageError
from nanochat.retrieval import staging
from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase

MOON = Document("moon", "The Moon has no air.", "The Moon", "book.txt", {"year": 1969, "tags": ["sky", "rock"]})
SUN = Document("sun", "The Sun is a hot star.", metadata={"year": 1919, "tags": ["sky"]})
SEA = Document("../sea/..", "The sea is salt water.", metadata={"year": 1969})


def write_lines(path: Path, documents: list[Document]) -> Path:
    path.write_text("".join(json.dumps({"id": d.id, "content": d.content}) + "\n" for d in documents))
    return path


def test_ingestion_commits_now_and_then_and_resumes(tmp_path: Path, letters: Any) -> None:
    documents = [Document(f"d{i}", f"text {i} " + "abcdefghijklmnopqrstuvwxyz"[i % 26] * (i % 40)) for i in range(5000)]
    path = write_lines(tmp_path / "docs.jsonl", documents)
    embedder = letters()
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


def test_vectors_computed_elsewhere_are_taken(tmp_path: Path, letters: Any) -> None:
    embedder = letters()
    kb = KnowledgeBase.create(tmp_path / "kb", kind="dense", embedder=embedder, chunk_words=3, overlap_words=1)
    texts = [text for document in (MOON, SUN) for text in kb.passages(document)]
    kb.stage(texts, embedder.embed_queries(texts))
    kb.add([MOON, SUN])
    assert embedder.embedded == []
    assert kb.stats()["staged_bytes"] == 0
    kb.close()


def test_texts_that_are_staged_twice_have_one_vector(tmp_path: Path, letters: Any) -> None:
    embedder = letters()
    texts = [f"letters {chr(97 + i)}{chr(97 + i // 5)}" for i in range(20)]
    expected = embedder.embed_queries(texts)
    staged = staging.Staging(tmp_path, embedder)
    assert staged.place(texts[:8]).tolist() == list(range(8))
    assert staged.place(texts[7:3:-1] + texts[6:12] + texts[6:12]).tolist() == [7, 6, 5, 4, *[*range(6, 12)] * 2]
    staged.close()
    again = staging.Staging(tmp_path, embedder)
    assert len(again) == 12
    places = again.place(texts)
    for part in (places, places[3:9], places[::2], places[::-1], places[[4, 4]], places[:0]):
        assert (again.vectors(part) == expected[part]).all()
    again.close(committed=True)
    assert embedder.embedded == texts
    assert not again.path.exists()


def test_what_took_the_embedder_long_is_written_through(
    tmp_path: Path, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(staging.os, "fsync", synced.append)
    for seconds, expected in ((0.0, 3), (1e6, 0)):
        monkeypatch.setattr(staging, "SYNC_SECONDS", seconds)
        staged = staging.Staging(tmp_path, letters())
        for text in ("abc", "bcd", "cde"):
            staged.place([f"{text} {seconds}"])
        assert len(synced) == expected
        staged.close()
        assert len(synced) == expected + 1
        synced.clear()


def test_damaged_staged_vectors_are_computed_again(tmp_path: Path, letters: Any) -> None:
    embedder = letters()
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
