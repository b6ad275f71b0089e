"""The report of a run: `report.html`, one self-contained page, and `report.json`, the same facts for programs.

Everything is read from the run's directory: each stage's `log.jsonl`, `config.json` and newest `meta.json`, and the
files that the evaluations wrote (`base_eval_base.json`, `chat_eval_sft.json`). So it can be written at any time, also
of half a run, and again after another evaluation.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat import __version__, checkpoint, config, runtime
from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.rag.traces import Trace, read_traces
from nanochat.report_html import page
from nanochat.runtime import log

STAGES = ("base", "mid", "sft", "rag")  # the order of stages
LATER = ("refrag_sft", "refrag", "rl")  # these come behind them, others follow by name
RANKED = {"base_eval": STAGES, "chat_eval": STAGES[::-1]}  # whose metric keeps its plain name, if stages share it


@dataclass(frozen=True)
class ReportSettings:
    """Write report.html and report.json of a run from what its directory holds."""

    run: str | None = None
    """name of the run (default: the one that was trained last)"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""


@dataclass
class Stage:
    """What a stage's directory says."""

    name: str
    records: list[dict[str, Any]]  # of log.jsonl
    config: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)  # of the newest checkpoint; empty before the first
    traces: list[Trace] = field(default_factory=list)  # answers of the latest evaluation, where the stage keeps them

    def facts(self) -> dict[str, Any]:
        """Steps, tokens, seconds of training and so on: those of the newest checkpoint or log line."""
        steps = [r for r in self.records if "loss" in r]
        last = steps[-1] if steps else {}
        metrics = self.meta.get("metrics", {})
        tokens = last.get("tokens", metrics.get("tokens", 0))
        seconds = last.get("time", metrics.get("train_seconds", 0))
        found = {
            "step": last.get("step", self.meta.get("step", 0)),
            "n_steps": self.meta.get("n_steps", 0),
            "finished": metrics.get("final") == 1.0,
            "tokens": int(tokens),
            "seconds": round(float(seconds), 3),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
            "peak_memory_bytes": int(last.get("peak_memory_bytes", metrics.get("peak_memory_bytes", 0))),
        }
        ends = {k: v for r in self.records for k, v in r.items() if k.startswith("val_")}
        shares = {k: v for k, v in metrics.items() if k.endswith("_share") or k.startswith("val_")}
        if "best_step" in metrics:
            found["best_step"] = int(metrics["best_step"])
        rolled_back = [r for r in self.records if "rolled_back_to" in r]
        if rolled_back:
            found["rollbacks"] = [
                {"step": r["step"], "to": r["rolled_back_to"], "reason": r["reason"]} for r in rolled_back
            ]
        return found | {"metrics": ends | shares}


