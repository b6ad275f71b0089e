"""Chat with documents: every turn searches a knowledge base, and the answer cites what it rests on.

    chat = nanochat.load("rag").with_knowledge("kb")
    answer = chat.chat("Who founded Torwick?")
    print(answer)                  # Mara Velt founded Torwick. [2]     [2] Torwick (towns.jsonl)
    answer.citations, answer.documents, answer.support

The prompt is laid out as in training: the documents first, then the conversation. So the documents are a stable prefix,
and when a later question finds the same ones, nobody reads them again (`engine.prefix`).

An answer is written twice (`reread`). The draft says which documents answer, and is thrown away; then the model answers
from these alone. Small models find the right document far more often than they keep to it: they take what they are
asked for from whichever document has such a thing. A draft that cites only what is not there becomes an abstention.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nanochat.conversation import as_conversation
from nanochat.data.answers import ABSTENTION
from nanochat.engine.generate import Completion, Engine
from nanochat.engine.prefix import PrefixCache
from nanochat.engine.sampling import Sampling, make_sampling
from nanochat.errors import UsageError
from nanochat.model.lm import LM
from nanochat.rag.calibration import DEFAULT, Calibration
from nanochat.rag.citation_stream import GroundedStream
from nanochat.rag.citations import ABSTAINED, Answer, parse, sources
from nanochat.rag.knowledge import Searcher, check_searcher, hits_of
from nanochat.rag.prompt import ORDERS, Block, focused, headings, retrieval_message
from nanochat.rag.rewrite import Rewriter, standalone
from nanochat.rag.support import Support, support
from nanochat.retrieval.document import Document, Embedder, Hit
from nanochat.runtime import log
from nanochat.tasks.task import message_text
from nanochat.tokenizer import Tokenizer

NOTHING_FOUND = ABSTENTION  # the whole answer when the knowledge base has no document for a question
_SHOWN_CITATION = re.compile(r"\s*\[\d{1,4}\]")


@dataclass(frozen=True)
class GroundedAnswer:
    """An answer and what it rests on."""

    text: str  # with citations as [n]: documents[n - 1]
    answer: Answer  # sentence by sentence
    documents: tuple[Document, ...]  # those of the prompt, as the model saw them
    support: tuple[Support, ...]  # of each sentence of `answer`
    query: str  # what was searched for; empty: nothing was, for a greeting or thanks
    seconds: float  # retrieval and generation
    completion: Completion | None = field(default=None, repr=False)  # None: nothing was found, the model was not asked

    @property
    def abstained(self) -> bool:
        """Whether the answer is that the documents do not say."""
        return self.answer.abstained

    @property
    def citations(self) -> tuple[Document, ...]:
        """The documents that are cited, in order of first mention."""
        return tuple(self.documents[n - 1] for n in self.answer.citations)

    @property
    def sources(self) -> list[str]:
        """A line for each cited document: `[2] Title (source)`."""
        return sources(self.answer, self.documents)

    def __str__(self) -> str:
        return "\n".join([self.text, *self.sources])


@dataclass(frozen=True)
class Asked:
    """A question with its documents, ready for the model: `finish` makes the answer of what the model says."""

    messages: list[dict[str, Any]]  # as the model reads them: the documents among them
    ids: list[int]  # the prompt; empty when there is nothing to ask about
    sampling: Sampling
    block: Block
    query: str  # what was searched for; empty: nothing was
    began: float  # time.perf_counter() at the beginning
    settled: Completion | None = None  # the draft, where it is the answer: the model has nothing more to say

    @property
    def nothing_found(self) -> bool:
        """Whether the answer is NOTHING_FOUND, without asking the model."""
        return bool(self.query) and not self.block.documents


class GroundedChat:
    """A model and a knowledge base that answer together. Several conversations and threads may share one.

    knowledge: anything with `search(queries, k)`, such as a KnowledgeBase. top_k: documents a turn. order: of the
    documents in the prompt, see `rag.prompt`. document_tokens: tokens that documents may take (0: what the
    conversation leaves, at least three quarters of the prompt). rewrite: makes the query out of the conversation.
    cache: keeps the states of documents (None: one of its own of 256 MB; `PrefixCache(0)`: none). reread: see above;
    without, the first answer counts, and comes sooner. embedder, contrast: further signs of support, which the
    calibration must know (see `rag.support`). Raises UsageError for values out of range and an empty knowledge base.
    """

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        knowledge: Searcher,
        *,
        top_k: int = 5,
        order: str = "best_first",
        document_tokens: int = 0,
        rewrite: Rewriter = standalone,
        cache: PrefixCache | None = None,
        reread: bool = True,
        embedder: Embedder | str | Path | None = None,
        contrast: bool = False,
        calibration: Calibration = DEFAULT,
    ) -> None:
        if top_k < 1:
            raise UsageError(f"top_k {top_k}: expected at least 1 document")
        if order not in ORDERS:
            raise UsageError(f"document order {order!r}: must be one of {', '.join(ORDERS)}")
        if document_tokens < 0:
            raise UsageError(f"document_tokens {document_tokens}: expected 0 (automatic) or more")
        check_searcher(knowledge)
        if isinstance(embedder, str | Path):
            from nanochat.retrieval.embed import make_embedder

            embedder = make_embedder(embedder)
        if embedder is not None and not callable(getattr(embedder, "embed", None)):
            raise UsageError(f"embedder {embedder!r:.80}: expected a name such as minilm, or an object with `embed`")
        parts = ["lexical", *["embedding"] * (embedder is not None), *["contrast"] * contrast]
        if frozenset(parts) not in calibration:
            raise UsageError(f"support by {' and '.join(parts)} needs a calibration fitted to them: see rag.support")
        self.model, self.tokenizer, self.knowledge = model, tokenizer, knowledge
        self.top_k, self.order, self.document_tokens = top_k, order, document_tokens
        self.rewrite, self.embedder, self.contrast, self.calibration = rewrite, embedder, contrast, calibration
        self.cache, self.reread = PrefixCache() if cache is None else cache, reread

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.sequence_len

    def retrieve(self, messages: str | Sequence[Mapping[str, Any]]) -> tuple[str, list[Hit]]:
        """The query for the last question, and what it finds. No hits for an empty query."""
        conversation = as_messages(messages)
        query = self.rewrite(conversation).strip()
        return query, hits_of(self.knowledge, [query], self.top_k)[0] if query else []

    def chat(self, messages: str | Sequence[Mapping[str, Any]], **sampling: Any) -> GroundedAnswer:
        """The answer to a conversation: a list of {"role", "content"}, or just a question.

        Keyword arguments are the fields of `Sampling`; the temperature is 0 unless it is given. Earlier answers may
        hold their [n]; documents of earlier turns are not needed and left out. Raises UsageError for a conversation
        without a question.
        """
        pieces = self.stream_chat(messages, **sampling)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def stream_chat(
        self, messages: str | Sequence[Mapping[str, Any]], **sampling: Any
    ) -> Generator[str, None, GroundedAnswer]:
        """As `chat`, piece by piece; the generator returns the GroundedAnswer."""
        asked = self.prepare(messages, **sampling)
        if asked.nothing_found:
            yield NOTHING_FOUND
            return self.finish(asked)
        engine = Engine(self.model, self.tokenizer, decoder=self.decoder(asked))
        cache = self.cache if self.cache.max_bytes else None
        if self.drafts(asked):
            asked = self.settle(asked, engine.generate_batch([asked.ids], asked.sampling, prefix_cache=cache)[0])
        if asked.settled is not None:
            yield asked.settled.text
            return self.finish(asked, asked.settled)
        return self.finish(asked, (yield from engine.stream(asked.ids, asked.sampling, cache)))

    def prepare(self, messages: str | Sequence[Mapping[str, Any]], **sampling: Any) -> Asked:
        """All that comes before the model: the search and the prompt. For whoever runs the model elsewhere, such as a
        server that answers many at once: `ids` and `sampling` go to the model with `decoder`, what it says to `finish`.
        """
        began = time.perf_counter()
        conversation, chosen = as_messages(messages), make_sampling({"temperature": 0.0, **sampling})
        query, hits = self.retrieve(conversation)
        limit = self.context - min(chosen.max_tokens, self.context // 4)
        block, shown = lay_out(
            conversation, [h.document for h in hits], self.tokenizer, limit, self.document_tokens, self.order
        )
        found = bool(block.documents) or not query
        ids = self.tokenizer.render_prompt({"messages": shown}, limit).ids if found else []
        return Asked(shown, ids, chosen, block, query, began)

    def drafts(self, asked: Asked) -> bool:
        """Whether the model is to write a draft first, for `settle`."""
        return self.reread and len(asked.block.documents) > 1

    def settle(self, asked: Asked, draft: Completion) -> Asked:
        """What to ask after a draft: the same about the documents that it cites, or nothing where it is `settled`."""
        answer = parse(draft.ids, self.tokenizer, headings(asked.block.documents))
        numbers = to_reread(answer, len(asked.block.documents))
        if answer.unfounded:
            return replace(asked, settled=_abstention(draft, self.tokenizer))
        if not numbers:
            return replace(asked, settled=draft)
        shown = [focused(m, numbers) if m is asked.block.message else m for m in asked.messages]
        return replace(asked, messages=shown, ids=self.tokenizer.render_prompt({"messages": shown}).ids)

    def decoder(self, asked: Asked) -> Callable[[], GroundedStream]:
        """Makes what turns the model's tokens into text with citations."""
        return partial(GroundedStream, self.tokenizer, headings(asked.block.documents))

    def finish(self, asked: Asked, completion: Completion | None = None) -> GroundedAnswer:
        """The answer, of what the model said; None: it was not asked, for nothing was found."""
        if completion is None:
            return GroundedAnswer(NOTHING_FOUND, ABSTAINED, (), (), asked.query, time.perf_counter() - asked.began)
        documents = asked.block.documents
        answer = parse(completion.ids, self.tokenizer, headings(documents))
        if not answer.text:  # it only cited: see `GroundedStream`
            answer = ABSTAINED
        found = tuple(self._support(answer, asked.block, asked.messages))
        seconds = time.perf_counter() - asked.began
        return GroundedAnswer(completion.text, answer, documents, found, asked.query, seconds, completion)

    def _support(self, answer: Answer, block: Block, messages: list[dict[str, Any]]) -> list[Support]:
        if not block.documents or answer.abstained:
            return []
        asked: dict[str, Any] = {"question": message_text(messages[-1]), "calibration": self.calibration}
        if self.contrast:
            asked |= {"model": self.model, "tokenizer": self.tokenizer, "messages": messages}
        return support(answer, block.documents, embedder=self.embedder, **asked)


