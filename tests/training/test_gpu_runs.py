"""runs/rag_gpu.sh and runs/refrag_gpu.sh: each command in them is one that the program takes; without a GPU they say
so; and the first one runs from end to end on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from nanochat import config
from nanochat.evaluation.rag_commands import RagEvalSettings
from nanochat.report import ReportSettings
from nanochat.training.commands import TokenizerSettings
from nanochat.training.rag import RagSettings
from nanochat.training.refrag import RefragSettings
from nanochat.training.settings import BaseSettings, MidSettings, SFTSettings

RUNS = Path(__file__).parents[2] / "runs"
SETTINGS = {
    "tok_train": TokenizerSettings, "base_train": BaseSettings, "mid_train": MidSettings, "chat_sft": SFTSettings,
    "rag_finetune": RagSettings, "refrag_finetune": RefragSettings, "rag_eval": RagEvalSettings,
    "report": ReportSettings,
}  # fmt: skip
STAGES = ["tok_train", "base_train", "mid_train", "chat_sft", "rag_finetune"]
CALLED = {
    "rag_gpu.sh": [*STAGES, "rag_eval", "report"],
    "refrag_gpu.sh": [*STAGES, "refrag_finetune", "rag_eval", "rag_eval", "report"],
}
SCRIPTS = pytest.mark.parametrize("script", CALLED)
PATH = {"PATH": "/usr/bin:/bin"}


def called(script: str, home: Path, **variables: str) -> list[list[str]]:
    """The arguments of every call of Python, by a Python that does nothing but to write them down."""
    python = home / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@" "" >> {home}/calls\n')
    python.chmod(0o755)
    env = {**PATH, "PYTHON": str(python), "NANOCHAT_OUT": str(home), **variables}
    subprocess.run(["bash", str(RUNS / script), "r"], check=True, capture_output=True, env=env)
    return [call.split("\n") for call in (home / "calls").read_text().strip().split("\n\n")]


@SCRIPTS
def test_every_command_is_one(script: str, tmp_path: Path) -> None:
    found = called(script, tmp_path)
    assert [words[2] for words in found] == CALLED[script]
    for _, module, name, *argv in found:
        assert module == "nanochat"
        settings = config.parse(SETTINGS[name], argv)
        assert settings.run == "r"
        if hasattr(settings, "check"):
            settings.check()


@SCRIPTS
def test_on_several_gpus_the_stages_run_under_torchrun(script: str, tmp_path: Path) -> None:
    found = called(script, tmp_path, NPROC="4", RAG="123")
    launched = [get_args_parser().parse_args(words[2:]) for words in found if words[1] == "torch.distributed.run"]
    trained = [name for name in CALLED[script] if name.endswith(("_train", "_sft", "_finetune"))]
    assert [one.training_script.removeprefix("scripts.") for one in launched] == trained[1:]
    assert all(one.module and one.standalone and one.nproc_per_node == "4" for one in launched)
    rag = config.parse(RagSettings, launched[trained.index("rag_finetune") - 1].training_script_args)
    assert (rag.run, rag.num_iterations) == ("r", 123)


@SCRIPTS
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_they_say_so(script: str, tmp_path: Path) -> None:
    env = {**PATH, "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(RUNS / script)], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "sees no GPU" in done.stderr
    assert subprocess.run(["bash", str(RUNS / script), "a", "b"], capture_output=True).returncode == 2


@pytest.mark.slow
def test_rag_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("tantivy")
    flags = "--eval_tokens 512 --dtype float32 --device_batch_size 2 --sequence_len 512"
    env = {
        **PATH, "PYTHON": sys.executable, "NANOCHAT_OUT": str(tmp_path), "DEVICE": "cpu", "OMP_NUM_THREADS": "1",
        "DEPTH": "2", "KNOWN": "20", "VOCAB": "400", "BASE": "2", "MID": "2", "SFT": "2", "RAG": "2",
        "DOCUMENTS": "120", "SHOWN": "2", "QUESTIONS": "4", "FLAGS": flags,
    }  # fmt: skip
    for _ in range(2):  # the second call has little to do
        done = subprocess.run(["bash", str(RUNS / "rag_gpu.sh"), "r"], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r" / "rag_eval_rag.json").read_text())
    assert "rag_em" in json.dumps(found)
    assert (tmp_path / "r" / "report.html").exists()
