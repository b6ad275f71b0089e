"""The report as one HTML page: inline style, inline SVG, no script, light and dark. All text is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanochat.rag.traces import Trace
from nanochat.report_chart import Series, curve, line_chart, points, short
from nanochat.report_policy import is_policy, outcome, policy_charts
from nanochat.report_style import STYLE, text
from nanochat.report_traces import TRACE_STYLE, trace_cards

# metric -> (what it is called on its tile, what it says); these come first, in this order
HEADLINES = {
    "closed_book_known_em": ("Known facts answered", "exact match, questions not seen in training"),
    "closed_book_new_abstain": ("Unknown things admitted", "abstains where nothing was learnt"),
    "val_bpb": ("Bits per byte", "validation text, lower is better"),
    "tokens_per_second": ("Tokens per second", "in training"),
    "train_seconds": ("Training time", "all stages together"),
}
STAGE_TITLES = {
    "base": "Base: pretraining on raw text",
    "mid": "Mid: text and conversations",
    "sft": "SFT: fine-tuning on conversations",
    "rag": "RAG: fine-tuning on documents in the prompt",
    "refrag_sft": "REFRAG, supervised: searches of somebody who knows the way",
    "refrag": "REFRAG: reinforcement learning on the model's own searches",
    "rl": "RL: reinforcement learning on tasks that judge answers",
}
SHARES = ("_accuracy", "_abstained", "_abstain", "_em", "_always_first", "_random_weights", "_chance", "_share")
BLOCKS = {"T": (0, "attention"), "M": (1, "Mamba"), "M2": (2, "Mamba-2")}
MOST_SAMPLES = 12  # of one kind or task
MOST_TRACES = 8  # of one stage


def page(
    report: Mapping[str, Any],
    logs: Mapping[str, Sequence[dict[str, Any]]],
    traces: Mapping[str, Sequence[Trace]] | None = None,
) -> str:
    """The whole page. `report` is what report.json holds, `logs` the log records by stage, `traces` answers of it."""
    traces = traces or {}
    title = report["title"] or f"nanochat: {report['run']}"
    sections = [
        header(title, report),
        tiles(report["metrics"]),
        *(stage(name, facts, logs.get(name, ()), traces.get(name, ())) for name, facts in report["stages"].items()),
        metrics_table(report["metrics"]),
        samples(report["samples"]),
        timings(report["timings"]),
        model(report["model"]),
        section("Machine", facts_table(report["machine"])) if report["machine"] else "",
        configs(report["configs"]),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{TRACE_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, sections))
        + f"\n<footer>nanochat {text(report['version'])}, written {text(report['written'])}</footer>"
        + "</main></body></html>\n"
    )


def section(title: str, body: str, name: str = "") -> str:
    return f'<section{f" id={name}" if name else ""}><h2>{text(title)}</h2>{body}</section>'


def header(title: str, report: Mapping[str, Any]) -> str:
    """Name of the run and one sentence on what it made."""
    facts, stages = report["model"], report["stages"]
    parts = []
    if facts:
        counts, shape = facts["parameters"], facts["config"]
        parts.append(f"{short(counts['total'])} parameters, {len(facts['blocks'])} layers, width {shape['d_model']}")
    if stages:
        parts.append(f"trained on {short(sum(s['tokens'] for s in stages.values()))} tokens")
    machine = report["machine"]
    cores = f", {machine['cores']} cores" if "cores" in machine else ""
    parts.append(str(machine.get("gpu") or machine.get("cpu", "") + cores))
    open_stages = [name for name, s in stages.items() if not s["finished"]]
    if open_stages:
        parts.append("not finished: " + ", ".join(open_stages))
    chips = block_strip(facts["blocks"]) if facts else ""
    return f"<header><h1>{text(title)}</h1><p>{text(' · '.join(filter(None, parts)))}</p>{chips}</header>"


# ---- numbers


def duration(seconds: float) -> str:
    """Seconds as people say them: 6 min 12 s."""
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_share(name: str) -> bool:
    return name.split("@")[0].endswith(SHARES)


def number(name: str, value: float) -> str:
    """A metric's value: a percentage for a share, a duration for seconds."""
    if is_share(name):
        return f"{100 * value:.1f}%"
    if name.endswith("_seconds"):
        return duration(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(n_bytes: float) -> str:
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.3g} {unit}"
    return f"{n_bytes:.0f} B"


