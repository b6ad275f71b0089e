"""Readers of test collections: documents, queries and relevance judgements in the formats that the field shares.

    read_queries, read_qrels    a file of any of the formats below, known by its content
    read_trec_run, write_trec_run
    beir, cranfield, hotpotqa   whole collections

Queries are `{id: text}`, judgements `{query: {document: grade}}`, in file order. Every error is a NanochatError that
names file and line.

The project's own format is JSONL: `{"id": "q1", "query": "…", "gold": ["doc-1", "doc-2"]}`, where `gold` may also be
`{document: grade}` and is left out or empty for a question that nothing in the collection answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from nanochat.errors import NanochatError
from nanochat.retrieval.document import Document
from nanochat.retrieval.jsonl import json_reason
from nanochat.retrieval.metrics import Run, ranked

Queries = dict[str, str]
Judgements = dict[str, dict[str, int]]

ID_FIELDS = ("id", "_id", "query_id", "qid")
TEXT_FIELDS = ("query", "question", "text")
_TAG = re.compile(r"<\s*(/?)\s*([a-zA-Z]+)[^>]*>")


class Collection(NamedTuple):
    """Documents with queries and their judgements. `documents` is read as it is iterated, each time anew."""

    documents: Iterable[Document]
    queries: Queries
    qrels: Judgements


class _Lines:
    """The lines of a UTF-8 file without their ends, numbered from 1; `fail` names file and line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        number = 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except OSError as error:
            raise NanochatError(f"cannot read {self.path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            self.fail(number, f"not UTF-8 ({error.reason} at byte {error.start})")

    def fail(self, number: int, message: str) -> NoReturn:
        raise NanochatError(f"{self.path}, line {number}: {message}")

    def objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The lines as JSON objects; empty lines are passed over."""
        for number, line in self:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                self.fail(number, f"not JSON: {json_reason(error)}")
            except ValueError as error:  # a number of too many digits
                self.fail(number, f"not JSON: {error}")
            except RecursionError:
                self.fail(number, "JSON nested too deeply")
            if not isinstance(record, dict):
                self.fail(number, f"a JSON object was expected, not {type(record).__name__}")
            yield number, record

    def first(self) -> str:
        """The first line that is not empty."""
        return next((line for _, line in self if line.strip()), "")


# ------------------------------------------------------------------------------------------------ any of the formats


def read_queries(path: str | Path) -> Queries:
    """Queries of a file: TREC topics, Cranfield (numbered as cranqrel does), JSONL (ours, BEIR's, HotpotQA's), or TSV
    `id <tab> text`. Raises NanochatError for a repeated id, an empty file and what is none of these."""
    lines = _Lines(path)
    first = lines.first()
    if first.startswith("{"):
        pairs = _jsonl_queries(lines)
    elif first.startswith(".I"):
        pairs = ((n, str(i), fields.get("W", "")) for i, (n, _, fields) in enumerate(_smart(lines), 1))
    elif first.lstrip().startswith("<"):
        pairs = _trec_topics(lines)
    else:
        pairs = _tsv_queries(lines)
    queries: Queries = {}
    for number, query, text in pairs:
        if query in queries:
            lines.fail(number, f"query {query!r} stands in this file twice")
        queries[query] = text
    if not queries:
        raise NanochatError(f"{lines.path} holds no query")
    return queries


def read_qrels(path: str | Path) -> Judgements:
    """Judgements of a file: TREC (`query 0 document grade`), BEIR's TSV (`query <tab> document <tab> grade`, with or
    without a heading), Cranfield's, when the name begins with cranqrel (see `cranfield_grade`), or our JSONL with
    `gold`. Raises NanochatError for a document judged twice for a query with different grades, an empty file and what
    is none of these."""
    lines = _Lines(path)
    if lines.first().startswith("{"):
        judged = _jsonl_gold(lines)
    else:
        judged = _qrels_columns(lines, cranfield=lines.path.name.startswith("cranqrel"))
    qrels: Judgements = {}
    for number, query, document, grade in judged:
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            lines.fail(number, f"document {document!r} has two different grades for query {query!r}")
    if not qrels:
        raise NanochatError(f"{lines.path} holds no relevance judgement")
    return qrels


def _text_field(lines: _Lines, number: int, record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of the named fields that the record has, which must hold a text (or, for an id, a whole number)."""
    name = next((name for name in names if name in record), None)
    if name is None:
        found = ", ".join(map(repr, record)) or "nothing"
        lines.fail(number, f"no field {' or '.join(map(repr, names))}, only {found}")
    value = record[name]
    if names is ID_FIELDS and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        lines.fail(number, f"field {name!r} must be a text, not {type(value).__name__}")
    return value


def _jsonl_queries(lines: _Lines) -> Iterator[tuple[int, str, str]]:
    for number, record in lines.objects():
        yield number, _text_field(lines, number, record, ID_FIELDS), _text_field(lines, number, record, TEXT_FIELDS)


