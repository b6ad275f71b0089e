"""The command refrag_trace with a model that was trained for a moment."""

from pathlib import Path

import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.rag.traces import read_traces
from nanochat.training.refrag_trace import TraceSettings, refrag_trace

WORLD = ["--questions", "world:seed=7,known=10,new=60", "--retriever_type", "simple", "--n", "3", "--max_tokens", "12"]


def test_traces_are_printed_written_and_shown_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--source", str(finished / "tiny" / "rag"), "--device", "cpu"]
    refrag_trace([*where, *WORLD, "--save", str(tmp_path / "traces.jsonl"), "--max_hops", "0"])
    printed = capsys.readouterr().out
    assert printed.count("=>") == 3
    assert "reward" in printed
    traces = read_traces(tmp_path / "traces.jsonl")
    assert len(traces) == 3
    assert {"answer", "relevance", "efficiency", "format"} <= set(traces[0].rewards)
    assert traces[0].missing  # nothing was searched
    page = tmp_path / "deep" / "page.html"
    refrag_trace(["--traces", str(tmp_path / "traces.jsonl"), "--n", "2", "--html", str(page)])
    assert page.read_text().count("<article") == 2
    assert "2 traces written" in capsys.readouterr().out


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"n": 0}, "--n 0"),
        ({"hops": (5,)}, "--hops 5"),
        ({"questions": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"knowledge_base": str(tmp_path / "none")}, "no such directory"),
    ):
        with pytest.raises(UsageError, match=message):
            TraceSettings(**options).check()  # type: ignore[arg-type]
    with pytest.raises(NanochatError, match="cannot read"):
        refrag_trace(["--traces", str(tmp_path / "none.jsonl")])
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(NanochatError, match="holds no trace"):
        refrag_trace(["--traces", str(tmp_path / "none.jsonl")])
