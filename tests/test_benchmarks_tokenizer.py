"""benchmarks.tokenizer: every row is measured, both encoders agree, and the last line is the record."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_it_measures_all_sides_on_the_same_text(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"Page {i} tells of towns and rivers. " * (20 + i))
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe")
    command = [sys.executable, "-m", "benchmarks.tokenizer", "--data", f"{tmp_path}?on_error=skip"]
    command += ["--vocab_size", "320", "--mb", "0.05", "--encode_mb", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [(row["work"], row["by"]) for row in record["rows"]] == [
        *(("train", name) for name in ("rustbpe", "nanochat", "tok_train")),
        *(("encode", name) for name in ("tiktoken", "nanochat")),
    ]
    assert {"train_seconds", "train_cpu", "train_memory", "encode_speed"} <= record["ratios"].keys()
    assert record["rows"][3]["ids_hash"] == record["rows"][4]["ids_hash"]
