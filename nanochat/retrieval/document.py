"""The records of retrieval (Document, Hit) and the protocols that its parts meet through: Index, Embedder, Reranker,
Retriever.

Inside the room a *passage* (a document, or a piece of a long one) is known by its *row*: a number that is given once
and never reused. Indexes know rows and texts only; ids, versions and metadata stay in the knowledge base's store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, overload, runtime_checkable

import numpy as np

Filter: TypeAlias = Mapping[str, Any]  # see filters.py
Settings: TypeAlias = Mapping[str, Any]  # of an index: JSON values, stored with it


@dataclass(frozen=True, slots=True)
class Document:
    """A text with an id. `metadata` holds JSON values; filters see its scalars and lists of scalars.

    `span` is set on passages of a document that was cut: the characters [start, end) of the source document's content.
    """

    id: str
    content: str
    title: str = ""
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    span: tuple[int, int] | None = None

    @property
    def text(self) -> str:
        """What indexes and embedders see: the title on a line of its own, then the content."""
        return f"{self.title}\n{self.content}" if self.title else self.content


@dataclass(frozen=True, slots=True)
class Hit:
    """A document found for a query: `rank` counts from 1; `score` is higher for better, its scale is the index's."""

    id: str
    score: float
    rank: int
    document: Document


class Found(NamedTuple):
    """What an index found for one query, before documents are fetched."""

    rows: np.ndarray  # (n <= k,) int64, best first; of equal scores the lower row first
    scores: np.ndarray  # (n,) float32

    @classmethod
    def none(cls) -> Found:
        return cls(np.empty(0, np.int64), np.empty(0, np.float32))


class Batch(NamedTuple):
    """Passages on their way into an index."""

    rows: np.ndarray  # (n,) int64, ascending
    texts: list[str]
    vectors: np.ndarray | None = None  # (n, d) float32, unit vectors, for dense indexes


class Index(Protocol):
    """Data derived from numbered passages, in one directory whose files never change once they are written."""

    kind: ClassVar[str]  # "simple", "bm25", "dense"
    n_rows: int

    @classmethod
    def write(
        cls,
        directory: Path,
        settings: Settings,
        batches: Iterable[Batch],
        base: Path | None = None,
        drop: np.ndarray | None = None,
    ) -> None:
        """Make `directory` (it must not exist): what `base`, an earlier directory of this kind, holds, minus the rows
        in `drop`, plus the batches, whose rows are ascending and greater than all of the base. Files of the base are
        hard-linked or copied, never changed. Batches stream: memory stays bounded. Plain files only, fsynced. When
        interrupted it leaves a directory that the caller deletes."""

    @classmethod
    def open(cls, directory: Path, settings: Settings) -> Index:
        """Read-only and memory-mapped; several threads and processes may search it."""

    def search(self, queries: Sequence[Any], k: int, allowed: np.ndarray | None = None) -> list[Found]:
        """The best `k` rows for each query: a text, or for dense indexes a row of an (n, d) float32 array.

        `allowed` (sorted int64 rows) restricts the answer to exactly the best among them. A query without any known
        word finds nothing, and k may exceed the number of rows."""

    def close(self) -> None: ...


class Embedder(Protocol):
    """Texts to unit vectors. A knowledge base stores the name and refuses to open with another one."""

    name: str
    dimension: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Documents as (n, dimension) float32 of unit length; zeros for a text without any word."""

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Queries, in the same form; most embedders treat both alike."""


class Reranker(Protocol):
    """Judges query and document together; higher is better."""

    name: str

    def scores(self, query: str, documents: Sequence[Document]) -> Sequence[float]: ...


@runtime_checkable
class Retriever(Protocol):
    """Finds documents for a text. One query gives one list of hits, several give a list for each."""

    @overload  # a text is a sequence of texts too, and comes first
    def search(  # type: ignore[overload-overlap]
        self, queries: str, k: int = 5, filter: Filter | None = None
    ) -> list[Hit]: ...
    @overload
    def search(self, queries: Sequence[str], k: int = 5, filter: Filter | None = None) -> list[list[Hit]]: ...

    def add(self, documents: Iterable[Document]) -> Any: ...

    def delete(self, ids: str | Iterable[str]) -> Any: ...

    def save(self, directory: str | Path) -> None: ...

    @classmethod
    def load(cls, directory: str | Path) -> Retriever: ...


def content_hash(*texts: str) -> bytes:
    """16 bytes that two lists of texts share only when they are equal: blake2b over their lengths and UTF-8.

    Raises UnicodeEncodeError on lone surrogates; `clean_text` comes first."""
    lengths = ",".join(map(str, map(len, texts)))
    return blake2b(f"{lengths}:{''.join(texts)}".encode(), digest_size=16).digest()


def document_hash(document: Document) -> bytes:
    """The hash by which duplicates are known: title, content and metadata, whatever the id and the source."""
    return content_hash(document.title, document.content, metadata_json(document.metadata))


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """Metadata as the JSON that is stored: keys sorted, no NaN. Raises TypeError or ValueError on what is no JSON."""
    if not metadata:
        return ""
    return json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def clean_text(text: str) -> str:
    """The text with each lone surrogate (half a character, which no UTF-8 file can hold) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
