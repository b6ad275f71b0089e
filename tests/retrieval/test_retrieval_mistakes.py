"""`nanochat retrieval`: what a user can get wrong is one message, and loses nothing."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, built, ids, write

from nanochat.lock import lock_file
from nanochat.retrieval import manifest
from nanochat.retrieval.knowledge_base import KnowledgeBase


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serch", "kb", "x"], "unknown subcommand 'serch'; did you mean search?"),
        (["search"], "--kb is missing: nanochat retrieval search KB QUERY"),
        (["search", "kb"], "give a query or a file of --queries"),
        (["search", "kb", "air", "--queries", "q"], "give a query or a file of --queries"),
        (["search", "nowhere", "air"], "nowhere does not exist"),
        (["search", ".", "air"], ". is no knowledge base: it has no manifest.json"),
        (["search", "documents.jsonl", "air"], "documents.jsonl is no knowledge base"),
        (["search", "kb", "air", "--k", "0"], "k must be a whole number of 1 or more, not 0"),
        (["search", "kb", "air", "--k", "many"], "--k many: expected"),
        (["search", "kb", "air", "--kk", "3"], "unknown flag --kk, did you mean --k?"),
        (["search", "kb", "air", "--mode", "dense"], "no mode 'dense' in a simple knowledge base"),
        (["search", "kb", "air", "--filter", "year"], "--filter 'year': expected key=value"),
        (["search", "kb", "air", "--filter", "{"], "--filter {: not JSON"),
        (["search", "kb", "air", "--at", "7"], "version 7 does not exist yet; the versions are 0, 1"),
        (["search", "kb", "air", "--at", "old"], "no tag 'old' in this knowledge base"),
        (["search", "kb", "air", "--reranker", "x"], "unknown reranker 'x'"),
        (["search", "kb", "air", "--normalize", "x"], "unknown normalisation 'x'"),
        (["get", "kb", "nobody"], "no document 'nobody' in version 1 of kb"),
        (["get", "kb", "moon", "mars"], "unexpected argument 'mars'"),
        (["tag", "kb", "7"], "a tag is a text that is no number, not '7'"),
        (["compact", "kb", "--keep", "0"], "keep must be 1 version or more, not 0"),
        (["reindex", "kb", "--embedder", "hashed"], "a knowledge base of kind 'simple' has no embedder"),
        (["reindex", "kb", "--language", "klingon"], "unknown language 'klingon'"),
        (["add", "kb", "none.jsonl"], "no such file: none.jsonl"),
        (["add", "kb", "documents.jsonl", "--on-error", "maybe"], "--on_error maybe: choose from raise, skip"),
        (["add", "kb", "documents.jsonl", "--on-duplicate", "maybe"], "--on_duplicate maybe: choose from"),
        (["add", "kb", "documents.jsonl", "--commit-every", "0"], "--commit_every 0: must be at least 1"),
        (["--documents", "documents.jsonl"], "--output is missing"),
        (["--documents", "documents.jsonl", "--output", "new", "--type", "bm26"], "--type bm26: choose from simple"),
        (["--documents", "none.jsonl", "--output", "new"], "no such file: none.jsonl"),
        (["--documents", "documents.jsonl", "--output", "."], ". is not empty"),
        (["evaluate", "kb", "--queries", "none", "--qrels", "none"], "cannot read none"),
    ],
)
def test_wrong_calls_are_one_message(call: Call, argv: list[str], message: str) -> None:
    built(call)
    files = [path for path in Path("kb").rglob("*") if path.is_file() and path.name != "writer.lock"]
    before = {path: path.read_bytes() for path in files}
    done = call(*argv)
    assert (done.code, done.out) == (1 if argv[0] == "evaluate" else 2, "")
    assert done.err.startswith("error: ")
    assert message in done.err
    assert not Path("new").exists()
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize("query", ["", "   ", "of an is", "zzzz qqqq", "\ud800", "!?", "\x00", "-", "-x"])
def test_queries_without_a_known_word_find_nothing(call: Call, query: str) -> None:
    write("documents.jsonl", [{"id": "moon", "content": "The Moon has no air."}])
    built(call)
    done = call("search", "kb", query)
    assert (done.code, done.out) == (0, "nothing found\n")


def test_a_query_of_stop_words_only(call: Call) -> None:
    built(call)
    assert ids(call("search", "kb", "the", "has", "--json")) == ["moon", "mars"]


def test_more_than_there_is(call: Call) -> None:
    built(call)
    assert sorted(ids(call("search", "kb", "air", "--k", "1000000", "--json"))) == ["mars", "moon"]


def test_bad_lines_are_named_or_skipped(call: Call) -> None:
    good, bad = {"id": "a", "content": "x y"}, ["not json", "[1]", {"id": "b"}, {"id": 4.5, "content": "z"}, "\x80"]
    write("bad.jsonl", [good, *bad, {"id": "c", "content": ""}, {"id": "\ud800", "content": "half"}])
    failed = call("build", "bad.jsonl", "--output=kb", "--type=simple")
    assert failed.code == 2
    assert "bad.jsonl, line 2: not JSON" in failed.err
    assert not Path("kb").exists()  # nothing was stored, nothing is left
    done = call("build", "bad.jsonl", "--output=kb", "--type=simple", "--on-error=skip")
    assert done.out.startswith("version 1: 2 added, 6 skipped\n"), done.out
    assert call("verify", "kb").code == 0


def test_ids_that_are_there_with_other_content(call: Call) -> None:
    built(call)
    write("new.jsonl", [{"id": "new", "content": "new"}, {"id": "moon", "content": "cheese"}])
    done = call("add", "kb", "new.jsonl")
    assert (done.code, "document 'moon' is already there with other content" in done.err) == (2, True)
    assert call("get", "kb", "new").code == 2  # all or nothing
    assert call("add", "kb", "new.jsonl", "--on-error=skip").out == "version 2: 1 added, 1 skipped\n"


def test_a_document_that_files_hold_twice_is_named_with_its_place(call: Call) -> None:
    write("a.jsonl", [{"id": "a", "content": "x"}, {"id": "b", "content": "x"}])
    done = call("build", "a.jsonl", "--output=kb", "--type=simple", "--on-duplicate=raise")
    assert done.code == 2
    assert "a.jsonl, line 2: document 'b' has the title, content and metadata of another one" in done.err


def test_files_without_text_are_counted(call: Call) -> None:
    Path("texts").mkdir()
    Path("texts/one.rst").write_text("======\nA walk\n======\n\nUp the hill.\n")
    Path("texts/empty.txt").write_text(" \n")
    done = call("build", "texts", "--output=kb", "--type=simple")
    assert (done.code, "1 skipped" in done.out + done.err) == (0, True), done
    assert call("get", "kb", "texts/one.rst").json["title"] == "A walk"


def test_an_id_that_files_hold_twice_is_named_with_both_places(call: Call) -> None:
    write("a.jsonl", [{"id": "a", "content": "x"}, {"id": "b", "content": "y"}])
    write("b.jsonl", ["", {"id": "c", "content": "z"}, {"_id": "b", "text": "other"}])
    Path("kb").mkdir()
    done = call("build", "a.jsonl", "b.jsonl", "--output=kb", "--type=simple")
    assert (done.code, "b.jsonl, line 3: document 'b' stands at a.jsonl, line 2 too" in done.err) == (2, True), done.err
    assert "already there" not in done.err
    assert list(Path("kb").iterdir()) == []  # the directory was there before
    assert call("build", "a.jsonl", "--output=kb", "--type=simple").code == 0
    done = call("build", "b.jsonl", "--output=kb", "--type=simple")
    assert "b.jsonl, line 3: document 'b' is already there with other content: `update` replaces it" in done.err
    assert call("get", "kb", "b").json["content"] == "y"


def test_what_a_failed_build_has_stored_stays(call: Call) -> None:
    write("bad.jsonl", [{"id": "a", "content": "x"}, "bad"])
    build = ["build", "bad.jsonl", "--output=kb", "--type=simple", "--commit-every=1"]
    assert call(*build).code == 2
    assert call("stats", "kb", "--json").json["documents"] == 1
    assert call(*build, "--on-error=skip").code == 0


def test_a_large_document(call: Call) -> None:
    write("documents.jsonl", [{"id": "large", "content": "lorem ipsum dolor " * 100_000 + "needle"}])
    built(call)
    assert ids(call("search", "kb", "needle", "--json")) == ["large"]


def test_other_embedder_and_type(call: Call) -> None:
    pytest.importorskip("faiss")
    built(call, "--embedder=hashed:64", kind="dense")
    done = call("build", "documents.jsonl", "--output=kb", "--type=dense", "--embedder=hashed:128")
    assert (done.code, "was built with the embedder 'hashed-64' (dimension 64)" in done.err) == (2, True)
    assert call("reindex", "kb", "--embedder=hashed:128").code == 0
    assert call("stats", "kb", "--json").json["embedder"] == "hashed-128"
    assert call("build", "documents.jsonl", "--output=k2", "--type=dense", "--embedder=nothing").code == 2
    assert not Path("k2").exists()


def test_what_to_install_for_an_embedder(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.retrieval.embed.find_spec", lambda name: None)
    done = call("build", "documents.jsonl", "--output=new", "--type=hybrid")
    assert (done.code, "pip install 'nanochat[rag]'" in done.err, Path("new").exists()) == (2, True, False)


@pytest.mark.parametrize("how", ["flip", "cut", "lose"])
def test_verify_names_the_damaged_file_and_reindex_mends_an_index(call: Call, how: str) -> None:
    built(call)
    path = max((p for p in Path("kb").glob("gen-*/**/*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    if how == "lose":
        path.unlink()
    else:
        path.write_bytes(data if how == "flip" else data[:-1])
    done = call("verify", "kb")
    assert (done.code, path.name in done.out) == (1, True)
    assert call("verify", "kb", "--json").json["problems"]
    assert call("search", "kb", "air").code in (0, 1)  # an answer, or the error; no traceback


@pytest.mark.parametrize("lost", ["gen-*", "gen-*/bm25", "gen-*/bm25/meta.json", "gen-*/dense/*.vectors.npy"])
def test_reindex_needs_no_index(call: Call, lost: str) -> None:
    pytest.importorskip("tantivy")
    pytest.importorskip("faiss")
    built(call, "--embedder=hashed:16", kind="hybrid")
    wanted = ids(call("search", "kb", "air", "--json"))
    for path in sorted(Path("kb").glob(lost)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert call("search", "kb", "air").code == 1
    done = call("reindex", "kb")
    assert (done.code, "built anew" in done.out) == (0, True), done.err
    assert ids(call("search", "kb", "air", "--json")) == wanted
    assert call("verify", "kb").code == 0


def test_damage_names_verify_once(call: Call) -> None:
    built(call)
    (path,) = Path("kb").glob("seg-*/*.sqlite*")
    path.chmod(0o644)
    path.write_bytes(b"no database" * 1000)
    done = call("search", "kb", "air")
    assert (done.code, done.err.count("`verify` tells")) == (1, 1), done.err


def test_a_damaged_manifest(call: Call) -> None:
    built(call)
    path = Path("kb") / manifest.NAME
    path.write_bytes(path.read_bytes().replace(b'"kind":"simple"', b'"kind":"simplf"'))
    for argv in (["search", "kb", "air"], ["add", "kb", "documents.jsonl"], ["stats", "kb"]):
        done = call(*argv)
        assert (done.code, "is damaged" in done.err) == (1, True)
    assert (call("verify", "kb").code, "is damaged" in call("verify", "kb").out) == (1, True)


def test_a_newer_format(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 99)
        built(call)
    for argv in (["search", "kb", "air"], ["add", "kb", "documents.jsonl"], ["verify", "kb"]):
        done = call(*argv)
        assert (done.code, "has format 99" in done.err, "install a newer nanochat" in done.err) == (2, True, True)


def test_a_second_writer_is_refused(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    built(call)
    write("new.jsonl", [{"id": "new", "content": "new"}])
    opened = KnowledgeBase.open
    monkeypatch.setattr(KnowledgeBase, "open", lambda *a, **k: opened(*a, **{**k, "lock_timeout": 0.05}))
    with lock_file(Path("kb/writer.lock")):
        done = call("add", "kb", "new.jsonl")
        assert ids(call("search", "kb", "air", "--json"))  # readers go on
    assert (done.code, "another process is writing to kb" in done.err) == (1, True)
    assert call("add", "kb", "new.jsonl").code == 0


def test_a_full_disk(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    built(call)
    write("new.jsonl", [{"id": "new", "content": "new"}])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_dump", full)
        done = call("add", "kb", "new.jsonl")
    assert done.code == 1
    assert "No space left on device" in done.err
    assert "the last version is intact" in done.err
    assert call("verify", "kb").code == 0
    assert call("add", "kb", "new.jsonl").out == "version 2: 1 added\n"


def test_interrupted_ingestion_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    built(call)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(KnowledgeBase, "ingest", interrupted)
    done = call("add", "kb", "documents.jsonl")
    assert (done.code, done.out) == (130, "")
    assert done.err == "\nkb is whole; the same call goes on where it stopped\ninterrupted\n"
