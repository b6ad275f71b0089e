"""Traces of multi-hop answers as HTML: cards for the report, and a page of their own. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.rag.traces import Shown, Trace, Turn, verdict
from nanochat.report_style import STYLE, text

TRACE_STYLE = """
.trace ol{margin:6px 0;padding-left:22px}.trace li{margin-bottom:6px}
.hits{list-style:none;margin:2px 0 0;padding:0}
.hits li{margin:0;padding:2px 0 2px 8px;border-left:3px solid var(--rule)}
.hits .gold-hit{border-left-color:var(--good)}.hits details{margin:0}
"""


def trace_page(traces: Sequence[Trace], title: str = "REFRAG traces") -> str:
    """A whole page."""
    body = f"<section><h2>{text(title)}</h2>{trace_cards(traces)}</section>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{TRACE_STYLE}</style></head>\n<body><main>\n{body}\n"
        "</main></body></html>\n"
    )


def trace_cards(traces: Sequence[Trace]) -> str:
    """A card for each; the page needs TRACE_STYLE beside the report's own."""
    return f'<div class="samples">{"".join(map(card, traces))}</div>'


def card(trace: Trace) -> str:
    mark = "" if trace.right is None else f'<span class="{"good" if trace.right else "bad"}">'
    mark += "" if trace.right is None else f"{'right' if trace.right else 'wrong'}</span> "
    turns = f"<ol>{''.join(map(turn_item, trace.turns))}</ol>" if trace.turns else ""
    name = f'<p class="meta">{text(trace.name)}</p>' if trace.name else ""
    error = f'<p class="bad">{text(trace.error)}</p>' if trace.error else ""
    return (
        f'<article class="trace">{name}<p class="user">{text(trace.question)}</p>{turns}'
        f'<p class="model">{mark}{text(trace.answer or "(no answer)")}</p>{error}'
        f'<p class="meta">{text(verdict(trace))}</p></article>'
    )


def turn_item(turn: Turn) -> str:
    thinking = f"<p>{text(turn.thinking)}</p>" if turn.thinking else ""
    other = f" → {text(turn.query)}" if turn.query not in ("", turn.wrote) else ""
    if turn.output:
        found = f" = {text(turn.output)}"
    elif turn.documents:
        found = f'<ul class="hits">{"".join(map(hit, turn.documents))}</ul>'
    else:
        found = '<p class="meta">nothing new was found</p>'
    return f'<li>{thinking}<span class="name">{text(turn.wrote)}{other}</span>{found}</li>'


def hit(document: Shown) -> str:
    marks = " ".join(name for name, on in (("gold", document.gold), ("cited", document.cited)) if on)
    shown = f'[{document.number}] {text(document.title or document.id)} <span class="good">{marks}</span>'
    kind = ' class="gold-hit"' if document.gold else ""
    return f"<li{kind}><details><summary>{shown}</summary>{text(document.text)}</details></li>"