def write_report(run_dir: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write `report.json` and `report.html` into the run's directory; the path of the latter.

    extra: what the directory does not know, kept in report.json, and taken from there when None: "metrics" (as in the
    file; they win), "samples" (first in the list; each {"prompt", "text"} or {"task", "question", "answer", "gold",
    "right"}), "timings" (label -> seconds, before those of stages that are not among them), "machine", "title". Raises
    UsageError when the directory holds nothing of a run, NanochatError when the report cannot be written.
    """
    run_dir = Path(run_dir)
    stages = read_stages(run_dir)
    evaluations = read_evaluations(run_dir)
    if not stages and not evaluations:
        raise UsageError(f"{run_dir} holds no stage and no evaluation of a run{_runs(run_dir.parent)}; train one first")
    if extra is None:
        extra = (read_json(run_dir / "report.json") or {}).get("extra", {})
    report = collect(run_dir, stages, evaluations, extra)
    _write(run_dir / "report.json", json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n")
    logs = {stage.name: stage.records for stage in stages}
    _write(run_dir / "report.html", page(report, logs, {stage.name: stage.traces for stage in stages}))
    return run_dir / "report.html"


def collect(
    run_dir: Path, stages: list[Stage], evaluations: list[dict[str, Any]], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of report.json."""
    facts = {stage.name: stage.facts() for stage in stages}
    timings = dict(extra.get("timings", {}))
    timings |= {name: fact["seconds"] for name, fact in facts.items() if name not in timings}
    samples = [*extra.get("samples", []), *(s for e in _latest_first(evaluations) for s in e.get("samples", []))]
    return {
        "version": __version__,
        "run": run_dir.resolve().name,
        "title": extra.get("title", ""),
        "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "metrics": collect_metrics(facts, evaluations, extra.get("metrics", {})),
        "stages": facts,
        "timings": timings,
        "model": next((model_facts(stage) for stage in reversed(stages) if "model_config" in stage.meta), {}),
        "machine": {**runtime.machine(), **extra.get("machine", {})},
        "evaluations": [{k: v for k, v in e.items() if k not in ("metrics", "samples")} for e in evaluations],
        "samples": samples,
        "traces": {stage.name: [asdict(trace) for trace in stage.traces] for stage in stages if stage.traces},
        "configs": {stage.name: stage.config for stage in stages if stage.config},
        "extra": dict(extra),
    }


def collect_metrics(
    facts: dict[str, dict[str, Any]], evaluations: list[dict[str, Any]], extra: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """All metrics as {value, n, low, high}. Where two stages have one of a name, the others' is called NAME@STAGE:
    text is base's first, chats are those of the last stage."""
    found = {name: as_metric(metric) for name, metric in extra.items()}
    for evaluation in _latest_first(evaluations):
        for name, metric in evaluation["metrics"].items():
            taken = name in found and name not in extra
            found.setdefault(f"{name}@{evaluation.get('stage', '?')}" if taken else name, as_metric(metric))
    for stage, fact in facts.items():
        if stage == "base" and "val_bpb" in fact["metrics"]:
            found.setdefault("val_bpb", as_metric(fact["metrics"]["val_bpb"]))
    seconds = sum(fact["seconds"] for fact in facts.values())
    if seconds:
        found.setdefault("train_seconds", as_metric(round(seconds, 3)))
        found.setdefault("tokens_per_second", as_metric(round(sum(f["tokens"] for f in facts.values()) / seconds, 1)))
    return found


def as_metric(value: Any) -> dict[str, float]:
    """A metric as {value, n, low, high}; a bare number is its own interval."""
    if isinstance(value, Mapping):
        at = value["value"]
        return {"value": at, "n": value.get("n", 1), "low": value.get("low", at), "high": value.get("high", at)}
    return {"value": value, "n": 1, "low": value, "high": value}


def model_facts(stage: Stage) -> dict[str, Any]:
    """Architecture, parameters and FLOPs of a checkpoint's model, from its configuration alone."""
    try:
        architecture = ModelConfig.from_dict(stage.meta["model_config"])
        with torch.device("meta"):
            model = LM(architecture.resolved())
    except (NanochatError, KeyError, TypeError) as error:
        log.warning("report: the model of %s cannot be described: %s", stage.name, error)
        return {}
    size = stage.meta.get("files", {}).get("model.safetensors", {}).get("bytes", 0)
    return {
        "stage": stage.name,
        "blocks": list(architecture.blocks),
        "parameters": model.n_params(),
        "flops_per_token": model.flops_per_token(),
        "bytes": size,
        "config": architecture.to_dict(),
    }


# ---- what a run's directory holds


def read_stages(run_dir: Path) -> list[Stage]:
    """The stages that were at least begun, in order."""
    stages = []
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        newest = checkpoint.latest(path) if path.is_dir() else None
        records = read_log(path / "log.jsonl")
        if newest is None and not records:
            continue
        stage = Stage(path.name, records, read_json(path / "config.json") or {}, traces=traces_of(path))
        if newest is not None:
            try:
                stage.meta = checkpoint.read_meta(newest)
            except NanochatError as error:
                log.warning("report: %s", error)
        stages.append(stage)
    order = (*STAGES, *LATER)
    return sorted(stages, key=lambda s: (order.index(s.name) if s.name in order else len(order), s.name))


def traces_of(stage_dir: Path) -> list[Trace]:
    """The answers that a stage's evaluation kept; a damaged file is left out with a warning."""
    path = stage_dir / "traces.jsonl"
    try:
        return read_traces(path) if path.is_file() else []
    except NanochatError as error:
        log.warning("report: %s", error)
        return []


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a line cut off by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Every `*_eval*.json` of the run with metrics in it; others are passed over with a warning."""
    found = []
    for path in sorted(run_dir.glob("*_eval*.json")):
        record = read_json(path)
        if record is not None and isinstance(record.get("metrics"), dict):
            found.append({"file": path.name, **record})
        else:
            log.warning("report: %s holds no metrics and is left out", path)
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None, and a warning if it is there, when there is none."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("report: %s cannot be read: %s", path, error)
        return None
    return record if isinstance(record, dict) else None


def _latest_first(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat before text; and in each the stage first whose metrics and samples matter most."""

    def key(evaluation: dict[str, Any]) -> tuple[bool, int]:
        kind, stage = evaluation.get("kind", ""), evaluation.get("stage")
        order = RANKED.get(kind, STAGES)
        return kind != "chat_eval", order.index(stage) if stage in order else len(order)

    return sorted(evaluations, key=key)


def _runs(out_dir: Path) -> str:
    names = sorted({path.parent.parent.name for path in out_dir.glob("*/*/log.jsonl")})
    return f" (there is: {', '.join(names)})" if names else ""


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise NanochatError(f"could not write {path}: {error.strerror or error}") from error


def main(argv: list[str] | None = None) -> None:
    """The command `nanochat report`."""
    settings = config.parse(ReportSettings, argv, prog="nanochat report")
    out_dir = Path(settings.out_dir or runtime.out_root())
    if settings.run:
        run_dir = out_dir / settings.run
    else:
        logs = sorted(out_dir.glob("*/*/log.jsonl"), key=lambda path: path.stat().st_mtime)
        if not logs:
            raise UsageError(f"{out_dir} holds no run yet: train one first, for example with `nanochat quickstart`")
        run_dir = logs[-1].parent.parent
    path = write_report(run_dir)
    print(f"{path}\n{path.with_suffix('.json')}")
