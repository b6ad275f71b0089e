"""Retrieval over versioned knowledge bases: four retrievers, their indexes, embedders and metrics.

    from nanochat.retrieval import Document, KnowledgeBase
    kb = KnowledgeBase.create("kb", kind="bm25")
    kb.add([Document("moon", "The Moon has no air.")])
    kb.search("air on the moon", k=3)

The names below are imported at first use; nothing here imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY = {
    "Document": "document",
    "Hit": "document",
    "Retriever": "document",
    "KnowledgeBase": "knowledge_base",
    "RETRIEVERS": "retriever",
    "SimpleRetriever": "retriever",
    "BM25Retriever": "retriever",
    "DenseRetriever": "retriever",
    "HybridRetriever": "retriever",
}

__all__ = [
    "RETRIEVERS",
    "BM25Retriever",
    "DenseRetriever",
    "Document",
    "Hit",
    "HybridRetriever",
    "KnowledgeBase",
    "Retriever",
    "SimpleRetriever",
]

if TYPE_CHECKING:
    from nanochat.retrieval.document import Document, Hit, Retriever


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nanochat.retrieval' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(f"nanochat.retrieval.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
