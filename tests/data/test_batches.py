"""The packed loader: nothing lost, nothing twice, documents apart, and a cursor that is exact whatever happens."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.background import Background
from nanochat.data.batches import IGNORED, Batch, Lane, Packer, Piece
from nanochat.errors import NanochatError, UsageError
from nanochat.nest import pack, unpack

PAD = 2**31


class Numbers:
    """Document d is the pairs (1000 d + i, 1000 d + i + 1); `mask(d, i)` says whether the pair is a target."""

    def __init__(self, lengths: Sequence[int], masked: int = 0, name: str = "numbers") -> None:
        self.lengths, self.masked, self.name = list(lengths), masked, name
        self.n_encoded = 0
        self.starts: list[tuple[int, int]] = []

    def read(self, epoch: int, start: int) -> Iterator[int]:
        self.starts.append((epoch, start))
        return iter(range(start, len(self.lengths)))

    def encode(self, raw: Sequence[int]) -> list[Piece | None]:
        self.n_encoded += len(raw)
        return [self.piece(d) for d in raw]

    def piece(self, d: int) -> Piece | None:
        n = self.lengths[d]
        if not n:
            return None
        inputs = 1000 * d + np.arange(n, dtype=np.int32)
        targets = np.where(np.arange(n) < min(self.masked, n - 1), IGNORED, inputs + 1).astype(np.int32)
        return Piece(inputs, targets)

    def pairs(self, epochs: int = 1) -> Counter[int]:
        return Counter({1000 * d + i: epochs for d, n in enumerate(self.lengths) for i in range(n)})


def drain(packer: Packer, n_rows: int = 3) -> list[Batch]:
    batches = []
    while (batch := packer.batch(n_rows)) is not None:
        batches.append(batch)
    return batches


def take(packer: Packer, n: int, n_rows: int = 2) -> list[Batch]:
    found = [packer.batch(n_rows) for _ in range(n)]
    assert all(batch is not None for batch in found)
    return found  # type: ignore[return-value]


def same(a: Sequence[Batch], b: Sequence[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


def used(batches: Sequence[Batch]) -> Counter[int]:
    return Counter(i for batch in batches for i in batch.inputs.flatten().tolist() if i != PAD)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint writes and reads it."""
    tensors: dict[str, torch.Tensor] = {}
    return unpack(pack(state, tensors, "state"), tensors)


def check_rows(batches: Sequence[Batch], T: int) -> list[list[list[int]]]:
    """What holds for every batch; returns the documents of each row, as their inputs."""
    rows = []
    for batch in batches:
        n = batch.inputs.size(0)
        assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.float32, torch.int32]
        assert all(x.shape == (n, T) for x in batch)
        assert ((batch.targets == IGNORED) == (batch.weights == 0)).all()
        assert (batch.targets != IGNORED).any(dim=1).all()  # no row has nothing to train on
        for inputs, targets, segments in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.segments.tolist()):
            assert segments == sorted(segments)
            documents = []
            for number in sorted(set(segments)):
                part = [i for i, s in zip(inputs, segments) if s == number]
                if part[0] == PAD:  # padding is a segment of its own, at the end, without targets
                    assert set(part) == {PAD}
                    assert number == segments[-1]
                    assert all(t == IGNORED for t, s in zip(targets, segments) if s == number)
                    continue
                assert part == list(range(part[0], part[0] + len(part)))  # a run of one document
                assert all(t in (IGNORED, i + 1) for i, t, s in zip(inputs, targets, segments) if s == number)
                documents.append(part)
            rows.append(documents)
    return rows


lengths_st = st.lists(st.integers(0, 23), min_size=1, max_size=40).filter(lambda x: sum(x) > 0)
quick = settings(max_examples=60, deadline=None)


# ---- nothing lost, nothing twice


@quick
@given(
    lengths_st, st.integers(1, 17), st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(1, 3), st.integers(1, 7)
)
def test_split_documents_lose_and_double_no_pair(
    lengths: list[int], T: int, n_lanes: int, buffer_size: int, epochs: int, read_ahead: int
) -> None:
    source = Numbers(lengths)
    packer = Packer(
        source, T, pad_id=PAD, n_lanes=n_lanes, buffer_size=buffer_size, epochs=epochs, read_ahead=read_ahead
    )
    batches = drain(packer)
    check_rows(batches, T)
    assert used(batches) == source.pairs(epochs)
    n_rows = sum(len(batch.inputs) for batch in batches)
    report = packer.report
    assert report.tokens == epochs * sum(lengths)
    assert report.tokens + report.padded == n_rows * T
    assert report.padded <= n_lanes * (T - 1)  # only the last row of each lane is padded
    assert report.skipped == epochs * lengths.count(0)
    assert report.cropped == 0


