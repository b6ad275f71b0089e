"""How a conversation is laid out as token ids: special tokens, turns, loss mask, and what goes when it is too long.

    <|bos|> [<|system_start|> ... <|system_end|>] <|user_start|> ... <|user_end|> <|assistant_start|> ...

A message stands between the start and end token of its role (`ROLES`), a part inside it between those of its type
(`PARTS`); the result of a search holds the documents that it brought (`documents`: parts) behind its text. The loss
mask is 1 on what the assistant has to produce (its text, code, tool calls, searches, citations, abstention, its end)
and 0 on all the rest. Knows no vocabulary: text becomes ids through the two functions passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from nanochat.errors import UsageError

Encode = Callable[[str], list[int]]
Special = Callable[[str], int]

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|bos|>",
    "<|pad|>",
    "<|system_start|>",
    "<|system_end|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_output_start|>",
    "<|tool_output_end|>",
    "<|code_start|>",
    "<|code_end|>",
    "<|retrieval_start|>",
    "<|retrieval_end|>",
    "<|doc_start|>",
    "<|doc_title_end|>",
    "<|doc_end|>",
    "<|cite_start|>",
    "<|cite_end|>",
    "<|search_start|>",
    "<|search_end|>",
    "<|result_start|>",
    "<|result_end|>",
    "<|abstain|>",
    *(f"<|reserved_{i}|>" for i in range(8)),
)

# role -> the special tokens around a message, and the part types that it may hold (None: all but `document`)
ROLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "system": ("system", ("text", "code", "document")),
    "user": ("user", ("text", "code", "document")),
    "assistant": ("assistant", ("text", "code", "tool_call", "tool_output", "search", "result", "cite", "abstain")),
    "tool": ("tool_output", ("text",)),
    "retrieval": ("retrieval", ("text", "document", "result")),
}

# part type -> its start and end token ("" = none), and whether the assistant produces it when it speaks
PARTS: dict[str, tuple[str, str, bool]] = {
    "text": ("", "", True),
    "code": ("code_start", "code_end", True),
    "tool_call": ("tool_call_start", "tool_call_end", True),
    "tool_output": ("tool_output_start", "tool_output_end", False),
    "search": ("search_start", "search_end", True),
    "result": ("result_start", "result_end", False),
    "cite": ("cite_start", "cite_end", True),
    "abstain": ("abstain", "", True),
    "document": ("doc_start", "doc_end", False),
}

class Rendered(NamedTuple):
    """Ids of a conversation, its loss mask (same length), and what `max_tokens` cost."""

    ids: list[int]
    mask: list[int]
    dropped_turns: int = 0
    truncated_tokens: int = 0


def render(conversation: dict[str, Any], encode: Encode, special: Special, max_tokens: int | None = None) -> Rendered:
    """Ids and loss mask of a whole conversation, for training.

    A turn is a user's message (with the retrieval right before it) and all up to the next one. Over `max_tokens`, whole
    turns go, oldest first, never the system message or the last turn. If that is still too long, the longest texts are
    shortened: what the assistant says loses its end (and the token after it leaves the loss: the assistant did not stop
    there), other texts lose their middle. Messages of one role may follow each other. Raises UsageError that names the
    message and part that cannot be laid out.
    """
    return _fit(_messages(conversation), _Vocabulary(encode, special), max_tokens, ends_open=False)


def render_parts(
    content: list[dict[str, Any]], encode: Encode, special: Special, max_tokens: int | None = None
) -> Rendered:
    """Ids and mask of parts of an assistant's message, without the tokens around it: as they stand inside of it.
    Texts are shortened as `render` does; special tokens alone may be more than `max_tokens`. Raises UsageError for what
    is no part."""
    vocabulary = _Vocabulary(encode, special)
    pieces = _part_pieces(_parts(content, ROLES["assistant"][1], "the parts"), vocabulary, True)
    total = _length(pieces)
    if max_tokens is not None and total > max_tokens:
        pieces = _shorten(pieces, max_tokens)
    ids = [i for piece in pieces for i in piece.ids]
    return Rendered(ids, [int(piece.produced) for piece in pieces for _ in piece.ids], 0, total - len(ids))


def render_prompt(
    conversation: dict[str, Any], encode: Encode, special: Special, max_tokens: int | None = None
) -> Rendered:
    """As `render`, for generation: the ids end with <|assistant_start|>. Assistant messages at the end are left out:
    they are the answer to find. The mask is that of the history."""
    messages = _messages(conversation)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return _fit(messages, _Vocabulary(encode, special), max_tokens, ends_open=True)


class _Piece(NamedTuple):
    ids: list[int]
    produced: bool  # by the assistant: mask 1
    is_text: bool  # may be shortened; the others are special tokens


class _Vocabulary(NamedTuple):
    encode: Encode
    special: Special

    def mark(self, name: str, produced: bool = False) -> _Piece:
        return _Piece([self.special(name)], produced, False)

    def text(self, text: str, produced: bool = False) -> _Piece:
        return _Piece(self.encode(text), produced, True)


def _lay_out(message: dict[str, Any], index: int, vocabulary: _Vocabulary) -> list[_Piece]:
    name, allowed = ROLES[message["role"]]
    speaks = message["role"] == "assistant"
    parts = _parts(message["content"], allowed, f"message {index} ({message['role']})")
    inside = _part_pieces(parts, vocabulary, speaks)
    return [vocabulary.mark(f"{name}_start"), *inside, vocabulary.mark(f"{name}_end", speaks)]


def _part_pieces(parts: list[dict[str, Any]], vocabulary: _Vocabulary, speaks: bool) -> list[_Piece]:
    pieces: list[_Piece] = []
    for part in parts:
        start, end, producible = PARTS[part["type"]]
        produced = speaks and producible
        if start:
            pieces.append(vocabulary.mark(start, produced))
        if part["type"] == "document":
            pieces += [vocabulary.text(part.get("title", "")), vocabulary.mark("doc_title_end")]
        pieces.append(vocabulary.text(part["text"], produced))
        if part.get("documents"):
            pieces += _part_pieces(part["documents"], vocabulary, False)
        if end:
            pieces.append(vocabulary.mark(end, produced))
    return pieces


# ---- too long


def _fit(messages: list[dict[str, Any]], vocabulary: _Vocabulary, max_tokens: int | None, ends_open: bool) -> Rendered:
    laid_out = [_lay_out(message, i, vocabulary) for i, message in enumerate(messages)]
    n_system = int(bool(messages) and messages[0]["role"] == "system")
    head = [vocabulary.mark("bos"), *(piece for pieces in laid_out[:n_system] for piece in pieces)]
    tail = [vocabulary.mark("assistant_start")] if ends_open else []
    turns = [[piece for i in turn for piece in laid_out[i]] for turn in _turns(messages, n_system)]
    lengths = [_length(turn) for turn in turns]
    total, dropped = _length(head) + sum(lengths) + _length(tail), 0
    limit = total if max_tokens is None else max_tokens
    while total > limit and dropped < len(turns) - 1:
        total -= lengths[dropped]
        dropped += 1
    pieces = [*head, *(piece for turn in turns[dropped:] for piece in turn), *tail]
    if total > limit:
        pieces = _shorten(pieces, limit)
    ids = [i for piece in pieces for i in piece.ids]
    mask = [int(piece.produced) for piece in pieces for _ in piece.ids]
    if len(ids) > limit:  # the special tokens alone are too many
        keep = slice(len(ids) - limit, None) if ends_open else slice(limit)
        ids, mask = ids[keep], mask[keep]
    return Rendered(ids, mask, dropped, total - len(ids))


def _turns(messages: list[dict[str, Any]], start: int) -> list[list[int]]:
    """Message indices by turn. A user's message after an answer opens one, and takes the retrieval right before it."""
    turns: list[list[int]] = [[]]
    for i in range(start, len(messages)):
        turn = turns[-1]
        if messages[i]["role"] == "user" and any(messages[j]["role"] == "assistant" for j in turn):
            opening: list[int] = []
            while messages[turn[-1]]["role"] == "retrieval":
                opening.insert(0, turn.pop())
            turns.append(opening)
        turns[-1].append(i)
    return turns if turns[0] else []


