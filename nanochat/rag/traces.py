"""Traces: what a model did on the way to an answer, hop by hop, as a record to look at, to write and to read.

A trace knows the gold documents, so that a reader sees at which hop the way was lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat.engine.rollout import Rollout
from nanochat.engine.tools import Call
from nanochat.errors import NanochatError
from nanochat.rag.multihop import Hop, documents_of, read_answer
from nanochat.tokenizer import Tokenizer

MAX_SHOWN = 160  # characters of a document in the text form


@dataclass(frozen=True)
class Shown:
    """A document that a search showed."""

    number: int
    id: str
    title: str
    text: str
    gold: bool
    cited: bool


@dataclass(frozen=True)
class Turn:
    """A call, and what the model said before it."""

    thinking: str
    wrote: str  # by the model
    query: str  # as it was searched; another one where a hook writes queries, empty where nothing was searched
    documents: tuple[Shown, ...]
    output: str = ""  # of another tool
    seconds: float = 0.0


@dataclass(frozen=True)
class Trace:
    """One answer. `missing` are gold documents that no search found, `right` None where nobody judged."""

    name: str
    question: str
    turns: tuple[Turn, ...]
    answer: str  # with citations as [n]
    invalid: tuple[str, ...]  # citations that name no document
    answers: tuple[str, ...]
    missing: tuple[str, ...]
    right: bool | None
    reward: float | None
    rewards: Mapping[str, float] = field(default_factory=dict)  # by part
    finish_reason: str = "stop"
    error: str = ""
    n_tokens: int = 0  # that the model produced


def trace_of(
    rollout: Rollout,
    tokenizer: Tokenizer,
    question: str,
    *,
    name: str = "",
    answers: Sequence[str] = (),
    gold: Iterable[str] = (),
    right: bool | None = None,
    reward: float | None = None,
    rewards: Mapping[str, float] | None = None,
) -> Trace:
    """The trace of a rollout. gold: ids of the documents that state the answer."""
    answer, wanted = read_answer(rollout, tokenizer), dict.fromkeys(gold)
    turns, start = [], 0
    for call in rollout.calls:
        thinking = tokenizer.decode(_thinking(rollout.ids[start : call.at], tokenizer)).strip()
        shown = _shown(call, wanted, answer.citations)
        query = call.result.query if isinstance(call.result, Hop) else ""
        output = "" if isinstance(call.result, Hop) else str(call.result)
        turns.append(Turn(thinking, call.text, query, shown, output, round(call.seconds, 6)))
        start = call.at + call.n_tokens
    found = {document.id for document in documents_of(rollout.calls)}
    return Trace(
        name, question, tuple(turns), answer.render(), answer.invalid, tuple(answers),
        tuple(one for one in wanted if one not in found), right, reward, dict(rewards or {}), rollout.finish_reason,
        rollout.error, sum(rollout.sampled),
    )  # fmt: skip


def _thinking(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """What the model said before the call began; special tokens left out."""
    starts = [tokenizer.special(name) for name in ("search_start", "tool_call_start")]
    begun = next((i for i, token in enumerate(ids) if token in starts), len(ids))
    return [i for i in ids[:begun] if not tokenizer.is_special(i)]


def _shown(call: Call, gold: Mapping[str, None], cited: Sequence[int]) -> tuple[Shown, ...]:
    if not isinstance(call.result, Hop):
        return ()
    return tuple(
        Shown(n, d.id, d.title, d.content, d.id in gold, n in cited)
        for n, d in enumerate(call.result.documents, call.result.first)
    )


# ---- as text


def show(trace: Trace) -> str:
    """A trace to read: `*` marks gold documents, `<` those that the answer cites."""
    lines = [f"{trace.name}: {trace.question}" if trace.name else trace.question]
    for i, turn in enumerate(trace.turns, 1):
        lines += [f"  {turn.thinking}"] if turn.thinking else []
        lines.append(f"  {i}. {turn.wrote!r}" + (f" -> {turn.query!r}" if turn.query not in ("", turn.wrote) else ""))
        lines += [f"     = {turn.output}"] if turn.output else []
        lines += [_line(document) for document in turn.documents]
        if not turn.documents and not turn.output:
            lines.append("     nothing new was found")
    lines.append(f"  => {trace.answer or '(no answer)'}{f'  ({trace.error})' if trace.error else ''}")
    lines.append(f"  {verdict(trace)}")
    return "\n".join(lines)


def _line(document: Shown) -> str:
    text = " ".join(f"{document.title}: {document.text}".split()) if document.title else document.text
    text = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
    return f"   {'*' if document.gold else ' '} [{document.number}] {text}{' <' if document.cited else ''}"


def verdict(trace: Trace) -> str:
    """What became of it, in one line."""
    parts = [] if trace.right is None else ["right" if trace.right else "wrong"]
    if trace.answers:
        parts.append(f"gold: {' | '.join(trace.answers)}")
    if trace.missing:
        parts.append(f"not found: {', '.join(trace.missing)}")
    if trace.invalid:
        parts.append(f"cites what is not there: {', '.join(trace.invalid)}")
    if trace.finish_reason != "stop":
        parts.append(f"ended by {trace.finish_reason}")
    if trace.reward is not None:
        parts.append(f"reward {trace.reward:.2f}")
    parts += [f"{name} {value:.2f}" for name, value in trace.rewards.items()]
    return "; ".join([*parts, f"{trace.n_tokens} tokens"])


# ---- as files


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """One JSON object a line. Raises NanochatError when the file cannot be written."""
    lines = "".join(json.dumps(asdict(trace), ensure_ascii=False) + "\n" for trace in traces)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(lines, encoding="utf-8", errors="backslashreplace")  # lone surrogates, as JSON has them
    except OSError as error:
        raise NanochatError(f"cannot write {path}: {error.strerror or error}") from None


def read_traces(path: str | Path) -> list[Trace]:
    """What `write_traces` wrote. Raises NanochatError that names the line that is no trace."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not at what else Unicode takes for a line's end
    except (OSError, UnicodeDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise NanochatError(f"cannot read {path}: {why}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_trace(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise NanochatError(f"{path}, line {number}: no trace ({why:.200})") from None
    return found


def _trace(record: dict[str, Any]) -> Trace:
    turns = tuple(
        Turn(**{**turn, "documents": tuple(Shown(**shown) for shown in turn["documents"])}) for turn in record["turns"]
    )
    lists = {name: tuple(record[name]) for name in ("invalid", "answers", "missing")}
    return Trace(**{**record, **lists, "turns": turns})
