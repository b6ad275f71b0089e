"""Reward models: the fit is the maximum of the likelihood, preferences that can be read off are learnt, files are
checked, and chat_rl takes the model as a reward."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from policies import final_meta, rounds, train_rl
from tiny import copy_run, train

from nanochat import checkpoint
from nanochat.engine.load import load_checkpoint
from nanochat.errors import NanochatError, UsageError
from nanochat.rag.citations import Answer, Sentence
from nanochat.rag.rewards import Sample
from nanochat.training.reward_model import (
    RewardSettings,
    fit,
    load_pairs,
    load_reward_model,
    train_reward_model,
)


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    """Against another way to find it."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(60, 5, generator=generator, dtype=torch.float64) + torch.tensor([1.0, 0.3, 0, 0, -0.5])
    w = fit(d, ridge=0.7)
    guess = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([guess], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = 0.35 * guess.square().sum() - torch.nn.functional.logsigmoid(d @ guess).sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    torch.testing.assert_close(w, guess.detach(), rtol=1e-4, atol=1e-5)


def preferences(path: Path, n: int = 60) -> Path:
    """Answers that end with a full stop are better."""
    lines = [
        {"question": f"What is {i}?", "chosen": f"It is {i * 7 % 50}.", "rejected": f"It is {i * 7 % 50} or"}
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return copy_run(finished, tmp_path, "tokenizer", "base")


def settings(root: Path, **options: object) -> RewardSettings:
    given = {"run": "tiny", "out_dir": str(root), "source": "base", "device": "cpu", "dtype": "float32"}
    return RewardSettings(**{**given, "pairs": str(preferences(root / "pairs.jsonl")), **options})  # type: ignore[arg-type]


def test_preferences_are_learnt_and_reward(root: Path) -> None:
    metrics = train_reward_model(settings(root))
    assert metrics["accuracy"] == 1.0
    loaded = load_checkpoint("base", "tiny", root, "cpu", "float32")
    judge = load_reward_model(str(root / "tiny" / "reward"), "cpu", loaded.tokenizer)
    asked = {"messages": [{"role": "user", "content": "What is 3?"}, {"role": "assistant", "content": "gold"}]}
    answers = ["It is 21.", "It is 21 or"]
    samples = [Sample("s", asked, a, Answer((Sentence(a, ()),), False, ()), False) for a in answers]
    good, bad = judge.score(samples)
    assert 0 <= bad < 0.4 < 0.6 < good <= 1
    one_by_one = [judge.score([sample])[0] for sample in samples]
    assert one_by_one == pytest.approx([good, bad], abs=1e-4)
    train_rl(
        root, source="base", num_iterations=2, reward_model=str(root / "tiny" / "reward"),
        reward_weights="answer=0.5,model=0.5", reward_gates=(),
    )  # fmt: skip
    assert all(0 <= record["reward_model"] <= 1 for record in rounds(root))
    assert final_meta(root)["metrics"]["final"] == 1.0


def test_a_run_with_a_reward_model_is_loaded_by_its_directory(root: Path) -> None:
    train_reward_model(settings(root))
    assert load_checkpoint(str(root / "tiny"), device="cpu", dtype="float32").path.parent.name == "base"


def test_some_pairs_are_always_left_to_learn_from(root: Path) -> None:
    metrics = train_reward_model(settings(root, pairs=str(preferences(root / "two.jsonl", 2)), held_back=0.9))
    assert metrics["train_accuracy"] == 1.0


def test_a_reader_that_changed_is_refused(root: Path) -> None:
    train_reward_model(settings(root))
    path = str(root / "tiny" / "reward")
    tokenizer = load_checkpoint("base", "tiny", root, "cpu", "float32").tokenizer
    saved = checkpoint.latest(path)
    assert saved is not None
    reader = Path(checkpoint.read_meta(saved)["reader_path"])
    train("base", root, resume=False, seed=5)
    assert reader.exists()
    with pytest.raises(NanochatError, match="has changed since"):
        load_reward_model(path, "cpu", tokenizer)


def test_what_is_no_preference(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "a", "chosen": "b", "rejected": "c"}\n{"question": "a", "chosen": "b"}\n')
    with pytest.raises(UsageError, match="line 2: needs"):
        load_pairs(path)
    good = {"messages": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for bad in ({"messages": []}, {"messages": "a"}, {"messages": ["a"]}, {"messages": [{"role": "user"}]},
                {"messages": said}, {"messages": 3}, {"chosen": ""}, {"rejected": 3}):  # fmt: skip
        path.write_text(f"{json.dumps(good)}\n{json.dumps({**good, **bad})}\n")
        with pytest.raises(UsageError, match="line 2: needs"):
            load_pairs(path)
    path.write_text('{"question": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UsageError, match=r"1 preference\(s\)"):
        load_pairs(path)
    with pytest.raises(NanochatError, match="cannot be read"):
        load_pairs(tmp_path / "none")
    for wrong in ({"pairs": ""}, {"ridge": 0.0}, {"held_back": 1.0}):
        with pytest.raises(UsageError, match="--"):
            replace(RewardSettings(pairs="x"), **wrong).check()
