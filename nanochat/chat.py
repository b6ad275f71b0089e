"""Talk to a trained model from Python; `nanochat.terminal` does it at the prompt.

    chat = nanochat.load("sft")
    chat.chat("Who built the bridge of Orvane?")
    for piece in chat.stream_chat([{"role": "user", "content": "Hello!"}], temperature=0.5):
        print(piece, end="", flush=True)
    chat.with_knowledge("kb").chat("Who built it?")      # answers from your documents, with citations
    nanochat.load("refrag").with_search("kb").chat("Where was its builder born?")   # searches hop by hop on its own
    chat.read(long_text).save("text.state")              # and later chat.resume("text.state").generate(" It was")
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from nanochat.conversation import Rendered, as_conversation
from nanochat.engine.generate import Completion, Engine
from nanochat.engine.load import Loaded, load_checkpoint
from nanochat.engine.reading import Reading
from nanochat.engine.sampling import make_sampling
from nanochat.errors import UsageError
from nanochat.rag.grounded import GroundedChat
from nanochat.rag.knowledge import Knowledge, Searcher, open_knowledge
from nanochat.rag.multihop_chat import HOP_K, MultiHopChat
from nanochat.runtime import log

if TYPE_CHECKING:
    from nanochat.retrieval import KnowledgeBase

Messages = str | Sequence[dict[str, Any]]


def load(
    path_or_stage: str | Path = "sft",
    run: str | None = None,
    out_dir: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> ChatModel:
    """A model to talk to.

    path_or_stage: a stage (`base`, `sft`, `rag`, `refrag`…), or a path to a run, stage or checkpoint directory. run:
    its name under out_dir (None: the one that wrote this stage last). quantize: `bf16` or `int8` weights, for faster
    decoding. Raises NanochatError when there is no such checkpoint or it is damaged.
    """
    return ChatModel(load_checkpoint(path_or_stage, run, out_dir, device, dtype, quantize))


class ChatModel:
    """A model with its tokenizer. Keyword arguments of all methods are the fields of `Sampling`: max_tokens,
    temperature, top_k, top_p, min_p, seed, stop."""

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.tokenizer, self.meta, self.path = loaded
        self.engine = Engine(self.model, self.tokenizer, skip_special=True)

    @property
    def stage(self) -> str:
        """What it was trained for last: `base`, `mid`, `sft`, `rag`, `refrag_sft`, `refrag` or `rl`."""
        return str(self.meta.get("stage", ""))

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.sequence_len

    @property
    def hop_k(self) -> int:
        """Documents of each search that it was trained to read; HOP_K where its directory does not say."""
        try:
            trained: Any = json.loads((self.path.parent / "config.json").read_text(encoding="utf-8"))
            return max(1, int(trained["top_k"])) if trained_to_search(self.meta) else HOP_K
        except (OSError, ValueError, TypeError, KeyError):
            return HOP_K

    def chat(self, messages: Messages, **sampling: Any) -> str:
        """The assistant's answer to a conversation: a list of {"role", "content"}, or just the user's text.

        A conversation longer than the context loses its oldest turns; a warning says so.
        """
        chosen = make_sampling(sampling)
        return self.engine.generate_batch([self.render(messages, chosen.max_tokens)], chosen)[0].text

    def stream_chat(self, messages: Messages, **sampling: Any) -> Generator[str, None, Completion]:
        """As `chat`, piece by piece; the generator returns the `Completion`."""
        chosen = make_sampling(sampling)
        return self.engine.stream(self.render(messages, chosen.max_tokens), chosen)

    @overload
    def generate(self, text: str, n: None = None, **sampling: Any) -> str: ...
    @overload
    def generate(self, text: str, n: int, **sampling: Any) -> list[str]: ...
    def generate(self, text: str, n: int | None = None, **sampling: Any) -> str | list[str]:
        """A continuation of `text`, without the text itself; with `n`, a list of so many.

        Raises UsageError when the text is longer than the context.
        """
        prompt = self.tokenizer.encode(text, bos=True)
        completions = self.engine.generate_batch([prompt], make_sampling(sampling), 1 if n is None else n)
        return completions[0].text if n is None else [completion.text for completion in completions]

    def stream(self, text: str, **sampling: Any) -> Generator[str, None, Completion]:
        """As `generate`, piece by piece; the generator returns the `Completion`."""
        return self.engine.stream(self.tokenizer.encode(text, bos=True), make_sampling(sampling))

    def read(self, text: str) -> Reading:
        """Read a text of any length; what comes back reads on, generates, and can be saved (see `engine.reading`)."""
        return Reading(self.engine).read(text)

    def resume(self, path: str | Path) -> Reading:
        """What `Reading.save` wrote. Raises UsageError when another model wrote it, NanochatError when it is
        damaged."""
        return Reading.load(self.engine, path)

    def with_knowledge(
        self, knowledge: KnowledgeBase | Searcher | str | Path, mode: str | None = None, **options: Any
    ) -> GroundedChat:
        """This model answering from documents: of a knowledge base (opened or its path), or of any retriever.

        mode: how a knowledge base is searched (simple, bm25, dense, hybrid; None: its own way). options: those of
        `GroundedChat`, such as top_k. Raises UsageError for an unknown option or mode and an empty knowledge base,
        NanochatError when there is none at the path or it is damaged.
        """
        knowledge = open_searcher(knowledge, mode, GroundedChat, options, "with_knowledge")
        if not trained_on_retrieval(self.meta):
            log.warning(
                "%s was never trained on documents (stage %s): it may not cite them, or pass over them. "
                "`nanochat rag_finetune` trains it", self.path, self.stage or "unknown",
            )  # fmt: skip
        if trained_to_search(self.meta):
            log.warning(
                "%s was trained to search on its own (stage %s), which with one search of ours it cannot: use "
                "`with_search`, or --max_hops 3 at the prompt; the stage `rag` is for one search",
                self.path, self.stage,
            )  # fmt: skip
        return GroundedChat(self.model, self.tokenizer, knowledge, **options)

    def with_search(
        self, knowledge: KnowledgeBase | Searcher | str | Path, mode: str | None = None, **options: Any
    ) -> MultiHopChat:
        """This model searching on its own, hop by hop, before it answers: for one that `refrag_finetune` trained.

        knowledge, mode and errors: as in `with_knowledge`. options: those of `MultiHopChat`, such as max_hops; top_k is
        what the model was trained with.
        """
        options.setdefault("top_k", self.hop_k)
        knowledge = open_searcher(knowledge, mode, MultiHopChat, options, "with_search")
        if not trained_to_search(self.meta):
            log.warning(
                "%s was never trained to search (stage %s): it may never do so, or never stop. "
                "`nanochat refrag_finetune` trains it", self.path, self.stage or "unknown",
            )  # fmt: skip
        return MultiHopChat(self.model, self.tokenizer, knowledge, **options)

    def render(self, messages: Messages, max_tokens: int) -> list[int]:
        """The prompt's ids, cut to leave room for the answer: `max_tokens`, but at most a quarter of the context."""
        rendered = self.lay_out(messages, max_tokens)
        if rendered.dropped_turns:
            log.warning(
                "the conversation is too long for the context of %d tokens: the oldest %d turn(s) are left out",
                self.context, rendered.dropped_turns,
            )  # fmt: skip
        if rendered.truncated_tokens:
            log.warning(
                "the last turn is too long for the context of %d tokens: %d tokens are left out",
                self.context, rendered.truncated_tokens,
            )  # fmt: skip
        return rendered.ids

    def lay_out(self, messages: Messages, max_tokens: int) -> Rendered:
        """As `render`, with what was left out, instead of a warning."""
        limit = self.context - min(max_tokens, self.context // 4)
        return self.tokenizer.render_prompt({"messages": as_conversation(messages)}, limit)


def open_searcher(
    knowledge: KnowledgeBase | Searcher | str | Path,
    mode: str | None,
    kind: type[GroundedChat] | type[MultiHopChat],
    options: Mapping[str, Any],
    method: str,
) -> Searcher:
    """What a chat of this kind searches. Raises UsageError for an option that it does not have."""
    if isinstance(knowledge, str | Path):
        knowledge = open_knowledge(knowledge, mode or "")
    elif mode is not None:
        knowledge = in_mode(knowledge, mode)
    known = [name for name in signature(kind).parameters][3:]
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r} of {method}; there is mode, {', '.join(known)}")
    return knowledge


def in_mode(knowledge: KnowledgeBase | Searcher, mode: str) -> Searcher:
    """A knowledge base that is searched in this mode. Raises UsageError for another kind of retriever."""
    from nanochat.retrieval import KnowledgeBase

    if not isinstance(knowledge, KnowledgeBase):
        raise UsageError(f"mode {mode!r}: only a KnowledgeBase can be searched in several ways")
    return Knowledge(knowledge, mode) if len(knowledge) else knowledge


def trained_on_retrieval(meta: Mapping[str, Any]) -> bool:
    """Whether the last stage of a checkpoint showed documents to the model."""
    return meta.get("stage") == "rag" or trained_to_search(meta)


def trained_to_search(meta: Mapping[str, Any]) -> bool:
    """Whether the last stage of a checkpoint taught the model to search on its own."""
    return meta.get("stage") in ("refrag_sft", "refrag")
