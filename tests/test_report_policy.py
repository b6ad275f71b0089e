"""The report of reinforcement learning: every curve, rollbacks, a few answers step by step."""

import json

import pytest
from test_report import NASTY, Page, add_stage, read

from nanochat.rag.traces import Shown, Trace, Turn, write_traces
from nanochat.report import write_report
from nanochat.report_chart import Mark, Series, line_chart
from nanochat.report_html import MOST_TRACES
from nanochat.report_policy import is_policy, policy_charts

PARTS = ("answer", "relevance", "efficiency", "format")


def add_policy(run, name="refrag", n=20, rollback=None, **more):
    """A stage of reinforcement learning: `n` rounds, an evaluation after every fifth."""
    stage = add_stage(run, name, n, with_checkpoint=False)
    records = []
    for i in range(n + 1):
        at = {"step": i, "tokens": 64 * i}
        parts = {f"reward_{part}": 0.1 + i / 40 for part in PARTS}
        means = {"reward": 0.2 + i / 50, "right": i / 40, "calls": 2.0, "truncated": 0.0, "entropy": 0.9, **parts}
        means |= {"answer_tokens": 9.0, "flat_groups": 0.0, "level": 1.0, "kl": 0.0, "clipped": 0.0, **more}
        if i:
            records.append({**at, "loss": 0.1, "grad_norm": 0.5, "time": 0.1 * i, **means})
        if i % 5 == 0:
            found = {"val_reward": 0.3, "val_accuracy": 0.4, "val_tokens": 8.0, "val_calls": 2.0}
            records.append({**at, **found, **{f"val_{key}": 0.5 for key in parts}, "val_accuracy_1hop": 0.5})
    if rollback:
        records.append({"step": n, "tokens": 64 * n, "rolled_back_to": rollback, "reason": f"the reward fell {NASTY}"})
    (stage / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return stage


def trace(i=0, words=NASTY):
    found = (Shown(1, "d0", words, words, True, True), Shown(2, "d1", "Other", "It rains.", False, False))
    turn = Turn(words, f"query {i}", f"query {i}", found)
    rewards = {part: 0.25 for part in PARTS}
    question, answer = f"Question {i}? {words}", f"{words} [1]"
    return Trace(f"q{i}", question, (turn,), answer, (), ("Brimholt",), ("d9",), False, 0.5, rewards)


def charts(html):
    return [tag.split('"')[0] for tag in html.split('role="img" aria-label="')[1:]]


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "out" / "demo"
    add_stage(run, "base")
    return run


def test_every_part_has_its_curve_and_the_evaluation_beside_it(run):
    add_policy(run)
    write_report(run)
    record, page = read(run)
    drawn = charts((run / "report.html").read_text(encoding="utf-8"))
    for title in ("Reward", *(f"Reward: {part}" for part in PARTS), "Right answers", "Entropy", "Length of answers",
                  "Calls of an answer", "Right answers by task", "Gradient norm of refrag"):  # fmt: skip
        assert any(one in (title, f"{title}, refrag") for one in drawn), title
    for title in ("Divergence", "clipped", "Level", "Groups that say nothing", "cut off"):
        assert not any(title in one for one in drawn), f"{title}: nothing happened there"
    for words in ("share of well-formed answers", "nats per token", "evaluation: 0.5 at 20 steps", "1hop"):
        assert words in page.text
    assert "Loss of refrag" not in drawn
    assert "Loss of base" in drawn  # other stages are as they were
    assert list(record["stages"]) == ["base", "refrag"]


def test_what_happened_only_sometimes_is_drawn_then(run):
    add_policy(run, "rl", kl=0.01, clipped=0.02, level=2.0, truncated=0.5, flat_groups=0.1)
    write_report(run)
    drawn = charts((run / "report.html").read_text(encoding="utf-8"))
    for title in ("Divergence", "clipped", "Level", "Groups that say nothing", "cut off"):
        assert any(title in one for one in drawn), title


def test_a_rollback_is_marked_and_told(run):
    add_policy(run, rollback=10)
    write_report(run)
    record, page = read(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert record["stages"]["refrag"]["rollbacks"] == [{"step": 20, "to": 10, "reason": f"the reward fell {NASTY}"}]
    assert "Collapsed at step 20: the reward fell <script>" in page.text
    assert "Rolled back to step 10." in page.text
    assert html.count(">collapsed</text>") == html.count(">kept</text>") == 11
    assert html.count('class="mark"') == 22
    assert not page.active


def test_the_best_weights_are_marked_without_a_collapse():
    facts = {"step": 20, "best_step": 5}
    records = [{"step": i, "entropy": 1.0} for i in range(21)]
    assert is_policy(records)
    assert any(">kept<" in chart for chart in policy_charts("rl", records, facts))
    assert not any(">kept<" in chart for chart in policy_charts("rl", records, {"step": 20, "best_step": 20}))
    assert not is_policy([{"step": 1, "loss": 2.0}])


def test_answers_are_shown_step_by_step_and_escaped(run):
    stage = add_policy(run)
    write_traces(stage / "traces.jsonl", [trace(i) for i in range(12)])
    write_report(run)
    record, page = read(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert len(record["traces"]["refrag"]) == 12
    assert html.count('<article class="trace">') == MOST_TRACES
    for words in ("Question 0?", "Question 10?", "query 0", "gold: Brimholt", "not found: d9", "relevance 0.25", "[1]"):
        assert words in page.text
    assert html.count('class="gold-hit"') == MOST_TRACES
    assert not page.active
    assert "script" not in page.tags


def test_damaged_traces_are_left_out_with_a_warning(run, caplog):
    stage = add_policy(run)
    (stage / "traces.jsonl").write_text("nonsense\n")
    write_report(run)
    assert "no trace" in caplog.text
    assert read(run)[0]["traces"] == {}


def test_stages_that_come_later_join_the_timings_of_before(run):
    write_report(run, {"timings": {"tokenizer": 2.0, "base": 60.0}})
    add_policy(run)
    write_report(run)
    record, page = read(run)
    assert record["timings"] == {"tokenizer": 2.0, "base": 60.0, "refrag": 2.0}
    assert "Time: 1 min 4 s" in page.text


def test_marks_stay_inside_their_chart():
    drawn = line_chart("t", [Series("s", [(0, 1.0), (10, 2.0)])], "x", "y", marks=[Mark(5, "<in>"), Mark(11, "out")])
    page = Page(drawn)
    assert "<in>" in page.text
    assert "out" not in page.text
