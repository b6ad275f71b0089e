"""What local and Milvus knowledge bases, and all retrievers, have in common: how `search` is called, and ingestion."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from tqdm import tqdm

from nanochat.errors import UsageError
from nanochat.retrieval.document import Document, Filter, Hit, Reranker, clean_text
from nanochat.retrieval.jsonl import file_list, places_of, read_documents
from nanochat.retrieval.search import AUTO, Query, normalized
from nanochat.retrieval.writer import Change, Refused, SameId

Entered = TypeVar("Entered")


class SearchesPassages(ABC):
    """A knowledge base that is read: one text gives one list of hits, several give a list for each."""

    @overload  # a text is a sequence of texts too, and comes first
    def search(  # type: ignore[overload-overlap]
        self,
        queries: str,
        k: int = 5,
        filter: Filter | None = None,
        *,
        mode: str | None = None,
        normalize: bool | str = False,
        unique: bool = False,
        reranker: Reranker | str | None = AUTO,
        candidates: int | None = None,
    ) -> list[Hit]: ...
    @overload
    def search(
        self,
        queries: Sequence[str],
        k: int = 5,
        filter: Filter | None = None,
        *,
        mode: str | None = None,
        normalize: bool | str = False,
        unique: bool = False,
        reranker: Reranker | str | None = AUTO,
        candidates: int | None = None,
    ) -> list[list[Hit]]: ...
    def search(
        self, queries: str | Sequence[str], k: int = 5, filter: Filter | None = None, **options: Any
    ) -> list[Hit] | list[list[Hit]]:
        """The best `k` passages for a query, or a list of them for each of several.

        `filter`: see filters.py. `mode`: which index of a hybrid one to ask (default: all of them). `normalize`:
        scores from 0 to 1 ("minmax", "max" or "rank"; True is "minmax"). `unique`: only the best passage of each
        document. `reranker` (a Reranker, a name as in rerank.make_reranker, or None) judges the best `candidates`
        (default: as many as it says; k, if that is more) again; by default hybrid searches have feedback, the others
        none."""
        query = Query(k, filter, **options)
        if isinstance(queries, str):
            return self._answers([queries], query)[0]
        return self._answers(_several(queries), query)

    @abstractmethod
    def _answers(self, texts: Sequence[str], query: Query) -> list[list[Hit]]:
        """The hits for each text."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what it holds."""

    def __bool__(self) -> bool:
        return True  # an empty knowledge base is one

    def __enter__(self: Entered) -> Entered:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SearchesDocuments(ABC):
    """A retriever: `search` takes one text or several."""

    @overload  # a text is a sequence of texts too, and comes first
    def search(  # type: ignore[overload-overlap]
        self, queries: str, k: int = 5, filter: Filter | None = None, *, normalize: bool | str = False
    ) -> list[Hit]: ...
    @overload
    def search(
        self, queries: Sequence[str], k: int = 5, filter: Filter | None = None, *, normalize: bool | str = False
    ) -> list[list[Hit]]: ...
    def search(
        self,
        queries: str | Sequence[str],
        k: int = 5,
        filter: Filter | None = None,
        *,
        normalize: bool | str = False,
    ) -> list[Hit] | list[list[Hit]]:
        """The best `k` passages for a query, or a list of them for each of several. `normalize`: scores from 0 to 1
        ("minmax", "max" or "rank"; True is "minmax")."""
        if isinstance(queries, str):
            return normalized(self._answers([queries], k, filter), normalize)[0]
        return normalized(self._answers(_several(queries), k, filter), normalize)

    @abstractmethod
    def _answers(self, texts: Sequence[str], k: int, filter: Filter | None) -> list[list[Hit]]:
        """The hits for each text."""


def _several(queries: Any) -> Sequence[str]:
    """Raises UsageError for what are no texts."""
    if isinstance(queries, bytes | Mapping) or not isinstance(queries, Iterable):
        raise UsageError(f"a query must be a text, or a list of texts, not {queries!r:.60}")
    return list(queries)


def ingest_files(
    files: str | Path | Iterable[str | Path],
    on_error: str,
    commit_every: int,
    progress: bool,
    version: int,
    commit: Callable[[Iterator[Document], list[Path]], Change],
) -> Change:
    """Give the documents of JSONL files to `commit`, `commit_every` at a time, with a progress bar over their bytes.
    `version`: the one before. Raises UsageError for a commit_every below 1."""
    if commit_every < 1:
        raise UsageError(f"commit_every must be 1 or more, not {commit_every}")
    paths = file_list(files)
    skipped: list[str] = []
    total = Change(version)
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=size, unit="B", unit_scale=True, desc="ingest", disable=not progress) as bar:

        def advance(n_bytes: int) -> None:
            bar.update(n_bytes)

        stream = read_documents(paths, on_error, skipped.append, advance)
        try:
            while (first := next(stream, None)) is not None:
                total = total + commit(itertools.chain([first], itertools.islice(stream, commit_every - 1)), paths)
        except Refused as error:
            raise UsageError(_with_places(error, paths)) from None
    return total + Change(total.version, skipped=len(skipped))


def _with_places(error: Refused, paths: Sequence[Path]) -> str:
    """The error with the places of the documents in the files."""
    first, second = [*itertools.islice(places_of(error.name, paths), 2), "", ""][:2]
    if not second or not isinstance(error, SameId):
        return f"{first}: {error}" if first else str(error)
    return (
        f"{second}: document {error.name!r} stands at {first} too, with other content: give one of them another id, or "
        "leave one out"
    )


def tag_name(name: str) -> str:
    """The name of a tag as it is stored. Raises UsageError for what could be a version's number."""
    if not isinstance(name, str) or not name or name.isdigit():
        raise UsageError(f"a tag is a text that is no number, not {name!r}")
    return clean_text(name)
