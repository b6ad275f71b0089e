"""A knowledge base as RAG uses it: opened once, searched in one mode, refused with a clear error when it is empty."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nanochat.errors import UsageError
from nanochat.retrieval.document import Document, Hit

if TYPE_CHECKING:
    from nanochat.retrieval import KnowledgeBase


class Searcher(Protocol):
    """What chat and evaluation need of a knowledge base or retriever."""

    def search(self, queries: Sequence[str], k: int = 5) -> Sequence[Sequence[Hit]]: ...


class Library(Searcher, Protocol):
    """What training needs: documents by id too."""

    def get(self, id: str) -> Document: ...


class Knowledge:
    """A reader of a knowledge base with a fixed way to search."""

    def __init__(self, base: KnowledgeBase, mode: str = "") -> None:
        self.base, self.mode = base, mode or None

    def search(self, queries: Sequence[str], k: int = 5) -> list[list[Hit]]:
        return self.base.search(list(queries), k, mode=self.mode)

    def get(self, id: str) -> Document:
        """The whole document. Raises NanochatError when there is none."""
        return self.base.get(id)

    def __contains__(self, id: str) -> bool:
        return id in self.base


def open_knowledge(path: str | Path, mode: str = "") -> Knowledge:
    """Raises UsageError for an unknown mode or an empty knowledge base, NanochatError when it cannot be opened."""
    from nanochat.retrieval import KnowledgeBase

    base = KnowledgeBase.open(path)
    if not len(base):
        raise UsageError(f"the knowledge base {path} holds no documents: add some with `nanochat retrieval add`")
    return Knowledge(base, mode)


def check_searcher(knowledge: Any) -> None:
    """Raises UsageError for what cannot be searched, or has nothing to be found."""
    if not callable(getattr(knowledge, "search", None)):
        raise UsageError(
            f"expected a knowledge base, its path, or a retriever with `search`, got {type(knowledge).__name__}"
        )
    if isinstance(knowledge, Sized) and not len(knowledge):
        raise UsageError("the knowledge base holds no documents: add some, and ask then")


def hits_of(knowledge: Searcher, queries: Sequence[str], k: int) -> list[list[Hit]]:
    """What a search finds. Raises UsageError for a retriever of the user's that gives something else."""
    found = [list(hits) for hits in knowledge.search(queries, k)]
    if len(found) != len(queries) or not all(isinstance(hit, Hit) for hits in found for hit in hits):
        raise UsageError(
            f"{type(knowledge).__name__}.search must return a list of nanochat.retrieval.Hit for each of "
            f"{len(queries)} queries, got {found!r:.80}"
        )
    return found
