import json

import pytest

from nanochat.errors import NanochatError
from nanochat.evaluation.metrics import table, write_metrics
from nanochat.intervals import exact, share


def test_write_metrics(tmp_path):
    path = write_metrics(tmp_path / "run" / "x_eval.json", {"a": share(1, 2)}, kind="x", samples=["ä"])
    record = json.loads(path.read_text(encoding="utf-8"))
    assert set(record["metrics"]["a"]) == {"value", "n", "low", "high"}
    assert record["kind"] == "x"
    assert record["samples"] == ["ä"]
    assert [p.name for p in path.parent.iterdir()] == ["x_eval.json"]


def test_write_metrics_names_the_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NanochatError, match=r"could not write .*file/x\.json"):
        write_metrics(tmp_path / "file" / "x.json", {})


def test_table_shows_intervals_and_counts():
    lines = table({"accuracy": share(8, 10), "seconds": exact(1234.5)}).splitlines()
    assert lines[2].split() == ["accuracy", "0.8", "0.4902", "to", "0.9433", "10"]
    assert lines[3].split() == ["seconds", "1234", "1"]
    assert str(share(8, 10)).startswith("0.8 [0.49")
    assert str(exact(2)) == "2"
