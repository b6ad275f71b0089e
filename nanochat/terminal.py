"""`nanochat chat_cli`: one answer with `-p`, or a conversation at the prompt; `--knowledge_base` gives it documents."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from nanochat import checkpoint, config, runtime
from nanochat.chat import ChatModel, load
from nanochat.engine.generate import Completion
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.line_input import read_message, reader
from nanochat.rag.grounded import GroundedAnswer, GroundedChat
from nanochat.rag.knowledge import Knowledge, open_knowledge
from nanochat.rag.multihop_chat import MultiHopChat, SearchedAnswer
from nanochat.rag.support import SUPPORTED

HELP = """\
/new                start a new conversation
/retry              another answer to the last message
/system TEXT        start a new conversation with this system message
/kb PATH            answer from the documents of this knowledge base (/kb off: without, /kb: which)
/save FILE          write the conversation to a file; as a line of chats.jsonl it can train a model
/load FILE          go on with a conversation that was saved
/temp 0.5           change a sampling option: /temp, /top_k, /top_p, /min_p, /seed, /max_tokens (no value: show them)
/help  /quit        Ctrl-C stops an answer, Ctrl-D leaves
A message of several lines stands between two lines of \"\"\"; a line that ends with \\ goes on in the next one."""
COMMANDS = ("/new", "/retry", "/system", "/kb", "/save", "/load", "/temp", "/help", "/quit")  # for completion

Grounded: TypeAlias = GroundedChat | MultiHopChat


@dataclass(frozen=True)
class ChatSettings:
    """Talk to a trained model in the terminal. -p PROMPT prints one answer."""

    prompt: str | None = None
    """answer this and leave; -p for short"""
    source: str | None = None
    """stage (base, mid, sft, rag, refrag), or path of a checkpoint, stage or run directory (default: sft; with a
    knowledge base rag, with --max_hops refrag, where there is one)"""
    run: str | None = None
    """name of the run (default: the one that wrote this stage last)"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    mode: Literal["auto", "chat", "text"] = "auto"
    """chat: answer as the assistant; text: continue the text; auto: text for a base model, chat for the others"""
    system: str = ""
    """system message"""
    knowledge_base: str | None = None
    """answer from the documents in this directory, and cite them"""
    documents: int | None = None
    """documents that are retrieved for each question (default: 5; with --max_hops for each search, as many as the model
    was trained with)"""
    retriever_type: str = ""
    """how to search: simple, bm25, dense or hybrid (default: what the knowledge base was built for)"""
    max_hops: int = 0
    """let the model search on its own, at most so many times an answer, --documents each time (0: one search for each
    question); for the stage refrag"""
    document_tokens: int = 0
    """tokens that the documents of a prompt may take (0: what the conversation leaves)"""
    max_tokens: int = 256
    """longest answer"""
    temperature: float | None = None
    """0: always the most likely token (default: 0.8; with a knowledge base 0)"""
    top_k: int = 0
    """keep the k most likely tokens (0: all)"""
    top_p: float = 1.0
    """keep the most likely tokens that together have this probability"""
    min_p: float = 0.0
    """drop tokens less likely than min_p times the most likely one"""
    seed: int | None = None
    """for answers that repeat (default: different each time)"""
    stop: tuple[str, ...] = ()
    """the answer ends before any of these texts"""
    quantize: Literal["fp32", "bf16", "int8"] | None = None
    """weights in fewer bytes, for speed"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:N"""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""

    def sampling(self) -> Sampling:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(Sampling)}
        if self.temperature is None:
            given["temperature"] = 0.0 if self.knowledge_base else Sampling.temperature
        return Sampling(**given)

    def find_source(self) -> str:
        """The stage to load when none was named."""
        if self.source is None and self.knowledge_base:
            stage = "refrag" if self.max_hops else "rag"
            with contextlib.suppress(NanochatError):
                return str(checkpoint.find(stage, self.out_dir or runtime.out_root(), self.run))
        return self.source or "sft"


