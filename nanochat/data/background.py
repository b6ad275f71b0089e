"""Batches made in a thread while the model works on earlier ones; the cursor is that of the consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

from nanochat.data.batches import Batch, Cursor, Packer

Made: TypeAlias = "tuple[Batch, Cursor] | BaseException | None"


class Background:
    """Makes batches in a thread, a few ahead. `cursor` stands behind the batch taken last, whatever was made ahead."""

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
        if not isinstance(item, tuple):  # the thread has ended: say so again to whoever asks again
            self.ready.put(item)
            if item is None:
                raise StopIteration
            raise item
        batch, self.cursor = item
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.cursor.state_dict(self.packer.n_lanes)

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
