"""KnowledgeBase: documents that can be searched, in a directory, with versions.

    kb/manifest.json        what there is, and the commit point (manifest.py); manifest.backup.json is the one before
    kb/seg-000012-0/        documents (store.py)
    kb/gen-000012/bm25/     indexes (generation.py)
    kb/removed-000012.npy   which passages which version removed (removed.py)
    kb/vectors.staged       vectors of an ingestion that did not come to its end (staging.py)
    kb/writer.lock          held by the one writer

One process writes at a time; any number read, without locks, each its own version until `refresh`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import UsageError
from nanochat.retrieval import compaction, generation, manifest
from nanochat.retrieval.document import Document, Embedder, content_hash
from nanochat.retrieval.interface import ingest_files, tag_name
from nanochat.retrieval.manifest import Manifest, Version
from nanochat.retrieval.opening import (
    EmbedderLike,
    analyser_settings,
    check_new,
    describe_embedder,
    embedder_of,
    failures,
    make_directory,
    new_settings,
    writer_lock,
)
from nanochat.retrieval.reader import LOCK_TIMEOUT, Reader
from nanochat.retrieval.staging import Staging
from nanochat.retrieval.view import View
from nanochat.retrieval.writer import Change, Writer

COMMIT_EVERY, COMMIT_EMBEDDED = 1_000_000, 100_000  # documents of an ingestion
INDEXES = generation.INDEXES
KINDS = generation.KINDS


class KnowledgeBase(Reader):
    """Made by `create`, opened by `open`. A context manager; `close` lets go of its files.

    Threads may share one for searching. Raises UsageError for wrong arguments, NanochatError for what goes wrong."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        kind: str = "hybrid",
        embedder: EmbedderLike | None = None,
        analyser: Any = None,
        chunk_words: int = 200,
        overlap_words: int = 40,
        fusion: str = "weighted",
        weights: Sequence[float] | None = None,
        depth: int = 100,
        index: dict[str, Any] | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> KnowledgeBase:
        """Make an empty knowledge base in a directory that is new or empty.

        `kind`: simple, bm25, dense or hybrid. `embedder` (dense, hybrid): one, or what `make_embedder` makes it of.
        `analyser` (simple, bm25, hybrid): see Analyser.of. Documents of more than `chunk_words` words are cut into
        passages that overlap by `overlap_words`; 0 keeps them whole. A hybrid fuses the best `depth` of both indexes
        by `fusion` ("weighted" or "rrf") and `weights`. `index` holds further settings for the indexes."""
        path = Path(path)
        options = {"kind": kind, "chunk_words": chunk_words, "overlap_words": overlap_words, "index": dict(index or {})}
        fused = {"fusion": fusion, "weights": list(weights) if weights else None, "depth": depth}
        settings, made = new_settings(options, analyser, embedder, fused)
        make_directory(path)
        with writer_lock(path, lock_timeout), failures(f"creating {path}"):
            check_new(path)
            manifest.commit(path, Manifest(settings=settings, versions=(Version(0, time.time(), "created", 0, 0),)))
        return cls.open(path, embedder=made, lock_timeout=lock_timeout)

    # -- changing ------------------------------------------------------------------------------------------------------

    def add(self, documents: Iterable[Document], on_duplicate: str = "skip", on_error: str = "raise") -> Change:
        """Add documents, all of them or none; one that is there already with the same content is left as it is.

        A document with the title, content and metadata of another one is left out (on_duplicate="skip"), stored
        ("keep"), or an error ("raise"). An id that is there with other content is an error: use `update`. With
        on_error="skip" bad documents are counted and left out."""
        return self._change(documents, False, on_duplicate, on_error)

    def update(self, documents: Iterable[Document], on_error: str = "raise") -> Change:
        """Add documents; where the id is there, replace its document. Of equal ids the last one counts."""
        return self._change(documents, True, "keep", on_error)

    def delete(self, ids: str | Iterable[str]) -> Change:
        """Delete documents by their ids; those that are not there count as unchanged."""
        names = [ids] if isinstance(ids, str) else list(ids)
        with self._writing() as writer:
            writer.remove(names)
            if writer.counts["deleted"]:
                writer.write((), False)
            return self._commit(writer, _note("delete", writer))

    def ingest(
        self,
        files: str | Path | Iterable[str | Path],
        on_error: str = "raise",
        commit_every: int | None = None,
        progress: bool = True,
        update: bool = False,
        on_duplicate: str = "skip",
    ) -> Change:
        """Add the documents of JSONL files (jsonl.py), a version for every `commit_every` of them (by default a
        million, or 100,000 where they are embedded, which takes longer than all else).

        When it was interrupted, call it again: what is there counts as unchanged, and vectors that were computed are
        used. With `update` documents replace those of the same id."""
        if commit_every is None:
            commit_every = COMMIT_EMBEDDED if "embedder" in self.settings else COMMIT_EVERY

        def commit(documents: Iterator[Document], paths: list[Path]) -> Change:
            names = f"ingest {', '.join(path.name for path in paths[:3])}"
            return self._change(documents, update, on_duplicate, on_error, names)

        return ingest_files(files, on_error, commit_every, progress, self.version, commit)

    def tag(self, name: str, version: int | str | None = None) -> None:
        """Name a version (default: the newest), or move a name. `compact` keeps tagged versions."""
        name = tag_name(name)
        with self._writing() as writer:
            now = writer.manifest
            tags = {**now.tags, name: now.find(now.newest.number if version is None else version).number}
            self._replace(now, tags=tags)

    def untag(self, name: str) -> None:
        """Take a name away. Raises UsageError when there is none such."""
        with self._writing() as writer:
            now = writer.manifest
            now.find(name)
            self._replace(now, tags={tag: number for tag, number in now.tags.items() if tag != name})

    def compact(self, keep: int | Iterable[int | str] = 1) -> int:
        """Forget all versions but the last `keep` (or those named), the newest and the tagged ones; delete what only
        they held, and merge segments. Returns how many versions went. Readers keep what they have open."""
        with self._writing() as writer:
            before = len(writer.manifest.versions)
            new = compaction.compact(writer, keep)
            self._move_on(new)
            return before - len(new.versions)

    def reindex(self, analyser: Any = None, embedder: EmbedderLike | None = None) -> None:
        """Build all indexes anew from the documents, with another analyser or embedder if wished; also mends damaged
        indexes. Versions stay."""
        with self._writing() as writer:
            settings = dict(writer.manifest.settings)
            made: Embedder | None = self.embedder if "embedder" in settings else None
            if embedder is not None:
                if made is None:
                    raise UsageError(f"a knowledge base of kind {self.kind!r} has no embedder")
                made = embedder_of(embedder)
                settings["embedder"] = describe_embedder(made, embedder)
            if analyser is not None:
                settings["analyser"] = analyser_settings(analyser)
            new = compaction.reindex(writer, settings, generation.index_settings(settings), made)
            self._embedder = made
            self._move_on(new)

    def stage(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Hand over vectors that were computed elsewhere, (n, dimension), for texts as `passages` gives them: adding
        documents with these passages takes them instead of embedding."""
        with self._writing(), failures(f"staging vectors in {self.path}"):
            staging = Staging(self.path, self.embedder)
            try:
                staging.add([content_hash(text) for text in texts], vectors)
            finally:
                staging.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Writer]:
        """A writer to the newest version, alone; what it wrote is deleted when the block fails."""
        self._check_open()
        if self.read_only:
            raise UsageError(f"{self!r} is read-only; open {self.path} itself to change it")
        with self._lock, writer_lock(self.path, self.lock_timeout), failures(f"writing to {self.path}"):
            self.refresh()
            generation.clean(self.path)
            settings = self._view.manifest.settings
            embedder = self.embedder if "embedder" in settings else None
            kinds = generation.KINDS[settings["kind"]]
            writer = Writer(self.path, self._view, kinds, generation.index_settings(settings), embedder)
            try:
                yield writer
            except BaseException:
                writer.abandon()
                raise

    def _change(
        self, documents: Iterable[Document], update: bool, on_duplicate: str, on_error: str, note: str = ""
    ) -> Change:
        if isinstance(documents, Document):
            documents = [documents]
        with self._writing() as writer:
            writer.write(documents, update, on_duplicate, on_error)
            return self._commit(writer, note or _note("update" if update else "add", writer))

    def _commit(self, writer: Writer, note: str) -> Change:
        counts = writer.counts
        if not (counts["added"] or counts["updated"] or counts["deleted"]):
            writer.abandon()
            return Change(self.version, **counts)
        self._move_on(writer.commit(note))
        return Change(self.version, **counts)

    def _replace(self, now: Manifest, **changes: Any) -> None:
        new = replace(now, serial=now.serial + 1, **changes)
        manifest.commit(self.path, new)
        self._move_on(new)

    def _move_on(self, new: Manifest) -> None:
        kinds, settings = generation.KINDS[new.settings["kind"]], generation.index_settings(new.settings)
        self._view = View(self.path, new, new.newest, kinds, settings, self._view)


def _note(what: str, writer: Writer) -> str:
    return f"{what} {sum(writer.counts[name] for name in ('added', 'updated', 'deleted')):,}"
