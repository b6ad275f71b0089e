"""Documents from files: JSONL, one object a line, plain or gzipped; and text files, each a document (`text_files`).

    {"id": "moon", "title": "The Moon", "content": "It has no air.", "source": "book.txt", "metadata": {"year": 1969}}

`_id`, `doc_id` or `docid` serve as id; `text`, `contents` or `body` as content; `url` as source. What else a line holds
joins the metadata. Without an id the content's hash becomes it, so that the same line always makes the same document.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, permutations
from json.scanner import make_scanner
from pathlib import Path
from typing import IO, Any, cast

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Document, clean_text, document_hash
from nanochat.retrieval.text_files import TEXT_FILES, is_text_file, read_text_file

NAMES = {
    "id": ("id", "_id", "doc_id", "docid"),
    "content": ("content", "text", "contents", "body"),
    "title": ("title",),
    "source": ("source", "url"),
}
ON_ERROR = ("raise", "skip")
ADVICE = 'correct it, or skip such lines with --on-error skip (in Python: on_error="skip")'


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_SCAN: Callable[[str, int], tuple[Any, int]] = make_scanner(_DECODER)  # type: ignore[arg-type]  # it takes a decoder
_USUAL = frozenset(  # the orders in which files have the usual fields
    keys
    for n in range(4)
    for more in combinations(("title", "source", "metadata"), n)
    for id in ("id", "_id")
    for content in ("content", "text")
    for keys in permutations((id, content, *more))
)
_PLAIN = frozenset(("id", "title", "content", "source", "metadata"))


def read_documents(
    files: str | Path | Iterable[str | Path],
    on_error: str = "raise",
    skipped: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """The documents of one or several files, streamed.

    A line that is no document, or a text file that is no text, raises UsageError with file and line; with
    on_error="skip" it is left out and `skipped` is called with that message. `progress` is called with the number of
    bytes read, now and then."""
    if on_error not in ON_ERROR:
        raise UsageError(f"on_error={on_error!r}: choose from {', '.join(ON_ERROR)}")

    def refuse(where: str, error: Exception) -> None:
        if on_error == "raise":
            raise UsageError(f"{where}: {error}; {ADVICE}") from None
        if skipped:
            skipped(f"{where}: {error}")

    for path in file_list(files):
        if is_text_file(path):
            try:
                document = read_text_file(path)
                if document is not None:
                    yield document
                elif skipped:
                    skipped(f"{path}: there is no text in it")
            except ValueError as error:
                refuse(str(path), error)
            if progress:
                progress(path.stat().st_size)
            continue
        for number, line in enumerate(_lines(path, progress), 1):
            if not line.strip():
                continue
            try:
                yield parse(line)
            except (ValueError, RecursionError) as error:
                refuse(f"{path}, line {number}", error)


def places_of(id: str, paths: Iterable[Path]) -> Iterator[str]:
    """Where the files hold documents of this id: files are read again, since nobody keeps the places of millions."""
    for path in paths:
        if is_text_file(path):
            if path.as_posix() == id:
                yield str(path)
            continue
        for number, line in enumerate(_lines(path, None), 1):
            try:
                found = bool(line.strip()) and clean_text(parse(line).id) == id
            except (ValueError, RecursionError):
                continue
            if found:
                yield f"{path}, line {number}"


def file_list(files: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files named; a directory stands for the .jsonl and .jsonl.gz files in it or, where it has none, for all text
    files below it. Raises UsageError for none."""
    found: list[Path] = []
    for name in [files] if isinstance(files, str | Path) else files:
        path = Path(name)
        if not path.exists():
            raise UsageError(f"no such file: {path}")
        found += _inside(path) if path.is_dir() else [path]
    if not found:
        raise UsageError("no files of documents given")
    return found


