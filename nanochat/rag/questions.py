"""Questions with answers and gold documents, from JSONL: what RAG training and evaluation read.

    {"question": "Where was Mara Velt born?", "answer": "Torwick", "gold": ["doc-17"]}

`answers` may list several that are right; `sentence` is what the model should say (default: the first answer);
`documents` ([{"id", "title", "content"}]) gives the documents of the prompt instead of a search; `gold` empty or left
out: nothing answers the question, and the model should abstain. HotpotQA's records are read as they are, also as one
JSON list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Document
from nanochat.retrieval.jsonl import json_reason

MAX_SHOWN = 20  # problems that one message lists


@dataclass(frozen=True)
class RagQuestion:
    """One question. `answers` is empty, and so is `gold`, when nothing answers it."""

    id: str
    question: str
    answers: tuple[str, ...]
    sentence: str
    gold: tuple[str, ...]
    documents: tuple[Document, ...] = ()
    place: str = field(default="", compare=False)  # where in its file it stands: `line 3`

    @property
    def answerable(self) -> bool:
        return bool(self.answers)


def complain(problems: Sequence[str], what: str) -> None:
    """Raise one UsageError for all problems, the first MAX_SHOWN of them in full; nothing when there are none."""
    if not problems:
        return
    more = f"\n  and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
    raise UsageError(f"{what}:\n  " + "\n  ".join(problems[:MAX_SHOWN]) + more)


def load_questions(path: str | Path) -> list[RagQuestion]:
    """The questions of a file. Raises NanochatError when it cannot be read, UsageError that lists everything wrong with
    it by line (or by item of a list)."""
    path = Path(path)
    found: list[RagQuestion] = []
    problems: list[str] = []
    places: dict[str, str] = {}
    for where, record in _records(path, problems):
        try:
            question = parse_question(record, where.replace("line ", "q").replace("item ", "q"))
            if question.gold and not question.answers:
                raise ValueError("has gold documents, but no answer that they could state")
        except KeyError as error:
            problems.append(f"{where}: lacks {error}")
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"{where}: {error}")
        else:
            if question.id in places:
                problems.append(f"{where}: the id {question.id!r} stands at {places[question.id]} too")
            places.setdefault(question.id, where)
            found.append(replace(question, place=where))
    if not found and not problems:
        problems.append("it holds no question")
    complain(problems, f"{path} cannot be used")
    return found


def _records(path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """(place, record) of a JSONL file, or of a file that is one JSON list; what is no JSON goes to the problems."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise NanochatError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: not UTF-8 ({error.reason})") from None
    is_list = text.lstrip().startswith("[")
    for number, piece in enumerate([text] if is_list else text.split("\n"), 1):
        if not piece.strip():
            continue
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError) as error:
            reason = json_reason(error) if isinstance(error, json.JSONDecodeError) else error
            problems.append(f"{'the list' if is_list else f'line {number}'}: not JSON: {reason}")
            continue
        if is_list:
            yield from ((f"item {i}", item) for i, item in enumerate(value, 1))
        else:
            yield f"line {number}", value


def parse_question(record: Any, default_id: str) -> RagQuestion:
    """One record. Raises ValueError that says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, got {type(record).__name__}")
    if "supporting_facts" in record or not isinstance(record.get("context", ""), str):  # SQuAD's is a text
        return _hotpotqa(record, default_id)
    text = record.get("question", record.get("query"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError('needs "question": a text that is not empty')
    answers: Any = record.get("answers", record.get("answer", []))
    if answers is None:
        raise ValueError('"answer" is null: leave it out where nothing answers the question')
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError('"answer" must be a text (or "answers" a list of texts)')
    gold: Any = record.get("gold", record.get("gold_documents", []))
    gold = [gold] if isinstance(gold, str) else list(gold)
    if not all(isinstance(g, str) for g in gold):
        raise ValueError('"gold" must be a list of document ids')
    sentence = record.get("sentence") or (answers[0] if answers else "")
    if not isinstance(sentence, str):
        raise ValueError('"sentence" must be a text')
    documents = tuple(_document(item, i) for i, item in enumerate(record.get("documents") or [], 1))
    return RagQuestion(str(record.get("id", default_id)), text, tuple(answers), sentence, tuple(gold), documents)


def _document(item: Any, number: int) -> Document:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str):
        raise ValueError(f'document {number} needs "content": a text')
    return Document(str(item.get("id", number)), item["content"], str(item.get("title", "")))


def _hotpotqa(record: dict[str, Any], default_id: str) -> RagQuestion:
    """HotpotQA: `context` is [[title, [sentence, …]], …] or {"title": […], "sentences": […]}; titles are the ids."""
    for name in ("question", "answer"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise ValueError(f'needs "{name}": a text that is not empty (it is a record of HotpotQA)')
    context, facts = _pairs(record, "context", "sentences"), _pairs(record, "supporting_facts", "sent_id")
    for number, (title, sentences) in enumerate(context, 1):
        if not isinstance(sentences, list) or not all(isinstance(one, str) for one in [title, *sentences]):
            raise ValueError(f'document {number} of "context": expected [title, [sentence, …]]')
    documents = tuple(Document(title, "".join(sentences).strip(), title) for title, sentences in context)
    gold = tuple(dict.fromkeys(str(title) for title, _ in facts))
    identity = str(record.get("_id", record.get("id", default_id)))
    return RagQuestion(identity, record["question"], (record["answer"],), record["answer"], gold, documents)


def _pairs(record: dict[str, Any], name: str, second: str) -> list[tuple[Any, Any]]:
    """A list of pairs, or the same as two columns. Raises ValueError for anything else."""
    value = record.get(name)
    if isinstance(value, dict) and isinstance(value.get("title"), list) and isinstance(value.get(second), list):
        value = list(zip(value["title"], value[second]))
    if not isinstance(value, list) or not all(isinstance(one, list | tuple) and len(one) == 2 for one in value):
        raise ValueError(
            f'needs "{name}": [[title, {"[sentence, …]" if name == "context" else "number of a sentence"}], …] '
            "(it is a record of HotpotQA)"
        )
    return [(first, other) for first, other in value]
