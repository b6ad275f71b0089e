"""Tokens to packed batches: rows with document boundaries, several lanes, an exact cursor.

A *piece* is a run of (input, target) pairs of one document. A document of n tokens gives n pairs (the last target is
the next document's <|bos|>, which stands for its end), so a document may be cut anywhere and no pair is lost. A row
begins with the oldest piece of a buffer (of its earliest epoch). Where documents may be cut it goes on with the longest
that fits, again and again, and the head of the longest fills the last gap (its tail goes back to the buffer). Where
conversations must stay whole it goes on with those that together leave the smallest gap, and only what no choice of
them can fill is padding.
Pieces of an earlier epoch go first: the longest of a small data set would otherwise crowd out the rest of it.

The stream is divided into `n_lanes` lanes: a hash of its number gives each document its lane (a remainder would send
every second document of an alternating corpus to the same lanes), and row g of the training run comes from lane
g % n_lanes. Ranks own lanes, so a run over 1, 2, 4 or 8 processes sees the same rows in the same order, and a
checkpoint of one resumes on another. The cursor of a lane is its next document, its documents read ahead and its
buffer: exact.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.data.shuffle import mix
from nanochat.errors import NanochatError, UsageError

IGNORED = -1


class Batch(NamedTuple):
    """One micro-batch; all (B, T)."""

    inputs: Tensor  # int64
    targets: Tensor  # int64, -1 = ignored
    weights: Tensor  # float32: 1, a reward, or an advantage
    segments: Tensor  # int32: document number inside the row


class PolicyBatch(NamedTuple):
    """A micro-batch of what a policy sampled, one rollout a row (training/reinforce.py); all (B, T)."""

    inputs: Tensor  # the first four as in Batch; weights are advantages times `scale`
    targets: Tensor
    weights: Tensor
    segments: Tensor
    scale: Tensor  # float32: what a token counts in the loss
    old: Tensor  # float32: negative log-likelihood under the model that sampled it
    reference: Tensor  # float32: the same under the reference model; (B, 0) without a KL term


class Piece(NamedTuple):
    """(input, target) pairs of one document, int32 each, and what the source had to leave out of it."""

    inputs: np.ndarray
    targets: np.ndarray
    cropped: int = 0  # tokens
    dropped_turns: int = 0


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
    dropped_turns: int = 0  # turns left out for the same reason; their tokens are not counted
    split: int = 0  # documents continued in another row
    skipped: int = 0  # documents with nothing to train on

    @property
    def padded_share(self) -> float:
        return self.padded / max(1, self.tokens + self.padded)

    @property
    def cropped_share(self) -> float:
        return self.cropped / max(1, self.tokens + self.cropped)


class Waiting(NamedTuple):
    """A piece in a buffer, in the order in which they are sought."""

    epoch: int
    length: int
    arrival: int
    piece: Piece


@dataclass
class Lane:
    """One independent sub-stream: (epoch, piece) read ahead, the packing buffer (sorted), the next document."""

    number: int
    next: tuple[int, int, int] = (0, 0, 0)  # (epoch, index in it, number in the run) of the next document to read
    pending: deque[tuple[int, Piece]] = field(default_factory=deque)
    buffer: list[Waiting] = field(default_factory=list)
    arrivals: int = 0

    def insert(self, epoch: int, piece: Piece) -> None:
        insort(self.buffer, Waiting(epoch, len(piece.inputs), self.arrivals, piece), key=lambda item: item[:3])
        self.arrivals += 1

    def oldest(self) -> int:
        """Where in the buffer the piece of the earliest epoch stands that arrived first. A small corpus fits into the
        buffer several times, and the tails of its documents would queue up behind all their heads of later epochs."""
        end = bisect_right(self.buffer, self.buffer[0].epoch, key=lambda item: item.epoch)
        return min(range(end), key=lambda i: self.buffer[i].arrival)

    def best(self, room: int) -> int | None:
        """Where the longest piece that fits stands, of the earliest epoch or else of the next; None: all are longer.
        Later epochs have to wait, or the shortest document of a small set would fill every gap."""
        start, last = 0, self.buffer[0].epoch + 1
        while start < len(self.buffer) and (epoch := self.buffer[start].epoch) <= last:
            end = bisect_right(self.buffer, epoch, lo=start, key=lambda item: item.epoch)
            at = bisect_right(self.buffer, room, lo=start, hi=end, key=lambda item: item.length)
            if at > start:
                return at - 1
            start = end
        return None


    def fill(self, room: int) -> list[Piece]:
        """Take pieces, of the earliest epoch and the next, that fill `room` as far as any choice of them can; where
        several do, those that came first. Sums of lengths are the bits of a number, so a choice costs microseconds."""
        last = self.buffer[0].epoch + 1 if self.buffer else 0
        waiting = sorted((one for one in self.buffer if one.epoch <= last), key=lambda one: (one.epoch, one.arrival))
        sums, within = [1], (1 << room + 1) - 1  # bit s of sums[k]: some of the first k pieces have s pairs together
        for one in waiting:
            if sums[-1] >> room:  # full: pieces that came later are not looked at
                break
            sums.append((sums[-1] | sums[-1] << one.length) & within)
        left, chosen = sums[-1].bit_length() - 1, []
        for k in range(len(sums) - 1, 0, -1):
            if not sums[k - 1] >> left & 1:  # not without this one
                chosen.append(waiting[k - 1])
                left -= waiting[k - 1].length
        taken = {one.arrival for one in chosen}
        self.buffer = [one for one in self.buffer if one.arrival not in taken]
        return [one.piece for one in reversed(chosen)]


@dataclass
class Cursor:
    """A position in the stream, as a checkpoint holds it. `row`: rows of the run handed out, over all ranks."""

    source: str
    row: int
    lanes: dict[int, Lane]
    report: Report

    def state_dict(self, n_lanes: int) -> dict[str, Any]:
        lanes = {}
        for lane in self.lanes.values():
            ordered = sorted(lane.buffer, key=lambda item: item.arrival)
            lanes[str(lane.number)] = {
                "next": list(lane.next),
                "arrivals": lane.arrivals,
                "arrived": np.array([item.arrival for item in ordered], dtype=np.int64),
                "buffer": join([(item.epoch, item.piece) for item in ordered]),
                "pending": join(lane.pending),
            }
        report = asdict(self.report)
        return {"source": self.source, "row": self.row, "n_lanes": n_lanes, "lanes": lanes, "report": report}


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
        self.base = 0  # rows of the run before this object took over
        self.taken = 0  # rows of this rank since
        self.report = Report()
        self.position = (0, 0, 0)
        self.barren = 0  # documents in a row that gave nothing to train on
        self.epoch_size = 0  # documents of the last whole epoch
        self.reader: Iterator[Any] | None = None

    def next_row(self) -> list[Piece] | None:
        """The pieces of this rank's next row; None when a finite stream is used up (ended lanes are passed over)."""
        for _ in range(len(self.lanes)):
            row = self.base + (self.rank - self.base) % self.world_size + self.taken * self.world_size
            self.taken += 1
            if pieces := self.fill(self.lanes[row % self.n_lanes]):
                return pieces
        return None

    def fill(self, lane: Lane) -> list[Piece]:
        """One row from a lane, empty when the lane has ended. A row without any target (the cut-off beginning of a long
        prompt) is passed over."""
        while pieces := self.pack(lane):
            if any((piece.targets != IGNORED).any() for piece in pieces):
                return pieces
        return []

    def pack(self, lane: Lane) -> list[Piece]:
        """The pieces of one row; none when the lane has ended."""
        room = self.T
        pieces: list[Piece] = []
        while room:
            self.top_up(lane)
            if not lane.buffer:
                break
            at = lane.best(room) if pieces else lane.oldest()
            if at is None or lane.buffer[at].length > room:
                more = [self.cut(lane, at, room)] if self.split else []
            elif pieces and not self.split:
                more = lane.fill(room)
            else:
                more = [lane.buffer.pop(at).piece]
            if not more:
                break
            pieces += more
            room -= sum(len(piece.inputs) for piece in more)
        return pieces

    def cut(self, lane: Lane, at: int | None, room: int) -> Piece:
        """The head of the piece at `at`, or of the longest of the earliest epoch; its tail stays in the buffer."""
        if at is None:
            at = bisect_right(lane.buffer, lane.buffer[0].epoch, key=lambda item: item.epoch) - 1
        epoch, _, _, whole = lane.buffer.pop(at)
        lane.insert(epoch, Piece(whole.inputs[room:], whole.targets[room:]))
        self.report.split += 1
        return Piece(whole.inputs[:room], whole.targets[:room])

    def top_up(self, lane: Lane) -> None:
        while len(lane.buffer) < self.buffer_size:
            while not lane.pending:
                if not self.read():
                    return
            lane.insert(*lane.pending.popleft())

    def read(self) -> bool:
        """Read the next documents and hand each to its lane; False at the end of a finite stream."""
        if self.reader is None:
            self.position = min(lane.next for lane in self.lanes.values())
        epoch, index, number = self.position
        wanted: list[tuple[Lane, int, Any]] = []
        for _ in range(self.read_ahead):
            if self.epochs is not None and epoch >= self.epochs:
                break
            if self.reader is None:
                self.reader = self.source.read(epoch, index)
            raw = next(self.reader, None)
            if raw is None:
                if index == 0:
                    raise NanochatError(f"the stream {self.source.name} holds no documents")
                epoch, index, self.epoch_size, self.reader = epoch + 1, 0, index, None
                continue
            lane = self.lanes.get(mix(0, number) % self.n_lanes)
            if lane is not None and number >= lane.next[2]:
                wanted.append((lane, epoch, raw))
            index, number = index + 1, number + 1
        before, self.position = self.position, (epoch, index, number)
        for (lane, of_epoch, _), piece in zip(wanted, self.source.encode([raw for *_, raw in wanted])):
            self.hand(lane, of_epoch, piece)
        for lane in self.lanes.values():
            lane.next = max(lane.next, self.position, key=lambda at: (at[2], at[0]))  # an epoch may end with a read
        return self.position != before

    def hand(self, lane: Lane, epoch: int, piece: Piece | None) -> None:
        """Put a piece where its lane takes it from. Raises NanochatError when a whole epoch gave none."""
        if piece is not None:
            self.report.cropped += piece.cropped
            self.report.dropped_turns += piece.dropped_turns
        if piece is not None and not self.split and len(piece.inputs) > self.T:
            self.report.cropped += len(piece.inputs) - self.T
            piece = Piece(piece.inputs[: self.T], piece.targets[: self.T])
        if piece is not None and (piece.targets != IGNORED).any():
            self.barren = 0
            lane.pending.append((epoch, piece))
            return
        self.report.skipped += 1
        self.barren += 1
        if self.epoch_size and self.barren > self.epoch_size + self.read_ahead:
            raise NanochatError(
                f"the stream {self.source.name} holds nothing to train on ({self.barren:,} documents read)"
            )

    def batch(self, n_rows: int) -> Batch | None:
        """The next `n_rows` rows (fewer at the end of a finite stream), None when there are none."""
        rows: list[list[Piece]] = []
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
        return Cursor(self.source.name, self.base + self.taken * self.world_size, lanes, replace(self.report))

    def state_dict(self) -> dict[str, Any]:
        return self.cursor().state_dict(self.n_lanes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken, on whatever number of processes. Raises UsageError when that was
        with another number of lanes or another source."""
        if state["n_lanes"] != self.n_lanes:
            raise UsageError(f"--n_lanes {self.n_lanes}: the checkpoint was written with {state['n_lanes']}")
        if state["source"] != self.source.name:
            raise UsageError(
                f"the checkpoint was reading {state['source']}, this run reads {self.source.name}: "
                "give the same data and seed, another --run, or --no-resume to start again"
            )
        self.base, self.taken = state["row"], 0
        for lane in self.lanes.values():
            saved = state["lanes"][str(lane.number)]
            lane.next, lane.arrivals = (*saved["next"],), saved["arrivals"]
            lane.pending = deque(part(saved["pending"]))
            arrived = [int(n) for n in np.asarray(saved["arrived"])]
            waiting = (Waiting(e, len(p.inputs), n, p) for n, (e, p) in zip(arrived, part(saved["buffer"])))
            lane.buffer = sorted(waiting, key=lambda item: item[:3])
        self.report = Report(**state["report"])
        self.reader = None


def join(pieces: Collection[tuple[int, Piece]]) -> dict[str, np.ndarray]:
    """Many (epoch, piece) as four arrays, as a checkpoint can hold them."""
    empty = np.zeros(0, dtype=np.int32)
    return {
        "epochs": np.array([epoch for epoch, _ in pieces], dtype=np.int32),
        "sizes": np.array([len(p.inputs) for _, p in pieces], dtype=np.int32),
        "inputs": np.concatenate([p.inputs for _, p in pieces]) if pieces else empty,
        "targets": np.concatenate([p.targets for _, p in pieces]) if pieces else empty,
    }


def part(arrays: dict[str, Any]) -> list[tuple[int, Piece]]:
    """The inverse of `join`."""
    ends = np.cumsum(np.asarray(arrays["sizes"], dtype=np.int64))[:-1]
    epochs = np.asarray(arrays["epochs"]).tolist()
    inputs = np.split(np.asarray(arrays["inputs"], dtype=np.int32), ends)
    targets = np.split(np.asarray(arrays["targets"], dtype=np.int32), ends)
    return [(epoch, Piece(a, b)) for epoch, a, b in zip(epochs, inputs, targets)]
