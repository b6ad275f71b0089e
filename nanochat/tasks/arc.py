"""ARC: multiple choice from school science (Clark et al. 2018; hub: allenai/ai2_arc)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat.tasks.rows import MultipleChoiceTask, multiple_choice, need, one_of, open_rows


class ARC(MultipleChoiceTask):
    """Rows: question, choices {text, label}, answerKey. Some have three or five choices, some digits for letters."""

    def __init__(
        self,
        subset: str = "ARC-Easy",
        split: str = "test",
        path: str | Path | None = None,
        limit: int | None = None,
        seed: int | None = 42,
    ) -> None:
        one_of("arc: subset", subset, ("ARC-Easy", "ARC-Challenge"))
        one_of("arc: split", split, ("train", "validation", "test"))
        rows = open_rows("allenai/ai2_arc", subset, split, path)
        super().__init__(f"{subset.lower()}-{split}", rows, limit, seed)

    def conversation(self, row: Any) -> dict[str, Any]:
        """See `RowTask`."""
        choices = need(row, "choices", dict)
        letters, texts = need(choices, "label", list), need(choices, "text", list)
        return multiple_choice(need(row, "question", str), letters, texts, need(row, "answerKey", str))
