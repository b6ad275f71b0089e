"""The knowledge bases of a server: directories below one root, opened once and shared by all requests."""

from __future__ import annotations

import os
import re
import shutil
import threading
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError
from nanochat.rag.knowledge import Knowledge
from nanochat.retrieval import KnowledgeBase
from nanochat.retrieval.document import Document, Embedder, Hit
from nanochat.retrieval.embed import DEFAULT, MINILM_PACKAGE, make_embedder
from nanochat.retrieval.manifest import NAME as MANIFEST
from nanochat.runtime import log
from nanochat.serving.errors import ApiError
from nanochat.serving.schema import NAME

MAX_BASES = 64
MAX_DOCUMENTS = 1_000_000  # of one knowledge base
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)$")  # names that Windows keeps for itself
NEEDED = ("tantivy", "faiss", "onnxruntime", "tokenizers", MINILM_PACKAGE)  # by the default kind


class Shelf:
    """Opens, makes and deletes knowledge bases by name. Threads may share it.

    root: their directory, made at the first need. embedder: of new ones ("": the default).
    """

    def __init__(self, root: Path, embedder: str = "") -> None:
        self.root, self._spec = root, embedder
        self._open: dict[str, KnowledgeBase] = {}
        self._embedders: dict[str, Embedder] = {}
        self._lock = threading.Lock()

    @property
    def default_kind(self) -> str:
        """hybrid where its packages are installed."""
        needed = NEEDED[:2] if self._spec else NEEDED
        return "hybrid" if all(find_spec(name) for name in needed) else "simple"

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if re.match(NAME, p.name) and (p / MANIFEST).is_file())

    def open(self, name: str) -> KnowledgeBase:
        """The newest version. Raises ApiError (404), NanochatError when it is damaged."""
        with self._lock:
            if not re.match(NAME, name) or not (self.root / name / MANIFEST).is_file():
                self._open.pop(name, None)
                raise ApiError(404, "there is no such knowledge base", code="not_found", param="knowledge_base")
            base = self._open.get(name)
            if base is None:
                base = self._open[name] = self._opened(name)
        base.refresh()
        return base

    def search(self, name: str, query: str, k: int, mode: str | None) -> list[Hit]:
        return self.open(name).search(query, k, mode=mode)

    def searcher(self, name: str, mode: str | None) -> Knowledge:
        """For GroundedChat. Raises ApiError (400) for an empty one."""
        base = self.open(name)
        if not len(base):
            raise ApiError(400, "the knowledge base holds no documents: upload some", param="retrieval.knowledge_base")
        return Knowledge(base, mode or "")

    def cards(self) -> list[dict[str, Any]]:
        """Of all; one that is damaged is left out, and the log says so."""
        found = []
        for name in self.names():
            try:
                found.append(self.card(name))
            except (NanochatError, ApiError) as error:
                log.warning("the knowledge base %s is left out: %s", name, error)
        return found

    def card(self, name: str) -> dict[str, Any]:
        """What clients learn of one."""
        base = self.open(name)
        return {
            "id": name,
            "object": "knowledge_base",
            "kind": base.kind,
            "modes": [base.kind] if base.kind != "hybrid" else ["hybrid", "bm25", "dense"],
            "documents": len(base),
            "version": base.version,
            "created": int(base.settings.get("created", 0)),
        }

    def create(self, name: str, kind: str | None) -> dict[str, Any]:
        """Raises ApiError (400, 409, 429)."""
        if RESERVED.match(name):
            raise ApiError(400, f"{name} is a name that some systems keep for themselves", param="name")
        if len(self.names()) >= MAX_BASES:
            raise ApiError(400, f"there are {MAX_BASES} knowledge bases already; delete one", code="too_many")
        chosen = kind or self.default_kind
        embedder = (self._spec or DEFAULT) if chosen in ("dense", "hybrid") else None
        try:
            (self.root / name).mkdir(parents=True)
        except FileExistsError:
            raise ApiError(409, "there is a knowledge base of this name already", code="exists", param="name") from None
        except OSError as error:
            raise NanochatError(f"cannot make {self.root / name}: {error.strerror}") from error
        try:
            KnowledgeBase.create(self.root / name, kind=chosen, embedder=embedder).close()
        except BaseException:
            shutil.rmtree(self.root / name, ignore_errors=True)
            raise
        return self.card(name)

    def delete(self, name: str) -> None:
        """Out of sight in one step; searches that run still have its files open. Raises ApiError (404)."""
        self.open(name)
        hidden = self.root / f".deleted-{uuid.uuid4().hex}"
        with self._lock:
            self._open.pop(name, None)
            try:
                os.replace(self.root / name, hidden)
            except FileNotFoundError:
                raise ApiError(404, "there is no such knowledge base", code="not_found") from None
            except OSError as error:
                raise NanochatError(f"cannot delete {self.root / name}: {error.strerror}") from error
        shutil.rmtree(hidden, ignore_errors=True)

    def embedder(self) -> Embedder:
        """That of new knowledge bases. Raises UsageError where its packages are missing."""
        with self._lock:
            return self._embedder(self._spec or DEFAULT)

    def close(self) -> None:
        with self._lock:
            for base in self._open.values():
                base.close()
            self._open.clear()

    def _opened(self, name: str) -> KnowledgeBase:
        base = KnowledgeBase.open(self.root / name)
        spec = (base.settings.get("embedder") or {}).get("spec")
        if spec is None:
            return base
        base.close()  # all share one embedder: its model is larger than most collections
        return KnowledgeBase.open(self.root / name, embedder=self._embedder(spec))

    def _embedder(self, spec: str) -> Embedder:
        if spec not in self._embedders:
            self._embedders[spec] = make_embedder(spec)
        return self._embedders[spec]


def citation(n: int, document: Document) -> dict[str, Any]:
    """A document as answers and searches show it."""
    shown = {"n": n, "id": document.id, "title": document.title, "source": document.source}
    return {**shown, "passage": document.content}
