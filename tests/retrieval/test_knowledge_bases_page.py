"""docs/knowledge-bases.md is true: its commands run as they stand, one after another, and so does its Python."""

import ast
import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from nanochat import cli
from nanochat.retrieval import embed

pytest.importorskip("tantivy")
pytest.importorskip("faiss")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "knowledge-bases.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.M | re.S)
FILES = {
    "more.jsonl": '{"id": "sun", "content": "The Sun is a star."}\n',
    "corrected.jsonl": '{"id": "mars", "content": "Mars has very thin air."}\n',
    "queries.tsv": "1\tair\n2\tflour\n",
    "qrels.txt": "1 0 moon 1\n1 0 mars 1\n",
}
# later flags win: all of Python takes half a minute, and tests/rag/test_dataset.py does that
PART = ["--modules", "builtins", "json", "--train", "30", "--validation", "5", "--test", "20"]


def words(line: str) -> list[str]:
    """A documented command as the arguments of `nanochat`."""
    found = shlex.split(line, comments=True) + (PART if "python_docs" in line else [])
    if found[:3] == ["python", "-m", "nanochat.retrieval"]:
        return ["retrieval", *found[3:]]
    assert found[0] == "nanochat"
    return found[1:]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each block of the page prints, command by command; run in order, in one directory, with a small embedder in
    place of the default one."""
    home = tmp_path_factory.mktemp("page")
    (home / "documents.jsonl").write_text(next(text for kind, text in BLOCKS if kind == "json"))
    for name, text in FILES.items():
        (home / name).write_text(text)
    printed: dict[str, str] = {}

    def keep(name: str, work: object) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            work()  # type: ignore[operator]
        printed[name] = out.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(embed, "DEFAULT", "hashed")
        for kind, text in BLOCKS:
            if kind == "python":
                keep(text, lambda text=text: exec(compile(text, "knowledge-bases.md", "exec"), {}))
            for line in text.splitlines() if kind == "bash" else ():
                keep(line, lambda line=line: cli.main(words(line)))
    return printed


def output(said: dict[str, str], *parts: str) -> str:
    """What the only command that has these parts printed."""
    (line,) = [line for line in said if all(part in line for part in parts)]
    return said[line]


def hits(text: str) -> list[str]:
    return [line.split()[2] for line in text.splitlines()[1:]]


def test_every_block_ran(said: dict[str, str]) -> None:
    assert len(said) >= 25
    assert {kind for kind, _ in BLOCKS} == {"json", "bash", "python"}


def test_searches_find_what_the_page_says(said: dict[str, str]) -> None:
    assert hits(output(said, "mayor of Dunyard"))[0] == "1021-0"
    assert "Dunyard" in output(said, "mayor of Dunyard").splitlines()[1]
    assert hits(output(said, "breathes", "--k 2"))[0] == "moon"
    assert len(json.loads(output(said, "breathes", "--json"))["hits"]) == 3
    assert hits(output(said, "--filter kind=planet")) == ["mars"]
    assert hits(output(said, "year<1970")) == ["moon"]
    assert hits(output(said, "tags=oven")) == ["bread"]
    assert hits(output(said, '"gt": 1970')) == ["mars"]
    assert hits(output(said, "--at spring"))[0] == "bread"
    assert hits(output(said, "--mode bm25", "thin air")) == ["mars", "moon"]
    assert "str.split" in hits(output(said, "split a string at a separator"))


def test_changes_do_what_the_page_says(said: dict[str, str]) -> None:
    assert output(said, "--documents documents.jsonl", "--output kb", "nanochat retrieval build").startswith(
        "version 1: 3 added\n"
    )
    assert output(said, "add kb more.jsonl") == "version 2: 1 added\n"
    assert output(said, "update kb corrected.jsonl") == "version 3: 1 updated\n"
    assert output(said, "delete kb bread") == "version 4: 1 deleted\n"
    assert "spring" in output(said, "versions kb").splitlines()[2]
    assert json.loads(output(said, "get kb moon"))["metadata"] == {"kind": "moon", "year": 1969}
    assert output(said, "compact kb").startswith("2 versions forgotten, 3 kept")
    assert "every byte" in output(said, "verify kb")


def test_evaluations_print_what_the_page_says(said: dict[str, str]) -> None:
    tables = [text for line, text in said.items() if "evaluate --kb data/" in line]
    assert len(tables) == 5
    for one in tables:
        assert "95% interval" in one
        assert "latency in ms: p50" in one
        assert "memory" in one
    measured = json.loads(output(said, "--qrels qrels.txt"))["metrics"]
    assert list(measured) == ["ndcg@10", "recall@5", "mrr"]


def test_python_prints_what_it_should(said: dict[str, str]) -> None:
    first, second = [said[text] for kind, text in BLOCKS if kind == "python"]
    lines = first.splitlines()
    assert [line.split()[2] for line in lines[:2]] == ["moon", "mars"]
    assert lines[-2:] == ["2 3 [0, 1, 2, 3]", "{'kind': 'planet', 'year': 1976} False True"]
    assert second == "['mars', 'moon'] ['bm25', 'dense', 'hybrid', 'simple']\n"


def test_messages_of_the_page_are_the_programs() -> None:
    text = []
    for path in (ROOT / "nanochat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text.append(node.value)
    source = "\n".join(text)
    table = PAGE.split("| message | cause | what to do |\n| --- | --- | --- |\n")[1].split("\n\n")[0]
    rows = [re.split(r"\s\|\s", row)[0] for row in table.splitlines()]
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 10
    assert [quote for quote in quoted if quote not in source] == []


def test_flags_and_embedders_that_the_page_names() -> None:
    named = re.findall(r"^\| `([\w-]+)`", PAGE.split("## Embedders")[1].split("## Hybrid")[0], flags=re.M)
    assert set(named) <= set(embed.EMBEDDERS)
    known = (ROOT / "docs" / "configuration.md").read_text()
    flags = {flag.replace("-", "_") for flag in re.findall(r"`--([\w-]+)", PAGE)}
    assert {flag for flag in flags if f"`--{flag}`" not in known} == set()