def _jsonl_gold(lines: _Lines) -> Iterator[tuple[int, str, str, int]]:
    for number, record in lines.objects():
        query, gold = _text_field(lines, number, record, ID_FIELDS), record.get("gold", [])
        if isinstance(gold, list) and all(isinstance(document, str) for document in gold):
            gold = dict.fromkeys(gold, 1)
        if not isinstance(gold, dict) or not all(type(grade) is int for grade in gold.values()):
            lines.fail(number, "field 'gold' must be a list of document ids or an object {document id: whole number}")
        for document, grade in gold.items():
            yield number, query, document, grade


def _tsv_queries(lines: _Lines) -> Iterator[tuple[int, str, str]]:
    for number, line in lines:
        if not line.strip():
            continue
        query, tab, text = line.partition("\t")
        if not tab or not query.strip():
            lines.fail(number, "expected JSON, TREC topics, Cranfield queries, or 'id<tab>text'")
        yield number, query.strip(), text.strip()


def _qrels_columns(lines: _Lines, cranfield: bool) -> Iterator[tuple[int, str, str, int]]:
    """Lines of four columns (TREC) or of three (BEIR, Cranfield); tabs part them where there are any."""
    for number, line in lines:
        if not line.strip():
            continue
        columns = [c.strip() for c in line.split("\t")] if "\t" in line else line.split()
        if len(columns) == 4:
            del columns[1]  # TREC's iteration, which nobody uses
        if len(columns) != 3:
            lines.fail(number, f"expected 'query 0 document grade' or 'query document grade', not {line[:60]!r}")
        query, document, grade = columns
        if number == 1 and not re.fullmatch(r"[+-]?\d+", grade):
            continue  # BEIR's heading
        if not re.fullmatch(r"[+-]?\d+", grade):
            lines.fail(number, f"grade {grade!r} is not a whole number")
        value = cranfield_grade(int(grade)) if cranfield else int(grade)
        if value is None:
            lines.fail(number, f"Cranfield has the relevance codes 1 to 5 and -1, not {grade}")
        yield number, query, document, value


# ------------------------------------------------------------------------------------------------------------- TREC


def _trec_topics(lines: _Lines) -> Iterator[tuple[int, str, str]]:
    """`<top> <num> Number: 301 <title> text … </top>`, with or without closing tags; the title is the query."""
    topic: dict[str, list[str]] | None = None
    started, field = 0, ""
    for number, line in lines:
        at = 0
        for tag in [*_TAG.finditer(line), None]:
            if topic is not None and field:
                topic.setdefault(field, []).append(line[at : tag.start() if tag else len(line)])
            if tag is None:
                break
            at, name = tag.end(), tag[2].lower()
            if name in ("top", "topic") and not tag[1]:
                if topic is not None:
                    lines.fail(number, f"<top> inside the topic of line {started}: </top> is missing")
                topic, started, field = {}, number, ""
                attribute = re.search(r"number\s*=\s*[\"']([^\"']+)", tag[0])
                if attribute:
                    topic["num"] = [attribute[1]]
            elif name in ("top", "topic"):
                if topic is None:
                    lines.fail(number, "</top> without <top>")
                yield started, *_topic(lines, started, topic)
                topic, field = None, ""
            else:
                field = "" if tag[1] else {"query": "title", "number": "num"}.get(name, name)
    if topic is not None:
        lines.fail(started, "this <top> has no </top>")


def _topic(lines: _Lines, number: int, topic: Mapping[str, list[str]]) -> tuple[str, str]:
    texts = _joined(topic)
    query = re.sub(r"^number:\s*", "", texts.get("num", ""), flags=re.IGNORECASE)
    title = re.sub(r"^topic:\s*", "", texts.get("title", ""), flags=re.IGNORECASE)
    if not query or "title" not in texts:
        lines.fail(number, "a topic needs <num> and <title>")
    return query, title


def read_trec_run(path: str | Path) -> dict[str, dict[str, float]]:
    """`{query: {document: score}}` of a TREC run (`query Q0 document rank score tag`)."""
    lines = _Lines(path)
    run: dict[str, dict[str, float]] = {}
    for number, line in lines:
        columns = line.split()
        if not columns:
            continue
        if len(columns) not in (5, 6):
            lines.fail(number, f"expected 'query Q0 document rank score tag', not {len(columns)} columns")
        query, _, document, _, score = columns[:5]
        try:
            value = float(score)
        except ValueError:
            lines.fail(number, f"score {score!r} is not a number")
        if value != value:
            lines.fail(number, "the score is not a number")
        if run.setdefault(query, {}).setdefault(document, value) is not value:
            lines.fail(number, f"document {document!r} stands twice under query {query!r}")
    return run


