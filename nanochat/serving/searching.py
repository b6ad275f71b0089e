"""Answers for which the model searches by itself, several times: one after the other, on a thread of their own.

Such an answer stops at every query until its documents are found and read (`rag.multihop_chat`); to the rest of the
server it looks as if the scheduler wrote it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from nanochat.engine.batching import Event, Overloaded, Request, Ticket
from nanochat.engine.sampling import Sampling
from nanochat.rag.multihop_chat import MultiHopChat, SearchedAnswer
from nanochat.runtime import log

MAX_WAITING = 8


class Search:
    """One answer on its way: a ticket like any other, and at its end the answer with what was searched and found."""

    def __init__(
        self, chat: MultiHopChat, conversation: Sequence[Mapping[str, Any]], sampling: Sampling, seconds: float
    ) -> None:
        self.chat, self.conversation = chat, conversation
        self.ticket = Ticket(Request((), sampling, deadline=seconds), wake=lambda: None)
        self.answer: SearchedAnswer | None = None

    def run(self) -> None:
        """Write the answer. Whoever left is noticed between two pieces of text."""
        ticket = self.ticket
        ticket.read_at = time.perf_counter()
        try:
            pieces = self.chat.stream_chat(self.conversation, **asdict(ticket.request.sampling))
            while not (reason := ticket.stopped(time.perf_counter())):
                piece = next(pieces)
                ticket.first_at = ticket.first_at or time.perf_counter()
                ticket.emit(Event(0, piece, [], [], "", []))
            pieces.close()
            ticket.end(reason)
        except StopIteration as end:
            self._finish(end.value)
        except Exception as error:
            log.error("an answer with searches failed: %s", error, exc_info=error)
            ticket.end("error", error)

    def _finish(self, answer: SearchedAnswer) -> None:
        assert answer.completion is not None
        assert answer.rollout is not None
        self.answer, said = answer, answer.completion
        read = len(answer.rollout.ids) - len(said.ids)  # what searches brought counts as prompt
        self.ticket.request = replace(self.ticket.request, ids=[*answer.rollout.prompt, *[0] * read])
        reason = "length" if said.finish_reason == "length" else "stop"
        self.ticket.emit(Event(0, "", said.ids, said.logprobs, reason, []))


class Searches:
    """Their queue and thread."""

    def __init__(self) -> None:
        self._running: set[Search] = set()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    def submit(self, search: Search) -> Ticket:
        """Line up. Raises Overloaded when too many wait already."""
        with self._lock:
            if len(self._running) >= MAX_WAITING:
                raise Overloaded("too many answers with searches are waiting; try again later", 10.0)
            self._running.add(search)
        self._thread.submit(self._run, search)
        return search.ticket

    def close(self) -> None:
        """Cancel what still runs and end the thread."""
        with self._lock:
            for search in self._running:
                search.ticket.cancel()
        self._thread.shutdown()

    def _run(self, search: Search) -> None:
        try:
            search.run()
        finally:
            with self._lock:
                self._running.discard(search)
