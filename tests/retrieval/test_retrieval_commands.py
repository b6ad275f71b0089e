"""`nanochat retrieval` from build to evaluate; what a user can get wrong is one message, and loses nothing."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanochat import cli
from nanochat.lock import lock_file
from nanochat.retrieval import manifest
from nanochat.retrieval.commands import COMMANDS, sources
from nanochat.retrieval.knowledge_base import KnowledgeBase

DOCUMENTS = [
    {"id": "moon", "title": "The Moon", "content": "The Moon has no air. Its days last a month.", "year": 1969},
    {"id": "mars", "title": "Mars", "content": "Mars has thin air and two moons.", "year": 1976, "kind": "planet"},
    {"id": "a/../b c", "content": "Bread is baked from flour, water, salt and yeast.", "kind": "food"},
]


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Outcome]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`nanochat retrieval ...` in a directory with documents.jsonl."""
    monkeypatch.chdir(tmp_path)
    write("documents.jsonl", DOCUMENTS)

    def run(*argv: str) -> Outcome:
        capsys.readouterr()
        try:
            cli.main(["retrieval", *argv])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


def write(name: str, records: Sequence[Any]) -> str:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    Path(name).write_text("\n".join(lines) + "\n")
    return name


def built(call: Call, *argv: str, kind: str = "simple") -> None:
    done = call("build", "--documents", "documents.jsonl", "--output", "kb", "--type", kind, *argv)
    assert done.code == 0, done.err


def ids(done: Outcome) -> list[str]:
    return [hit["id"] for hit in done.json["hits"]]


# ---- what it is for


@pytest.mark.parametrize("kind", ["simple", "bm25", "dense", "hybrid"])
def test_from_files_to_hits(call: Call, kind: str) -> None:
    for package in {"simple": [], "bm25": ["tantivy"], "dense": ["faiss"], "hybrid": ["tantivy", "faiss"]}[kind]:
        pytest.importorskip(package)
    embedder = ["--embedder", "hashed"] if kind in ("dense", "hybrid") else []
    built(call, *embedder, kind=kind)
    found = call("search", "kb", "air on the moon", "--k", "2", "--json")
    assert ids(found) == ["moon", "mars"]
    best = found.json["hits"][0]
    assert (best["rank"], best["title"], best["metadata"]) == (1, "The Moon", {"year": 1969})
    assert (found.json["query"], found.json["version"]) == ("air on the moon", 1)


def test_the_form_without_a_subcommand_builds(call: Call) -> None:
    done = call("--documents", "documents.jsonl", "--output", "kb", "--type", "simple")
    assert done.code == 0
    assert done.out == "version 1: 3 added\nkb: 3 documents in 3 passages, simple\n"


def test_a_folder_of_text_files_is_searched_and_an_empty_file_is_told(call: Call) -> None:
    Path("letters").mkdir()
    Path("letters/moon.md").write_text("# The Moon\nIt has no air.")
    assert call("build", "--documents", "letters", "--output", "kb", "--type", "simple").err == ""
    assert ids(call("search", "kb", "air", "--json")) == ["letters/moon.md"]
    assert "1 unchanged" in call("update", "kb", "letters").out
    Path("empty.jsonl").touch()
    done = call("build", "--documents", "empty.jsonl", "--output", "none", "--type", "simple")
    assert (done.code, done.err) == (0, "warning: none is empty: no document in empty.jsonl\n")


def test_building_again_adds_what_is_missing(call: Call) -> None:
    built(call)
    write("documents.jsonl", [*DOCUMENTS, {"id": "sun", "content": "The Sun is a star."}])
    again = call("build", "documents.jsonl", "--output=kb", "--type=simple")
    assert again.out.startswith("version 2: 1 added, 3 unchanged\n")
    other = call("build", "documents.jsonl", "--output=kb", "--type=simple", "--chunk-words=50")
    assert (other.code, "(--chunk_words 200, not 50)" in other.err) == (2, True)