def write_trec_run(path: str | Path, run: Run, tag: str = "nanochat") -> None:
    """Write a run for trec_eval. Rankings without scores get falling ones. Raises NanochatError for an id with white
    space, which the format cannot hold."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            for query, ranking in run.items():
                documents = ranked(ranking)
                for rank, document in enumerate(documents, 1):
                    if len(f"{query} {document}".split()) != 2 or not (query and document):
                        raise NanochatError(f"a TREC run cannot hold ids with white space: {query!r}, {document!r}")
                    score = ranking[document] if isinstance(ranking, Mapping) else len(documents) - rank + 1
                    file.write(f"{query} Q0 {document} {rank} {score!r} {tag}\n")
    except OSError as error:
        raise NanochatError(f"cannot write {path}: {error.strerror or error}") from error


# -------------------------------------------------------------------------------------------------- whole collections


def beir(directory: str | Path, split: str = "test") -> Collection:
    """A BEIR folder: `corpus.jsonl` (_id, title, text), `queries.jsonl`, `qrels/<split>.tsv`. Only the judged queries
    of the split are kept."""
    folder = Path(directory)
    qrels = read_qrels(folder / "qrels" / f"{split}.tsv")
    queries = read_queries(folder / "queries.jsonl")
    missing = next((query for query in qrels if query not in queries), None)
    if missing is not None:
        raise NanochatError(f"{folder / 'queries.jsonl'} lacks query {missing!r}, which qrels/{split}.tsv judges")
    return Collection(_Corpus(folder / "corpus.jsonl"), {query: queries[query] for query in qrels}, qrels)


class _Corpus:
    """BEIR's documents, streamed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Document]:
        lines = _Lines(self.path)
        for number, record in lines.objects():
            title, metadata = record.get("title") or "", record.get("metadata") or {}
            if not isinstance(title, str) or not isinstance(metadata, dict):
                lines.fail(number, "field 'title' must be a text and 'metadata' an object")
            document = _text_field(lines, number, record, ID_FIELDS)
            yield Document(document, _text_field(lines, number, record, ("text", "content")), title, metadata=metadata)


def cranfield(directory: str | Path) -> Collection:
    """The Cranfield collection (Cleverdon 1967) as its folder holds it: `cran.all.1400`, `cran.qry`, `cranqrel`.

    Queries are numbered 1, 2, … in file order, as cranqrel counts them; the numbers after `.I` in cran.qry are others.
    An abstract begins by repeating its title, which is left out of the content, so that no word counts three times."""
    folder = Path(directory)
    documents = []
    for _, number, fields in _smart(_Lines(folder / "cran.all.1400")):
        title, text = fields.get("T", ""), fields.get("W", "")
        content = text[len(title) :].lstrip() if title and text.startswith(title) else text
        metadata = {name: fields[key] for name, key in (("authors", "A"), ("published", "B")) if fields.get(key)}
        documents.append(Document(number, content, title, source="cran.all.1400", metadata=metadata))
    return Collection(documents, read_queries(folder / "cran.qry"), read_qrels(folder / "cranqrel"))


def cranfield_grade(code: int) -> int | None:
    """The grade of a relevance code in cranqrel, where 1 is the best ("a complete answer") and 4 the least ("minimum
    interest"), and 5 means irrelevant: 1 for each of 1 to 4, since published figures take them alike; taken for a grade
    the code would turn the order around. The widespread copies with -1 say it of the papers that the questions arose
    from, which other copies give a 1. None for another number."""
    return {-1: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 0}.get(code)


def _smart(lines: _Lines) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Records of the SMART format: line of `.I`, the number given there, and texts by letter, lines joined by spaces.

    The text (`.W`) comes last and runs to the next numbered `.I`: Cranfield's documents 240, 576 and 578 have stray
    `.A`, `.B` and `.W` in theirs, document 470 a stray `.I`."""
    started, record, field = 0, "", ""
    fields: dict[str, list[str]] = {}
    for number, line in lines:
        mark = line.rstrip()
        if re.fullmatch(r"\.I\s*\d+", mark):
            if started:
                yield started, record, _joined(fields)
            started, record, field, fields = number, mark[2:].strip(), "", {}
        elif re.fullmatch(r"\.[A-Z]", mark):
            if field != "W":
                field = mark[1]
        elif mark:
            if not started or not field:
                lines.fail(number, f"expected '.I number' and a field such as '.W' before {mark[:40]!r}")
            fields.setdefault(field, []).append(mark)
    if started:
        yield started, record, _joined(fields)


def _joined(fields: Mapping[str, list[str]]) -> dict[str, str]:
    return {name: " ".join(" ".join(parts).split()) for name, parts in fields.items()}


def hotpotqa(path: str | Path) -> Collection:
    """HotpotQA questions in JSONL (Yang et al. 2018): all their paragraphs as one collection, by title, which is the
    document's id too. The judged documents of a question are those that hold its supporting facts."""
    lines = _Lines(path)
    documents: dict[str, Document] = {}
    queries: Queries = {}
    qrels: Judgements = {}
    for number, record in lines.objects():
        query = _text_field(lines, number, record, ID_FIELDS)
        if query in queries:
            lines.fail(number, f"question {query!r} stands in this file twice")
        queries[query] = _text_field(lines, number, record, ("question",))
        try:
            for title, sentences in record["context"]:
                documents.setdefault(title, Document(title, "".join(sentences).strip(), title, source="hotpotqa"))
            qrels[query] = dict.fromkeys((title for title, _ in record["supporting_facts"]), 1)
        except (KeyError, TypeError, ValueError) as error:
            lines.fail(number, f"'context' and 'supporting_facts' must be lists of pairs, title first: {error}")
    return Collection(list(documents.values()), queries, qrels)
