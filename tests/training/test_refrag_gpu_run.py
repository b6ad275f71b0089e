"""runs/refrag_gpu.sh: every command in it is one that the program takes, and without a GPU it says so."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import config
from nanochat.evaluation.rag_commands import RagEvalSettings
from nanochat.training.commands import TokenizerSettings
from nanochat.training.rag import RagSettings
from nanochat.training.refrag import RefragSettings
from nanochat.training.settings import BaseSettings, MidSettings, SFTSettings

SCRIPT = Path(__file__).parents[2] / "runs" / "refrag_gpu.sh"
SETTINGS = {
    "tok_train": TokenizerSettings, "base_train": BaseSettings, "mid_train": MidSettings, "chat_sft": SFTSettings,
    "rag_finetune": RagSettings, "refrag_finetune": RefragSettings, "rag_eval": RagEvalSettings,
}  # fmt: skip


def commands() -> list[list[str]]:
    text = re.sub(r"\\\n\s*", " ", SCRIPT.read_text())
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    arrays = dict(re.findall(r"^(\w+)=\((.*)\)$", text, flags=re.M))
    text = re.sub(r'"\$\{(\w+)\[@\]\}"', lambda match: arrays[match[1]], text)
    world = re.search(r'^world="(.*)"$', text, flags=re.M)
    assert world is not None
    text = text.replace("$world", world[1]).replace("$fresh", "world:new=100000").replace("$stage", "refrag")
    lines = re.findall(r'^\s*(?:train|"\$python" -m nanochat) (\w+ .*--.*)$', text, flags=re.M)
    return [shlex.split(line.replace('"$run"', "r")) for line in lines]


def test_every_command_is_one() -> None:
    found = commands()
    assert [words[0] for words in found] == list(SETTINGS) + ["report"] * (len(found) > len(SETTINGS))
    for name, *argv in found[: len(SETTINGS)]:
        settings = config.parse(SETTINGS[name], argv)
        if hasattr(settings, "check"):
            settings.check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "sees no GPU" in done.stderr
    assert subprocess.run(["bash", str(SCRIPT), "a", "b"], capture_output=True).returncode == 2
