"""Documents on their way into the store: checked, hashed, and cut into passages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from nanochat.errors import UsageError
from nanochat.retrieval.chunk import Span
from nanochat.retrieval.document import Document, clean_text, content_hash, metadata_json
from nanochat.retrieval.store import hash_id

AT_ONCE = 2000  # documents handled together
CHARACTERS_AT_ONCE = 8_000_000


class Ready(NamedTuple):
    """A document that was checked."""

    document: Document
    id_hash: bytes
    hash: bytes
    metadata: str


def passage_texts(document: Document, cuts: Sequence[Span]) -> list[str]:
    """What indexes and embedders see of a document that is cut so."""
    if len(cuts) == 1:
        return [document.text]
    head = f"{document.title}\n" if document.title else ""
    return [head + document.content[start:end] for start, end in cuts]


def pieces(row: int, content: str, cuts: Sequence[Span]) -> list[tuple[int, int, int, str]]:
    """Rows of the table of passages: each holds the content up to where the next passage starts."""
    starts = [0, *(start for start, _ in cuts[1:]), len(content)]
    return [(row + i, *cut, content[starts[i] : starts[i + 1]]) for i, cut in enumerate(cuts)]


def slices(documents: Iterable[Document]) -> Iterator[list[Document]]:
    part: list[Document] = []
    size = 0
    for document in documents:
        part.append(document)
        size += len(getattr(document, "content", None) or ())
        if len(part) >= AT_ONCE or size >= CHARACTERS_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def check_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{what} must be a text, not {value!r:.60}")
    return value


def check(document: Document) -> Ready:
    """The document with what the store needs. Raises UsageError for what cannot be stored."""
    if not isinstance(document, Document):
        raise UsageError(f"a knowledge base holds Document records, not {type(document).__name__}")
    if not isinstance(document.id, str) or not document.id:
        raise UsageError(f"a document's id must be a text that is not empty, not {document.id!r:.60}")
    try:
        id_hash = hash_id(document.id)
    except UnicodeEncodeError:
        raise UsageError(f"the document id {document.id!r:.60} holds half a character (a lone surrogate)") from None
    if not type(document.content) is type(document.title) is type(document.source) is str:
        for name in ("content", "title", "source"):
            check_text(getattr(document, name), f"the {name} of document {document.id!r:.60}")
    try:
        metadata = metadata_json(document.metadata) if document.metadata else ""
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the metadata of document {document.id!r:.60} is not JSON: {error}") from None
    try:
        if document.source:
            document.source.encode()
        # content_hash(title, content, metadata), but in a third of the time
        title, content = document.title, document.content
        text = f"{len(title)},{len(content)},{len(metadata)}:{title}{content}{metadata}"
        hash = blake2b(text.encode(), digest_size=16).digest()
    except UnicodeEncodeError:
        metadata = clean_text(metadata)
        document = Document(
            document.id,
            clean_text(document.content),
            clean_text(document.title),
            clean_text(document.source),
            json.loads(metadata) if metadata else {},
        )
        hash = content_hash(document.title, document.content, metadata)
    return Ready(document, id_hash, hash, metadata)
