"""docs/mamba.md is true: its Python runs as it stands, and its commands do on a tiny model."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat.data.corpus import open_corpus
from nanochat.evaluation.commands import base_eval
from nanochat.export import export_model, import_model
from nanochat.model.config import ModelConfig
from nanochat.model.interop import PLAIN, write
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer
from nanochat.training.commands import base_train, mid_train

PAGE = (Path(__file__).parents[1] / "docs" / "mamba.md").read_text()
WORLD = "world:seed=0,known=10,wordings=4"
RUN = {"base_train": base_train, "base_eval": base_eval, "mid_train": mid_train, "import_model": import_model,
       "export_model": export_model}  # fmt: skip
TINY = {  # later flags win
    "base_train": ["--depth=2", "--d_model=32", "--head_dim=16", "--sequence_len=64", "--num_iterations=2",
                   f"--data={WORLD}", "--eval_tokens=256"],
    "base_eval": [f"--data={WORLD}", "--position_len=256", "--passkey", "150", "--eval_tokens=512"],
    "mid_train": ["--num_iterations=2", "--sequence_len=64", "--eval_tokens=256",
                  "--tasks=world-qa:seed=0,known=10,limit=20"],
    "import_model": ["--sequence_len=256"],
    "export_model": [],
}  # fmt: skip


def code(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the page's commands for a run, and those for a public checkpoint, have run."""
    home = tmp_path_factory.mktemp("home")
    texts = list(open_corpus(WORLD).documents("train"))
    tokenizer = Tokenizer.train(texts, 400)
    tokenizer.save(home / "out" / "m2" / "tokenizer")
    (home / "book.txt").write_text(" ".join(texts[:30]))
    public = LM.build(ModelConfig(vocab_size=408, depth=2, d_model=32, pattern="mamba2", head_dim2=16, **PLAIN), seed=0)
    write(home / "mamba-130m", public, "state-spaces")
    tokenizer.export_hf(home / "gpt-neox" / "tokenizer.json")
    with inside(home):
        for block in code("bash"):
            for line in block.splitlines():
                words = shlex.split(line)
                if words[0] == "nanochat":
                    RUN[words[1]]([*words[2:], *TINY[words[1]]])
    return home


@contextlib.contextmanager
def inside(home: Path) -> Iterator[io.StringIO]:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("NANOCHAT_OUT", str(home / "out"))
        patch.chdir(home)
        yield out


def test_the_commands_leave_what_they_promise(home: Path) -> None:
    assert (home / "out" / "m2" / "base_eval_base.json").is_file()
    assert "passkey_150" in (home / "out" / "m2" / "base_eval_base.json").read_text()
    assert (home / "out" / "public" / "mid" / "step_000002" / "model.safetensors").is_file()
    assert (home / "given" / "model.safetensors").is_file()


def test_the_python_runs(home: Path) -> None:
    (block,) = code("python")
    with inside(home) as out:
        torch.manual_seed(0)
        exec(compile(block, "mamba.md", "exec"), {})
    assert re.match(r"\d+ tokens in \d+ bytes\n", out.getvalue())
    assert (home / "book.state").is_file()
