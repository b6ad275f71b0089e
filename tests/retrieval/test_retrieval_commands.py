"""`nanochat retrieval` from build to evaluate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import DOCUMENTS, Call, built, ids, write

from nanochat.retrieval.commands import COMMANDS, sources

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
