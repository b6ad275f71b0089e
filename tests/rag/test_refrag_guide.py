"""docs/refrag.md: its commands and Python work as they stand there, with a model that knows nothing."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from nanochat import KnowledgeBase, checkpoint, cli
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.rag.questions import load_questions
from nanochat.retrieval.document import Document
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "refrag.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.M | re.S)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a knowledge base, questions, and a model of a stage `refrag`, random but for its shape."""
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    config = ModelConfig(vocab_size=tokenizer.vocab_size, sequence_len=512, depth=1, d_model=16, head_dim=8).resolved()
    model = LM.build(config, seed=0)
    with torch.no_grad():
        model.head.weight.normal_()
    meta = {"stage": "refrag", "model_config": config.to_dict(), "tokenizer_hash": tokenizer.hash, "metrics": {}}
    checkpoint.save(tmp_path / "out" / "r" / "refrag", 1, {"model": model.state_dict()}, meta)
    tokenizer.save(tmp_path / "out" / "r" / "tokenizer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_OUT", str(tmp_path / "out"))
    with KnowledgeBase.create(tmp_path / "kb", kind="bm25") as kb:
        kb.add([Document("t", "Torwick was founded by Mara Velt.", "Torwick"),
                Document("m", "Mara Velt was born in Fairfield.", "Mara Velt")])  # fmt: skip
    asked = {"question": "Where was the founder of Torwick born?", "answer": "Fairfield", "gold": ["t", "m"]}
    Path("test.jsonl").write_text(json.dumps(asked) + "\n")
    assert load_questions("test.jsonl")[0].gold == ("t", "m")
    return tmp_path


def test_commands_and_python(place, capsys):
    pytest.importorskip("tantivy")
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    mine = [line for line in lines if re.match(r"nanochat (rag_eval|refrag_trace)", line)]
    assert len(mine) >= 5
    for line in mine:
        command, *arguments = shlex.split(line)[1:]
        small = ["--device=cpu", "--max_tokens=4", "--seed=1"]
        if command == "rag_eval":
            small += ["--latency_questions=1", "--conditions", "refrag", "rag"]
        if "world:" in line:
            small.append("--retriever_type=simple")
        cli.run(command, [*arguments, *small])
    shown = capsys.readouterr().out
    for part in ("REFRAG", "refrag_eval_refrag.json", "=>", "traces.html"):
        assert part in shown
    assert "<article" in Path("traces.html").read_text()
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)
    assert [d.id for hop in names["hops"][0] for d in hop.documents] == ["t", "m"]
    assert len(names["answer"].hops) <= 3


def test_benchmarks_of_the_guide_parse(monkeypatch, capsys):
    for line in [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python -m bench")]:
        module = __import__(line.split()[2], fromlist=["main"])
        monkeypatch.setattr("sys.argv", ["benchmark", "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        assert "--" in capsys.readouterr().out
