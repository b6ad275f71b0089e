"""Questions with answers and gold documents, from JSONL: what RAG training and evaluation read.

    {"question": "Where was Mara Velt born?", "answer": "Torwick", "gold": ["doc-17"]}

`answers` may list several that are right; `sentence` is what the model should say (default: the first answer);
`documents` ([{"id", "title", "content"}]) gives the documents of the prompt instead of a search; `gold` empty or left
out: nothing answers the question, and the model should abstain. HotpotQA's records are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError
from nanochat.retrieval.document import Document

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

    @property
    def answerable(self) -> bool:
        return bool(self.answers)


def read_questions(path: str | Path) -> list[RagQuestion]:
    """All questions of a JSONL file. Raises NanochatError that lists every bad line (the first 20), with its reason."""
    path = Path(path)
    found: list[RagQuestion] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, line in _lines(path):
        try:
            question = parse_question(json.loads(line), f"q{number}")
            if question.id in seen:
                raise ValueError(f"the id {question.id!r} was given to an earlier question")
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"line {number}: {error}")
            continue
        seen.add(question.id)
        found.append(question)
    if problems:
        more = f"\n  and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        listed = "\n  ".join(problems[:MAX_SHOWN])
        raise NanochatError(f"{path}: {len(problems)} bad line(s); correct or delete them:\n  {listed}{more}")
    if not found:
        raise NanochatError(f"{path} holds no question")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except FileNotFoundError:
        raise NanochatError(f"there is no file of questions at {path}") from None
    except UnicodeDecodeError as error:
        raise NanochatError(f"{path} is not UTF-8: {error}") from None
    except OSError as error:
        raise NanochatError(f"cannot read {path}: {error.strerror or error}") from error


def parse_question(record: Any, default_id: str) -> RagQuestion:
    """One record. Raises ValueError that says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, got {type(record).__name__}")
    if "supporting_facts" in record and "context" in record:
        return _hotpotqa(record, default_id)
    text = record.get("question", record.get("query"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError('needs "question": a text that is not empty')
    answers: Any = record.get("answers", record.get("answer", []))
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
    context, facts = record["context"], record["supporting_facts"]
    if isinstance(context, dict):
        context = list(zip(context["title"], context["sentences"]))
    titles = facts["title"] if isinstance(facts, dict) else [title for title, _ in facts]
    documents = tuple(Document(title, "".join(sentences).strip(), title) for title, sentences in context)
    gold = tuple(dict.fromkeys(titles))
    answer = record["answer"]
    identity = str(record.get("_id", record.get("id", default_id)))
    return RagQuestion(identity, record["question"], (answer,), answer, gold, documents)
