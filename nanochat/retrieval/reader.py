"""Reading a knowledge base: searching it, its documents and its versions. knowledge_base.py adds the changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanochat.errors import UsageError
from nanochat.retrieval import manifest, verification
from nanochat.retrieval.chunk import spans
from nanochat.retrieval.document import Document, Embedder, Hit, clean_text
from nanochat.retrieval.interface import SearchesPassages
from nanochat.retrieval.manifest import Version
from nanochat.retrieval.opening import (
    EmbedderLike,
    check_analyser,
    check_embedder,
    copy_files,
    failures,
    make_directory,
    open_view,
    writer_lock,
)
from nanochat.retrieval.prepare import passage_texts
from nanochat.retrieval.search import Query, run
from nanochat.retrieval.view import View

LOCK_TIMEOUT = 10.0  # seconds that a second writer waits
Opened = TypeVar("Opened", bound="Reader")


class Reader(SearchesPassages):
    """A knowledge base as `open` opens it, to be read."""

    def __init__(
        self,
        path: Path,
        view: View,
        embedder: Embedder | None = None,
        read_only: bool = False,
        pinned: bool = False,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.lock_timeout = lock_timeout
        self._view = view
        self._pinned = pinned  # a view of one version, which `refresh` leaves alone
        self._embedder = embedder
        self._lock = threading.RLock()  # held by a change from its beginning to its end
        self._refreshing = threading.Lock()
        self._closed = False

    # -- opening -------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls: type[Opened],
        path: str | Path,
        *,
        embedder: EmbedderLike | None = None,
        analyser: Any = None,
        version: int | str | None = None,
        read_only: bool = False,
        lock_timeout: float = LOCK_TIMEOUT,
        indexes: bool = True,
    ) -> Opened:
        """Open a knowledge base; with `version`, a number or a tag, a read-only view of it.

        The embedder is remembered by name, so that only one of your own must be given; another one than it was built
        with is an error, and so is another analyser. Where its indexes are damaged, `indexes=False` opens the documents
        alone, for `reindex`."""
        path = Path(path)
        settings = manifest.read(path).settings
        made = check_embedder(path, settings, embedder)
        check_analyser(path, settings, analyser)
        view = open_view(path, version, None, indexes)
        return cls(path, view, made, read_only or version is not None, version is not None, lock_timeout)

    def at(self: Opened, version: int | str) -> Opened:
        """A read-only view of a version, by number or tag. Close it when done."""
        self._check_open()
        view = open_view(self.path, version, None)
        return type(self)(self.path, view, self._embedder, read_only=True, pinned=True)

    def refresh(self) -> bool:
        """Move on to the newest version; whether there was a newer state.

        While another thread changes the documents through this object, which may take minutes, it is on the newest
        version and moves on by itself: nothing waits for the change."""
        self._check_open()
        if self._pinned:
            return False
        with self._refreshing:
            if not self._lock.acquire(blocking=False):
                return False
            try:
                if manifest.read(self.path).serial == self._view.manifest.serial:
                    return False
                self._view = open_view(self.path, None, self._view)
                return True
            finally:
                self._lock.release()

    def close(self) -> None:
        """Let go of the files; nothing can be done with it afterwards."""
        if not self._closed:
            self._closed = True
            self._view.close()

    def __repr__(self) -> str:
        version = self._view.version
        return f"<KnowledgeBase {self.path}: {self.kind}, version {version.number}, {version.documents:,} documents>"

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """simple, bm25, dense or hybrid."""
        return str(self._view.manifest.settings["kind"])

    @property
    def settings(self) -> dict[str, Any]:
        """What was fixed when it was created."""
        return dict(self._view.manifest.settings)

    @property
    def version(self) -> int:
        """The number of the version that is searched."""
        return self._view.version.number

    @property
    def embedder(self) -> Embedder:
        """The embedder of a dense or hybrid knowledge base; made at first use. Raises UsageError when it is one of
        your own that was not given."""
        if self._embedder is None:
            described = self._view.manifest.settings.get("embedder")
            if described is None:
                raise UsageError(f"a knowledge base of kind {self.kind!r} has no embedder")
            if described["spec"] is None:
                raise UsageError(
                    f"{self.path} was built with the embedder {described['name']!r} of your own: give it as `embedder`"
                )
            self._embedder = check_embedder(self.path, self._view.manifest.settings, described["spec"])
            assert self._embedder is not None
        return self._embedder

    def _answers(self, texts: Sequence[str], query: Query) -> list[list[Hit]]:
        self._check_open()
        return run(self._view, texts, query, lambda: self.embedder)

    def get(self, id: str) -> Document:
        """The whole document with this id. Raises UsageError when there is none."""
        self._check_open()
        found = self._view.known([clean_text(id)]) if isinstance(id, str) else {}
        if not found:
            raise UsageError(f"no document {id!r} in version {self.version} of {self.path}")
        [(segment, known)] = found.values()
        return segment.whole(known.row)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and bool(self._view.known([clean_text(id)]))

    def __len__(self) -> int:
        return self._view.version.documents

    def documents(self) -> Iterator[Document]:
        """All documents, whole, in the order in which they were added."""
        self._check_open()
        return self._view.documents()

    def passages(self, document: Document) -> list[str]:
        """The texts that this knowledge base would index and embed for a document."""
        settings = self._view.manifest.settings
        return passage_texts(document, spans(document.content, settings["chunk_words"], settings["overlap_words"]))

    def versions(self) -> list[Version]:
        """All versions that can be searched, oldest first, with their tags."""
        self._check_open()
        return self._view.manifest.version_list()

    def stats(self) -> dict[str, Any]:
        """Counts and sizes, as JSON values."""
        self._check_open()
        return verification.stats(self.path, self._view)

    def verify(self) -> list[str]:
        """Read every file and compare it with its checksum, and the files with each other: what is wrong, as
        sentences. Waits for a writer to end."""
        self._check_open()
        with writer_lock(self.path, self.lock_timeout, to_read=True):
            return verification.problems(self.path)

    @classmethod
    def load(cls: type[Opened], directory: str | Path) -> Opened:
        """`open`, by the name that retrievers give it."""
        return cls.open(directory)

    def save(self, directory: str | Path) -> None:
        """Copy what is there, with all versions, to a directory that is new or empty: a backup."""
        self._check_open()
        target = Path(directory)
        make_directory(target)
        with writer_lock(self.path, self.lock_timeout, to_read=True), failures(f"copying {self.path}"):
            copy_files(self.path, manifest.read(self.path), target)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"the knowledge base {self.path} was closed")