def to_reread(draft: Answer, n_documents: int) -> tuple[int, ...]:
    """The documents to answer from after a draft; none where it stands: it abstains, cites nothing that is there, or
    all there is."""
    cited = draft.citations
    return () if draft.abstained or len(cited) == n_documents else cited


def _abstention(draft: Completion, tokenizer: Tokenizer) -> Completion:
    """What the model should have said instead of a draft; one that was cut off stays one."""
    ids = [tokenizer.special("abstain"), *tokenizer.encode(ABSTENTION), tokenizer.eot]
    return draft._replace(ids=ids, text=ABSTENTION, logprobs=[0.0] * len(ids))


def as_messages(messages: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation that ends with the user's question. Raises UsageError when it has none."""
    conversation = as_conversation(messages)
    while conversation and conversation[-1].get("role") == "assistant":
        conversation.pop()
    if not conversation or conversation[-1].get("role") != "user":
        raise UsageError('the conversation must end with a question: {"role": "user", "content": ...}')
    return conversation


def lay_out(
    conversation: Sequence[dict[str, Any]],
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    limit: int,
    document_tokens: int = 0,
    order: str = "best_first",
) -> tuple[Block, list[dict[str, Any]]]:
    """The block of documents, and the messages of a prompt of at most `limit` tokens: system, documents, conversation.

    Documents of earlier turns leave first: their numbers would be mistaken for the new ones. Then a question keeps its
    beginning and end within half of the prompt, the documents are trimmed to fit, and the oldest turns leave.
    """
    size = partial(_size, tokenizer=tokenizer)
    system = [m for m in conversation[:1] if m["role"] == "system"]
    history = [_plain(m) for m in conversation[len(system) : -1] if m["role"] in ("user", "assistant", "tool")]
    question = _fit_question(conversation[-1], tokenizer, limit // 2)
    room = max(limit - 2 - sum(map(size, [*system, question])), limit // 4)  # <|bos|>, <|assistant_start|>
    said = sum(map(size, history))
    budget = max(room - said, 3 * room // 4, 1)
    if document_tokens:
        budget = min(budget, document_tokens)
    block = retrieval_message(documents, tokenizer, budget, order)
    if documents and not block.documents:
        log.warning("none of %d documents fits into %d tokens of the context", len(documents), budget)
    elif block.trimmed or block.dropped:
        log.warning(
            "the documents are too long for %d tokens of the context: %d tokens of them and %d documents are left out",
            budget, block.trimmed, block.dropped,
        )  # fmt: skip
    shown = [block.message] if block.documents else []
    room -= sum(map(size, shown))
    n_turns = sum(m["role"] == "user" for m in history)
    while history and sum(map(size, history)) > room:
        rest = [i for i, m in enumerate(history) if i and m["role"] == "user"]
        history = history[rest[0] :] if rest else []
    dropped = n_turns - sum(m["role"] == "user" for m in history)
    if dropped:
        log.warning("the conversation is too long beside its documents: the oldest %d turn(s) are left out", dropped)
    return block, [*system, *shown, *history, question]


def left_out(
    conversation: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> tuple[int, int]:
    """How many turns, and tokens of the question, the messages of `lay_out` lack."""
    both = (conversation, shown)
    turns = [sum(message["role"] == "user" for message in messages) for messages in both]
    tokens = [len(tokenizer.encode(message_text(messages[-1]))) for messages in both]
    return turns[0] - turns[1], tokens[0] - tokens[1]


def _size(message: dict[str, Any], tokenizer: Tokenizer) -> int:
    """Tokens of one message in a prompt."""
    return len(tokenizer.render({"messages": [message]}).ids) - 1  # without <|bos|>


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message of an earlier turn, without citations: their documents are gone."""
    if message["role"] != "assistant":
        return message
    if isinstance(message["content"], str):
        return {**message, "content": _SHOWN_CITATION.sub("", message["content"])}
    return {**message, "content": [part for part in message["content"] if part.get("type") != "cite"]}


def _fit_question(message: dict[str, Any], tokenizer: Tokenizer, most: int) -> dict[str, Any]:
    """The question with its middle left out where it is too long."""
    text = message_text(message)
    ids = tokenizer.encode(text)
    if len(ids) <= most:
        return message
    log.warning("the question is too long for the context: %d of its %d tokens are left out", len(ids) - most, len(ids))
    half = (most - 2) // 2
    return {"role": "user", "content": f"{tokenizer.decode(ids[:half])} {tokenizer.decode(ids[-half:])}"}
