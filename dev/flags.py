"""Writes the tables of flags in docs/configuration.md from the settings classes: python dev/flags.py

A field's default and the docstring below it are the only source; tests/test_docs.py fails when the page is behind them.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from nanochat.model.config import ModelConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- flags: written by dev/flags.py -->\n", "<!-- end of flags -->\n"

TABLES = [  # heading, class
    ("quickstart", "nanochat.pipeline:QuickstartSettings"),
    ("tok_train", "nanochat.training.commands:TokenizerSettings"),
    ("base_train, mid_train, chat_sft and rag_finetune", "nanochat.training.settings:TrainSettings"),
    ("base_train also", "nanochat.training.settings:BaseSettings"),
    ("mid_train also", "nanochat.training.settings:MidSettings"),
    ("chat_sft also", "nanochat.training.settings:SFTSettings"),
    ("rag_finetune also", "nanochat.training.rag:RagSettings"),
    ("chat_rl and refrag_finetune also", "nanochat.training.rl_commands:PolicySettings"),
    ("chat_rl also", "nanochat.training.rl_commands:ChatRLSettings"),
    ("refrag_finetune also", "nanochat.training.refrag:RefragSettings"),
    ("reward_train", "nanochat.training.reward_model:RewardSettings"),
    ("base_eval, chat_eval and rag_eval", "nanochat.evaluation.commands:EvalSettings"),
    ("base_eval also", "nanochat.evaluation.commands:BaseEvalSettings"),
    ("chat_eval also", "nanochat.evaluation.commands:ChatEvalSettings"),
    ("rag_eval also", "nanochat.evaluation.rag_commands:RagEvalSettings"),
    ("refrag_trace, beside those of the evaluations", "nanochat.training.refrag_trace:TraceSettings"),
    ("chat_cli", "nanochat.terminal:ChatSettings"),
    ("chat_web", "nanochat.serving.settings:ServeSettings"),
    ("prepare_rag_dataset", "nanochat.rag.dataset:DatasetSettings"),
    ("retrieval build, add and update", "nanochat.retrieval.settings:IngestSettings"),
    ("retrieval build also", "nanochat.retrieval.settings:BuildSettings"),
    ("retrieval add and update also", "nanochat.retrieval.settings:UpdateSettings"),
    ("retrieval add also", "nanochat.retrieval.settings:AddSettings"),
    ("retrieval delete", "nanochat.retrieval.settings:DeleteSettings"),
    ("retrieval search, evaluate, stats, versions and verify", "nanochat.retrieval.settings:ListSettings"),
    ("retrieval search, evaluate and stats also", "nanochat.retrieval.settings:ReadSettings"),
    ("retrieval search and evaluate also", "nanochat.retrieval.settings:FindSettings"),
    ("retrieval search also", "nanochat.retrieval.settings:SearchSettings"),
    ("retrieval evaluate also", "nanochat.retrieval.settings:EvaluateSettings"),
    ("retrieval get", "nanochat.retrieval.settings:GetSettings"),
    ("retrieval tag", "nanochat.retrieval.settings:TagSettings"),
    ("retrieval compact", "nanochat.retrieval.settings:CompactSettings"),
    ("retrieval reindex", "nanochat.retrieval.settings:ReindexSettings"),
    ("report", "nanochat.report:ReportSettings"),
    ("export_tokenizer", "nanochat.export:ExportTokenizerSettings"),
    ("export_model", "nanochat.export:ExportModelSettings"),
    ("import_model", "nanochat.export:ImportModelSettings"),
    ("doctor", "nanochat.doctor:DoctorSettings"),
]


def settings_class(place: str) -> type:
    """The class at `module:name`."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def own_fields(config_class: type) -> dict[str, str]:
    """The fields that the class itself states (again), with their docstrings on one line."""
    body = ast.parse(inspect.getsource(config_class)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for node, after in zip(body.body, [*body.body[1:], None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[node.target.id] = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
    return found


def show(value: Any) -> str:
    """A default as one would type it."""
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def table(config_class: type) -> str:
    """A Markdown table: flag, default, meaning."""
    known = {field.name: field for field in fields(config_class)}  # type: ignore[arg-type]
    lines = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for name, text in own_fields(config_class).items():
        field = known[name]
        default = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
        if default is None:  # an architecture option: the model's own default, 0 where it follows from the depth
            default = getattr(ModelConfig, name, None) or None
        lines.append(f"| `--{name}` | {show(default)} | {text} |".replace("  ", " "))
    return "\n".join(lines) + "\n"


def tables() -> str:
    """All tables, with headings."""
    return "\n".join(f"### {heading}\n\n{table(settings_class(place))}" for heading, place in TABLES)


def written(page: str) -> str:
    """The page with its tables renewed."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
