"""Bulk ingestion: its parts by themselves, then with a Ray of two workers."""

import contextlib
import gzip
import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import bulk
from nanochat.retrieval.embed import HashedEmbedder
from nanochat.retrieval.jsonl import read_documents
from nanochat.retrieval.knowledge_base import KnowledgeBase

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray leaves sockets and processes to its own cleaning
ENGLISH = ["moon", "sun", "air", "cheese", "water", "iron", "stone", "light", "night", "star"]


def write(path, n, start=0):
    lines = [
        json.dumps({"id": f"d{i}", "text": " ".join(ENGLISH[i * j % 10] for j in range(1, 12)) + f" {i}", "n": i})
        for i in range(start, start + n)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def kb(tmp_path):
    with KnowledgeBase.create(tmp_path / "kb", embedder="hashed:32", chunk_words=8, overlap_words=2) as made:
        yield made


def worker(kb):
    return bulk._Worker("hashed:32", kb.embedder.name, bulk._cutter(kb))


def run(made, ranges):
    """What the workers would send, without Ray."""
    for i, one in enumerate(ranges):
        for part in made({"range": [i], **{name: [value] for name, value in one._asdict().items()}}):
            [row] = [{name: values[0] for name, values in part.items()}]
            vectors = np.frombuffer(row["vectors"], "<f4")
            yield {**row, "vectors": vectors.reshape(len(row["texts"]), -1) if row["texts"] else vectors}


@pytest.fixture
def no_ray(monkeypatch):
    """The workers' work done here, one range after the other."""

    def parts(data, todo, task, *resources):
        yield from run(bulk._Worker(**task), todo)

    monkeypatch.setattr(bulk, "_Ray", lambda *options: contextlib.nullcontext())
    monkeypatch.setattr(bulk, "_parts", parts)


@given(st.lists(st.text("ab é", max_size=9), max_size=12), st.integers(1, 40), st.booleans())
def test_ranges_cover_a_file_line_by_line(tmp_path_factory, lines, size, ends):
    path = tmp_path_factory.mktemp("ranges") / "f.jsonl"
    path.write_text("\n".join(lines) + ("\n" if ends and lines else ""))
    found = []
    for one in bulk.ranges(path, size):
        part = list(bulk._lines(one))
        assert one.line == len(found) + 1
        assert sum(map(len, part)) == one.end - one.start
        found += part
    assert b"".join(found) == path.read_bytes()
    assert all(line.endswith(b"\n") for line in found[:-1])


def test_a_worker_sends_the_passages_that_the_knowledge_base_wants(kb, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "PART_TEXTS", 5)
    path = write(tmp_path / "docs.jsonl", 20)
    parts = list(run(worker(kb), bulk.ranges(path, 700)))
    texts = [text for part in parts for text in part["texts"]]
    assert texts == [text for document in read_documents(path) for text in kb.passages(document)]
    np.testing.assert_allclose(np.concatenate([part["vectors"] for part in parts]), kb.embedder.embed(texts))
    for number in {part["range"] for part in parts}:
        lasts = [part["last"] for part in parts if part["range"] == number]
        assert lasts == [-1] * (len(lasts) - 1) + [len(lasts)]


def test_gzipped_files_are_read_whole(kb, tmp_path):
    plain = write(tmp_path / "docs.jsonl", 10)
    packed = tmp_path / "docs.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    [one] = bulk.ranges(packed, 100)
    assert list(bulk._lines(one)) == plain.read_bytes().splitlines(keepends=True)


def test_bad_lines_are_named_by_file_and_line(kb, tmp_path):
    path = write(tmp_path / "docs.jsonl", 6)
    lines = path.read_text().splitlines()
    lines[4] = '{"id": "x"}'
    path.write_text("\n".join(lines))
    errors = [error for part in run(worker(kb), bulk.ranges(path, 150)) for error in part["errors"]]
    assert len(errors) == 1
    assert f"{path}, line 5: no content" in errors[0]


def test_parts_may_come_in_any_order(kb, tmp_path):
    notes = bulk.Notes(kb)
    path = write(tmp_path / "docs.jsonl", 4)
    [one] = bulk.ranges(path, 10_000)
    vectors = np.ones((1, 32), np.float32)
    with bulk._Stage(kb, notes) as stage:
        assert not stage.add(one, {"texts": ["c"], "vectors": vectors, "last": 3})
        assert not stage.add(one, {"texts": ["a"], "vectors": vectors, "last": -1})
        assert notes.missing([one]) == [one]
        assert stage.add(one, {"texts": [], "vectors": vectors, "last": -1})
    assert bulk.Notes(kb).missing([one]) == []


def test_notes_start_over_when_the_file_or_the_knowledge_base_is_another(kb, tmp_path):
    path = write(tmp_path / "docs.jsonl", 9)
    all_ranges = list(bulk.ranges(path, 200))
    bulk.Notes(kb).add(all_ranges[1:])
    with open(bulk.Notes(kb).path, "a") as file:
        file.write('\n["interrupted wri')
    notes = bulk.Notes(kb)
    assert notes.missing(all_ranges) == all_ranges[:1]
    notes.add(all_ranges[:1])
    assert bulk.Notes(kb).missing(all_ranges) == []
    write(path, 10)
    assert bulk.Notes(kb).missing(all_ranges) == all_ranges


def test_wrong_arguments_are_errors(kb, tmp_path):
    path = write(tmp_path / "docs.jsonl", 2)
    with pytest.raises(UsageError, match="workers=0"):
        bulk.bulk_ingest(kb, path, workers=0)
    with pytest.raises(UsageError, match="on_error"):
        bulk.bulk_ingest(kb, path, on_error="never")
    with pytest.raises(UsageError, match="no such file"):
        bulk.bulk_ingest(kb, tmp_path / "nothing.jsonl")
    with (
        KnowledgeBase.create(tmp_path / "lexical", kind="bm25") as lexical,
        pytest.raises(UsageError, match="has no embedder"),
    ):
        bulk.bulk_ingest(lexical, path)


def test_a_bad_line_ends_the_run_and_what_was_embedded_is_kept(kb, tmp_path, no_ray):
    path = write(tmp_path / "docs.jsonl", 30)
    good = path.stat().st_size
    with open(path, "a") as file:
        file.write('{"id": "x"}\n')
    with pytest.raises(UsageError, match="line 31: no content"):
        bulk.bulk_ingest(kb, path, range_bytes=500, progress=False)
    assert len(kb) == 0
    texts = sum(len(kb.passages(document)) for document in read_documents(path, "skip"))
    with path.open("rb+") as file:
        file.truncate(good)
    assert bulk.bulk_ingest(kb, path, range_bytes=500, progress=False).added == 30
    assert texts > 30
    with open(path, "a") as file:
        file.write('{"id": "x"}\n')
    change = bulk.bulk_ingest(kb, path, range_bytes=500, on_error="skip", progress=False)
    assert (change.unchanged, change.skipped) == (30, 1)


def test_a_worker_that_fails_is_one_clear_error(kb, tmp_path, no_ray):
    path = write(tmp_path / "docs.jsonl", 2)
    kb._view.manifest.settings["embedder"]["spec"] = "hashed:64"
    with pytest.raises(NanochatError, match=r"a worker failed at .*docs\.jsonl: UsageError: this machine's embedder"):
        bulk.bulk_ingest(kb, path, progress=False)


# -- with Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray():
    pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with bulk._Ray(None, 2, 1.0, 0.0):
            yield


@pytest.fixture
def embeds_nothing(monkeypatch):
    """Embedding in this process is an error; the workers are others."""

    def refuse(self, texts):
        raise AssertionError(f"embedded {len(texts)} texts in the driver")

    monkeypatch.setattr(HashedEmbedder, "embed", refuse)


def test_two_workers_make_what_one_process_makes(local_ray, kb, tmp_path, embeds_nothing, monkeypatch):
    path = write(tmp_path / "docs.jsonl", 300)
    change = bulk.bulk_ingest(kb, path, range_bytes=4000, progress=False)
    assert (change.added, len(kb), kb.verify()) == (300, 300, [])
    assert bulk.bulk_ingest(kb, path, range_bytes=4000, progress=False).unchanged == 300
    monkeypatch.undo()
    with KnowledgeBase.create(tmp_path / "plain", embedder="hashed:32", chunk_words=8, overlap_words=2) as plain:
        plain.ingest(path, progress=False)
        for query in ("moon cheese 17", "water"):
            expected = [(hit.id, hit.document) for hit in plain.search(query, 9)]
            assert [(hit.id, hit.document) for hit in kb.search(query, 9)] == expected


def test_an_interrupted_run_goes_on_where_it_was(local_ray, tmp_path, embeds_nothing, monkeypatch):
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    from nanochat.retrieval.milvus import MilvusKnowledgeBase

    path = write(tmp_path / "docs.jsonl", 200)
    with MilvusKnowledgeBase.create(str(tmp_path / "lite.db"), kind="dense", embedder="hashed:32") as kb:
        original = bulk._Stage.add
        seen = []

        def interrupt(self, one, part):
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append(one)
            return original(self, one, part)

        with monkeypatch.context() as patch:
            patch.setattr(bulk._Stage, "add", interrupt)
            with pytest.raises(KeyboardInterrupt):
                bulk.bulk_ingest(kb, path, range_bytes=2000, progress=False)
        assert len(kb) == 0
        missing = bulk.Notes(kb).missing(bulk.ranges(path, 2000))
        assert not set(seen) & set(missing)
        n = bulk.embed_files(kb, [path], workers=2, range_bytes=2000, progress=False)
        assert n == sum(1 for one in missing for _ in bulk._lines(one)) < 200
        assert kb.ingest(path, progress=False).added == 200
        assert kb.verify() == []
