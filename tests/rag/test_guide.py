"""docs/rag.md: its documents, commands and Python work as they stand there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint, cli
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

GUIDE = (Path(__file__).parents[2] / "docs" / "rag.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.M | re.S)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the guide's documents and a model of a stage `rag`, random but for its shape."""
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    config = ModelConfig(vocab_size=tokenizer.vocab_size, sequence_len=512, depth=1, d_model=16, head_dim=8).resolved()
    model = LM.build(config, seed=0)
    with torch.no_grad():
        model.head.weight.normal_()
    meta = {"stage": "rag", "model_config": config.to_dict(), "tokenizer_hash": tokenizer.hash, "metrics": {}}
    checkpoint.save(tmp_path / "out" / "quickstart" / "rag", 1, {"model": model.state_dict()}, meta)
    tokenizer.save(tmp_path / "out" / "quickstart" / "tokenizer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_OUT", str(tmp_path / "out"))
    Path("documents.jsonl").write_text(blocks("json")[0])
    return tmp_path


def test_commands_and_python(place, monkeypatch, capsys):
    pytest.importorskip("tantivy")

    def end(prompt=""):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    mine = [line for line in lines if re.match(r"nanochat (retrieval|chat_cli .*--knowledge_base)", line)]
    assert len(mine) >= 4
    for line in mine:
        command, *arguments = shlex.split(line)[1:]
        cli.run(command, [*arguments, *(["--max_tokens=8"] if command == "chat_cli" else [])])
    shown = capsys.readouterr().out
    assert "3 added" in shown
    assert "Torwick" in shown
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)
    assert [d.id for d in names["answer"].documents] == ["torwick"]


def test_errors_of_the_table_exist():
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "nanochat").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)
    section = GUIDE.split("## When something is wrong", 1)[1]
    messages = re.findall(r"^\| (`.*?`) \|", section, flags=re.M)
    assert len(messages) >= 6
    for message in re.findall(r"`([^`]+)`", " ".join(messages)):
        for part in message.split("..."):
            assert part.strip() in source, message
