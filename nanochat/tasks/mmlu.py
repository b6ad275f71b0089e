"""MMLU: multiple choice over 57 subjects (Hendrycks et al. 2021; hub: cais/mmlu)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat.tasks.rows import MultipleChoiceTask, multiple_choice, need, one_of, open_rows

LETTERS = ["A", "B", "C", "D"]
SPLITS = ("auxiliary_train", "dev", "validation", "test")


class MMLU(MultipleChoiceTask):
    """Rows: question, subject, choices (four texts), answer (0 to 3)."""

    def __init__(
        self,
        split: str = "test",
        path: str | Path | None = None,
        subject: str | None = None,
        limit: int | None = None,
        seed: int | None = 42,
    ) -> None:
        one_of("mmlu: split", split, SPLITS)
        super().__init__(f"mmlu-{split}", open_rows("cais/mmlu", subject or "all", split, path), limit, seed)

    def conversation(self, row: Any) -> dict[str, Any]:
        """See `RowTask`."""
        answer = need(row, "answer", int)
        if not 0 <= answer < 4:
            raise ValueError(f"answer {answer} is not in 0..3")
        choices = need(row, "choices", list)
        return multiple_choice(
            need(row, "question", str), LETTERS, choices, LETTERS[answer], subject=row.get("subject", "")
        )
