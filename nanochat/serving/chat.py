"""POST /v1/chat/completions: with or without documents, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from nanochat.engine import batching
from nanochat.engine.batching import Ticket
from nanochat.engine.generate import Completion
from nanochat.engine.prefix import PrefixCache
from nanochat.engine.sampling import Sampling
from nanochat.rag.grounded import NOTHING_FOUND, Asked, GroundedAnswer, GroundedChat, left_out
from nanochat.rag.multihop_chat import MultiHopChat, Searching
from nanochat.retrieval.document import Document
from nanochat.serving import answers
from nanochat.serving.answers import Choice
from nanochat.serving.errors import ApiError, from_exception
from nanochat.serving.knowledge import citation
from nanochat.serving.models import Served, Service, client_of, service_of
from nanochat.serving.schema import ChatRequest, Retrieval
from nanochat.serving.streams import DONE, EventStream, Frames, events, frame, unless_left
from nanochat.serving.strict import StrictRoute

router = APIRouter(route_class=StrictRoute)
TOP_K = 5  # documents of an answer
LEFT = 499  # the client left before the answer; nobody reads this


@dataclass
class Turn:
    """One request, laid out for its model."""

    served: Served
    body: ChatRequest
    ids: list[int]
    sampling: Sampling
    grounded: GroundedChat | None = None
    asked: Asked | None = None
    search: Searching | None = None
    drafts: Sequence[Ticket] = ()  # what came before the answer, see `rag.grounded`
    dropped_turns: int = 0
    truncated_tokens: int = 0

    @property
    def n(self) -> int:
        return self.body.n or 1

    @property
    def settled(self) -> Completion | None:
        """The answer where the model has nothing more to say: nothing was found, or its draft stands."""
        if self.asked is None:
            return None
        return Completion([], NOTHING_FOUND, [], "stop") if self.asked.nothing_found else self.asked.settled

    def request(self, client: str, seconds: float) -> batching.Request:
        if (search := self.search) is not None:
            return batching.Request(
                search.ids, search.sampling, 1, client, seconds, decoder=search.decoder, guide=search
            )
        decoder = self.grounded.decoder(self.asked) if self.grounded and self.asked else None
        return batching.Request(
            self.ids, self.sampling, self.n, client, seconds,
            decoder=decoder, top_logprobs=self.body.top_logprobs or 0,
        )  # fmt: skip

    def logprobs(self, choice: Choice, start: int = 0) -> dict[str, Any] | None:
        """Of the tokens from `start` on; None where they were not asked for."""
        if not self.body.logprobs:
            return None
        tokenizer = self.served.chat.tokenizer
        return answers.chat_logprobs(tokenizer, choice.ids[start:], choice.logprobs[start:], choice.top[start:])

    def ground(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What the answers rest on."""
        if self.search is not None:
            answer = self.search.finish()
            trace = [{"query": hop.query, "documents": _numbered(hop.documents, hop.first)} for hop in answer.hops]
            return _rests_on([answer], _numbered(answer.documents)) | {"trace": trace}
        if self.grounded is None or self.asked is None:
            return {}
        finish = partial(self.grounded.finish, self.asked)
        found = [finish(None if self.asked.nothing_found else choice.completion()) for choice in choices]
        documents = _numbered(self.asked.block.documents)
        return _rests_on(found, documents) | {"trace": [{"query": self.asked.query, "documents": documents}]}

    def cut(self) -> dict[str, Any]:
        """What was left out of a conversation that is too long."""
        if not self.dropped_turns and not self.truncated_tokens:
            return {}
        return {"truncated": {"turns": self.dropped_turns, "tokens": self.truncated_tokens}}


@router.post("/v1/chat/completions", response_model=None)
async def create(request: Request, body: ChatRequest, service: Annotated[Service, Depends(service_of)]) -> Response:
    """An answer to a conversation."""
    served = service.model(body.model)
    check_n(body.n or 1, service)
    turn = await service.run(prepare, served, body, service)
    if turn.grounded is not None and turn.asked is not None and turn.grounded.drafts(turn.asked):
        made = turn.request(client_of(request), service.settings.max_seconds)
        turn.drafts = await service.run(answers.submit, served, [replace(made, n=1, top_logprobs=0)])
        if await unless_left(request, settle(service, turn, turn.grounded, turn.asked)) is None:
            return Response(status_code=LEFT)
    if turn.settled is not None:
        tickets: list[Ticket] = []
    else:
        made = turn.request(client_of(request), service.settings.max_seconds)
        tickets = await service.run(answers.submit, served, [made])
    if body.stream:
        return EventStream(stream(service, turn, tickets), tickets)
    record = await unless_left(request, whole(service, turn, tickets))
    return Response(status_code=LEFT) if record is None else JSONResponse(record)


