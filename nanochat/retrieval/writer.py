"""Changes on their way to a commit: new segments, a new generation, removed rows, and then a new manifest.

Nothing here touches a file that the current manifest names. `Writer.commit` is the one moment at which the change
becomes real; before it, `Writer.abandon` (or the next writer, after a crash) deletes what was written.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import UsageError
from nanochat.retrieval import generation as generations
from nanochat.retrieval import manifest as manifests
from nanochat.retrieval.chunk import spans
from nanochat.retrieval.document import Batch, Document, Embedder, clean_text
from nanochat.retrieval.manifest import GenerationInfo, Manifest, SegmentInfo, Version
from nanochat.retrieval.prepare import AT_ONCE, Ready, check, check_text, passage_texts, pieces, slices
from nanochat.retrieval.removed import load_removed, write_removed
from nanochat.retrieval.staging import Staging
from nanochat.retrieval.store import Known, Segment, SegmentWriter, merge, numbers
from nanochat.retrieval.view import View

log = logging.getLogger("nanochat")
SEGMENT_DOCUMENTS = 200_000  # a larger change becomes several segments
MERGE_SEGMENTS = 8  # so many of about one size become one
MERGE_UP_TO = 32_768  # documents of a segment; larger ones are merged by `compact` only
MERGE_DEAD = 1000  # passages: a generation with more dead ones, and more than live ones, drops them
ON_DUPLICATE = ("skip", "keep", "raise")


class Refused(UsageError):
    """A document that another one stands in the way of: `name` is its id."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"document {name!r} {why}")
        self.name = name


