import json
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat import checkpoint, report
from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.report import as_metric, read_log, write_report
from nanochat.report_chart import HEIGHT, WIDTH, Scale, Series, line_chart, linear_ticks, log_ticks, short, smooth, thin
from nanochat.report_html import duration, size, text

CONFIG = ModelConfig(vocab_size=300, sequence_len=32, depth=2, d_model=32, n_head=2, pattern="M2 T")
NASTY = '<script>alert("1")</script> & \'quotes\' \x00 \ud800 </style></details>'


class Page(HTMLParser):
    """Tags must nest; keeps the text, the curves and everything that could load or run something."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words, self.lines, self.active = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "polyline":
            self.lines.append((attrs["class"], attrs["points"]))
        if tag in ("script", "iframe", "link", "object") or {"src", "href", "onload", "onerror"} & set(attrs):
            self.active.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def add_stage(run, name, n=12, *, val="val_bpb", with_checkpoint=True):
    stage = run / name
    stage.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(1, n + 1):
        lines.append(
            {"step": i, "tokens": 64 * i, "loss": 6.0 / i, "grad_norm": 0.5, "tokens_per_second": 640.0}
            | {"seconds": 0.1, "time": 0.1 * i, "peak_memory_bytes": 5 << 20}
        )
        if i % 4 == 0:
            lines.append({"step": i, "tokens": 64 * i, val: 2.0 / i})
    (stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage / "config.json").write_text(json.dumps({"run": run.name, "num_iterations": n, "data": NASTY}))
    if with_checkpoint:
        meta = {"stage": name, "model_config": CONFIG.to_dict(), "n_steps": n, "tokenizer_hash": "0"}
        meta["metrics"] = {"final": 1.0, "tokens": 64.0 * n, "train_seconds": 0.1 * n, val: 2.0 / n}
        checkpoint.save(stage, n, {"model": {"w": torch.zeros(3)}}, meta)
    return stage


def add_evaluation(run, kind, stage, metrics, samples=()):
    record = {"metrics": metrics, "kind": kind, "stage": stage, "step": 12, "samples": list(samples)}
    (run / f"{kind}_{stage}.json").write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "out" / "demo"
    add_stage(run, "base")
    add_stage(run, "sft", n=120, val="val_chat_loss")
    share = {"value": 0.75, "n": 40, "low": 0.6, "high": 0.86}
    sample = {"task": "quiz", "question": NASTY, "answer": "<b>7</b>", "gold": "8", "right": False}
    add_evaluation(run, "chat_eval", "sft", {"quiz_accuracy": share}, [sample])
    bpb = {"value": 0.5, "n": 9, "low": 0.4, "high": 0.6}
    add_evaluation(run, "base_eval", "base", {"val_bpb": bpb}, [{"prompt": "Once", "text": " upon a time"}])
    return run


def read(run):
    return json.loads((run / "report.json").read_text()), Page((run / "report.html").read_text(encoding="utf-8"))


def test_json_has_metrics_stages_machine_samples_and_version(run):
    assert write_report(run) == run / "report.html"
    record, _ = read(run)
    for metric in record["metrics"].values():
        assert set(metric) == {"value", "n", "low", "high"}
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert record["metrics"]["quiz_accuracy"] == {"value": 0.75, "n": 40, "low": 0.6, "high": 0.86}
    assert record["metrics"]["val_bpb"]["n"] == 9
    assert record["metrics"]["train_seconds"]["value"] == pytest.approx(1.2 + 12.0)
    assert record["metrics"]["tokens_per_second"]["value"] == pytest.approx(640.0, rel=1e-3)
    base = record["stages"]["base"]
    assert list(record["stages"]) == ["base", "sft"]
    assert (base["step"], base["tokens"], base["finished"]) == (12, 768, True)
    assert base["seconds"] == pytest.approx(1.2)
    assert base["peak_memory_bytes"] == 5 << 20
    assert record["machine"]["torch"] == torch.__version__
    assert record["samples"][0]["task"] == "quiz"
    assert record["configs"]["base"]["num_iterations"] == 12
    assert record["version"]


def test_model_facts_are_those_of_the_model(run):
    write_report(run)
    facts = read(run)[0]["model"]
    model = LM.build(CONFIG)
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["blocks"] == ["M2", "T"]
    assert facts["flops_per_token"] == model.flops_per_token()


def test_a_reward_model_is_no_model_to_describe(run, caplog):
    checkpoint.save(run / "reward", 1, {"head": {"weight": torch.zeros(3)}}, {"stage": "reward", "tokenizer_hash": "0"})
    write_report(run)
    assert read(run)[0]["model"]["blocks"] == ["M2", "T"]
    assert not caplog.records


def test_page_has_curves_metrics_samples_timings_and_settings(run):
    write_report(run)
    page = read(run)[1]
    # base: loss, bits per byte, gradient norm; sft (120 steps): smoothed and raw loss, chat loss, norm twice
    assert page.tags.count("svg") == 3 + 2 + 1  # and one picture of a share
    assert len(page.lines) == 3 + 5
    assert sum("faint" in classes for classes, _ in page.lines) == 2
    for words in ("quiz_accuracy", "75.0%", "60.0% to 86.0%", "validation chat loss", "upon a time", "expected: 8"):
        assert words in page.text
    for words in ("base 1.2 s", "FLOPs per token", '"num_iterations": 12', "training loss", "log scale"):
        assert words in page.text
    assert "prefers-color-scheme:dark" in (run / "report.html").read_text()


def test_page_is_self_contained_and_everything_is_escaped(run):
    write_report(run, {"title": NASTY, "metrics": {f"{NASTY}_accuracy": 0.5}, "machine": {"cpu": NASTY}})
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.active
    assert "script" not in page.tags
    assert "b" not in page.tags[: page.tags.index("section")]
    assert "<b>7</b>" in page.text  # as text
    assert page.text.count('<script>alert("1")</script>') >= 4
    assert "\x00" not in html
    assert not re.search(r"https?://", html)


def test_curves_stay_inside_their_chart(run):
    write_report(run)
    for _, points in read(run)[1].lines:
        for x, y in (map(float, pair.split(",")) for pair in points.split()):
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_base_alone_and_without_checkpoint(tmp_path):
    run = tmp_path / "half"
    add_stage(run, "base", with_checkpoint=False)
    with (run / "base" / "log.jsonl").open("a") as log:
        log.write('{"step": 13, "lo')  # killed while writing
    write_report(run)
    record, page = read(run)
    assert record["model"] == {}
    assert record["stages"]["base"]["finished"] is False
    assert record["stages"]["base"]["step"] == 12
    assert record["metrics"]["val_bpb"]["value"] == pytest.approx(2 / 12)
    assert "not finished: base" in page.text
    assert len(page.lines) == 3


def test_evaluation_alone(tmp_path):
    run = tmp_path / "only"
    run.mkdir()
    add_evaluation(run, "chat_eval", "sft", {"quiz_accuracy": 0.5})
    write_report(run)
    record, page = read(run)
    assert record["stages"] == {}
    assert "quiz_accuracy" in page.text


def test_extra_wins_and_is_kept_by_a_later_report(run):
    sample = {"question": "Q1?", "answer": "A1", "gold": "A1", "right": True}
    extra = {"metrics": {"train_seconds": 99.0, "closed_book_known_em": as_metric(0.9)}, "samples": [sample]}
    write_report(run, {**extra, "timings": {"tokenizer": 2.0, "base": 60.0}, "title": "My run"})
    first, _ = read(run)
    write_report(run)
    second, page = read(run)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["train_seconds"]["value"] == 99.0
    assert second["samples"][0] == sample
    assert len(second["samples"]) == 3  # not repeated
    for words in ("My run", "Time: 1 min 14 s", "tokenizer 2 s", "Known facts answered", "90.0%", "✓ right"):
        assert words in page.text


def test_metrics_that_stages_share_keep_apart(run):
    for stage, value in (("mid", 0.6), ("base", 0.1)):
        add_evaluation(run, "chat_eval", stage, {"quiz_accuracy": value})
    for stage, value in (("mid", 0.7), ("sft", 0.8)):
        add_evaluation(run, "base_eval", stage, {"val_bpb": value})
    write_report(run)
    metrics = {name: m["value"] for name, m in read(run)[0]["metrics"].items()}
    assert metrics["quiz_accuracy"] == 0.75
    assert metrics["quiz_accuracy@mid"] == 0.6
    assert metrics["quiz_accuracy@base"] == 0.1
    assert metrics["val_bpb"] == 0.5
    assert metrics["val_bpb@mid"] == 0.7
    assert metrics["val_bpb@sft"] == 0.8


def test_damaged_files_are_left_out_with_a_warning(run, caplog):
    (run / "chat_eval_mid.json").write_text("{")
    meta = run / "sft" / "step_000120" / "meta.json"
    meta.write_text(meta.read_text().replace("120", "121"))
    write_report(run)
    assert "chat_eval_mid.json" in caplog.text
    assert "meta.json is damaged" in caplog.text
    record, _ = read(run)
    assert record["model"]["stage"] == "base"
    assert record["stages"]["sft"]["step"] == 120  # from the log


def test_a_loss_that_is_no_number_leaves_the_rest(run):
    log = run / "base" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 13, "loss": NaN, "tokens": 832, "time": 1.3, "grad_norm": Infinity}\n')
    write_report(run)
    assert "nan" not in " ".join(points for _, points in read(run)[1].lines)


def test_empty_run_is_a_usage_error_that_lists_runs(run):
    with pytest.raises(UsageError, match=r"holds no stage and no evaluation of a run \(there is: demo\)"):
        write_report(run.parent / "nothing")


def test_a_report_that_cannot_be_written_says_where(run):
    (run / "report.json").mkdir()
    with pytest.raises(NanochatError, match=r"could not write .*report\.json"):
        write_report(run, {})


def test_main(run, capsys, monkeypatch):
    monkeypatch.setenv("NANOCHAT_OUT", str(run.parent))
    report.main([])
    assert str(run / "report.html") in capsys.readouterr().out
    (run / "report.html").unlink()
    report.main(["--run", "demo"])
    assert (run / "report.html").exists()
    with pytest.raises(UsageError, match="holds no run yet"):
        report.main(["--out_dir", str(run / "base")])
    with pytest.raises(UsageError, match="holds no stage"):
        report.main(["--run", "other"])


def test_read_log_of_no_file_is_empty(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []


# ---- charts and numbers


positive = st.floats(1e-6, 1e6)


@settings(deadline=None)
@given(positive, st.floats(1.0001, 1e6))
def test_ticks_lie_inside_and_rise(low, factor):
    high = low * factor
    for ticks in (linear_ticks(low, high), log_ticks(low, high)):
        assert ticks == sorted(set(ticks))
        assert 1 <= len(ticks) <= 10
        assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in ticks)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(allow_nan=True, allow_infinity=True)), max_size=30))
@example([(5e-324, 0.0)])
@example([(0.0, 5e-324), (1.0, 1.0)])
def test_any_curve_makes_a_chart_or_nothing(points):
    html = line_chart("t<", [Series("s&", sorted(points, key=lambda p: p[0]))], "x", "y")
    if html:
        page = Page(html)
        assert page.tags[0] == "svg"
        assert "nan" not in html.lower()
        assert not re.search(r"\binf\b", html)


def test_scales():
    linear, log = Scale(0, 10, 100, 0), Scale(0.01, 100, 0, 400, log=True)
    assert [linear(v) for v in (0, 5, 10)] == [100, 50, 0]
    assert [round(log(v)) for v in (0.01, 1, 100)] == [0, 200, 400]


def test_smooth_does_not_lag_and_thin_keeps_the_end():
    line = [(i, 3.0 + i) for i in range(400)]
    assert smooth(line)[:-8] == [(x, pytest.approx(y)) for x, y in line[:-8]]  # a straight line stays: no lag
    assert smooth(line)[-1][1] == pytest.approx(402 - 4)
    assert smooth([(0, 2.0)]) == [(0, 2.0)]
    assert smooth([(0, 2.0), (1, float("nan")), (2, 4.0)])[-1] == (2, 3.0)
    waves = [(i, float(i % 2)) for i in range(400)]
    assert all(0.4 < y < 0.6 for _, y in smooth(waves)[8:])
    points = [(i, i) for i in range(1001)]
    assert len(thin(points, 100)) <= 101
    assert thin(points, 100)[-1] == (1000, 1000)


def test_numbers_as_people_read_them():
    said = {0.1234: "0.123 s", 59.96: "1 min 0 s", 61: "1 min 1 s", 3599.6: "1 h 0 min", 7260: "2 h 1 min"}
    assert {seconds: duration(seconds) for seconds in said} == said
    assert [size(n) for n in (10, 2048, 5 << 20, 3 << 30)] == ["10 B", "2 KiB", "5 MiB", "3 GiB"]
    assert [short(v) for v in (0.25, 1500, 2.5e6, 3e9)] == ["0.25", "1.5K", "2.5M", "3G"]
    assert text("<&\"'>\x07") == "&lt;&amp;&quot;&#x27;&gt;\ufffd"
