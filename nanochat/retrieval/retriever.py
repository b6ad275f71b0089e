"""The four retrievers by the names users know: thin over a knowledge base, in a directory or a temporary one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from nanochat.errors import UsageError
from nanochat.retrieval import hybrid, manifest
from nanochat.retrieval.document import Document, Filter, Hit, Reranker, Retriever
from nanochat.retrieval.interface import SearchesDocuments
from nanochat.retrieval.knowledge_base import KnowledgeBase
from nanochat.retrieval.search import AUTO, check_k


class StoredRetriever(SearchesDocuments):
    """A retriever over a knowledge base of its kind: the one at `path` (made there when there is none), or one in a
    temporary directory. `options` are those of `KnowledgeBase.create`."""

    kind: ClassVar[str]

    def __init__(self, path: str | Path | None = None, **options: Any) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="nanochat-kb-") if path is None else None
        place = Path(self._temporary.name if self._temporary is not None else str(path))
        if (place / manifest.NAME).exists():
            self.kb = _open(type(self), place, **options)
        else:
            self.kb = KnowledgeBase.create(place, kind=self.kind, **options)

    def _answers(self, texts: Sequence[str], k: int, filter: Filter | None) -> list[list[Hit]]:
        return self.kb.search(texts, k, filter)

    def add(self, documents: Iterable[Document]) -> Any:
        """See KnowledgeBase.add."""
        return self.kb.add(documents)

    def delete(self, ids: str | Iterable[str]) -> Any:
        """See KnowledgeBase.delete."""
        return self.kb.delete(ids)

    def __len__(self) -> int:
        return len(self.kb)

    def __bool__(self) -> bool:
        return True

    def save(self, directory: str | Path) -> None:
        """Copy the knowledge base, with its versions, to a directory that is new or empty."""
        self.kb.save(directory)

    @classmethod
    def load(cls, directory: str | Path, **options: Any) -> Any:
        """What `save` saved; changes go there. Raises UsageError when it is of another kind."""
        manifest.read(Path(directory))
        return cls(directory, **options)

    def close(self) -> None:
        """Let go of the files; a temporary knowledge base is deleted."""
        self.kb.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(kind: type[StoredRetriever], path: Path, **options: Any) -> KnowledgeBase:
    own = {"embedder", "analyser", "read_only", "lock_timeout"} & options.keys()
    kb = KnowledgeBase.open(path, **{name: options.pop(name) for name in own})
    settings = {**kb.settings, **kb.settings.get("fusion", {})}
    wrong = [name for name, value in options.items() if settings.get(name) != value]
    if kb.kind != kind.kind or wrong:
        kb.close()
        if kb.kind != kind.kind:
            raise UsageError(f"{path} is a knowledge base of kind {kb.kind}, not {kind.kind}")
        raise UsageError(f"{path} was made with another {wrong[0]}: leave it out, or choose another directory")
    return kb


class SimpleRetriever(StoredRetriever):
    """TF-IDF in numpy: for small collections, and to compare with."""

    kind = "simple"


class BM25Retriever(StoredRetriever):
    """BM25 over tantivy."""

    kind = "bm25"


class DenseRetriever(StoredRetriever):
    """Vectors of an embedder over FAISS."""

    kind = "dense"


class _StoredHybrid(StoredRetriever):
    kind = "hybrid"


class HybridRetriever(SearchesDocuments):
    """Several rankings fused, the best reranked (by feedback, which needs no model, unless told otherwise).

    HybridRetriever()                  BM25 and vectors over one knowledge base; options as for the other retrievers
    HybridRetriever([first, second])   any retrievers, each with its own documents; see hybrid.FusedRetriever"""

    def __init__(
        self,
        retrievers: Sequence[Retriever] | None = None,
        path: str | Path | None = None,
        *,
        reranker: Reranker | str | None = AUTO,
        **options: Any,
    ) -> None:
        self.inner: Any
        self.reranker: Reranker | str | None = reranker
        if retrievers is None:
            self.inner = _StoredHybrid(path, **options)
        elif path is not None:
            raise UsageError("a hybrid retriever is made of retrievers or kept at a path, not both")
        else:
            chosen = "feedback" if reranker == AUTO else reranker
            self.inner = hybrid.FusedRetriever(retrievers, reranker=chosen, **options)

    def _answers(self, texts: Sequence[str], k: int, filter: Filter | None) -> list[list[Hit]]:
        if isinstance(self.inner, StoredRetriever):
            return self.inner.kb.search(texts, k, filter, reranker=self.reranker)
        found: list[list[Hit]] = self.inner.search(texts, check_k(k), filter)
        return found

    def add(self, documents: Iterable[Document]) -> Any:
        """See KnowledgeBase.add; of several retrievers, what each of them answered."""
        return self.inner.add(documents)

    def delete(self, ids: str | Iterable[str]) -> Any:
        """See KnowledgeBase.delete; of several retrievers, what each of them answered."""
        return self.inner.delete(ids)

    def __len__(self) -> int:
        return len(self.inner if isinstance(self.inner, StoredRetriever) else self.inner.retrievers[0])

    def __bool__(self) -> bool:
        return True

    def save(self, directory: str | Path) -> None:
        """Save to a directory that is new or empty; the reranker is not saved."""
        self.inner.save(directory)

    @classmethod
    def load(cls, directory: str | Path, **options: Any) -> HybridRetriever:
        """What `save` saved."""
        if not (Path(directory) / hybrid.SAVED).exists():
            manifest.read(Path(directory))
            return cls(path=directory, **options)
        loaded = cls.__new__(cls)
        options.setdefault("reranker", "feedback")
        loaded.reranker, loaded.inner = AUTO, hybrid.FusedRetriever.load(directory, **options)
        return loaded

    def close(self) -> None:
        """Let go of the files."""
        for one in (self.inner,) if isinstance(self.inner, StoredRetriever) else self.inner.retrievers:
            if hasattr(one, "close"):
                one.close()

    def __enter__(self) -> HybridRetriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


RETRIEVERS: dict[str, Any] = {
    "simple": SimpleRetriever,
    "bm25": BM25Retriever,
    "dense": DenseRetriever,
    "hybrid": HybridRetriever,
}