@quick
@given(lengths_st, st.integers(1, 30), st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(0, 4))
def test_whole_documents_stay_whole(lengths: list[int], T: int, n_lanes: int, buffer_size: int, masked: int) -> None:
    source = Numbers(lengths, masked)
    packer = Packer(source, T, split=False, pad_id=PAD, n_lanes=n_lanes, buffer_size=buffer_size, epochs=1)
    batches = drain(packer)
    found = Counter(tuple(document) for row in check_rows(batches, T) for document in row)
    # a document whose first T pairs are no targets has nothing to train on
    kept = {d: n for d, n in enumerate(lengths) if n and (min(masked, n - 1) < T)}
    assert found == Counter(tuple(range(1000 * d, 1000 * d + min(n, T))) for d, n in kept.items())
    assert packer.report.cropped == sum(max(0, n - T) for n in lengths)
    assert packer.report.skipped == len(lengths) - len(kept)
    assert packer.report.padded == sum(int((batch.inputs == PAD).sum()) for batch in batches)


@quick
@given(lengths_st, st.integers(1, 8), st.integers(1, 22))
def test_split_prompts_never_fill_a_row_alone(lengths: list[int], T: int, masked: int) -> None:
    packer = Packer(Numbers(lengths, masked), T, pad_id=PAD, n_lanes=2, epochs=1)
    rows = check_rows(drain(packer), T)
    targets = {
        i for row in rows for document in row for i in document if i % 1000 >= min(masked, lengths[i // 1000] - 1)
    }
    assert len(targets) == sum(n - min(masked, n - 1) for n in lengths if n)


def test_a_document_longer_than_many_rows() -> None:
    packer = Packer(Numbers([103]), 8, pad_id=PAD, epochs=1)
    batches = drain(packer)
    assert used(batches) == Numbers([103]).pairs()
    assert packer.report.split == 12
    assert packer.report.padded == 1


def test_one_short_document_fills_endless_rows() -> None:
    batches = take(Packer(Numbers([3]), 8, pad_id=PAD), 20)
    assert all((batch.inputs != PAD).all() for batch in batches)
    whole = take(Packer(Numbers([3]), 8, split=False, pad_id=PAD), 20)
    assert all((batch.inputs != PAD).sum() == 2 * 6 for batch in whole)


@pytest.mark.parametrize("split", [True, False])
def test_every_document_of_a_small_set_gets_its_turn(split: bool) -> None:
    """Fewer documents than lanes, or than a buffer holds: earlier epochs go first, whatever the lengths."""
    for lengths in ([5, 9, 20], [21, 22, 23, 20, 24, 25, 19, 13, 12, 11, 5]):
        batches = take(Packer(Numbers(lengths), 64, split=split, pad_id=PAD), 60)
        times = [count for pair, count in sorted(used(batches).items()) if pair % 1000 == 0]
        assert len(times) == len(lengths)
        assert max(times) <= min(times) + 8, times  # one a lane


def test_a_small_corpus_is_read_before_it_is_read_again() -> None:
    """Long documents whose tails queue: the heads of later epochs in the same buffer have to wait."""
    source = Numbers([100] * 40)
    batches = take(Packer(source, 16, pad_id=PAD, n_lanes=4), 120)  # 3,840 of 4,000 pairs, if each comes once
    found = used(batches)
    assert len(found) > 0.9 * found.total()
    assert max(found.values()) <= 2


def test_no_piece_waits_for_ever() -> None:
    """Lengths that never fill a gap best still come, within as many rows as the buffer holds pieces."""
    lengths = [60, 4] * 500 + [33] + [60, 4] * 500
    packer = Packer(Numbers(lengths), 64, split=False, pad_id=PAD, n_lanes=1, buffer_size=16)
    rows = check_rows(take(packer, 600, n_rows=1), 64)
    assert next(i for i, row in enumerate(rows) if 33 in map(len, row)) < 500 + 17


@quick
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), max_size=9), st.integers(1, 30))
def test_no_choice_of_whole_documents_fills_a_gap_better(waiting: list[tuple[int, int]], room: int) -> None:
    lane = Lane(0)
    for length, epoch in sorted(waiting, key=lambda one: one[1]):
        lane.insert(epoch, Piece(np.zeros(length, dtype=np.int32), np.full(length, lane.arrivals, dtype=np.int32)))
    before = {one.arrival: one for one in lane.buffer}
    usable = [one.length for one in lane.buffer if one.epoch <= lane.buffer[0].epoch + 1]
    best = max(sum(some) for n in range(len(usable) + 1) for some in combinations(usable, n) if sum(some) <= room)
    taken = {int(piece.targets[0]) for piece in lane.fill(room)}
    assert sum(before[arrival].length for arrival in taken) == best
    assert [one.arrival for one in lane.buffer] == [a for a in before if a not in taken]  # in order, all but those


