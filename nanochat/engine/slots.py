"""States of a batch whose rows come and go: memory with room for more rows and tokens, where one row is written or
moved without copying the others. With 32 rows of 300 tokens (4 layers of attention, width 256, one CPU core), copying
all of them for one that joins takes ten times as long as decoding a token for each.

Nothing here asks what kind a state is: a tensor grows along the dimension in which it differs from an empty state's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nanochat.engine import cache
from nanochat.model.mixer import State

SPARE_TOKENS = 256  # room behind the longest row
ROWS = 4  # room is made for so many rows at once
COHORTS = 8  # more are counted as one


class Slots:
    """`states` are those of the first `n` slots, and the model may advance them.

    The rows of `states` are the first; `empty`: states that have read nothing; `more`: how many rows will join soon.

    Rows that came together (a cohort) stay side by side when others leave: they are of similar length, and attention
    over a run of rows costs as much as if all were as long as the longest of them.
    """

    def __init__(self, states: list[State], empty: Sequence[State], more: int = 0) -> None:
        self.states = states
        self.n = next(iter(states[0].tensors().values())).size(0)
        self._cohorts = [self.n]  # rows of each, in order
        self._dims = [[cache.growing(x, e) for x, e in zip(_tensors(s), _tensors(o))] for s, o in zip(states, empty)]
        self._room = (0, 0)  # rows, tokens
        self._used = 0  # tokens: behind them all slots are zero
        self._full: list[list[Tensor]] = [[] for _ in states]  # by layer: the tensors with all their room
        self._make_room(self.n + more, self._longest(states))

    def join(self, states: list[State]) -> None:
        """Append the rows of these states."""
        more = next(iter(states[0].tensors().values())).size(0)
        longest = self._longest(self.states)
        self._used = max(self._used, longest)
        self._make_room(self.n + more, max(longest, self._longest(states)))
        for state, full, dims in zip(states, self._full, self._dims):
            for slots, x, d in zip(full, _tensors(state), dims):
                _write(slots[self.n : self.n + more], x, d, self._used)
        self.n += more
        self._cohorts.append(more)
        if len(self._cohorts) > COHORTS:
            self._merge_cohorts()
        self._show()

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Forget all other rows; in each cohort the last rows move to the places that become free. Returns the new
        order."""
        order = self._order(set(rows))
        longest = self._longest(self.states)
        self._used = max(self._used, longest)
        self._write_back()
        moved = [(place, row) for place, row in enumerate(order) if place != row]
        for slots, d in ((x, d) for full, dims in zip(self._full, self._dims) for x, d in zip(full, dims)):
            used = slots if d is None else slots.narrow(d, 0, self._used)
            for place, row in moved:  # from the first place on: what stood there has moved already, or goes
                used[place].copy_(used[row])
        self.n = len(order)
        self._show()
        return order

    def _order(self, kept: set[int]) -> list[int]:
        """Which row each place gets, and the cohorts counted anew. A row only ever moves to the front."""
        order: list[int] = []
        cohorts, end = [], 0
        for size in self._cohorts:
            begin, end = end, end + size
            rows = [row for row in range(begin, end) if row in kept]
            places = range(len(order), len(order) + len(rows))
            later = [row for row in rows if row not in places]
            order += [place if place >= begin and place in kept else later.pop() for place in places]
            cohorts.append(len(rows))
        self._cohorts = [size for size in cohorts if size]
        return order

    def _merge_cohorts(self) -> None:
        """The two neighbours with the fewest rows become one."""
        sizes = self._cohorts
        i = min(range(len(sizes) - 1), key=lambda i: sizes[i] + sizes[i + 1])
        sizes[i : i + 2] = [sizes[i] + sizes[i + 1]]

    def reserve(self, n: int) -> None:
        """Room for n more tokens in every row."""
        longest = self._longest(self.states)
        if longest + n > self._room[1] > 0 and longest:
            self._make_room(self.n, longest + n)

    def _longest(self, states: Sequence[State]) -> int:
        sizes = [x.size(d) for s, dims in zip(states, self._dims) for x, d in zip(_tensors(s), dims) if d is not None]
        return max(sizes, default=0)

    def _make_room(self, n_rows: int, n_tokens: int) -> None:
        """Other memory, where there is too little or more than twice what is needed."""
        rows, tokens = self._room
        need_rows, need_tokens = -(-n_rows // ROWS) * ROWS, n_tokens + SPARE_TOKENS
        if n_rows <= rows and n_tokens <= tokens and rows * tokens <= 2 * need_rows * need_tokens:
            return self._write_back()
        if need_rows <= rows <= 2 * need_rows:  # they will be back: rows that wait for a search join again
            need_rows = rows
        self._room = need_rows, need_tokens
        for layer, (state, dims) in enumerate(zip(self.states, self._dims)):
            full = []
            for x, d in zip(_tensors(state), dims):
                shape = [need_rows, *(need_tokens if i == d else size for i, size in enumerate(x.shape[1:], 1))]
                full.append(x.new_zeros(shape))
                _write(full[-1][: self.n], x, d)
            self._full[layer] = full
            self.states[layer] = _view(state, full, self.n)  # the old memory goes, layer by layer
        self._used = self._longest(self.states)

    def _write_back(self) -> None:
        """Into the slots what the model has put elsewhere."""
        for state, full, dims in zip(self.states, self._full, self._dims):
            for slots, x, d in zip(full, _tensors(state), dims):
                if x.data_ptr() != slots.data_ptr():
                    _write(slots[: self.n], x, d, self._used)

    def _show(self) -> None:
        self.states = [_view(state, full, self.n) for state, full in zip(self.states, self._full)]


def _tensors(state: State) -> list[Tensor]:
    return list(state.tensors().values())


def _write(slots: Tensor, x: Tensor, d: int | None, used: int = 0) -> None:
    """Rows into their slots; behind them, in the first `used` tokens, goes what another row has left there (attention
    reads it and gives it no weight, but what is no number would spoil the sum)."""
    if d is not None:
        n = x.size(d)
        if used > n:
            slots.narrow(d, n, used - n).zero_()
        slots = slots.narrow(d, 0, n)
    slots.copy_(x)


def _view(state: State, full: Sequence[Tensor], n: int) -> State:
    """A state of this kind over the first n slots, with all their room."""
    slots = iter(full)  # `State.map` visits the tensors in the order of `State.tensors`
    return state.map(lambda _: next(slots)[:n])