def test_the_table_of_hits(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    built(call)
    monkeypatch.setenv("COLUMNS", "60")
    lines = call("search", "kb", "air", "on", "the", "moon").out.splitlines()
    assert lines[0].split() == ["score", "id", "passage"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2"]
    assert "The Moon: The Moon has no air." in lines[1]
    assert all(len(line) <= 60 for line in lines)
    full = call("search", "kb", "yeast", "--full").out
    assert full.startswith("1.  a/../b c  (")
    assert full.endswith(")\nBread is baked from flour, water, salt and yeast.\n")


def test_versions_tags_and_time_travel(call: Call) -> None:
    built(call)
    assert call("tag", "kb", "first").out == "version 1 is now first\n"
    write("new.jsonl", [{"id": "moon", "content": "The Moon is made of cheese."}])
    assert call("update", "kb", "new.jsonl").out == "version 2: 1 updated\n"
    assert call("delete", "kb", "a/../b c", "nobody").out == "version 3: 1 deleted, 1 unchanged\n"
    assert ids(call("search", "kb", "cheese", "--json")) == ["moon"]
    assert ids(call("search", "kb", "cheese", "--json", "--at", "first")) == []
    assert ids(call("search", "kb", "yeast", "--json", "--at", "2")) == ["a/../b c"]
    assert ids(call("search", "kb", "yeast", "--json")) == []
    assert json.loads(call("get", "kb", "moon", "--at=1").out)["content"].startswith("The Moon has no air")
    listed = call("versions", "kb", "--json").json
    assert [(v["number"], v["documents"], v["tags"]) for v in listed] == [
        (0, 0, []), (1, 3, ["first"]), (2, 3, []), (3, 2, [])
    ]  # fmt: skip
    table = call("versions", "kb").out.splitlines()
    assert (len(table), "first" in table[2]) == (5, True)
    assert call("compact", "kb").out.startswith("2 versions forgotten, 2 kept; ")
    assert ids(call("search", "kb", "yeast", "--json", "--at", "first")) == ["a/../b c"]
    assert call("search", "kb", "yeast", "--at", "2").err == (
        "error: version 2 was compacted away; the versions are 1, 3\n"
    )
    assert call("tag", "kb", "first", "--delete").out == "first is no tag any more\n"
    assert call("search", "kb", "yeast", "--at", "first").code == 2


def test_adding_and_what_a_document_becomes(call: Call) -> None:
    built(call)
    write("more.jsonl", [{"id": "copy", **{k: v for k, v in DOCUMENTS[0].items() if k != "id"}}, DOCUMENTS[1]])
    assert call("add", "kb", "more.jsonl").out == "version 1: 1 unchanged, 1 duplicates\n"
    assert call("add", "kb", "more.jsonl", "--on-duplicate=keep").out == "version 2: 1 added, 1 unchanged\n"
    done = call("get", "kb", "a/../b c")
    texts = {"title": "", "content": DOCUMENTS[2]["content"], "source": ""}
    assert json.loads(done.out) == {"id": "a/../b c", **texts, "metadata": {"kind": "food"}}
    Path("again.jsonl").write_text(done.out)
    assert call("add", "kb", "again.jsonl").out == "version 2: 1 unchanged\n"


def test_stats_verify_and_reindex(call: Call) -> None:
    built(call)
    stats = call("stats", "kb", "--json").json
    assert (stats["documents"], stats["passages"], stats["kind"], stats["version"]) == (3, 3, "simple", 1)
    shown = call("stats", "kb", "--at", "0").out
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith("documents")] == ["0"]
    assert call("verify", "kb").out == "kb: every byte is as it was written\n"
    assert call("reindex", "kb", "--language", "none").out == "kb: indexes of 3 passages built anew\n"
    assert ids(call("search", "kb", "moons", "--json")) == ["mars"]  # without a stemmer


def test_long_documents_are_cut_and_found_once(call: Call) -> None:
    words = " ".join(f"word{i}" for i in range(1000))
    write("documents.jsonl", [{"id": "long", "content": f"{words} tail {words}"}])
    built(call, "--chunk-words=100", "--overlap-words=10")
    stats = call("stats", "kb", "--json").json
    assert (stats["documents"], stats["passages"]) == (1, 23)  # 2,001 words, 90 further each time
    hits = call("search", "kb", "word5", "--json").json["hits"]
    assert len(hits) == 2
    assert all("word5" in hit["content"] and hit["span"][1] > hit["span"][0] for hit in hits)
    assert len(call("search", "kb", "word5", "--json", "--unique").json["hits"]) == 1


def test_several_queries_and_normalised_scores(call: Call) -> None:
    built(call)
    Path("queries.tsv").write_text("q1\tair\nq2\tyeast\nq3\tnothing of it\n")
    done = call("search", "kb", "--queries", "queries.tsv", "--json", "--normalize", "max")
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [(a["id"], a["query"], len(a["hits"])) for a in answers] == [
        ("q1", "air", 2), ("q2", "yeast", 1), ("q3", "nothing of it", 0)
    ]  # fmt: skip
    assert answers[0]["hits"][0]["score"] == 1
    shown = call("search", "kb", "--queries", "queries.tsv").out
    assert "\nq3: nothing of it\nnothing found\n" in shown


def test_rerankers_and_modes(call: Call) -> None:
    built(call)
    assert sorted(ids(call("search", "kb", "air", "--json", "--reranker=feedback"))) == ["mars", "moon"]
    assert call("search", "kb", "air", "--mode", "simple").code == 0


# ---- evaluation


FORMATS = {
    "jsonl": ("q.jsonl", '{"id": "1", "query": "air", "gold": ["moon", "mars"]}\n'
                         '{"id": "2", "query": "yeast", "gold": []}\n', None, None),
    "trec": ("topics.txt", "<top>\n<num> Number: 1\n<title> air\n</top>\n", "qrels.txt", "1 0 moon 1\n1 0 mars 1\n"),
    "beir": ("queries.jsonl", '{"_id": "1", "text": "air"}\n', "test.tsv",
             "query-id\tcorpus-id\tscore\n1\tmoon\t1\n1\tmars\t1\n"),
    "cranfield": ("cran.qry", ".I 7\n.W\nair\n", "cranqrel", "1 moon 1\n1 mars 2\n"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_evaluate_reads_the_formats_of_the_field(call: Call, form: str) -> None:
    queries, text, qrels, judged = FORMATS[form]
    Path(queries).write_text(text)
    argv = ["--queries", queries]
    if qrels and judged:
        Path(qrels).write_text(judged)
        argv += ["--qrels", qrels]
    built(call)
    done = call("evaluate", "--kb", "kb", *argv, "--json", "--run-file", "run.trec")
    assert done.code == 0, done.err
    assert done.json["queries"] == 1
    assert done.json["metrics"]["recall@5"]["value"] == done.json["metrics"]["ndcg@10"]["value"] == 1
    assert {"p50", "p90", "p99", "mean"} <= done.json["latency_ms"].keys()
    assert done.json["peak_memory_mb"] is None or done.json["peak_memory_mb"] > 1
    assert {line.split()[2] for line in Path("run.trec").read_text().splitlines()} == {"moon", "mars"}
    table = call("evaluate", "kb", *argv, "--metrics", "recall@1", "mrr").out
    assert "recall@1" in table
    assert "latency in ms: p50" in table
    assert "95% interval" in table


def test_judgements_of_other_documents(call: Call) -> None:
    built(call)
    Path("q.tsv").write_text("1\tair\n")
    Path("qrels").write_text("1 0 moon 1\n1 0 gone 1\n")
    assert "1 of 2 relevant documents are not in the knowledge base" in call(
        "evaluate", "kb", "--queries", "q.tsv", "--qrels", "qrels"
    ).out
    Path("qrels").write_text("1 0 gone 1\n")
    done = call("evaluate", "kb", "--queries", "q.tsv", "--qrels", "qrels")
    assert (done.code, "these judgements are about other documents" in done.err) == (1, True)


def test_folders_give_their_documents_only(tmp_path: Path) -> None:
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert sources([str(tmp_path)]) == ([tmp_path / "corpus.jsonl"], [])
    cranfield = tmp_path / "cranfield"
    cranfield.mkdir()
    (cranfield / "cran.all.1400").write_text(".I 1\n.T\nwings\n.A\nme\n.B\nj\n.W\nwings lift .\n")
    for name, text in (("cran.qry", ".I 1\n.W\nlift\n"), ("cranqrel", "1 1 1\n")):
        (cranfield / name).write_text(text)
    for name in (cranfield, cranfield / "cran.all.1400"):
        files, (document,) = sources([str(name)])
        assert (files, document.id, document.title) == ([], "1", "wings")


# ---- what a user can get wrong


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


# ---- filters


def test_conditions_through_the_command_line(call: Call) -> None:
    built(call)
    assert ids(call("search", "kb", "air", "--json", "--filter", "year>=1970", "kind=planet")) == ["mars"]
    assert ids(call("search", "kb", "air", "--json", "--filter", '{"year": {"lt": 1970}}')) == ["moon"]


# ---- the program


def test_as_a_module_without_torch(call: Call) -> None:
    code = "import sys; from nanochat.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    argv = ["retrieval", "--documents", "documents.jsonl", "--output", "kb", "--type", "simple"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    command = [sys.executable, "-m", "nanochat.retrieval", "search", "kb", "air", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(hit["id"] for hit in json.loads(done.stdout)["hits"]) == ["mars", "moon"]


def test_help(call: Call) -> None:
    listed = call().out
    assert all(name in listed for name in COMMANDS)
    assert call("--help").out == listed
    for name in COMMANDS:
        shown = call(name, "--help")
        assert (shown.code, f"nanochat retrieval {name}" in " ".join(shown.out.split())) == (0, True)