def test_little_is_padding_where_conversations_stay_whole() -> None:
    """Lengths as of short chats in rows of 256."""
    lengths = np.random.default_rng(0).lognormal(3.6, 0.6, 4000).astype(int).clip(8, 256).tolist()
    packer = Packer(Numbers(lengths), 256, split=False, pad_id=PAD)
    take(packer, 40, n_rows=8)
    assert packer.report.padded_share < 0.001
    assert packer.report.cropped == 0


def test_alternating_lengths_do_not_pile_up() -> None:
    """Every second document long: lanes chosen by remainder would read ahead without end."""
    packer = Packer(Numbers([400, 4] * 2000), 64, pad_id=PAD)
    take(packer, 300, n_rows=8)
    assert max(len(lane.pending) for lane in packer.lanes.values()) < 300


# ---- the cursor


@settings(max_examples=40, deadline=None)
@given(
    lengths_st, st.integers(2, 17), st.booleans(), st.integers(0, 6), st.integers(1, 9), st.integers(1, 7), st.data()
)
def test_resuming_at_any_batch_goes_on_as_if_nothing_had_happened(
    lengths: list[int], T: int, split: bool, n: int, buffer_size: int, read_ahead: int, data: st.DataObject
) -> None:
    epochs = data.draw(st.sampled_from([None, 2]))

    def packer() -> Packer:
        source = Numbers(lengths, masked=1)
        return Packer(
            source, T, split=split, pad_id=PAD, n_lanes=4, buffer_size=buffer_size, read_ahead=read_ahead, epochs=epochs
        )

    def some(of: Packer, count: int) -> list[Batch]:
        return [batch for _ in range(count) if (batch := of.batch(2)) is not None]

    first = packer()
    some(first, n)
    state = through_json(first.state_dict())
    second = packer()
    second.load_state_dict(state)
    assert same(some(second, 6), some(first, 6))
    assert second.report == first.report