def _length(pieces: Iterable[_Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _shorten(pieces: list[_Piece], budget: int) -> list[_Piece]:
    """Cut all texts to one common length, the largest that fits, so that short ones stay whole."""
    texts = sorted(len(piece.ids) for piece in pieces if piece.is_text)
    room = max(0, budget - _length(piece for piece in pieces if not piece.is_text))
    cap = 0
    for i, length in enumerate(texts):  # what the short ones leave is shared by the longer ones
        cap = room // (len(texts) - i)
        if length > cap:
            break
        room -= length
    shortened: list[_Piece] = []
    cut_speech = False
    for piece in pieces:
        ids = piece.ids
        if piece.is_text and len(ids) > cap:
            cut_speech = piece.produced
            ids = ids[:cap] if piece.produced else ids[: cap - cap // 2] + ids[len(ids) - cap // 2 :]
            shortened.append(piece._replace(ids=ids))
        else:
            shortened.append(piece._replace(produced=False) if cut_speech else piece)
            cut_speech = False
    return shortened


# ---- what a conversation may hold


def as_conversation(messages: Any) -> list[dict[str, Any]]:
    """Messages {"role", "content"}, copied; a text is a question of the user's. Raises UsageError for anything else."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise UsageError(f"expected a question or a list of messages, got {type(messages).__name__}")
    for i, message in enumerate(messages):
        _check_message(i, message)
    return [dict(message) for message in messages]


def _check_message(i: int, message: Any) -> None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise UsageError(f'message {i} must be {{"role": ..., "content": ...}}, got {message!r:.80}')


def _messages(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UsageError('a conversation must be {"messages": [...]} with at least one message')
    for i, message in enumerate(messages):
        _check_message(i, message)
        if not isinstance(message["role"], str) or message["role"] not in ROLES:
            raise UsageError(f"message {i} has role {message['role']!r}; expected one of {', '.join(ROLES)}")
        if message["role"] == "system" and i > 0:
            raise UsageError(f"message {i} has role 'system'; only message 0 may")
    return messages


def _parts(content: Any, allowed: tuple[str, ...], where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UsageError(f"{where}: content must be text or a list of parts, got {type(content).__name__}")
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in PARTS:
            raise UsageError(f"{where}, part {j}: type must be one of {', '.join(PARTS)}; got {part!r:.80}")
        if kind not in allowed:
            raise UsageError(f"{where}, part {j}: cannot hold {kind!r} here, only {', '.join(allowed)}")
        if not isinstance(part.get("text"), str) or not isinstance(part.get("title", ""), str):
            raise UsageError(f"{where}, part {j}: text (and title) must be strings")
        if "documents" in part:
            if kind != "result" or not isinstance(part["documents"], list):
                raise UsageError(f"{where}, part {j}: only a result holds documents, and they must be a list")
            _parts(part["documents"], ("document",), f"{where}, part {j}")
    return content
