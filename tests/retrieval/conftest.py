"""What the tests of knowledge bases share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import call  # noqa: F401 - a fixture

from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase


class Letters:
    """An embedder for tests: counts of letters. It remembers what it embedded."""

    def __init__(self, name: str = "letters", dimension: int = 26) -> None:
        self.name, self.dimension = name, dimension
        self.embedded: list[str] = []
        self.fail_after = 10**9

    def embed(self, texts: list[str]) -> np.ndarray:
        if len(self.embedded) + len(texts) > self.fail_after:
            raise KeyboardInterrupt
        self.embedded += texts
        return self.embed_queries(texts)

    def embed_queries(self, texts: list[str]) -> np.ndarray:
        counts = np.zeros((len(texts), self.dimension), np.float32)
        for line, text in zip(counts, texts):
            for letter in text.lower():
                if "a" <= letter <= "z":
                    line[(ord(letter) - 97) % self.dimension] += 1
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def letters() -> type[Letters]:
    return Letters


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.create(tmp_path / "kb", kind="simple") as made:
        yield made


@pytest.fixture
def hybrid(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.create(tmp_path / "kb", embedder=Letters(), fusion="rrf") as made:
        moon = Document("moon", "The Moon has no air.", "The Moon", "book.txt", {"year": 1969, "tags": ["sky", "rock"]})
        sun = Document("sun", "The Sun is a hot star.", metadata={"year": 1919, "tags": ["sky"]})
        made.add([moon, sun, Document("../sea/..", "The sea is salt water.", metadata={"year": 1969})])
        yield made

if importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite"):
    from milvus_server import make, uri  # noqa: F401 - fixtures
