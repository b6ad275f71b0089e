"""Calls on threads of their own."""

from __future__ import annotations

import threading

from nanochat.engine.calls import THREADS, Called, Calls


class Told:
    """A guide whose call ends when it is told to."""

    def __init__(self, result=([1, 2], "")) -> None:
        self.go, self.result, self.called = threading.Event(), result, False

    def call(self):
        self.called = True
        assert self.go.wait(20)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_calls_come_back_when_they_are_done():
    woken = threading.Semaphore(0)
    calls: Calls[str] = Calls(woken.release)
    slow, quick, broken = Told(), Told(([3], "length")), Told(ValueError("no"))
    for name, guide in (("slow", slow), ("quick", quick), ("broken", broken)):
        calls.start(name, guide)
    assert not calls.come
    for guide in (quick, broken):
        guide.go.set()
        assert woken.acquire(timeout=20)
    assert calls.come
    found = {called.who: called for called in calls.done()}
    broke = Called("broken", [], "error", broken.result)
    assert found == {"quick": Called("quick", [3], "length"), "broken": broke}
    assert not calls.come
    slow.go.set()
    calls.close()
    assert calls.done() == [Called("slow", [1, 2], "")]


def test_who_gives_up_in_line_is_never_called():
    calls: Calls[int] = Calls(lambda: None)
    guides = [Told() for _ in range(THREADS + 1)]
    futures = [calls.start(i, guide) for i, guide in enumerate(guides)]
    assert futures[-1].cancel()
    for guide in guides:
        guide.go.set()
    calls.close()
    assert [guide.called for guide in guides] == [True] * THREADS + [False]
    assert sorted(called.who for called in calls.done()) == list(range(THREADS))
