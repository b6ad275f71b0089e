"""The RAG stage: what it trains on, and everything that is wrong said at once before it starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import COMMON, copy_run, saved, settings, train

from nanochat.errors import UsageError
from nanochat.rag.tasks import RagWorld
from nanochat.tasks.task import Curriculum
from nanochat.tokenizer import Tokenizer
from nanochat.training import rag
from nanochat.training.rag import rag_tasks, validate


def test_contexts_begin_with_one_document(tmp_path: Path) -> None:
    given = settings("rag", tmp_path, contexts="n=40,documents=3,questions=2,seed=4", first=0.25)
    course, val = rag_tasks(given, Tokenizer([bytes([i]) for i in range(256)]), 256, None, [])
    assert isinstance(course, Curriculum)
    sizes = [len(course[i]["messages"][0]["content"]) for i in range(len(course))]
    assert set(sizes[:10]) == {1}
    assert max(sizes[10:]) == 3
    assert isinstance(val, RagWorld)
    held = {part["text"] for i in range(len(val)) for part in val[i]["messages"][0]["content"]}
    seen = {part["text"] for i in range(40) for part in course[i]["messages"][0]["content"]}
    assert not held & seen


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    questions = tmp_path / "train.jsonl"
    questions.write_text('{"question": "a", "answer": "b"}\n{"question": 3}\n')
    given = settings(
        "rag", tmp_path, contexts="dokuments=3", knowledge_base=str(tmp_path / "none"), tasks=("nothing",), top_k=0,
        absent=3.0, warmup=2.0, questions=str(questions),
    )  # fmt: skip
    with pytest.raises(UsageError) as error:
        validate(given)
    text = str(error.value)
    assert "dokuments" in text
    assert "documents" in text
    assert str(tmp_path / "none") in text
    assert "line 2" in text
    assert "unknown task 'nothing'" in text
    assert "--top_k 0: must be at least 1" in text
    assert "--absent 3.0" in text
    assert "--warmup 2.0" in text
    assert len(text.splitlines()) >= 8


def test_a_knowledge_base_without_questions_beside_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train.jsonl: there is no such file: give the questions with --questions"):
        validate(settings("rag", tmp_path, knowledge_base=str(tmp_path / "kb")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": ""}, "nothing to train on"),
        ({"top_k": 0}, "--top_k 0"),
        ({"absent": 1.0}, "--absent 1.0"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings("rag", tmp_path, **options).check()


def colours(root: Path) -> tuple[Path, list[dict[str, object]]]:
    """A knowledge base of the colours of things with its questions, and these as records."""
    from nanochat.retrieval import Document, KnowledgeBase

    base = root / "rag" / "knowledge_base"
    with KnowledgeBase.create(base, kind="bm25") as kb:
        kb.add([Document(f"d{i}", f"The colour of thing{i} is shade{i}.", f"thing{i}") for i in range(30)])
    lines: list[dict[str, object]] = [
        {"question": f"colour of thing{i}", "answer": f"shade{i}", "gold": [f"d{i}"]} for i in range(30)
    ]
    (base.parent / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return base, lines


def test_questions_against_a_knowledge_base(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tantivy")
    copy_run(finished, tmp_path, "tokenizer", "base")
    base, lines = colours(tmp_path)
    metrics = train("rag", tmp_path, contexts="", knowledge_base=str(base), top_k=2, num_iterations=4)
    assert metrics["tokens"] > 0
    seen: list[int] = []

    def spy(given, tokenizer, context, *rest):
        seen.append(context)
        return rag_tasks(given, tokenizer, context, *rest)

    monkeypatch.setattr(rag, "rag_tasks", spy)
    train("rag", tmp_path, contexts="", knowledge_base=str(base), sequence_len=None, num_iterations=1, resume=False)
    assert seen == [32]  # the checkpoint's own context: documents are cut to three quarters of it
    lines[3]["gold"] = ["nowhere"]
    (base.parent / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UsageError, match=r"1 of 30 gold documents are not in .*nowhere"):
        train("rag", tmp_path, contexts="", knowledge_base=str(base), top_k=2)


@pytest.mark.slow
def test_the_command_under_torchrun_trains_as_one_process(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("tantivy")
    alone, both = (copy_run(finished, tmp_path / name, "tokenizer", "base") for name in ("alone", "both"))
    base, _ = colours(tmp_path)
    options = {
        "knowledge_base": str(base), "contexts": "n=40,documents=2,questions=2", "top_k": 2, "weight_decay": 0.0,
        "lr_scale": 0.005, "sequence_len": 256, "num_iterations": 6,
    }  # fmt: skip
    train("rag", alone, **options)
    flags = {**COMMON, **options, "source": "base", "out_dir": str(both), "device_batch_size": 1}
    flags["total_batch_size"] = 512
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "scripts.rag_finetune", "--", *(f"--{name}={value}" for name, value in flags.items())],
        capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected, found = saved(alone, "rag"), saved(both, "rag")
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5), name