def _inside(directory: Path) -> list[Path]:
    found = sorted(p for p in directory.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
    found = found or sorted(p for p in directory.rglob("*") if _is_shown_text(p, directory))
    if not found:
        raise UsageError(f"no .jsonl files in {directory}, and no {', '.join(TEXT_FILES)} files below it")
    return found


def _is_shown_text(path: Path, directory: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
    return is_text_file(path) and path.is_file() and not hidden


def parse(line: str | bytes) -> Document:
    """The document of a line. Raises ValueError, which says what is wrong with it."""
    try:
        text = line.decode().lstrip("\ufeff") if isinstance(line, bytes) else line
        try:
            record, end = _SCAN(text, 0)  # what `decode` does, in less than half of the time
            is_whole = text[end:] in ("", "\n")
        except StopIteration:
            is_whole = False
        if not is_whole:
            record = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({json_reason(error)})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a document must be a JSON object, not {type(record).__name__}")
    return from_record(record)


def json_reason(error: json.JSONDecodeError) -> str:
    """What is wrong with a text that should be JSON, and where: the column, and the line where it has several."""
    text, pos = error.doc.rstrip(), error.pos
    pos = min(pos, len(text))  # the end of a line is no line of its own
    line, column = text.count("\n", 0, pos) + 1, pos - text.rfind("\n", 0, pos)
    what = error.msg.rstrip(": ").removesuffix(" at")  # some messages end with "at", some with a colon
    if what == "Invalid control character" and pos == len(text):  # the end of the line itself
        what = "Unterminated string"
    return f"{what} at line {line}, column {column}" if "\n" in text else f"{what} at column {column}"


def from_record(record: dict[str, Any]) -> Document:
    """A document from such an object. Raises ValueError."""
    document = _usual(record)
    if document is not None:
        return document
    values: dict[str, str] = {}
    used = set()
    for field, names in NAMES.items():
        for name in names:
            if name in record:
                values[field] = _text(name, record[name], number=field == "id")
                used.add(name)
                break
    if "content" not in values:
        raise ValueError(f"no {' or '.join(NAMES['content'])} in it; it has {', '.join(map(str, record)) or 'nothing'}")
    metadata = record.get("metadata")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be an object, not {metadata!r}")
    if not used >= record.keys() - _PLAIN:
        metadata = {**{k: v for k, v in record.items() if k not in used and k != "metadata"}, **metadata}
    name = values.get("id") or _name_by_content(values, metadata)
    return Document(name, values["content"], values.get("title", ""), values.get("source", ""), metadata)


def _usual(record: dict[str, Any]) -> Document | None:
    """The document of a record with the usual fields and no other, as fast as can be."""
    keys = tuple(record)
    if keys not in _USUAL:
        return None
    get = record.get
    name, content = get("id") or get("_id"), get("content") or get("text")
    title, source, metadata = get("title", ""), get("source", ""), get("metadata")
    if not type(name) is type(content) is type(title) is type(source) is str:
        return None
    if metadata is None:
        return Document(name, content, title, source)
    return Document(name, content, title, source, metadata) if type(metadata) is dict else None


def _text(name: str, value: Any, number: bool) -> str:
    if value is None:
        return ""
    if number and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {value!r:.60}")
    return value


def _name_by_content(values: dict[str, str], metadata: dict[str, Any]) -> str:
    clean = {key: clean_text(value) for key, value in values.items()}
    return document_hash(Document("", clean["content"], clean.get("title", ""), "", metadata)).hex()


def _lines(path: Path, progress: Callable[[int], None] | None) -> Iterator[bytes]:
    """Raises NanochatError when the file cannot be read to its end."""
    try:
        with open(path, "rb") as raw:
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
            before = 0
            for number, line in enumerate(stream):
                yield line
                if progress and not number % 1000:
                    progress(raw.tell() - before)
                    before = raw.tell()
            if progress:
                progress(raw.tell() - before)
    except (OSError, EOFError, zlib.error) as error:
        raise NanochatError(f"cannot read {path}: {error}") from error