def chat_cli(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    long = ["--prompt" if a == "-p" else f"--prompt={a[3:]}" if a.startswith("-p=") else a for a in arguments]
    settings = config.parse(ChatSettings, long, prog="nanochat chat_cli")
    sampling = settings.sampling()
    if settings.prompt is not None and not settings.prompt.strip():
        raise UsageError("-p: the prompt is empty")
    if settings.documents is not None and settings.documents < 1:
        raise UsageError(f"--documents {settings.documents}: expected 1 or more")
    if settings.max_hops < 0 or (settings.max_hops and not settings.knowledge_base):
        raise UsageError(f"--max_hops {settings.max_hops}: expected 0 or more, and more only with --knowledge_base")
    if settings.knowledge_base and settings.mode == "text":
        raise UsageError("--mode text: a text is continued without documents; leave --knowledge_base out, or --mode")
    # before the model, whose loading takes longer: a wrong path is told at once
    knowledge = open_knowledge(settings.knowledge_base, settings.retriever_type) if settings.knowledge_base else None
    source = settings.find_source()
    model = load(source, settings.run, settings.out_dir, settings.device, settings.dtype, settings.quantize)
    options: dict[str, Any] = {"top_k": settings.documents} if settings.documents else {}

    def ask(knowledge: Knowledge) -> Grounded:
        if settings.max_hops:
            return model.with_search(knowledge, max_hops=settings.max_hops, **options)
        return model.with_knowledge(knowledge, document_tokens=settings.document_tokens, **options)

    def ground(path: str) -> ChatModel | Grounded:
        return ask(open_knowledge(path, settings.retriever_type)) if path else model

    chat = model if knowledge is None else ask(knowledge)
    as_text = settings.mode == "text" or (settings.mode == "auto" and model.stage == "base" and knowledge is None)
    session = Session(
        chat, sampling, as_text, settings.system, str(model.path), settings.knowledge_base or "", ground,
        settings.temperature is None,
    )  # fmt: skip
    with runtime.warnings_only():
        if settings.prompt is not None:
            return session.answer(settings.prompt)
        session.loop()
    return 0


@dataclass
class Session:
    """One conversation at the terminal."""

    chat: ChatModel | Grounded
    sampling: Sampling
    as_text: bool = False
    system: str = ""
    where: str = ""  # what is asked, for the first line
    knowledge_base: str = ""  # path of the one that is asked
    ground: Callable[[str], ChatModel | Grounded] | None = None  # what answers from this knowledge base ("": none)
    free_temperature: bool = False  # nobody chose one: documents change it
    messages: list[dict[str, Any]] = field(default_factory=list)
    file: Path | None = None  # where this conversation was saved or loaded

    def __post_init__(self) -> None:
        self.new()

    def new(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.file = None

    def answer(self, text: str) -> int:
        """Stream the answer (and its sources) to stdout and its speed to stderr, and remember both turns. Ctrl-C keeps
        what there is.

        Returns 0, or 130 when it was stopped.
        """
        options = dataclasses.asdict(self.sampling)
        pieces: Generator[str, None, Completion] | Generator[str, None, GroundedAnswer]
        if self.as_text:
            assert isinstance(self.chat, ChatModel)
            pieces = self.chat.stream(text, **options)
        else:
            self.messages.append({"role": "user", "content": text})
            pieces = self.chat.stream_chat(self.messages, **options)
        try:
            said, stopped = _show(pieces)
        except NanochatError:
            if not self.as_text:
                self.messages.pop()
            raise
        if not self.as_text:
            self.messages.append({"role": "assistant", "content": said})
        return 130 if stopped else 0

    def retry(self) -> None:
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            print("there is no answer to try again")
            return
        del self.messages[-1]
        self.answer(self.messages.pop()["content"])

    def loop(self) -> None:
        read = reader(COMMANDS)
        what = "continue a text" if self.as_text else "chat"
        where = ", ".join(filter(None, [self.where, self.knowledge_base]))
        print(f"{where}: {what}. /help lists the commands.", file=sys.stderr)
        while True:
            try:
                text = read_message(read)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)")
                continue
            if text in ("/quit", "/exit", "/q"):
                return
            try:
                if text.startswith("/") and "\n" not in text:
                    self.command(text)
                elif text:
                    self.answer(text)
            except NanochatError as error:
                print(f"error: {error}", file=sys.stderr)

    def command(self, line: str) -> None:
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        simple = {"help": lambda: print(HELP), "new": self.new, "retry": self.retry}
        files = {"save": self.save, "load": self.load, "kb": self.choose}
        if name in simple:
            simple[name]()
        elif name in files:
            files[name](value)
        elif name == "system":
            self.system = value
            self.new()
        else:
            self.change(name, value)

    def choose(self, path: str) -> None:
        """Answer from this knowledge base from now on; "off": from none. Raises NanochatError, and leaves all as it
        was."""
        if not path:
            print(self.knowledge_base or "no knowledge base")
            return
        if self.as_text or self.ground is None:
            raise UsageError("/kb: a text is continued without documents; start with --mode chat")
        path = "" if path == "off" else path
        self.chat = self.ground(path)
        self.knowledge_base = path
        if self.free_temperature:
            self.sampling = replace(self.sampling, temperature=0.0 if path else Sampling.temperature)
        print(f"answers rest on {path}" if path else "answers rest on no documents")

    def save(self, name: str) -> None:
        """Raises UsageError rather than write over a file of something else, NanochatError when it cannot write."""
        path = _path("save", name)
        if path.exists() and path != self.file:
            raise UsageError(f"/save {name}: there is such a file already; choose another name")
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            temporary.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except (OSError, UnicodeEncodeError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise NanochatError(f"/save {name}: {_why(error)}") from None
        self.file = path
        print(f"saved {_count(self.messages)} to {path}")

    def load(self, name: str) -> None:
        """Raises NanochatError for a file that cannot be read or holds no conversation; the present one stays."""
        path = _path("load", name)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise NanochatError(f"/load {name}: {_why(error)}") from None
        messages = record.get("messages") if isinstance(record, dict) else None
        if not isinstance(messages, list) or not all(map(_is_turn, messages)):
            raise NanochatError(f'/load {name}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
        self.messages, self.file = messages, path
        self.system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        print(f"loaded {_count(messages)} from {path}")
        for message in messages[-2:]:
            print(f"{'> ' if message['role'] == 'user' else ''}{message['content']}")

    def change(self, name: str, value: str) -> None:
        """Set a sampling option, given by the beginning of its name. Raises UsageError."""
        options = {"max_tokens": int, "temperature": float, "top_k": int, "top_p": float, "min_p": float, "seed": int}
        found = [option for option in options if option.startswith(name)]
        if len(found) != 1:
            raise UsageError(f"unknown command /{name}; /help lists the commands")
        if not value:
            print(", ".join(f"{option} {getattr(self.sampling, option)}" for option in options))
            return
        try:
            self.sampling = replace(self.sampling, **{found[0]: options[found[0]](value)})
            self.free_temperature &= found[0] != "temperature"
        except ValueError:
            raise UsageError(f"/{name} {value}: expected a number") from None


def _path(command: str, name: str) -> Path:
    """Raises UsageError for no name."""
    if not name:
        raise UsageError(f"/{command}: expected a file, as in /{command} chat.json")
    return Path(name).expanduser().absolute()


def _why(error: Exception) -> str:
    """Without the number of the error and the name of a temporary file."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _is_turn(message: Any) -> bool:
    turn = isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
    return turn and isinstance(message.get("content"), str)


def _count(messages: list[dict[str, Any]]) -> str:
    return f"{len(messages)} message{'s' if len(messages) != 1 else ''}"


def _show(pieces: Generator[str, None, Completion] | Generator[str, None, GroundedAnswer]) -> tuple[str, bool]:
    """Print pieces as they come, then the sources; the whole text, and whether Ctrl-C stopped it."""
    began = time.perf_counter()
    first = 0.0
    said: list[str] = []
    found: Completion | GroundedAnswer | None = None
    stopped = False
    try:
        while True:
            piece = next(pieces)
            first = first or time.perf_counter() - began
            said.append(piece)
            print(piece, end="", flush=True)
    except StopIteration as end:
        found = end.value
    except KeyboardInterrupt:
        stopped = True
        pieces.close()
    print(flush=True)
    seconds = time.perf_counter() - began
    completion = found.completion if isinstance(found, GroundedAnswer) else found
    notes = [_speed(completion, first, seconds, len(said))] if completion is not None else []
    if isinstance(found, GroundedAnswer):
        for line in found.sources:
            print(line, flush=True)
        notes += _grounds(found)
    if stopped:
        notes = ["stopped"]
    if notes:
        print(f"[{', '.join(notes)}]", file=sys.stderr)
    return "".join(said), stopped


def _speed(completion: Completion, first: float, seconds: float, n_pieces: int) -> str:
    n = len(completion.ids)
    why = ", cut at max_tokens or the end of the context" if completion.finish_reason == "length" else ""
    streamed = n_pieces > 1 and seconds > first  # one piece came all at once
    rate = f", {(n - 1) / (seconds - first):.1f} tok/s" if streamed else ""
    return f"{n} tokens, first after {first:.2f} s{rate}{why}"


def _grounds(answer: GroundedAnswer) -> list[str]:
    """What the answer rests on, in a few words."""
    if not answer.query:
        return []
    if not answer.documents:
        return ["no document found"]
    n = len(answer.documents)
    notes = [f"{n} document{'s' if n > 1 else ''}"]
    if isinstance(answer, SearchedAnswer):
        notes += [f"searched {hop.query!r}" for hop in answer.hops]
    if answer.support:
        least = min(each.score for each in answer.support)
        notes.append(f"support {least:.2f}" + (": its documents do not say so" if least < SUPPORTED else ""))
    return notes
