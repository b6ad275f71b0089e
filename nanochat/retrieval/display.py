"""Hits, versions and counts as text for a terminal, and as JSON values."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanochat.retrieval.document import Document, Hit
from nanochat.retrieval.manifest import Version

LONGEST_ID = 40  # characters; what is longer is cut in tables, not in JSON
LEAST_TEXT = 30  # characters of a passage that a narrow terminal shows all the same
LONGEST_TEXT = 100_000  # characters of a passage that are looked through for the place to show
BEFORE = 30  # characters that a shown piece of a passage begins before the word that was asked for


def hit_values(hit: Hit) -> dict[str, Any]:
    """A hit as JSON values."""
    return {"rank": hit.rank, "id": hit.id, "score": hit.score, **document_values(hit.document)}


def document_values(document: Document) -> dict[str, Any]:
    """A document as JSON values, from which jsonl.py makes it again; of a passage also its place."""
    values: dict[str, Any] = {"id": document.id, "title": document.title, "content": document.content}
    values |= {"source": document.source, "metadata": dict(document.metadata)}
    return {**values, "span": list(document.span)} if document.span else values


def hits_table(query: str, hits: Sequence[Hit], full: bool = False) -> str:
    """One line for each hit with the place in its text that the query is about; `full`: the whole texts."""
    if not hits:
        return "nothing found"
    if full:
        return "\n\n".join(f"{_heading(hit)}\n{_printable(hit.document.content, lines=True)}" for hit in hits)
    rows = [[str(hit.rank), f"{hit.score:.4g}", _cut(_printable(hit.id), LONGEST_ID), ""] for hit in hits]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    room = max(LEAST_TEXT, shutil.get_terminal_size((100, 24)).columns - sum(widths) - 6)
    for row, hit in zip(rows, hits):
        row[3] = excerpt(hit.document, query, room)
    return table(("", "score", "id", "passage"), rows, right=(0, 1))


def excerpt(document: Document, query: str, width: int) -> str:
    """The title and a piece of the content around what was asked for, on one line."""
    title, text = _printable(document.title), _printable(document.content[:LONGEST_TEXT])
    if title:
        title = _cut(title, width // 2) + ": "
    room = width - len(title)
    start = max(0, _place(query, text) - BEFORE)
    if start + room > len(text):
        start = max(0, len(text) - room)
    if start:
        start = text.find(" ", start, start + BEFORE) + 1 or start
        return title + _cut("…" + text[start:], room)
    return title + _cut(text, room)


def _place(query: str, text: str) -> int:
    """Where the first of the query's longer words (or else of its others) begins in the text; 0: nowhere."""
    words = re.findall(r"\w+", query)
    for some in ([re.escape(word[:6]) for word in words if len(word) > 3], [rf"{re.escape(word)}\b" for word in words]):
        if some and (found := re.search(rf"\b(?:{'|'.join(some)})", text, flags=re.IGNORECASE)):
            return found.start()
    return 0


def versions_table(versions: Sequence[Version]) -> str:
    rows = [
        [str(v.number), _time(v.time), f"{v.documents:,}", f"{v.passages:,}", " ".join(v.tags), _printable(v.note)]
        for v in versions
    ]
    return table(("version", "time", "documents", "passages", "tags", "note"), rows, right=(0, 2, 3))


def version_values(version: Version) -> dict[str, Any]:
    """A version as JSON values."""
    names = ("number", "time", "note", "documents", "passages")
    return {**{name: getattr(version, name) for name in names}, "tags": list(version.tags)}


def stats_table(stats: Mapping[str, Any]) -> str:
    """A line for each value."""
    shown = {name: _value(name, value) for name, value in stats.items() if value is not None}
    width = max(map(len, shown))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in shown.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns, two blanks apart; those in `right` end at their right edge."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    cells = [
        [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _heading(hit: Hit) -> str:
    document = hit.document
    place = f", characters {document.span[0]:,} to {document.span[1]:,}" if document.span else ""
    title = f"  {_printable(document.title)}" if document.title else ""
    return f"{hit.rank}.  {_printable(hit.id)}{place}  ({hit.score:.4g}){title}"


def _value(name: str, value: Any) -> str:
    if name == "created":
        return _time(value)
    if name.endswith("bytes"):
        return f"{value:,} ({value / 1e6:,.1f} MB)"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items() if one is not None)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _printable(text: str, lines: bool = False) -> str:
    """The text on one line (or on its own, with `lines`), without control characters: a document must not command the
    terminal."""
    parts = text.splitlines() if lines else [text]
    kept = ["".join(c if c.isprintable() else " " for c in part) for part in parts]
    return "\n".join(kept) if lines else " ".join(kept[0].split())
