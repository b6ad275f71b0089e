"""Chats from a file of the user's own: one {"messages": [{"role", "content"}, ...]} (or the bare list) a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat.conversation import render
from nanochat.data.answers import exact_match
from nanochat.errors import UsageError
from nanochat.tasks.rows import Rows, RowTask, open_rows
from nanochat.tasks.task import message_text


def check_conversation(conversation: Any) -> dict[str, Any]:
    """The conversation, when it can be laid out and the assistant says something; else a ValueError says why not."""
    if isinstance(conversation, list):
        conversation = {"messages": conversation}
    try:
        render(conversation, encode=lambda text: [], special=lambda name: 0)  # the layout is what is checked
    except UsageError as error:
        raise ValueError(str(error)) from None
    if not any(m["role"] == "assistant" and message_text(m) for m in conversation["messages"]):
        raise ValueError("no message of the assistant with text: there is nothing to learn from it")
    return conversation


class Conversations(RowTask):
    """A task of ready-made conversations; the first row is checked at once, each one when it is taken."""

    def __init__(self, name: str, rows: Rows, limit: int | None = None, seed: int | None = 42) -> None:
        super().__init__(name, rows, limit, seed)
        self[0]

    def conversation(self, row: Any) -> dict[str, Any]:
        """See `RowTask`."""
        return check_conversation(row)

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Exact match with the last message."""
        return exact_match(completion, message_text(conversation["messages"][-1]))


def own_conversations(path: str | Path, limit: int | None = None, seed: int | None = 42) -> Conversations:
    """The conversations of a local jsonl or parquet file."""
    rows = open_rows("", "", "train", path, (dict, list))
    return Conversations(f"conversations:{Path(path).name}", rows, limit, seed)
