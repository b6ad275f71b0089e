"""Talk to a trained model from Python; `nanochat.terminal` does it at the prompt.

    chat = nanochat.load("sft")
    chat.chat("Who built the bridge of Orvane?")
    for piece in chat.stream_chat([{"role": "user", "content": "Hello!"}], temperature=0.5):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, overload

from nanochat.engine.generate import Completion, Engine
from nanochat.engine.load import Loaded, load_checkpoint
from nanochat.engine.sampling import make_sampling
from nanochat.runtime import log

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

    path_or_stage: `base`, `mid` or `sft`, or a path to a checkpoint, stage or run directory. run: its name under
    out_dir (None: the one that wrote this stage last). quantize: `bf16` or `int8` weights, for faster decoding.
    Raises NanochatError when there is no such checkpoint or it is damaged.
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
        """`base`, `mid` or `sft`."""
        return str(self.meta.get("stage", ""))

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.sequence_len

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

    def render(self, messages: Messages, max_tokens: int) -> list[int]:
        """The prompt's ids, cut to leave room for the answer: `max_tokens`, but at most a quarter of the context."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        limit = self.context - min(max_tokens, self.context // 4)
        rendered = self.tokenizer.render_prompt({"messages": list(messages)}, limit)
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
