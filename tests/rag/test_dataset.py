"""prepare_rag_dataset: questions that the documents answer, parts that share no entity, and files that never mix."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat import cli
from nanochat.data.world import World
from nanochat.errors import UsageError
from nanochat.rag.dataset import SHARES, DatasetSettings, example, prepare
from nanochat.rag.questions import load_questions
from nanochat.retrieval import KnowledgeBase
from nanochat.retrieval.evaluate import evaluate
from nanochat.retrieval.formats import read_qrels, read_queries

SMALL = {"known": 10, "new": 80, "train": 100, "validation": 20, "test": 20}
FILES = ("documents.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("rag")
    assert prepare(DatasetSettings(output=str(home), retriever_type="simple", **SMALL)) == home / "knowledge_base"
    return home


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_there(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == sorted([*FILES, "knowledge_base"])
    assert [len(records(made / name)) for name in FILES] == [80, 100, 20, 20]
    with KnowledgeBase.open(made / "knowledge_base") as base:
        assert (len(base), base.kind, base.verify()) == (80, "simple", [])
        stored = {document.id: document.content for document in base.documents()}
    assert stored == {one["id"]: one["content"] for one in records(made / "documents.jsonl")}
    kinds = [one["metadata"]["kind"] for one in records(made / "documents.jsonl")]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"person": 48, "town": 16, "company": 16}


def test_gold_documents_state_the_answers(made: Path) -> None:
    texts = {one["id"]: one["content"] for one in records(made / "documents.jsonl")}
    for name in FILES[1:]:
        for question in records(made / name):
            assert len(question["gold"]) == question["hops"]
            if question["gold"]:
                assert question["answer"].lower() in texts[question["gold"][-1]].lower()
                assert question["answer"] in question["sentence"]
            else:
                assert question["answers"] == []


def test_shares_of_hops_and_of_unanswerable_questions(made: Path) -> None:
    hops = [question["hops"] for question in records(made / "train.jsonl")]
    assert hops.count(0) == 15
    assert {n: hops.count(n) for n in SHARES} == {1: 42, 2: 26, 3: 17}  # of 85
    assert hops != sorted(hops)  # mixed, since training takes the last of them for validation


def test_training_and_test_share_no_entity(made: Path) -> None:
    world = World(0, 10, 80)
    asked = {name: records(made / name) for name in FILES[1:]}
    for name, part in (("train.jsonl", "train"), ("validation.jsonl", "heldout"), ("test.jsonl", "heldout")):
        entities = {int(gold.split("-")[0]) for question in asked[name] for gold in question["gold"]}
        assert entities <= set(world.pool("new", part))
    texts = [question["question"] for questions in asked.values() for question in questions]
    assert len(set(texts)) == len(texts)


def test_what_reads_questions_reads_them(made: Path) -> None:
    for name in FILES[1:]:
        read = load_questions(made / name)
        assert [q.answerable for q in read] == [bool(one["gold"]) for one in records(made / name)]
    queries, qrels = read_queries(made / "test.jsonl"), read_qrels(made / "test.jsonl")
    assert len(queries) == 20
    assert set(qrels) == {question.id for question in load_questions(made / "test.jsonl") if question.answerable}


def test_the_rag_stage_accepts_it(made: Path) -> None:
    from nanochat.training.rag import RagSettings, validate

    knowledge, questions = validate(RagSettings(knowledge_base=str(made / "knowledge_base")))
    assert knowledge is not None
    assert len(questions) == 100
    assert knowledge.search([questions[0].question], 3)[0]


def test_equal_settings_give_equal_files_and_other_ones_are_refused(made: Path) -> None:
    before = {name: (made / name).read_bytes() for name in FILES}
    prepare(DatasetSettings(output=str(made), retriever_type="simple", **SMALL))
    with pytest.raises(UsageError, match=r"train\.jsonl is there with other content"):
        prepare(DatasetSettings(output=str(made), retriever_type="simple", **{**SMALL, "train": 101}))
    with pytest.raises(UsageError, match="holds a knowledge base with other settings"):
        prepare(DatasetSettings(output=str(made), retriever_type="bm25", **SMALL))
    assert {name: (made / name).read_bytes() for name in FILES} == before
    other = example(DatasetSettings(seed=1, **SMALL))
    assert other["documents.jsonl"].encode() == before["documents.jsonl"]
    assert other["train.jsonl"].encode() != before["train.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "exmaple"], "--mode exmaple: choose from example, build"),
        (["--mode", "build"], "--mode build needs --documents and --output"),
        (["--mode", "build", "--documents", "none.jsonl", "--output", "kb"], "no such file: none.jsonl"),
        (["--documents", "x.jsonl"], "--documents goes with --mode build"),
        (["--modules", "json"], "--modules goes with --mode python_docs"),
        (["--mode", "python_docs", "--modules", "jsn"], "--modules jsn: no module of the standard library"),
        (["--mode", "python_docs", "--modules", "json", "--test", "9"], "questions, not 4,509: ask fewer with"),
        (["--retriever_type", "bm26"], "--retriever_type bm26: choose from"),
        (["--new", "39"], "--new 39: must be at least 40"),
        (["--new", "40", "--known", "10"], "new entities give only"),
        (["--absent", "1"], "--absent 1.0: must be at least 0 and below 1"),
        (["--test", "0"], "--test 0: must be at least 1"),
        (["--retriver_type", "bm25"], "unknown flag --retriver_type, did you mean --retriever_type?"),
    ],
)
def test_wrong_calls_are_one_message(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare_rag_dataset", *argv])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_mode_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text('{"id": "a", "content": "The needle."}\nbad\n')
    argv = ["--mode", "build", "--documents", "own.jsonl", "--output", "kb", "--retriever_type", "simple"]
    cli.main(["prepare_rag_dataset", *argv, "--on_error", "skip"])
    assert capsys.readouterr().out == "version 1: 1 added, 1 skipped\nkb: 1 documents in 1 passages, simple\n"
    with KnowledgeBase.open("kb") as base:
        assert [hit.id for hit in base.search("needle")] == ["a"]


def test_mode_python_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--train", "30", "--validation", "5", "--test", "20", "--retriever_type", "simple"]
    cli.main(["prepare_rag_dataset", "--mode", "python_docs", "--modules", "json", "textwrap", "shutil", *sizes])
    home = Path("data/python")
    assert [len(records(home / name)) for name in FILES[1:]] == [30, 5, 20]
    asked = [question for name in FILES[1:] for question in records(home / name)]
    assert len({question["gold"][0] for question in asked}) == 55
    with KnowledgeBase.open(home / "knowledge_base") as base:
        assert len(base) == len(records(home / "documents.jsonl")) > 100
        found = base.search("Serialize obj to a JSON formatted str", 5, {"kind": "function", "module": "json"})
        assert "json.dumps" in [hit.id for hit in found]
        assert all(question["gold"][0] in base for question in asked)
    assert len(load_questions(home / "train.jsonl")) == 30
    capsys.readouterr()
    call = ["retrieval", "evaluate", "--kb", str(home / "knowledge_base"), "--queries", str(home / "test.jsonl")]
    cli.main([*call, "--metrics", "recall@5", "--json"])
    measured = json.loads(capsys.readouterr().out)
    assert measured["queries"] == 20
    assert measured["metrics"]["recall@5"]["value"] > 0.8


@pytest.mark.slow
def test_all_of_python(tmp_path: Path) -> None:
    """As docs/knowledge-bases.md says."""
    prepare(DatasetSettings("python_docs", str(tmp_path), retriever_type="simple", test=2000))
    with KnowledgeBase.open(tmp_path / "knowledge_base") as base:
        assert base.stats()["passages"] >= len(base) > 10_000
        assert {"json.dumps", "str.split", "os.path.join", "asyncio.Queue", "abs", "help('with')"} <= {
            document.id for document in base.documents()
        }
        found = evaluate(base, read_queries(tmp_path / "test.jsonl"), read_qrels(tmp_path / "test.jsonl"))
    assert found.metrics["recall@10"].value > 0.9


def test_a_hybrid_one(tmp_path: Path) -> None:
    for package in ("tantivy", "faiss"):
        pytest.importorskip(package)
    base = prepare(DatasetSettings(output=str(tmp_path), embedder="hashed", **SMALL))
    with KnowledgeBase.open(base) as opened:
        assert (opened.kind, len(opened)) == ("hybrid", 80)


def test_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.retrieval.embed.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'nanochat\[rag\]'"):
        prepare(DatasetSettings(output=str(tmp_path / "rag"), **SMALL))
    assert not (tmp_path / "rag").exists()


def test_modules_with_fewer_questions_than_usual(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare(DatasetSettings("python_docs", str(tmp_path), modules=("json",), retriever_type="simple"))
    train, validation = (len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "validation"))
    assert train > 5
    assert abs(train - 8 * validation) <= 8
    assert "in the same proportions" in caplog.text
