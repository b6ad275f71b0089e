"""A knowledge base as RAG uses it: opened once, searched in one mode, refused with a clear error when it is empty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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