@settings(max_examples=30, deadline=None)
@given(lengths_st, st.booleans(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_any_number_of_processes_sees_the_same_rows(
    lengths: list[int], split: bool, before: int, after: int, n: int
) -> None:
    """8 rows a step, the run cut after n steps and resumed on another number of processes."""

    def ranks(world_size: int) -> list[Packer]:
        return [
            Packer(Numbers(lengths), 11, split=split, pad_id=PAD, rank=r, world_size=world_size, buffer_size=5)
            for r in range(world_size)
        ]

    def step(packers: list[Packer]) -> list[torch.Tensor]:
        found = [packer.batch(8 // len(packers)) for packer in packers]
        rows = [[batch.inputs[i] for batch in found if batch is not None] for i in range(8 // len(packers))]
        return [row for turn in rows for row in turn]

    alone = ranks(1)
    expected = [step(alone) for _ in range(n + 3)]
    packers = ranks(before)
    found = [step(packers) for _ in range(n)]
    states = [packer.state_dict() for packer in packers]
    for other in states[1:]:
        states[0]["lanes"].update(other["lanes"])
    packers = ranks(after)
    for packer in packers:
        packer.load_state_dict(through_json(states[0]))
    found += [step(packers) for _ in range(3)]
    for a, b in zip(found, expected):
        assert torch.equal(torch.stack(a), torch.stack(b))


def test_an_odd_number_of_rows_can_be_resumed_by_two_processes() -> None:
    lengths = [3, 8, 2, 9, 4, 7]
    alone = Packer(Numbers(lengths), 11, pad_id=PAD)
    take(alone, 1, n_rows=3)
    state = alone.state_dict()
    expected = sorted(row.tolist() for batch in take(alone, 2, n_rows=4) for row in batch.inputs)
    found = []
    for rank in range(2):
        packer = Packer(Numbers(lengths), 11, pad_id=PAD, rank=rank, world_size=2)
        packer.load_state_dict(state)
        found += [row.tolist() for batch in take(packer, 2) for row in batch.inputs]
    assert sorted(found) == expected


def test_a_rank_encodes_its_own_documents_only() -> None:
    sources = [Numbers([5] * 400) for _ in range(4)]
    for rank, source in enumerate(sources):
        take(Packer(source, 16, rank=rank, world_size=4, epochs=1, buffer_size=400), 1)
    assert sum(source.n_encoded for source in sources) == 400


def test_a_resumed_stream_reads_from_where_it_was() -> None:
    lengths = [5] * 100_000
    packer = Packer(Numbers(lengths), 16)
    take(packer, 500)
    source = Numbers(lengths)
    again = Packer(source, 16)
    again.load_state_dict(packer.state_dict())
    take(again, 50)
    ((epoch, start),) = source.starts
    assert epoch == 0
    assert start > 1000
    assert source.n_encoded < 1000


def test_a_cursor_of_other_lanes_or_data_is_refused() -> None:
    state = Packer(Numbers([4]), 8).state_dict()
    with pytest.raises(UsageError, match="--n_lanes 4: the checkpoint was written with 8"):
        Packer(Numbers([4]), 8, n_lanes=4).load_state_dict(state)
    with pytest.raises(UsageError, match="was reading numbers, this run reads letters"):
        Packer(Numbers([4], name="letters"), 8).load_state_dict(state)
    with pytest.raises(UsageError, match="--n_lanes 8 must be a multiple of the number of processes, 3"):
        Packer(Numbers([4]), 8, world_size=3)


# ---- streams that give nothing


def test_an_empty_stream_is_an_error() -> None:
    with pytest.raises(NanochatError, match="the stream numbers holds no documents"):
        Packer(Numbers([]), 8).batch(1)


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_a_stream_with_nothing_to_train_on_is_an_error(n: int) -> None:
    with pytest.raises(NanochatError, match="the stream numbers holds nothing to train on"):
        Packer(Numbers([0] * n), 8).batch(1)
    assert Packer(Numbers([0] * n), 8, epochs=1).batch(1) is None


# ---- the thread


def test_the_background_gives_what_the_foreground_gives() -> None:
    lengths = [3, 8, 2, 9, 4, 7, 30]
    expected = drain(Packer(Numbers(lengths), 5, pad_id=PAD, epochs=3), n_rows=2)
    background = Background(Packer(Numbers(lengths), 5, pad_id=PAD, epochs=3), 2)
    assert same(list(background), expected)
    with pytest.raises(StopIteration):  # the end stays the end
        next(background)
    background.close()


def test_the_background_cursor_is_that_of_the_last_batch_taken() -> None:
    lengths = [3, 8, 2, 9, 4, 7, 30]
    background = Background(Packer(Numbers(lengths), 5, pad_id=PAD), 2, ahead=3)
    front = Packer(Numbers(lengths), 5, pad_id=PAD)
    for n in range(5):
        state = Packer(Numbers(lengths), 5, pad_id=PAD)
        state.load_state_dict(background.state_dict())
        assert same(take(state, 2), take_copy(front)), n
        assert same([next(background)], take(front, 1))
    assert background.cursor.report == front.report
    background.close()
    assert not background.thread.is_alive()


def take_copy(packer: Packer) -> list[Batch]:
    """The next two batches, without moving on."""
    copy = Packer(packer.source, packer.T, pad_id=PAD)
    copy.load_state_dict(packer.state_dict())
    return take(copy, 2)


class Failing(Numbers):
    def encode(self, raw: Sequence[int]) -> list[Piece | None]:
        if self.n_encoded > 100:
            raise NanochatError("broken.jsonl, line 7: no text")
        return super().encode(raw)


def test_an_error_in_the_thread_reaches_the_consumer() -> None:
    background = Background(Packer(Failing([5] * 1000), 8, buffer_size=2), 2)
    for _ in range(2):  # and the next one who asks
        with pytest.raises(NanochatError, match=r"broken\.jsonl, line 7"):
            for _ in background:
                pass
    background.close()


def test_closing_does_not_wait_for_a_full_queue() -> None:
    n_threads = threading.active_count()
    background = Background(Packer(Numbers([5]), 8), 2, ahead=1)
    next(background)
    background.close()
    background.close()
    assert threading.active_count() == n_threads
