"""One version of a knowledge base, opened for reading: immutable, shared by threads.

All its files are open from the start, so that a later version may delete them.
"""

from __future__ import annotations

import json
import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import NanochatError
from nanochat.retrieval.document import Document, Found
from nanochat.retrieval.filters import Condition
from nanochat.retrieval.generation import Generation, serving
from nanochat.retrieval.manifest import Manifest, Version
from nanochat.retrieval.removed import removed_at
from nanochat.retrieval.store import Known, Segment, hash_id, numbers

SPARE = 1.3  # how many more rows are asked for than would do if hidden ones were spread evenly
FEW_ROWS = 200_000  # of which those of a version are told to the index at once, instead of looking for more and more
CACHED_FILTERS = 16  # the latest ones; and together up to so many bytes
CACHED_BYTES = 64 << 20


class View:
    """A version, its segments and its generation. `before` lends what both have in common.

    Raises FileNotFoundError when a file has vanished, which a newer manifest explains or else is damage."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        version: Version,
        kinds: Sequence[str],
        index_settings: Mapping[str, Any],
        before: View | None = None,
    ) -> None:
        self.manifest, self.version = manifest, version
        self._filters: OrderedDict[str, np.ndarray] = OrderedDict()
        self._filters_lock = threading.Lock()
        self._all: np.ndarray | None = None
        had = {segment.directory.name: segment for segment in before.segments} if before else {}
        self.segments: list[Segment] = []
        for info in manifest.segments:
            if info.first_row <= version.last_row:
                self.segments.append(had.get(info.name) or Segment(directory / info.name))
        self._ends = [int(segment.rows[0][-1] + segment.rows[1][-1]) for segment in self.segments]
        self.removed = removed_at(directory, manifest, version)
        chosen = serving(manifest.generations, version)
        self.generation: Generation | None = None
        self._held = chosen.passages if chosen else 0  # by the generation, visible or not
        if chosen is not None:
            same = before is not None and before.generation is not None and before.generation.name == chosen.name
            if same and before is not None:
                self.generation = before.generation
            else:
                self.generation = Generation(directory / chosen.name, kinds, index_settings)

    def close(self) -> None:
        for segment in self.segments:
            segment.close()
        if self.generation is not None:
            self.generation.close()

    # -- which rows ----------------------------------------------------------------------------------------------------

    def visible(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows this version holds, (n,) bool."""
        seen = rows <= self.version.last_row
        if len(self.removed):
            at = np.searchsorted(self.removed, rows)
            seen &= self.removed[np.minimum(at, len(self.removed) - 1)] != rows
        return seen

    def all_rows(self) -> np.ndarray:
        """All passages of this version, sorted."""
        if self._all is None:
            rows = [segment.expand(np.asarray(segment.rows[0])) for segment in self.segments]
            joined = np.concatenate([np.empty(0, np.int64), *rows])
            self._all = joined[self.visible(joined)]
        return self._all

    def allowed(self, conditions: Mapping[str, Condition]) -> np.ndarray:
        """The passages, sorted, of this version's documents that pass the filter. The latest answers are kept."""
        name = json.dumps(conditions, sort_keys=True)
        with self._filters_lock:
            if name in self._filters:
                self._filters.move_to_end(name)
                return self._filters[name]
        parts = [segment.expand(segment.matching(conditions)) for segment in self.segments]
        rows = np.concatenate([np.empty(0, np.int64), *parts])
        rows = rows[self.visible(rows)]
        with self._filters_lock:
            self._filters[name] = rows
            while len(self._filters) > CACHED_FILTERS or (
                len(self._filters) > 1 and sum(one.nbytes for one in self._filters.values()) > CACHED_BYTES
            ):
                self._filters.popitem(last=False)
        return rows

    # -- search --------------------------------------------------------------------------------------------------------

    def find(self, kind: str, queries: Any, k: int, allowed: np.ndarray | None = None) -> list[Found]:
        """The best `k` rows of this version, or of the allowed ones, in the index of a kind, for each query."""
        n = len(queries)
        if self.generation is None or not n:
            return [Found.none()] * n
        index, held = self.generation.indexes[kind], self._held
        k = min(k, self.version.passages if allowed is None else len(allowed))
        if not k:
            return [Found.none()] * n
        if allowed is not None:
            return index.search(queries, k, allowed)
        answers: list[Found] = [Found.none()] * n
        pending = list(range(n))
        hidden = held - self.version.passages
        wanted = k * held / self.version.passages * SPARE + 8 if hidden else float(k)
        first = True
        while pending and (first or wanted < held / 4) and not (hidden and held <= FEW_ROWS):
            first = False
            limit = math.ceil(wanted)
            found = index.search(_some(queries, pending), limit)
            late = []
            for i, one in zip(pending, found):
                seen = self.visible(one.rows)
                answers[i] = Found(one.rows[seen][:k], one.scores[seen][:k])
                if len(answers[i].rows) < k and (len(one.rows) == limit or kind == "dense"):
                    late.append(i)
            pending, wanted = late, wanted * 3
        if pending:
            found = index.search(_some(queries, pending), k, self.all_rows())
            for i, one in zip(pending, found):
                answers[i] = one
        return answers

    # -- documents -----------------------------------------------------------------------------------------------------

    def fetch(self, rows: np.ndarray) -> dict[int, Document]:
        """Row -> passage. Raises NanochatError for a row that no segment holds."""
        parts: dict[int, list[int]] = {}
        for row in rows.tolist():
            parts.setdefault(bisect_right(self._ends, row), []).append(row)
        documents: dict[int, Document] = {}
        for i, part in parts.items():
            if i < len(self.segments):
                documents.update(self.segments[i].fetch(part))
        if len(documents) < len(rows):
            missing = sorted(set(rows.tolist()) - documents.keys())
            if missing:
                raise NanochatError(f"the index names passage {missing[0]}, which no document has; run `verify`")
        return documents

    def first_rows(self, rows: np.ndarray) -> np.ndarray:
        """The first rows of the documents that passages belong to: equal for passages of one document. Raises
        NanochatError for a row that no segment holds."""
        firsts = rows.copy()
        at = np.searchsorted(self._ends, rows, side="right")
        if (at == len(self.segments)).any():
            row = rows[at == len(self.segments)][0]
            raise NanochatError(f"the index names passage {row}, which no document has; run `verify`")
        for i in set(at.tolist()):
            segment, mine = self.segments[i], at == i
            firsts[mine] = segment.rows[0][segment.places(rows[mine])]
        return firsts

    def known(self, ids: Sequence[str]) -> dict[str, tuple[Segment, Known]]:
        """Id -> where its document is, for those of the ids that this version holds."""
        hashes = numbers([hash_id(id) for id in ids])
        wanted, found = set(ids), {}
        for segment in self.segments:
            candidates = np.array([row for _, row in segment.with_ids(hashes)], np.int64)
            for id, known in segment.known(candidates[self.visible(candidates)].tolist()).values():
                if id in wanted:
                    found[id] = segment, known
        return found

    def documents(self) -> Iterator[Document]:
        """All documents of this version, whole, in the order in which they were added."""
        for segment in self.segments:
            firsts = np.asarray(segment.rows[0])
            for row in firsts[self.visible(firsts)].tolist():
                yield segment.whole(row)


def _some(queries: Any, places: list[int]) -> Any:
    """Some of the queries: texts, or rows of an array."""
    return queries[places] if isinstance(queries, np.ndarray) else [queries[i] for i in places]
