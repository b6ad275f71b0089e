"""Calls of completions that pause for them, on threads of their own: a search takes as long as it takes, and the model
goes on with everybody else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from nanochat.engine.ticket import Guide

THREADS = 4  # calls at the same time; more wait

Who = TypeVar("Who")


@dataclass(frozen=True)
class Called(Generic[Who]):
    """What a call came to: tokens to read, and why it was the end, where it was (see `Guide.call`); or an error."""

    who: Who
    ids: list[int]
    finish_reason: str
    error: Exception | None = None


class Calls(Generic[Who]):
    """Their threads, and what has come back. `wake` is called from one of the threads whenever something has."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._done: deque[Called[Who]] = deque()
        self._threads: ThreadPoolExecutor | None = None  # most schedulers never need any

    def start(self, who: Who, guide: Guide) -> Future[None]:
        """Begin a call. Whoever has lost interest in it before its turn cancels the future."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="calls")
        return self._threads.submit(self._call, who, guide)

    @property
    def come(self) -> bool:
        """Whether any has come back."""
        return bool(self._done)

    def done(self) -> list[Called[Who]]:
        """Those that have come back since the last time."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self) -> None:
        """Wait for those that run; the others are dropped."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def _call(self, who: Who, guide: Guide) -> None:
        try:
            self._done.append(Called(who, *guide.call()))
        except Exception as error:  # a tool may raise anything
            self._done.append(Called(who, [], "error", error))
        self._wake()
