"""Chat in which the model searches on its own, hop by hop, before it answers.

    chat = nanochat.load("refrag").with_search("kb")
    answer = chat.chat("Where was the founder of Torwick born?")
    print(answer)             # The founder of Torwick was born in Brimholt. [3]     [3] Mara Velt (people.jsonl)
    [hop.query for hop in answer.hops]

The same loop as in training and evaluation (`engine.rollout`), with one row; or, on a server, beside other requests
(`MultiHopChat.prepare`, `engine.batching`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from nanochat.data.answers import ABSTENTION
from nanochat.engine.generate import Completion
from nanochat.engine.prefix import PrefixCache
from nanochat.engine.rollout import MAX_CALL_TOKENS, Guided, Rollout, Step, steps
from nanochat.engine.sampling import Sampling, make_sampling
from nanochat.engine.text import TextStream
from nanochat.errors import NanochatError, UsageError
from nanochat.model.lm import LM
from nanochat.rag.calibration import DEFAULT, Calibration
from nanochat.rag.citation_stream import CitationStream
from nanochat.rag.citations import headings_in
from nanochat.rag.grounded import GroundedAnswer, as_messages, lay_out
from nanochat.rag.knowledge import Searcher, check_searcher
from nanochat.rag.multihop import (
    Hop,
    Query,
    SearchTool,
    Select,
    Stop,
    as_written,
    believed,
    documents_of,
    hops_of,
    read_answer,
)
from nanochat.rag.support import Support, support
from nanochat.tasks.task import message_text
from nanochat.tokenizer import Tokenizer

HOP_K = 2  # documents of each search, unless a model was trained with others


@dataclass(frozen=True)
class SearchedAnswer(GroundedAnswer):
    """An answer, what it rests on, and the searches that led there. `query` is the last search's, `completion` what the
    model said without what it read."""

    hops: tuple[Hop, ...] = ()
    rollout: Rollout | None = None


class MultiHopChat:
    """A model that searches a knowledge base while it answers. Several conversations and threads may share one.

    knowledge: anything with `search(queries, k)`. max_hops: searches an answer. top_k: documents a search. query,
    select, stop: see `rag.multihop`. cache: keeps the states of conversations, so that the next turn reads only what
    is new (None: one of its own of 256 MB; `PrefixCache(0)`: none). Raises UsageError for values out of range and an
    empty knowledge base.
    """

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        knowledge: Searcher,
        *,
        max_hops: int = 3,
        top_k: int = HOP_K,
        query: Query = as_written,
        select: Select | None = None,
        stop: Stop | None = None,
        cache: PrefixCache | None = None,
        calibration: Calibration = DEFAULT,
    ) -> None:
        if max_hops < 0:
            raise UsageError(f"max_hops {max_hops}: expected 0 (no search) or more")
        check_searcher(knowledge)
        self.model, self.tokenizer, self.knowledge = model, tokenizer, knowledge
        self.max_hops, self.top_k, self.calibration = max_hops, top_k, calibration
        self.cache = PrefixCache() if cache is None else cache
        self.hooks: dict[str, Any] = {"query": query, "select": select, "stop": stop}
        self.tool("")  # so that values out of range are told at once

    @property
    def context(self) -> int:
        """Tokens that prompt, searches and answer may have together."""
        return self.model.config.sequence_len

    @property
    def room(self) -> int:
        """Tokens of the prompt: half of the context; the other half is for what will be found, and the answer."""
        return self.context // 2

    def shown(self, messages: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A conversation as the model reads it: what is too long has lost its oldest turns."""
        return lay_out(as_messages(messages), [], self.tokenizer, self.room)[1]

    def tool(self, question: str) -> SearchTool:
        return SearchTool(self.tokenizer, self.knowledge, self.top_k, questions=[question], **self.hooks)

    def chat(self, messages: str | Sequence[Mapping[str, Any]], **sampling: Any) -> SearchedAnswer:
        """The answer to a conversation: a list of {"role", "content"}, or just a question. Keyword arguments are the
        fields of `Sampling`; the temperature is 0 unless it is given, and max_tokens is that of what is said:
        queries come on top. Raises UsageError for a conversation without a question, NanochatError when a search
        fails."""
        pieces = self.stream_chat(messages, **sampling)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def stream_chat(
        self, messages: str | Sequence[Mapping[str, Any]], **sampling: Any
    ) -> Generator[str, None, SearchedAnswer]:
        """As `chat`, piece by piece: what the model says beside its queries. The generator returns the answer."""
        began = time.perf_counter()
        ids, question, chosen, visible = self._begin(messages, sampling)
        running = steps(
            self.model, self.tokenizer, [ids], chosen, 1, [self.tool(question)], self.max_hops,
            at_limit="forbid", until=visible.push, prefix_cache=self.cache if self.cache.max_bytes else None,
        )  # fmt: skip
        for step in chain.from_iterable(running):
            visible.read(step)
            if piece := visible.released():
                yield piece
        assert step.finished is not None
        return self._finish(step.finished, question, visible, began)

    def prepare(self, messages: str | Sequence[Mapping[str, Any]], **sampling: Any) -> Searching:
        """As `stream_chat`, for a scheduler to write: arguments and errors are the same."""
        return Searching(self, *self._begin(messages, sampling))

    def _begin(
        self, messages: str | Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> tuple[list[int], str, Sampling, _Visible]:
        """The prompt, the question, how to sample queries and answer, and what will be seen of them."""
        shown, chosen = self.shown(messages), make_sampling({"temperature": 0.0, **sampling})
        ids = self.tokenizer.render_prompt({"messages": shown}, self.room).ids
        visible = _Visible(self.tokenizer, chosen.stop, chosen.max_tokens)
        longest = chosen.max_tokens + self.max_hops * (MAX_CALL_TOKENS + 2)
        return ids, message_text(shown[-1]), replace(chosen, max_tokens=longest, stop=()), visible

    def _finish(self, rollout: Rollout, question: str, visible: _Visible, began: float) -> SearchedAnswer:
        if rollout.error:
            raise NanochatError(rollout.error)
        hops, documents = hops_of(rollout.calls), documents_of(rollout.calls)
        answer = believed(read_answer(rollout, self.tokenizer))
        grounds: list[Support] = []
        if documents and not answer.abstained:
            grounds = support(answer, documents, question=question, calibration=self.calibration)
        own = [(i, p) for i, sampled, p in zip(rollout.ids, rollout.sampled, rollout.logprobs) if sampled]
        reason = "length" if visible.full else rollout.finish_reason
        completion = Completion([i for i, _ in own], visible.said, [p for _, p in own], reason)
        return SearchedAnswer(
            visible.said, answer, documents, tuple(grounds), hops[-1].query if hops else "",
            time.perf_counter() - began, completion, hops, rollout,
        )  # fmt: skip


class Searching:
    """An answer with searches, on its way through a scheduler:
    `Request(s.ids, s.sampling, guide=s, decoder=s.decoder)`. Its text is what the model says beside its queries."""

    def __init__(
        self, chat: MultiHopChat, ids: list[int], question: str, sampling: Sampling, visible: _Visible
    ) -> None:
        self.chat, self.ids, self.question, self.sampling, self._visible = chat, ids, question, sampling, visible
        self._began = time.perf_counter()
        self._guided = Guided(
            chat.model, chat.tokenizer, ids, sampling, [chat.tool(question)], chat.max_hops,
            at_limit="forbid", until=lambda row, token: visible.ended,
        )  # fmt: skip

    @property
    def max_results(self) -> int:
        return self._guided.max_results

    @property
    def forbidden(self) -> Sequence[int]:
        return self._guided.forbidden

    @property
    def paused(self) -> bool:
        return self._guided.paused

    def decoder(self) -> _Shown:
        """What turns tokens into text. It holds what was said: one request only."""
        return _Shown(self._visible)

    def take(self, token: int, logprob: float) -> str:
        return self._ended(self._guided.take(token, logprob))

    def call(self) -> tuple[list[int], str]:
        ids = self._guided.call()
        self._visible.read(Step(0, ids, False))
        return ids, self._ended(self._guided.rollout.finish_reason)

    def finish(self) -> SearchedAnswer:
        """The answer, after the last event. Raises NanochatError for one that failed."""
        return self.chat._finish(self._guided.rollout, self.question, self._visible, self._began)

    def _ended(self, reason: str) -> str:
        """Why it ended, as of a completion: one call too many is an end like another."""
        if reason == "error":
            raise NanochatError(self._guided.rollout.error)
        return "stop" if reason == "calls" else "length" if reason and self._visible.full else reason


class _Shown:
    """A decoder for `Engine`: what is visible."""

    def __init__(self, visible: _Visible) -> None:
        self.visible = visible

    def feed(self, ids: int) -> str:
        self.visible.push(0, ids)
        return self.visible.released()

    def flush(self) -> str:
        self.visible.finish()
        return self.visible.released()


class _Visible:
    """The text of a rollout: what the model says outside of its calls, or the abstention where it would rest on a
    document that was not found (`multihop.believed`)."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], max_tokens: int) -> None:
        self.decoder = CitationStream(tokenizer, [])
        self.text = TextStream(self.decoder, stop)
        self.start, self.end = tokenizer.special(SearchTool.start), tokenizer.special(SearchTool.end)
        self.inside = self.unfounded = False
        self.said = self.held = ""
        self.room = max_tokens

    @property
    def ended(self) -> bool:
        """Whether no more is to be said."""
        return self.text.stopped or self.full or self.unfounded

    @property
    def full(self) -> bool:
        """Whether max_tokens ended it, and no stop string."""
        return self.room <= 0 and not self.text.stopped

    def push(self, row: int, token: int) -> bool:
        """Take a token; whether it was the last: a stop string is complete, enough was said, or nothing should be."""
        if token == self.start:
            self.inside = True
        elif token == self.end:
            self.inside = False
        elif not self.inside:
            piece = self.text.push(token)
            self.room -= 1
            if self.decoder.adrift and self.decoder.begun:
                self.unfounded, self.held = True, ABSTENTION
            else:
                self.held += piece
        return self.ended

    def read(self, step: Step) -> None:
        """What else a step brings: documents that may be cited from now on, or the end."""
        if not step.sampled:
            self.decoder.headings += headings_in(step.ids, self.decoder.tokenizer)
        if step.finished is not None:
            self.finish()

    def finish(self) -> None:
        """What is still held back is said; where that is nothing, such as behind a query that has no end, an
        abstention."""
        if not self.unfounded:
            self.held += self.text.finish()
            if not self.decoder.begun and not self.text.stopped:
                self.unfounded, self.held = True, ABSTENTION

    def released(self) -> str:
        """The text that is new."""
        piece, self.held = self.held, ""
        self.said += piece
        return piece
