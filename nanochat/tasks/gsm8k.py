"""GSM8K: school arithmetic in words, with calculator calls (Cobbe et al. 2021; hub: openai/gsm8k)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nanochat.tasks.rows import RowTask, need, one_of, open_rows
from nanochat.tasks.task import chat, message_text

_ANSWER = re.compile(r"#### *(-?[0-9.,]+)")
_CALL = re.compile(r"<<([^<>]*)>>")


def extract_number(text: str) -> str | None:
    """The number behind the first `####`, without thousands separators; None where there is none."""
    found = _ANSWER.search(text)
    number = found.group(1).replace(",", "").rstrip(".") if found else ""
    return number or None


def solution_parts(answer: str) -> list[dict[str, str]]:
    """A solution as parts: `<<48/2=24>>` becomes the tool call `48/2` and its output `24`; the rest is text."""
    parts = []
    for k, piece in enumerate(_CALL.split(answer)):
        if k % 2:
            expression, _, result = piece.rpartition("=") if "=" in piece else (piece, "", "")
            parts.append({"type": "tool_call", "text": expression})
            parts.append({"type": "tool_output", "text": result})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


class GSM8K(RowTask):
    """Rows: question, answer (the steps, then `#### n`)."""

    def __init__(
        self,
        split: str = "test",
        path: str | Path | None = None,
        subset: str = "main",
        limit: int | None = None,
        seed: int | None = 42,
    ) -> None:
        one_of("gsm8k: split", split, ("train", "test"))
        one_of("gsm8k: subset", subset, ("main", "socratic"))
        super().__init__(f"gsm8k-{split}", open_rows("openai/gsm8k", subset, split, path), limit, seed)

    def conversation(self, row: Any) -> dict[str, Any]:
        """See `RowTask`."""
        answer = need(row, "answer", str)
        if extract_number(answer) is None:
            raise ValueError("the answer has no number behind ####")
        return chat(need(row, "question", str), solution_parts(answer))

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Whether the number behind #### is the right one (7, 7.0 and 7.00 are one number)."""
        gold, found = extract_number(message_text(conversation["messages"][-1])), extract_number(completion)
        if gold is None or found is None:
            return False
        try:
            return gold == found or float(gold) == float(found)
        except ValueError:  # "1.2.3"
            return False