async def settle(service: Service, turn: Turn, grounded: GroundedChat, asked: Asked) -> Asked:
    """Read the draft; it says what to ask next."""
    draft = Choice(0)
    try:
        async with aclosing(events(turn.drafts)) as arriving:
            async for _, event in arriving:
                draft.add(event)
    finally:
        answers.count(service.metrics, turn.served, turn.drafts)
    turn.asked = await service.run(grounded.settle, asked, draft.completion())
    turn.ids = turn.asked.ids
    return turn.asked


def check_n(n: int, service: Service) -> None:
    """Raises ApiError for more answers than the server gives."""
    if n > service.settings.max_n:
        raise ApiError(400, f"this server gives at most {service.settings.max_n} answers to a request", param="n")


def prepare(served: Served, body: ChatRequest, service: Service) -> Turn:
    """Search and lay out the prompt. Raises ApiError."""
    if not served.can_chat:
        raise ApiError(400, "this is a base model, which only continues texts: use /v1/completions", param="model")
    sampling = body.sampling(**({"temperature": 0.0} if body.retrieval else {}))
    turn = _laid_out(served, body, sampling, service)
    if body.truncation == "disabled" and turn.cut():
        raise ApiError(
            400, f"the messages are too long for the model's context of {served.chat.context} tokens, which the answer "
            "and what is retrieved share", code="context_length_exceeded", param="messages",
        )  # fmt: skip
    return turn


def _laid_out(served: Served, body: ChatRequest, sampling: Sampling, service: Service) -> Turn:
    conversation, tokenizer = body.conversation(), served.chat.tokenizer
    if body.retrieval is None:
        rendered = served.chat.lay_out(conversation, sampling.max_tokens)
        turn = Turn(served, body, rendered.ids, sampling)
        turn.dropped_turns, turn.truncated_tokens = rendered.dropped_turns, rendered.truncated_tokens
        return turn
    multi_hop = body.retrieval.multi_hop
    if multi_hop is None:  # a model that was trained to search can do nothing else with documents
        multi_hop = served.can_search and (body.n or 1) == 1 and not body.logprobs
    if multi_hop:
        search = _searching(served, body, body.retrieval, sampling, service)
        turn, shown = Turn(served, body, search.ids, sampling, search=search), search.chat.shown(conversation)
    else:
        grounded = _grounded(served, body.retrieval, service)
        asked = grounded.prepare(conversation, **asdict(sampling))
        turn, shown = Turn(served, body, asked.ids, sampling, grounded, asked), asked.messages
    turn.dropped_turns, turn.truncated_tokens = left_out(conversation, shown, tokenizer)
    return turn


async def whole(service: Service, turn: Turn, tickets: Sequence[Ticket]) -> dict[str, Any]:
    """The answer in one piece."""
    choices = [Choice(i) for i in range(turn.n)]
    try:
        async with aclosing(events(tickets)) as arriving:
            async for _, event in arriving:
                choices[event.index].add(event)
    finally:
        answers.count(service.metrics, turn.served, tickets)
    if not tickets:
        _say(choices, turn.settled)
    found = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": turn.logprobs(choice),
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    record = answers.head("chatcmpl", "chat.completion", turn.served)
    usage = answers.usage([*turn.drafts, *tickets])
    record |= {"choices": found, "usage": usage, "timings": answers.timings(tickets), **turn.cut()}
    return record | await service.run(turn.ground, choices)


