"""The quickstart in miniature: ends with a report, goes on where it stopped, refuses to mix two models in one run."""

import json

import pytest

from nanochat import pipeline
from nanochat.errors import UsageError
from nanochat.pipeline import PROFILES, Profile, QuickstartSettings, plan, run_quickstart
from nanochat.tasks.registry import open_task

TINY = Profile(16, 80, 3, 400, 1, 32, 64, 2, 3, 3, 2, 2, 1, 2, 2, 1)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PROFILES, "cpu", TINY)


def settings(tmp_path, **more):
    given = {"eval_questions": 6, "rag_questions": 3, "refrag": False, **more}
    return QuickstartSettings(out_dir=str(tmp_path), run="r", device="cpu", profile="cpu", **given)


def test_ends_with_a_report(tiny, tmp_path):
    metrics = run_quickstart(settings(tmp_path, pattern="transformer", refrag=True))
    found = json.loads((tmp_path / "r" / "report.json").read_text())["metrics"]
    for name in (
        "train_seconds", "closed_book_known_em", "closed_book_new_abstain", "val_bpb", "tokens_per_second",
        "closed_book_new_em", "rag_em", "rag_gold_em", "rag_shuffled_em", "hallucination_rate",
        "abstain_unanswerable", "rag_seconds", "refrag_em", "refrag_sft_em", "refrag_rl_gain", "refrag_seconds",
        "multihop_one_shot_em", "refrag_hallucination_rate",
    ):  # fmt: skip
        assert set(found[name]) >= {"value", "n", "low", "high"}
        assert found[name]["value"] == pytest.approx(metrics[name].value)
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert "<svg" in (tmp_path / "r" / "report.html").read_text()


def test_second_call_goes_on_where_the_first_stopped(tiny, tmp_path, monkeypatch):
    def interrupted(settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_mid", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_quickstart(settings(tmp_path))
    base = (tmp_path / "r" / "base" / "step_000003" / "meta.json").stat().st_mtime_ns
    run_quickstart(settings(tmp_path))
    assert (tmp_path / "r" / "base" / "step_000003" / "meta.json").stat().st_mtime_ns == base
    timings = json.loads((tmp_path / "r" / "timings.json").read_text())
    assert set(timings) == {"tokenizer", "base", "mid", "sft", "rag", "evaluation", "rag_evaluation"}


def test_other_settings_in_the_same_run_are_refused(tiny, tmp_path):
    run_quickstart(settings(tmp_path))
    with pytest.raises(UsageError, match="--pattern was alternate and is mamba"):
        run_quickstart(settings(tmp_path, pattern="mamba"))
    run_quickstart(settings(tmp_path, eval_seed=5))  # only concerns the evaluation


@pytest.mark.parametrize(("flag", "value"), [("profile", "laptop"), ("scale", 0.0)])
def test_bad_settings(flag, value):
    with pytest.raises(UsageError, match=f"--{flag}"):
        plan(QuickstartSettings(**{flag: value, **({} if flag == "profile" else {"profile": "cpu"})}))


def test_no_evaluated_question_is_trained_on():
    todo = plan(QuickstartSettings(profile="cpu", eval_seed=7))
    tasks = [open_task(spec) for spec in todo.sft.tasks[:2]]
    trained = {(task[i]["entity"], task[i]["relation"]) for task in tasks for i in range(len(task))}
    for spec in todo.evaluation.values():
        task = open_task(spec)
        asked = {(task[i]["entity"], task[i]["relation"]) for i in range(100)}
        assert not asked & trained


def test_the_world_of_the_knowledge_base_is_one_that_no_stage_has_seen():
    todo = plan(QuickstartSettings(profile="cpu", world_seed=7))
    assert "seed=8," in todo.rag_world
    assert all("seed=7," in text for text in (todo.base.data, *todo.mid.tasks, *todo.sft.tasks))


def test_without_rag_nothing_of_it_is_made(tiny, tmp_path):
    metrics = run_quickstart(settings(tmp_path, rag=False))
    assert "rag_em" not in metrics
    assert not (tmp_path / "r" / "knowledge_base").exists()