class SameId(Refused):
    """Its id is another one's, with other content."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "is already there with other content: `update` replaces it")


@dataclass(frozen=True)
class Change:
    """What a change did. `duplicates`: documents left out because another one has the same title, content and
    metadata; `skipped`: what could not be read or stored (on_error="skip")."""

    version: int
    added: int = 0
    updated: int = 0
    deleted: int = 0
    unchanged: int = 0
    duplicates: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        names = ("added", "updated", "deleted", "unchanged", "duplicates", "skipped")
        parts = [f"{getattr(self, name):,} {name}" for name in names if getattr(self, name)]
        return f"version {self.version}: {', '.join(parts) or 'nothing to change'}"

    def __add__(self, other: Change) -> Change:
        """Both, one after the other."""
        names = ("added", "updated", "deleted", "unchanged", "duplicates", "skipped")
        return Change(other.version, *(getattr(self, name) + getattr(other, name) for name in names))


class Writer:
    """Collects changes to the newest version. `kinds` are the indexes; the embedder serves dense ones."""

    def __init__(
        self,
        directory: Path,
        view: View,
        kinds: Sequence[str],
        index_settings: Mapping[str, Any],
        embedder: Embedder | None,
    ) -> None:
        self.directory, self.view, self.kinds, self.embedder = directory, view, kinds, embedder
        self.index_settings = index_settings
        self.manifest: Manifest = view.manifest
        self.serial = self.manifest.serial + 1
        self.version = self.manifest.newest.number + 1
        self.next_row = self.manifest.next_row
        self.counts = dict.fromkeys(("added", "updated", "deleted", "unchanged", "duplicates", "skipped"), 0)
        self._removed: dict[int, int] = {}  # first row -> passages, of documents that this change removes
        self._segments: list[Future[SegmentInfo]] = []  # written; the disk and the checksums take their time
        self._background = ThreadPoolExecutor(1)
        self._opened: list[Segment] = []
        self._filling: SegmentWriter | None = None
        self._rows_by_id: dict[str, int] = {}  # of the segment that is being filled
        self._contents: set[bytes] = set()
        self._staging: Staging | None = None
        self._staged_rows: list[np.ndarray] = []
        self._staged_places: list[np.ndarray] = []
        self._generation: GenerationInfo | None = None
        self._made: list[Path] = []

    # -- documents -----------------------------------------------------------------------------------------------------

    def write(
        self, documents: Iterable[Document], update: bool, on_duplicate: str = "skip", on_error: str = "raise"
    ) -> None:
        """Take in the documents and index them. Raises UsageError for a bad one, unless on_error="skip"."""
        if on_duplicate not in ON_DUPLICATE:
            raise UsageError(f"on_duplicate={on_duplicate!r}: choose from {', '.join(ON_DUPLICATE)}")
        batches = self._batches(documents, update, on_duplicate, on_error)
        first = next(batches, None)
        before = self.manifest.generations[-1] if self.manifest.generations else None
        base = self.directory / before.name if before else None
        drop = self._worth_dropping(before)
        if first is not None or drop is not None:
            stream: Iterator[Batch] = itertools.chain([] if first is None else [first], batches)
            target = self.make(f"gen-{self.serial:06d}")
            for kind in self.kinds:
                if kind == "dense":
                    for _ in stream:
                        pass  # the other indexes have drawn all of it
                    self._close_segment()
                    stream = self._staged_batches()
                generations.write_index(kind, target, self.index_settings, stream, base, drop)
            self._describe(target, base, before, drop)
        elif before is not None:
            held = before.passages + self._n_new_passages()  # documents without a word: nothing to index
            self._generation = replace(before, last_row=self.next_row - 1, passages=held)
        self._close_segment()

    def remove(self, ids: Iterable[str]) -> None:
        """Remove documents; ids that are not there count as unchanged."""
        names = list(dict.fromkeys(clean_text(check_text(id, "an id")) for id in ids))
        for start in range(0, len(names), AT_ONCE):
            part = names[start : start + AT_ONCE]
            found = self.view.known(part)
            self._removed.update((known.row, known.n) for _, known in found.values())
            self.counts["deleted"] += len(found)
            self.counts["unchanged"] += len(part) - len(found)

    def _batches(
        self, documents: Iterable[Document], update: bool, on_duplicate: str, on_error: str
    ) -> Iterator[Batch]:
        """What is new, stored on the way, as batches for the lexical index; vectors are staged."""
        for part in slices(documents):
            ready = []
            for document in part:
                try:
                    ready.append(check(document))
                except UsageError as error:
                    self._refuse(error, on_error)
            fresh = self._choose(ready, update, on_duplicate, on_error)
            batch = self._store(fresh)
            if not len(batch.rows):
                continue
            if self.embedder is not None:
                if self._staging is None:
                    self._staging = Staging(self.directory, self.embedder)
                self._staged_places.append(self._staging.place(batch.texts))
                self._staged_rows.append(batch.rows)
            yield batch

    def _refuse(self, error: UsageError, on_error: str) -> None:
        if on_error == "raise":
            raise error
        self.counts["skipped"] += 1
        log.warning("skipped: %s", error)

    def _choose(self, ready: list[Ready], update: bool, on_duplicate: str, on_error: str) -> list[Ready]:
        """Those of the documents that are to be stored; of what they replace, the rows are marked as removed."""
        stored = self._stored(ready)
        contents = set() if on_duplicate == "keep" else self._same_content(ready)
        chosen: dict[str, Ready] = {}
        for one in ready:
            name = one.document.id
            if name in chosen:
                known: Known | Ready | None = chosen[name]
                source = chosen[name].document.source
            else:
                known = stored.get(name)
                source = known.source if known else ""
            if known is not None:
                if known.hash == one.hash and source == one.document.source:
                    self.counts["unchanged"] += 1
                elif not update:
                    self._refuse(SameId(name), on_error)
                else:
                    if isinstance(known, Known):
                        self._forget(known)
                        self.counts["updated"] += 1
                    contents.discard(known.hash)
                    chosen[name] = one
                    contents.add(one.hash)
            elif one.hash in contents and on_duplicate != "keep":
                if on_duplicate == "raise":
                    same = "has the title, content and metadata of another one: leave one out, or --on-duplicate skip"
                    self._refuse(Refused(name, same), on_error)
                else:
                    self.counts["duplicates"] += 1
            else:
                chosen[name] = one
                contents.add(one.hash)
                self.counts["added"] += 1
        return list(chosen.values())

    def _stored(self, ready: list[Ready]) -> dict[str, Known]:
        """Id -> the document that has it now, in the last version or added by this change."""
        names = [one.document.id for one in ready]
        hashes = numbers([one.id_hash for one in ready])
        found: dict[str, Known] = {}
        for segment in (*self.view.segments, *self._opened):
            rows = self._live([row for _, row in segment.with_ids(hashes)])
            found.update(segment.known(rows).values())
        if self._filling is not None:
            rows = [self._rows_by_id[name] for name in names if name in self._rows_by_id]
            found.update(self._filling.known(rows).values())
        return found

    def _same_content(self, ready: list[Ready]) -> set[bytes]:
        """Those of the content hashes that some document has now."""
        names = {one.hash for one in ready}
        hashes = numbers(list(names))
        found = names & self._contents
        for segment in (*self.view.segments, *self._opened):
            rows = self._live([row for _, row in segment.with_hashes(hashes)])
            found.update(known.hash for _, known in segment.known(rows).values())
        return found & names

    def _live(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows that neither the last version nor this change lacks."""
        if not rows:
            return []
        candidates = np.array(rows, np.int64)
        seen = self.view.visible(candidates) | (candidates >= self.manifest.next_row)
        return [row for row in candidates[seen].tolist() if row not in self._removed]

    def _store(self, fresh: list[Ready]) -> Batch:
        """Write documents to the segment being filled; their passages, but those without a word, as a batch."""
        if self._filling is None:
            self._filling = SegmentWriter(self.make(f"seg-{self.serial:06d}-{len(self._segments)}"))
        chunk, overlap = self.manifest.settings["chunk_words"], self.manifest.settings["overlap_words"]
        documents, passages, fields, texts = [], [], [], []
        rows: list[int] = []
        row = self.next_row
        for document, _, hash, metadata in fresh:
            content: str | None = document.content
            cuts = spans(document.content, chunk, overlap)
            n = len(cuts)
            if n > 1:
                passages += pieces(row, document.content, cuts)
                content = None
            documents.append((row, n, document.id, hash, document.title, document.source, metadata, content))
            if metadata:
                fields.append((row, document.metadata))
            texts += passage_texts(document, cuts)
            rows += range(row, row + n)
            self._rows_by_id[document.id] = row
            row += n
        self.next_row = row
        self._contents.update([one.hash for one in fresh])
        self._filling.add(documents, [one.id_hash for one in fresh], passages, fields)
        if len(self._filling) >= SEGMENT_DOCUMENTS:
            self._close_segment()
        worded = [bool(text) and not text.isspace() for text in texts]  # the rest cannot be found by anything
        return Batch(np.array(rows, np.int64)[worded], list(compress(texts, worded)))

    def _forget(self, known: Known) -> None:
        """Take a document out of what this change and the last version hold."""
        self._removed[known.row] = known.n
        if known.row >= self.manifest.next_row:
            self._contents.discard(known.hash)

    def _close_segment(self) -> None:
        """Finish the segment being filled, if it holds anything."""
        if self._filling is None:
            return
        filled, self._filling = self._filling, None
        if not len(filled):
            filled.close()
            generations.remove(filled.directory)
            return
        filled.finish()
        self._segments.append(self._background.submit(filled.describe))
        self._opened.append(Segment(filled.directory))
        self._rows_by_id.clear()
        self._contents.clear()

    def _staged_batches(self) -> Iterator[Batch]:
        """The new passages with their vectors, for the dense index."""
        for rows, places in zip(self._staged_rows, self._staged_places):
            assert self._staging is not None
            yield Batch(rows, [], self._staging.vectors(places))

    # -- generation and commit -----------------------------------------------------------------------------------------

    def _worth_dropping(self, before: GenerationInfo | None) -> np.ndarray | None:
        """The dead rows of the newest generation, sorted, when it is time to build one without them."""
        if before is None:
            return None
        rows, _ = self._all_removed()
        rows = rows[rows <= before.last_row]
        dead = before.passages - (self.manifest.newest.passages - sum(self._removed.values()))
        return rows if dead > MERGE_DEAD and 2 * dead > before.passages else None

    def _all_removed(self) -> tuple[np.ndarray, np.ndarray]:
        """All removed rows, sorted, and the versions that removed them, with those of this change."""
        rows, versions = load_removed(self.directory, self.manifest)
        if not self._removed:
            return rows, versions
        parts = [np.arange(row, row + n) for row, n in self._removed.items()]
        rows = np.concatenate([rows, *parts])
        versions = np.concatenate([versions, np.full(len(rows) - len(versions), self.version)])
        order = np.argsort(rows, kind="stable")
        return rows[order], versions[order]

    def _n_new_passages(self) -> int:
        return self.next_row - self.manifest.next_row

    def _describe(
        self, target: Path, base: Path | None, before: GenerationInfo | None, drop: np.ndarray | None
    ) -> None:
        """Note the generation that was written. What this change replaced while it was written is in it, and dead."""
        files = generations.describe(target, base, before.files if before else None)
        if drop is None:
            held = (before.passages if before else 0) + self._n_new_passages()
        else:
            gone = set(drop.tolist())
            held = self._n_passages() + sum(n for row, n in self._removed.items() if row not in gone)
        since = self.version if drop is not None else before.from_version if before else 0
        self._generation = GenerationInfo(target.name, self.next_row - 1, held, since, files)

    def _n_passages(self) -> int:
        """Of the version that this change makes."""
        return self.manifest.newest.passages + self._n_new_passages() - sum(self._removed.values())

    def commit(self, note: str) -> Manifest:
        """Make the change a version. When it raises, call `abandon`."""
        old = self.manifest
        segments = [one.result() for one in self._segments]
        documents = old.newest.documents + sum(one.documents for one in segments) - len(self._removed)
        version = Version(self.version, time.time(), note, documents, self._n_passages(), self.next_row - 1)
        versions = (*old.versions, version)
        built = [*old.generations]
        if self._generation is not None:
            built = [one for one in built if one.name != self._generation.name] + [self._generation]
        removed = old.removed
        if self._removed:
            removed = write_removed(self.make(f"removed-{self.serial:06d}.npy"), *self._all_removed())
        new = replace(
            old,
            serial=self.serial,
            next_row=self.next_row,
            versions=versions,
            segments=tuple(self._merged([*old.segments, *segments])),
            generations=generations.retained(built, versions),
            removed=removed,
        )
        return self.replace_manifest(new)

    def replace_manifest(self, new: Manifest) -> Manifest:
        """The commit itself; then what is not needed any more is deleted."""
        manifests.commit(self.directory, new)
        self._made.clear()
        self._close(committed=True)
        with contextlib.suppress(OSError):
            generations.clean(self.directory)
        return new

    def _merged(self, infos: list[SegmentInfo]) -> list[SegmentInfo]:
        """The segments, the last ones merged when there are many of about one size."""
        start, size = None, MERGE_SEGMENTS
        while size <= MERGE_UP_TO:
            run = len(list(itertools.takewhile(lambda one: one.documents < size, reversed(infos))))  # noqa: B023
            start = len(infos) - run if run >= MERGE_SEGMENTS else start
            size *= MERGE_SEGMENTS
        if start is None:
            return infos
        target = self.make(f"seg-{self.serial:06d}-merged")
        merged = merge(self.directory, target, [one.name for one in infos[start:]], np.empty(0, np.int64))
        assert merged is not None
        return [*infos[:start], merged]

    def make(self, name: str) -> Path:
        """A path in the knowledge base for something new, deleted when the change is abandoned."""
        self._made.append(self.directory / name)
        return self._made[-1]

    def _close(self, committed: bool) -> None:
        self._background.shutdown()
        if self._filling is not None:
            self._filling.close()
        for segment in self._opened:
            segment.close()
        if self._staging is not None:
            self._staging.close(committed)

    def abandon(self) -> None:
        """Delete what was written; vectors that were computed stay staged."""
        self._close(committed=False)
        for path in self._made:
            generations.remove(path)
