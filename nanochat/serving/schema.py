"""What requests hold. Strict: no field is guessed at, none is passed over in silence.

Names and meanings are OpenAI's; `top_k`, `min_p`, `retrieval` and `truncation` are ours. Fields that this server cannot
honour are accepted with the value that changes nothing, and refused with any other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nanochat.engine.sampling import Sampling

NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"  # of a knowledge base
Mode = Literal["simple", "bm25", "dense", "hybrid"]
Zero = Annotated[float, Field(ge=0, le=0)]
MAX_TOP_K = 50
MAX_STOP = 16


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn. Fields that OpenAI's own answers carry may come back, empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=256)]
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """The message as a conversation holds it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Retrieval(Strict):
    """Answer from the documents of a knowledge base, and cite them."""

    knowledge_base: Annotated[str, Field(pattern=NAME)]
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] | None = Field(
        None, description="documents of the answer, or of each search of multi_hop (default: 5, or as the model learnt)"
    )
    mode: Mode | None = Field(None, description="how to search; null: what the knowledge base was built for")
    reread: bool = Field(
        True, description="answer twice, the second time from the documents that the first answer, a draft, cites"
    )
    multi_hop: bool | None = Field(
        None, description="let the model search several times; needs a model trained to (default: if it was)"
    )


class SamplingFields(Strict):
    """What both kinds of completion share."""

    model: Annotated[str, Field(max_length=256)] | None = Field(None, description="default: the first of /v1/models")
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        for text in [stop] if isinstance(stop, str) else stop or []:
            if not 0 < len(text) <= 256:
                raise ValueError("a stop string has 1 to 256 characters")
        return stop

    @model_validator(mode="after")
    def _streams(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed with 'stream': true")
        return self

    def sampling(self, **defaults: Any) -> Sampling:
        """The fields that were given, over `defaults`."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(**{**defaults, **given, "stop": stop})


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    retrieval: Retrieval | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto (default): a conversation that is too long loses its oldest turns; disabled: an error"
    )

    @model_validator(mode="after")
    def _conversation(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("'messages' must end with the user's")
        roles = [message.role for message in self.messages]
        if any(role in ("system", "developer") for role in roles[1:]):
            raise ValueError("only the first of 'messages' may have the role system or developer")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed with 'logprobs': true")
        return self

    def conversation(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]

    def sampling(self, **defaults: Any) -> Sampling:
        sampling = super().sampling(**defaults)
        if self.max_completion_tokens is None:  # the newer name of max_tokens
            return sampling
        return replace(sampling, max_tokens=self.max_completion_tokens)


class CompletionRequest(SamplingFields):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _best(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("'best_of' must equal 'n': this server returns all that it makes")
        return self

    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class EmbeddingRequest(Strict):
    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    model: Annotated[str, Field(max_length=256)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class NewKnowledgeBase(Strict):
    name: Annotated[str, Field(pattern=NAME, description="small letters, digits, - and _")]
    kind: Mode | None = Field(None, description="null: hybrid where its packages are installed, else simple")


class SearchRequest(Strict):
    query: Annotated[str, Field(min_length=1, max_length=10_000)]
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] = 5
    mode: Mode | None = None


class MarkdownText(Strict):
    """A text to show on the page; `citations`: the numbers that it may cite."""

    text: Annotated[str, Field(max_length=200_000)]
    citations: Annotated[list[int], Field(max_length=1000)] = []


class MarkdownRequest(Strict):
    items: Annotated[list[MarkdownText], Field(max_length=100)]
