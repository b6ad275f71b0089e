"""`nanochat retrieval` as the tests call it: in a directory of its own, with a few documents."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanochat import cli

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