# ---- metrics


def tiles(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The few numbers that matter most."""
    shown = [name for name in HEADLINES if name in metrics]
    shares = [name for name in metrics if name.endswith("_accuracy") and "@" not in name]
    shown = [*shares[: max(0, 5 - len(shown))], *shown]
    cards = []
    for name in shown:
        metric = metrics[name]
        label, about = HEADLINES.get(name, (name.removesuffix("_accuracy"), "answered right"))
        note = about
        if metric["low"] != metric["high"]:
            note = f"{number(name, metric['low'])} to {number(name, metric['high'])}, n = {metric['n']:,}"
        cards.append(
            f'<div class="tile" title="{text(about)}"><div class="what">{text(label)}</div>'
            f'<div class="big">{text(number(name, metric["value"]))}</div><div class="note">{text(note)}</div></div>'
        )
    return f'<div class="tiles">{"".join(cards)}</div>' if cards else ""


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Every metric with n and interval, shares also as a picture."""
    rows = []
    for name, m in metrics.items():
        interval = f"{number(name, m['low'])} to {number(name, m['high'])}" if m["low"] != m["high"] else ""
        picture = whisker(m) if is_share(name) else ""
        rows.append(
            f'<tr><td class="name">{text(name)}</td><td class="num">{text(number(name, m["value"]))}</td>'
            f'<td class="num">{text(interval)}</td><td class="num">{m["n"]:,}</td><td>{picture}</td></tr>'
        )
    if not rows:
        return ""
    head = "<tr><th>metric</th><th>value</th><th>95% interval</th><th>n</th><th>0 to 100%</th></tr>"
    return section("Metrics", f'<div class="wide"><table>{head}{"".join(rows)}</table></div>', "metrics")


def whisker(metric: Mapping[str, float]) -> str:
    """A share and its interval between 0 and 1."""
    low, value, high = (2 + 156 * min(1.0, max(0.0, metric[k])) for k in ("low", "value", "high"))
    return (
        '<svg class="whisker" viewBox="0 0 160 14" aria-hidden="true">'
        '<line class="axis" x1="2" x2="158" y1="7" y2="7"/>'
        f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="7" y2="7"/>'
        f'<circle class="dot s0" cx="{value:.1f}" cy="7" r="4"/></svg>'
    )


# ---- stages


def stage(
    name: str, facts: Mapping[str, Any], records: Sequence[dict[str, Any]], traces: Sequence[Trace] = ()
) -> str:
    """Facts and curves of one stage; of reinforcement learning also what became of it, and a few answers."""
    steps = f"{facts['step']:,}" + (f" of {facts['n_steps']:,}" if facts["n_steps"] > facts["step"] else "")
    shown = {
        "steps": steps,
        "tokens": short(facts["tokens"]),
        "training time": duration(facts["seconds"]),
        "tokens per second": f"{facts['tokens_per_second']:,.0f}",
        "peak memory": size(facts["peak_memory_bytes"]),
        **{measure(key): f"{value:.4g}" for key, value in facts["metrics"].items() if key.startswith("val_")},
    }
    items = "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in shown.items())
    drawn = policy_charts(name, records, facts) if is_policy(records) else stage_charts(name, records)
    charts = "".join(f"<figure>{chart}</figure>" for chart in drawn if chart)
    body = f'<dl class="facts">{items}</dl>{outcome(facts)}<div class="charts">{charts}</div>'
    if traces:
        body += f"<h3>Answers of its last evaluation, step by step</h3>{trace_cards(few(traces))}"
    return section(STAGE_TITLES.get(name, name), body, name)


def few(traces: Sequence[Trace]) -> list[Trace]:
    """At most MOST_TRACES of them, evenly spread: evaluations write one task after the other."""
    n = min(len(traces), MOST_TRACES)
    return [traces[i * len(traces) // n] for i in range(n)]


def measure(key: str) -> str:
    """What the log calls val_bpb and val_chat_loss, in words."""
    return "validation bits per byte" if key == "val_bpb" else key.replace("val_", "validation ").replace("_", " ")


def stage_charts(name: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """Loss in training and on validation chats (nats a token), bits per byte of validation text, gradient norm."""
    train = curve("training loss", points(records, "loss"), 0)
    keys = sorted({key for record in records for key in record if key.startswith("val_") and key.endswith("_loss")})
    for i, key in enumerate(keys):
        train.append(Series(measure(key), points(records, key), 1 + i % 2, dots=True))
    bits = Series("validation text", points(records, "val_bpb"), 1, dots=True)
    norm = curve("gradient norm", points(records, "grad_norm"), 2)
    return [
        line_chart(f"Loss of {name}", train, "steps", "nats per token"),
        line_chart(f"Bits per byte of {name}", [bits], "steps", "bits per byte"),
        line_chart(f"Gradient norm of {name}", norm, "steps", "norm before clipping"),
    ]


def timings(seconds: Mapping[str, float]) -> str:
    """Where the time went: one bar, cut by part."""
    total = sum(seconds.values())
    if not total:
        return ""
    parts, rows = [], []
    for i, (name, value) in enumerate(seconds.items()):
        label = f"{name}: {duration(value)}"
        parts.append(f'<div class="b{i % 6}" style="flex-grow:{value / total:.5f}" title="{text(label)}"></div>')
        rows.append(f'<li><i class="b{i % 6}"></i>{text(name)} <b>{text(duration(value))}</b></li>')
    body = f'<div class="bar">{"".join(parts)}</div><ul class="keys">{"".join(rows)}</ul>'
    return section(f"Time: {duration(total)}", body, "time")


# ---- samples


def samples(found: Sequence[Mapping[str, Any]]) -> str:
    """Answers with their gold answers, then continuations."""
    cards: list[str] = []
    seen: dict[str, int] = {}
    for sample in found:
        kind = str(sample.get("task", ""))
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= MOST_SAMPLES:
            cards.append(answer(sample) if "question" in sample else continuation(sample))
    return section("Samples", f'<div class="samples">{"".join(cards)}</div>', "samples") if cards else ""


def answer(sample: Mapping[str, Any]) -> str:
    right = sample.get("right")
    mark = "" if right is None else '<span class="good">✓ right</span>' if right else '<span class="bad">✗ wrong</span>'
    gold = f'<p class="gold">expected: {text(sample["gold"])}</p>' if right is False and "gold" in sample else ""
    return (
        f'<article><p class="meta">{text(sample.get("task", ""))} {mark}</p>'
        f'<p class="user">{text(sample["question"])}</p>'
        f'<p class="model">{text(sample.get("answer", "")) or "(nothing)"}</p>{gold}</article>'
    )


def continuation(sample: Mapping[str, Any]) -> str:
    prompt, made = text(sample.get("prompt", "")), text(sample.get("text", ""))
    return f'<article><p class="meta">continuation</p><p class="model"><b>{prompt}</b>{made}</p></article>'


# ---- model, machine, settings


def block_strip(blocks: Sequence[str]) -> str:
    """The layers in order, coloured by kind."""
    chips = []
    for i, letter in enumerate(blocks):
        color, kind = BLOCKS.get(letter, (0, letter))
        chips.append(f'<span class="chip s{color}" title="layer {i}: {text(kind)}">{text(letter)}</span>')
    return f'<div class="chips" aria-label="layers">{"".join(chips)}</div>'


def model(facts: Mapping[str, Any]) -> str:
    """Size, cost and architecture."""
    if not facts:
        return ""
    counts = facts["parameters"]
    shown: dict[str, Any] = {
        "parameters": f"{counts['total']:,}",
        "in embeddings": f"{counts['embedding']:,}",
        "in blocks": f"{counts['blocks']:,}",
        "in the head": f"{counts['head']:,}" if counts["head"] else "0 (tied to the embedding)",
        "training FLOPs per token": short(facts["flops_per_token"]),
        "weights on disk": size(facts["bytes"]),
    }
    rest = {key: value for key, value in facts["config"].items() if key != "pattern"}
    details = f"<details><summary>architecture</summary>{facts_table(rest)}</details>"
    return section("Model", facts_table(shown) + details, "model")


def facts_table(facts: Mapping[str, Any]) -> str:
    rows = (f"<tr><th>{text(key.replace('_', ' '))}</th><td>{text(value)}</td></tr>" for key, value in facts.items())
    return f'<table class="pairs">{"".join(rows)}</table>'


def configs(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The resolved settings of each stage."""
    parts = []
    for name, values in found.items():
        shown = text(json.dumps(values, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>{text(name)}</summary><pre>{shown}</pre></details>")
    return section("Settings", "".join(parts), "settings") if parts else ""
