"""Forgetting versions, and building indexes anew: changes of what is stored that change no version."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nanochat.errors import UsageError
from nanochat.retrieval import generation as generations
from nanochat.retrieval.document import Batch, Embedder
from nanochat.retrieval.manifest import GenerationInfo, Manifest, SegmentInfo, Version
from nanochat.retrieval.removed import load_removed, write_removed
from nanochat.retrieval.staging import NAME as STAGED
from nanochat.retrieval.staging import Staging
from nanochat.retrieval.store import Segment, merge
from nanochat.retrieval.view import View
from nanochat.retrieval.writer import MERGE_UP_TO, Writer

LARGEST = 1_000_000  # documents of a merged segment


def compact(writer: Writer, keep: int | Iterable[int | str]) -> Manifest:
    """See KnowledgeBase.compact."""
    old = writer.manifest
    kept = _kept(old, keep)
    rows, removed_by = load_removed(writer.directory, old)
    dead = rows[_unseen(rows, removed_by, kept)]
    segments = _rewritten(writer, dead)
    built = list(old.generations)
    if built and len(dead):
        built.append(_without(writer, built[-1], dead, segments, rows, removed_by, kept[0].number))
    retained = generations.retained(built, kept)
    # An older generation still names dead rows: they stay listed as removed.
    listed = ~np.isin(rows, dead) | (rows <= max((one.last_row for one in retained[:-1]), default=-1))
    removed = None
    if listed.any():
        path = writer.make(f"removed-{writer.serial:06d}.npy")
        removed = write_removed(path, rows[listed], removed_by[listed])
    (writer.directory / STAGED).unlink(missing_ok=True)
    new = replace(
        old,
        serial=writer.serial,
        versions=tuple(kept),
        tags=dict(old.tags),
        segments=tuple(segments),
        generations=retained,
        removed=removed,
    )
    return writer.replace_manifest(new)


def _kept(old: Manifest, keep: int | Iterable[int | str]) -> list[Version]:
    if isinstance(keep, int):
        if keep < 1:
            raise UsageError(f"keep must be 1 version or more, not {keep}")
        numbers = {version.number for version in old.versions[-keep:]}
    else:
        numbers = {old.find(version).number for version in ([keep] if isinstance(keep, str) else keep)}
    numbers |= {old.newest.number, *old.tags.values()}
    return [version for version in old.versions if version.number in numbers]


def _unseen(rows: np.ndarray, removed_by: np.ndarray, kept: Sequence[Version]) -> np.ndarray:
    """Which of the removed rows no kept version sees: the last one before the removal came before the row, too."""
    numbers = np.array([version.number for version in kept])
    last_rows = np.array([version.last_row for version in kept])
    before = np.searchsorted(numbers, removed_by, side="left") - 1
    return (before < 0) | (last_rows[before] < rows)


def _rewritten(writer: Writer, dead: np.ndarray) -> list[SegmentInfo]:
    """The segments, those with dead documents or neighbours to merge with written anew."""
    made: list[SegmentInfo] = []
    run: list[SegmentInfo] = []

    def flush() -> None:
        worth = len(run) > 1 or any(_holds(info, dead) for info in run)
        if worth:
            target = writer.make(f"seg-{writer.serial:06d}-{len(made)}")
            merged = merge(writer.directory, target, [info.name for info in run], dead)
            made.extend([merged] if merged else [])
        else:
            made.extend(run)
        run.clear()

    for info in writer.manifest.segments:
        alone = info.documents > MERGE_UP_TO and not _holds(info, dead)
        if run and (alone or sum(one.documents for one in run) + info.documents > LARGEST):
            flush()
        run.append(info)
        if alone:
            flush()
    flush()
    return made


def _holds(info: SegmentInfo, dead: np.ndarray) -> bool:
    """Whether a segment has dead rows."""
    at = int(np.searchsorted(dead, info.first_row))
    return at < len(dead) and int(dead[at]) <= info.last_row


def _without(
    writer: Writer,
    newest: GenerationInfo,
    dead: np.ndarray,
    segments: Sequence[SegmentInfo],
    rows: np.ndarray,
    removed_by: np.ndarray,
    first: int,
) -> GenerationInfo:
    """The newest generation without the dead rows."""
    base, target = writer.directory / newest.name, writer.make(f"gen-{writer.serial:06d}")
    for kind in writer.kinds:
        generations.write_index(kind, target, writer.index_settings, (), base, dead)
    # What is left of the documents, but for those that the newest generation had dropped before.
    dropped = np.count_nonzero((removed_by <= newest.from_version) & ~np.isin(rows, dead))
    held = sum(info.passages for info in segments) - int(dropped)
    files = generations.describe(target, base, newest.files)
    return GenerationInfo(target.name, newest.last_row, held, max(newest.from_version, first), files)


def reindex(
    writer: Writer, settings: Mapping[str, Any], index_settings: Mapping[str, Any], embedder: Embedder | None
) -> Manifest:
    """See KnowledgeBase.reindex: one generation that serves all versions."""
    old = writer.manifest
    view = View(writer.directory, replace(old, generations=()), old.newest, (), index_settings)
    target = writer.make(f"gen-{writer.serial:06d}")
    staging = Staging(writer.directory, embedder) if embedder is not None else None
    places: list[tuple[np.ndarray, np.ndarray]] = []
    try:
        for kind in writer.kinds:
            if kind != "dense":
                generations.write_index(kind, target, index_settings, _batches(view.segments), None, None)
        if staging is not None:
            places = [(batch.rows, staging.place(batch.texts)) for batch in _batches(view.segments)]
            vectors = (Batch(rows, [], staging.vectors(at)) for rows, at in places)
            generations.write_index("dense", target, index_settings, vectors, None, None)
        files = generations.describe(target)
        held = sum(info.passages for info in old.segments)
        built = GenerationInfo(target.name, old.next_row - 1, held, 0, files)
        new = replace(old, serial=writer.serial, settings=dict(settings), generations=(built,) if held else ())
        writer.replace_manifest(new)
        done = replace(new, serial=new.serial + 1)
        writer.replace_manifest(done)  # so that the backup does not name what may be damaged either
    except BaseException:
        if staging is not None:
            staging.close()
        raise
    if staging is not None:
        staging.close(committed=True)
    return done


def _batches(segments: Iterable[Segment], at_once: int = 2000) -> Iterator[Batch]:
    """All stored passages that have a word."""
    for segment in segments:
        rows = segment.expand(np.asarray(segment.rows[0]))
        for start in range(0, len(rows), at_once):
            documents = segment.fetch(rows[start : start + at_once].tolist())
            texts = {row: documents[row].text for row in sorted(documents)}
            texts = {row: text for row, text in texts.items() if text and not text.isspace()}
            if texts:
                yield Batch(np.array(list(texts), np.int64), list(texts.values()))
