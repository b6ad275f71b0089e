"""The quickstart in miniature: ends with a report, goes on where it stopped, refuses to mix two models in one run."""

import json

import pytest

from nanochat import pipeline
from nanochat.errors import UsageError
from nanochat.pipeline import PROFILES, Profile, QuickstartSettings, plan, run_quickstart
from nanochat.tasks.registry import open_task

TINY = Profile(16, 40, 3, 400, 1, 32, 64, 2, 3, 3, 2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PROFILES, "cpu", TINY)


def settings(tmp_path, **more):
    return QuickstartSettings(out_dir=str(tmp_path), run="r", device="cpu", profile="cpu", eval_questions=6, **more)


def test_ends_with_a_report(tiny, tmp_path):
    metrics = run_quickstart(settings(tmp_path, pattern="transformer"))
    found = json.loads((tmp_path / "r" / "report.json").read_text())["metrics"]
    for name in ("train_seconds", "closed_book_known_em", "closed_book_new_abstain", "val_bpb", "tokens_per_second"):
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
    assert set(timings) == {"tokenizer", "base", "mid", "sft", "evaluation"}


def test_other_settings_in_the_same_run_are_refused(tiny, tmp_path):
    run_quickstart(settings(tmp_path))
    with pytest.raises(UsageError, match="--pattern was hybrid and is mamba"):
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
