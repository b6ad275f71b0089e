"""Byte-level BPE tokenizer: trained by rustbpe, run by tiktoken, saved as plain JSON.

Ids 0..n-1 are byte strings in merge order, the special tokens (`nanochat.conversation.SPECIAL_TOKENS`) follow. Only
`render` and `render_prompt` place special tokens: text that a user, a document or a tool wrote is always encoded as
plain bytes, whatever it says (`"<|bos|>"` becomes several ordinary tokens).
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rustbpe
import tiktoken

from nanochat.conversation import SPECIAL_TOKENS, Rendered, render, render_parts, render_prompt
from nanochat.errors import NanochatError, UsageError

log = logging.getLogger("nanochat")

__all__ = ["SPECIAL_TOKENS", "SPLIT_PATTERN", "Rendered", "StreamDecoder", "Tokenizer"]

FORMAT_VERSION = 1
FILE_NAME = "bpe.json"

# GPT-4's split, but numbers in groups of at most 2 digits: three-digit tokens would fill a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Longer texts are encoded in slices: the split's `\s+(?!\S)` overflows the regex stack near a million spaces.
_SLICE = 1 << 16
_TRAIN_BUFFER = 1024  # texts that rustbpe takes at once; with `_SLICE` it bounds what training holds


class Tokenizer:
    """Text to ids and back, conversations to ids and masks. Immutable, so threads may share one."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> None:
        self.pattern = pattern
        self.special_tokens = tuple(special_tokens)
        self._tokens = [*tokens, *(name.encode() for name in special_tokens)]
        self._n_ranks = len(tokens)
        self._special = {name: self._n_ranks + i for i, name in enumerate(special_tokens)}
        self._ranks = {token: rank for rank, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=self._special
        )
        self.vocab_size = len(self._tokens)
        self.bos = self.special("bos")
        self.eot = self.special("assistant_end")
        self.pad = self.special("pad")
        lengths = [len(token) for token in tokens] + [0] * len(special_tokens)
        self.token_bytes = np.array(lengths, dtype=np.int32)
        self.token_bytes.setflags(write=False)
        self.hash = _canonical_hash(self._record())

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, hash={self.hash[:12]})"

    # ---- train, save, load

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, max_chars: int = 0) -> Tokenizer:
        """Learn merges from `texts`, streamed once and never held, until `vocab_size` tokens, special ones included.

        max_chars: stop reading after so many characters (0 = all). A text too small for that many merges gives a
        smaller vocabulary and a warning. Deterministic. Raises UsageError for a vocab_size below the bytes and special
        tokens, NanochatError when there is no text.
        """
        n_ranks = vocab_size - len(SPECIAL_TOKENS)
        if n_ranks < 256:
            least = 256 + len(SPECIAL_TOKENS)
            raise UsageError(f"vocab_size {vocab_size} is too small: bytes and special tokens alone need {least}")
        stream = _TrainingText(texts, max_chars)
        trainer = rustbpe.Tokenizer()
        # A few merges more than needed: two merges can spell the same bytes, which counts as one token here.
        trainer.train_from_iterator(iter(stream), n_ranks + 16, buffer_size=_TRAIN_BUFFER, pattern=SPLIT_PATTERN)
        if not stream.n_chars:
            raise NanochatError("no text to train a tokenizer on: the data is empty")
        learned = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        tokens = list(dict.fromkeys(bytes(token) for token, _ in learned))[:n_ranks]
        if len(tokens) < n_ranks:
            log.warning(
                "the text (%d characters) supports only %d of %d merges: the vocabulary has %d tokens instead of %d",
                stream.n_chars,
                len(tokens) - 256,
                n_ranks - 256,
                len(tokens) + len(SPECIAL_TOKENS),
                vocab_size,
            )
        return cls(tokens)

    def _record(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "pattern": self.pattern,
            "special_tokens": list(self.special_tokens),
            "tokens": [base64.b64encode(token).decode() for token in self._tokens[: self._n_ranks]],
        }

    def save(self, directory: str | Path) -> Path:
        """Write `bpe.json` into `directory` (created when missing), in one rename. Returns the file."""
        path = Path(directory) / FILE_NAME
        temporary = path.with_name(f".{FILE_NAME}-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({**self._record(), "sha256": self.hash}, indent=0), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise NanochatError(f"could not save the tokenizer to {path}: {error}") from error
        return path

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises UsageError when it is missing, NanochatError when it cannot be read."""
        path = Path(directory)
        path = path / FILE_NAME if path.suffix != ".json" else path
        try:
            record = json.loads(path.read_bytes())
            version, sha256 = record["format_version"], record.pop("sha256")
        except FileNotFoundError:
            raise UsageError(f"no tokenizer at {path}: train one with `nanochat tok_train`") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NanochatError(f"{path} is damaged ({error!r}); train the tokenizer again") from None
        if version != FORMAT_VERSION:
            raise NanochatError(f"{path} has format version {version}, this nanochat reads {FORMAT_VERSION}: update it")
        if sha256 != _canonical_hash(record):
            raise NanochatError(f"{path} is damaged (its sha256 does not match its content); train the tokenizer again")
        missing = sorted(set(SPECIAL_TOKENS) - set(record["special_tokens"]))
        if missing:
            raise NanochatError(f"{path} lacks the special tokens {', '.join(missing)}; train the tokenizer again")
        tokens = [base64.b64decode(token) for token in record["tokens"]]
        return cls(tokens, record["pattern"], record["special_tokens"])

    def export_hf(self, path: str | Path) -> Path:
        """Write a Hugging Face `tokenizer.json` (`path`, or into the directory `path`) that gives the same ids.

        Every split of a token into two tokens is listed as a merge, which is what tiktoken's merging by bytes does.
        Hugging Face's tokenizer does recognise special tokens in text unless `encode_special_tokens` is set.
        """
        path = Path(path)
        path = path if path.suffix == ".json" else path / "tokenizer.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._hf_record(), ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise NanochatError(f"could not write {path}: {error}") from error
        return path

    def _hf_record(self) -> dict[str, Any]:
        letters = byte_letters()
        spelled = ["".join(letters[byte] for byte in token) for token in self._tokens[: self._n_ranks]]
        merges = []
        for token, text in zip(self._tokens[: self._n_ranks], spelled):
            splits = [i for i in range(1, len(token)) if token[:i] in self._ranks and token[i:] in self._ranks]
            splits.sort(key=lambda i, t=token: (self._ranks[t[:i]], self._ranks[t[i:]]))  # type: ignore[misc]
            merges += [[text[:i], text[i:]] for i in splits]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags} for name, i in self._special.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {text: rank for rank, text in enumerate(spelled)},
                "merges": merges,
            },
        }

    # ---- text <-> ids

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`, never a special one; `bos` puts <|bos|> in front. Lone surrogates become U+FFFD."""
        if len(text) <= _SLICE:
            ids = self._encoding.encode_ordinary(text)
        else:
            ids = [i for part in _slices(text) for i in self._encoding.encode_ordinary(part)]
        return [self.bos, *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str], threads: int = 2, bos: bool = False) -> list[list[int]]:
        """`encode` of each text, on `threads` threads (tiktoken releases the GIL)."""
        texts = list(texts)
        n = -(-len(texts) // (threads * 8)) if threads > 1 else len(texts)
        if threads <= 1 or n < 2:
            return [self.encode(text, bos) for text in texts]
        chunks = [texts[i : i + n] for i in range(0, len(texts), n)]
        with ThreadPoolExecutor(threads) as pool:
            encoded = pool.map(lambda chunk: [self.encode(text, bos) for text in chunk], chunks)
            return [ids for chunk in encoded for ids in chunk]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; special tokens decode to their names. Raises UsageError for an id that does not exist."""
        tokens, n = self._tokens, len(self._tokens)
        ids = list(ids)
        for i in ids:
            if not 0 <= i < n:
                raise UsageError(f"token id {i} is outside the vocabulary (0 to {n - 1})")
        return b"".join(tokens[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        """Id of a special token, named `bos` or `<|bos|>`."""
        found = self._special.get(name, self._special.get(f"<|{name}|>"))
        if found is None:
            raise UsageError(f"no special token {name!r}; there is {', '.join(self.special_tokens)}")
        return found

    def is_special(self, id: int) -> bool:
        return id >= self._n_ranks

    # ---- conversations

    def render(self, conversation: dict[str, Any], max_tokens: int | None = None) -> Rendered:
        """Ids and loss mask of a whole conversation, for training. See `nanochat.conversation.render`."""
        return render(conversation, self.encode, self.special, max_tokens)

    def render_prompt(self, conversation: dict[str, Any], max_tokens: int | None = None) -> Rendered:
        """Ids that end with <|assistant_start|>, for generation. See `nanochat.conversation.render_prompt`."""
        return render_prompt(conversation, self.encode, self.special, max_tokens)

    def render_parts(self, parts: list[dict[str, Any]], max_tokens: int | None = None) -> Rendered:
        """Ids of parts inside of an assistant's message. See `nanochat.conversation.render_parts`."""
        return render_parts(parts, self.encode, self.special, max_tokens)


class StreamDecoder:
    """Ids in, text out, piece by piece: a UTF-8 character comes out whole, with the token that completes it.

    All pieces and `flush()` together equal `Tokenizer.decode` of all ids. Special tokens come out as their names, or
    not at all with `skip_special`; then what stands inside of a citation, a name for a document, does not either.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._citing = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: int | Iterable[int]) -> str:
        ids = [ids] if isinstance(ids, int) else list(ids)
        if self._skip_special:
            ids = [i for i in ids if self._is_text(i)]
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def _is_text(self, token: int) -> bool:
        if self._tokenizer.is_special(token):
            self._citing = token == self._tokenizer.special("cite_start")
            return False
        return not self._citing

    def flush(self) -> str:
        """What is left: U+FFFD for a character that was never completed. Ready for a new text afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._citing = False
        return rest


# ---- training text


class _TrainingText:
    """Texts as rustbpe can take them: no lone surrogates, no huge strings, at most `max_chars` characters; counted."""

    def __init__(self, texts: Iterable[str], max_chars: int) -> None:
        self.texts, self.max_chars, self.n_chars = texts, max_chars, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if self.max_chars and self.n_chars + len(text) >= self.max_chars:
                text = text[: self.max_chars - self.n_chars]
            self.n_chars += len(text)
            try:
                text.encode()  # lone surrogates have no UTF-8 form, and rustbpe takes nothing else
            except UnicodeEncodeError:
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield from _slices(text)
            if self.max_chars and self.n_chars >= self.max_chars:
                return


def _slices(text: str) -> Iterator[str]:
    """Cut a long text into slices of at most `_SLICE` characters, where the split pattern cuts anyway: before a single
    space between two visible characters, if there is one in the second half of a slice."""
    start = 0
    while len(text) - start > _SLICE:
        low, cut = start + _SLICE // 2, start + _SLICE
        while (cut := text.rfind(" ", low, cut)) > 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            pass
        cut = cut if cut > 0 else start + _SLICE
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


# ---- small pieces


def _canonical_hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte (Radford et al. 2019), as Hugging Face's ByteLevel spells tokens."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
