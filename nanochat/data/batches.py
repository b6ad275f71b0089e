"""Tokens to packed batches: best-fit rows with document boundaries, several lanes, an exact cursor, a background thread.

A *piece* is a run of (input, target) pairs of one document. A document of n tokens gives n pairs (the last target is the
next document's <|bos|>, which stands for its end), so a document may be cut anywhere and no pair is lost. Rows are filled
from a buffer of pieces: the longest that fits, again and again; the last gap is filled with the head of the longest piece
(its tail goes back to the buffer) or, where conversations must stay whole, with padding.

The stream is divided into `n_lanes` lanes: document i belongs to lane i % n_lanes, and row g of the training run comes from lane
g % n_lanes. Ranks own lanes, so a run over 1, 2, 4 or 8 processes sees the same rows in the same order, and a checkpoint of
one resumes on another. The cursor of a lane is its next document, its documents read ahead and its buffer: exact.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol, Union

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import NanochatError, UsageError

IGNORED = -1


class Batch(NamedTuple):
    """One micro-batch; all (B, T)."""

    inputs: Tensor  # int64
    targets: Tensor  # int64, -1 = ignored
    weights: Tensor  # float32: 1, a reward, or an advantage
    segments: Tensor  # int32: document number inside the row


class Piece(NamedTuple):
    """(input, target) pairs of one document, int32 each."""

    inputs: np.ndarray
    targets: np.ndarray


class Source(Protocol):
    """What a stream is read from. The same (epoch, start) always gives the same documents in the same order."""

    name: str

    def read(self, epoch: int, start: int) -> Iterator[Any]: ...
    def encode(self, raw: Sequence[Any]) -> list[Piece | None]:
        """A piece for each raw document, None for one that has nothing to train on."""
        ...


@dataclass
class Report:
    """What became of the tokens."""

    tokens: int = 0
    padded: int = 0
    cropped: int = 0  # tokens cut off because a conversation was longer than a row
    split: int = 0  # documents continued in another row
    skipped: int = 0  # documents with nothing to train on

    @property
    def padded_share(self) -> float:
        return self.padded / max(1, self.tokens + self.padded)

    @property
    def cropped_share(self) -> float:
        return self.cropped / max(1, self.tokens + self.cropped)


@dataclass
class Lane:
    """One independent sub-stream: read-ahead pieces, the packing buffer (sorted by length), the next document."""

    number: int
    next: tuple[int, int, int] = (0, 0, 0)  # (epoch, index in it, number in the run) of the next document to read
    pending: deque[Piece] = field(default_factory=deque)
    buffer: list[tuple[int, int, Piece]] = field(default_factory=list)  # (length, arrival, piece)
    arrivals: int = 0

    def insert(self, piece: Piece) -> None:
        insort(self.buffer, (len(piece.inputs), self.arrivals, piece), key=lambda item: item[:2])
        self.arrivals += 1


@dataclass
class Cursor:
    """A position in the stream, as a checkpoint holds it."""

    row: int
    lanes: dict[int, Lane]
    report: Report

    def state_dict(self, n_lanes: int) -> dict[str, Any]:
        lanes = {}
        for lane in self.lanes.values():
            ordered = sorted(lane.buffer, key=lambda item: item[1])
            lanes[str(lane.number)] = {
                "next": list(lane.next),
                "arrivals": lane.arrivals,
                "arrived": np.array([item[1] for item in ordered], dtype=np.int64),
                "buffer": join([item[2] for item in ordered]),
                "pending": join(list(lane.pending)),
            }
        return {
            "row": self.row,
            "n_lanes": n_lanes,
            "lanes": lanes,
            "report": asdict(self.report),
        }


class Packer:
    """Rows of `sequence_len` pairs from the lanes that `rank` owns, in the order of the run."""

    def __init__(
        self,
        source: Source,
        sequence_len: int,
        *,
        split: bool = True,
        pad_id: int = 0,
        n_lanes: int = 8,
        rank: int = 0,
        world_size: int = 1,
        buffer_size: int = 64,
        read_ahead: int = 128,
        epochs: int | None = None,
    ) -> None:
        if n_lanes % world_size:
            raise UsageError(f"--n_lanes {n_lanes} must be a multiple of the number of processes, {world_size}")
        self.source, self.T, self.split, self.pad_id = source, sequence_len, split, pad_id
        self.n_lanes, self.rank, self.world_size = n_lanes, rank, world_size
        self.buffer_size, self.read_ahead, self.epochs = buffer_size, read_ahead, epochs
        self.lanes = {i: Lane(i) for i in range(n_lanes) if i % world_size == rank}
        self.row = rank  # number of the next row of the run
        self.report = Report()
        self.position = (0, 0, 0)
        self.barren = 0  # documents in a row that gave nothing to train on
        self.epoch_size = 0  # documents of the last whole epoch
        self.reader: Iterator[Any] | None = None
        self.ended = False

    def next_row(self) -> list[Piece] | None:
        """The pieces of this rank's next row; None when a finite stream is used up (lanes that end early are passed over)."""
        for _ in range(len(self.lanes)):
            lane = self.lanes[self.row % self.n_lanes]
            self.row += self.world_size
            pieces = self.fill(lane)
            if pieces:
                return pieces
        return None

    def fill(self, lane: Lane) -> list[Piece]:
        room, pieces = self.T, []
        while room:
            self.top_up(lane)
            if not lane.buffer:
                break
            at = bisect_right(lane.buffer, room, key=lambda item: item[0])
            if at:
                piece = lane.buffer.pop(at - 1)[2]
            elif self.split:
                whole = lane.buffer.pop()[2]
                piece = Piece(whole.inputs[:room], whole.targets[:room])
                lane.insert(Piece(whole.inputs[room:], whole.targets[room:]))
                self.report.split += 1
            else:
                break
            pieces.append(piece)
            room -= len(piece.inputs)
        return pieces

    def top_up(self, lane: Lane) -> None:
        while len(lane.buffer) < self.buffer_size:
            while not lane.pending:
                if not self.read():
                    return
            lane.insert(lane.pending.popleft())

    def read(self) -> bool:
        """Read the next documents and hand each to its lane; False at the end of a finite stream."""
        if self.ended:
            return False
        if self.reader is None:
            self.position = min(lane.next for lane in self.lanes.values())
            self.reader = self.source.read(*self.position[:2])
        wanted: list[tuple[Lane, Any]] = []
        epoch, index, number = self.position
        for _ in range(self.read_ahead):
            raw = next(self.reader, None)
            if raw is None:
                if index == 0:
                    raise NanochatError(f"the stream {self.source.name} holds no documents")
                epoch, index, self.epoch_size = epoch + 1, 0, index
                self.ended = self.epochs is not None and epoch >= self.epochs
                if self.ended:
                    break
                self.reader = self.source.read(epoch, 0)
                continue
            lane = self.lanes.get(number % self.n_lanes)
            if lane is not None and number >= lane.next[2]:
                wanted.append((lane, raw))
            index, number = index + 1, number + 1
        self.position = (epoch, index, number)
        for (lane, _), piece in zip(wanted, self.source.encode([raw for _, raw in wanted])):
            self.hand(lane, piece)
        for lane in self.lanes.values():
            lane.next = max(lane.next, self.position, key=lambda at: at[2])
        return True

    def hand(self, lane: Lane, piece: Piece | None) -> None:
        """Put a piece where its lane takes it from. Raises NanochatError when a whole epoch gave none."""
        if piece is not None and not self.split and len(piece.inputs) > self.T:
            self.report.cropped += len(piece.inputs) - self.T
            piece = Piece(piece.inputs[: self.T], piece.targets[: self.T])
        if piece is not None and (piece.targets != IGNORED).any():
            self.barren = 0
            lane.pending.append(piece)
            return
        self.report.skipped += 1
        self.barren += 1
        if self.epoch_size and self.barren > self.epoch_size + self.read_ahead:
            raise NanochatError(f"the stream {self.source.name} holds nothing to train on ({self.barren:,} documents read)")

    def batch(self, n_rows: int) -> Batch | None:
        """The next `n_rows` rows (fewer at the end of a finite stream), None when there are none."""
        rows = []
        while len(rows) < n_rows:
            row = self.next_row()
            if row is None:
                break
            rows.append(row)
        return self.assemble(rows) if rows else None

    def assemble(self, rows: list[list[Piece]]) -> Batch:
        inputs = np.full((len(rows), self.T), self.pad_id, dtype=np.int64)
        targets = np.full((len(rows), self.T), IGNORED, dtype=np.int64)
        segments = np.zeros((len(rows), self.T), dtype=np.int32)
        for i, pieces in enumerate(rows):
            at = 0
            for number, piece in enumerate(pieces):
                end = at + len(piece.inputs)
                inputs[i, at:end], targets[i, at:end], segments[i, at:end] = piece.inputs, piece.targets, number
                at = end
            segments[i, at:] = len(pieces)
            self.report.tokens += at
            self.report.padded += self.T - at
        weights = (targets != IGNORED).astype(np.float32)
        return Batch(*(torch.from_numpy(x) for x in (inputs, targets, weights, segments)))

    def cursor(self) -> Cursor:
        """Where the stream stands, cheaply: pieces are shared, not copied."""
        lanes = {n: replace(x, pending=deque(x.pending), buffer=list(x.buffer)) for n, x in self.lanes.items()}
        return Cursor(self.row - self.rank, lanes, replace(self.report))

    def state_dict(self) -> dict[str, Any]:
        return self.cursor().state_dict(self.n_lanes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken. Raises UsageError when it was taken with another number of lanes."""
        if state["n_lanes"] != self.n_lanes:
            raise UsageError(f"--n_lanes {self.n_lanes}: the checkpoint was written with {state['n_lanes']}")
        self.row = state["row"] + self.rank
        for lane in self.lanes.values():
            saved = state["lanes"][str(lane.number)]
            lane.next, lane.arrivals = (*saved["next"],), saved["arrivals"]
            lane.pending = deque(part(saved["pending"]))
            arrived = [int(n) for n in np.asarray(saved["arrived"])]
            lane.buffer = sorted(
                ((len(p.inputs), n, p) for n, p in zip(arrived, part(saved["buffer"]))), key=lambda item: item[:2]
            )
        self.report = Report(**state["report"])
        self.reader, self.ended = None, False


def join(pieces: list[Piece]) -> dict[str, np.ndarray]:
    """Many pieces as three arrays, as a checkpoint can hold them."""
    empty = np.zeros(0, dtype=np.int32)
    return {
        "sizes": np.array([len(p.inputs) for p in pieces], dtype=np.int32),
        "inputs": np.concatenate([p.inputs for p in pieces]) if pieces else empty,
        "targets": np.concatenate([p.targets for p in pieces]) if pieces else empty,
    }


def part(arrays: dict[str, Any]) -> list[Piece]:
    """The inverse of `join`."""
    ends = np.cumsum(np.asarray(arrays["sizes"], dtype=np.int64))[:-1]
    inputs = np.split(np.asarray(arrays["inputs"], dtype=np.int32), ends)
    targets = np.split(np.asarray(arrays["targets"], dtype=np.int32), ends)
    return [Piece(a, b) for a, b in zip(inputs, targets) if len(a)]


Made = Union[tuple[Batch, Cursor], BaseException, None]


class Background:
    """Makes batches in a thread, a few ahead. `cursor` is the cursor behind the batch taken last, whatever was made ahead."""

    def __init__(self, packer: Packer, n_rows: int, ahead: int = 4) -> None:
        self.packer, self.n_rows = packer, n_rows
        self.cursor = packer.cursor()
        self.ready: queue.Queue[Made] = queue.Queue(maxsize=ahead)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, name="batches", daemon=True)
        self.thread.start()

    def run(self) -> None:
        item: Made
        try:
            while not self.stop.is_set():
                batch = self.packer.batch(self.n_rows)
                item = None if batch is None else (batch, self.packer.cursor())
                self.put(item)
                if item is None:
                    return
        except BaseException as error:  # handed to the consumer, where it is raised
            self.put(error)

    def put(self, item: Made) -> None:
        while not self.stop.is_set():
            try:
                self.ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self.ready.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        batch, self.cursor = item
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.cursor.state_dict(self.packer.n_lanes)

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