async def stream(service: Service, turn: Turn, tickets: Sequence[Ticket]) -> AsyncGenerator[bytes, None]:
    """The answer piece by piece. The last piece tells usage, citations and the like."""
    record = answers.head("chatcmpl", "chat.completion.chunk", turn.served)
    choices = [Choice(i) for i in range(turn.n)]

    def piece(index: int, delta: dict[str, str], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**record, "choices": [choice]}

    def words(index: int, text: str) -> dict[str, Any]:
        return piece(index, {"content": text})

    said = [Frames(partial(words, i)) for i in range(turn.n)]
    try:
        yield b"".join(frame(piece(i, {"role": "assistant", "content": ""})) for i in range(turn.n))
        running = turn.n
        async with aclosing(events(tickets)) as arriving:
            async for _, event in arriving:
                choice, start = choices[event.index], len(choices[event.index].ids)
                choice.add(event)
                if turn.body.logprobs and event.ids:
                    yield frame(piece(event.index, {"content": event.text}, None, turn.logprobs(choice, start)))
                elif event.text:
                    yield said[event.index](event.text)
                if choice.finish_reason:
                    running -= 1
                    if running:
                        yield frame(piece(event.index, {}, choice.finish_reason))
                    else:
                        last = piece(event.index, {}, choice.finish_reason)
        if not tickets:
            _say(choices, turn.settled)
            for choice in choices:
                yield frame(piece(choice.index, {"content": "".join(choice.text)}, None, turn.logprobs(choice)))
            for choice in choices[:-1]:
                yield frame(piece(choice.index, {}, choice.finish_reason))
            last = piece(choices[-1].index, {}, choices[-1].finish_reason)
        more = {"timings": answers.timings(tickets), **turn.cut(), **await service.run(turn.ground, choices)}
        options = turn.body.stream_options
        if options is not None and options.include_usage:
            yield frame(last)
            last = {**record, "choices": [], "usage": answers.usage([*turn.drafts, *tickets])}
        yield frame(last | more)
    except Exception as error:  # the answer has begun: it cannot have another status any more
        yield frame(from_exception(error).body)
    finally:
        answers.count(service.metrics, turn.served, tickets)
    yield DONE


def _grounded(served: Served, wanted: Retrieval, service: Service) -> GroundedChat:
    """The model with the knowledge base. Raises ApiError."""
    searcher = service.shelf.searcher(wanted.knowledge_base, wanted.mode)
    chat = served.chat
    # the scheduler keeps the states of documents, for all
    options: dict[str, Any] = {"top_k": wanted.top_k or TOP_K, "reread": wanted.reread}
    return GroundedChat(chat.model, chat.tokenizer, searcher, cache=PrefixCache(0), **options)


def _searching(
    served: Served, body: ChatRequest, wanted: Retrieval, sampling: Sampling, service: Service
) -> Searching:
    """The model that searches by itself. Raises ApiError for one that was not trained to, and for what such an answer
    cannot have."""
    if not served.can_search:
        raise ApiError(400, "this model was not trained to search", param="retrieval.multi_hop")
    if (body.n or 1) > 1 or body.logprobs:
        raise ApiError(400, "an answer with multi_hop comes alone, without logprobs", param="retrieval.multi_hop")
    searcher = service.shelf.searcher(wanted.knowledge_base, wanted.mode)
    top_k = wanted.top_k or served.chat.hop_k  # the scheduler keeps the states of conversations
    chat = MultiHopChat(served.chat.model, served.chat.tokenizer, searcher, top_k=top_k, cache=PrefixCache(0))
    return chat.prepare(body.conversation(), **asdict(sampling))


def _numbered(documents: Sequence[Document], first: int = 1) -> list[dict[str, Any]]:
    return [citation(n, document) for n, document in enumerate(documents, first)]


def _rests_on(found: Sequence[GroundedAnswer], documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    cited = {n for answer in found for n in answer.answer.citations}
    return {
        "citations": [document for document in documents if document["n"] in cited],
        "grounding": [_grounding(answer) for answer in found],
    }


def _grounding(answer: GroundedAnswer) -> dict[str, Any]:
    """Sentence by sentence: what it cites, and the probability that its documents support it."""
    scores: list[float | None] = [support.score for support in answer.support]
    scores += [None] * (len(answer.answer.sentences) - len(scores))  # it abstained: nothing to support
    sentences = [
        {"text": sentence.text, "cited": list(sentence.cited), "support": score}
        for sentence, score in zip(answer.answer.sentences, scores)
    ]
    return {"abstained": answer.abstained, "sentences": sentences}


def _say(choices: Sequence[Choice], settled: Completion | None) -> None:
    assert settled is not None  # the model was not asked
    for choice in choices:
        choice.ids, choice.logprobs = list(settled.ids), list(settled.logprobs)
        choice.text, choice.finish_reason = [settled.text], settled.finish_reason
