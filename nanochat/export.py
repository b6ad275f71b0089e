"""What a run's files become for other programs. So far: the tokenizer as Hugging Face `tokenizer.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat import config, runtime
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExportTokenizerSettings:
    """Write a run's tokenizer as Hugging Face tokenizer.json, which gives the same ids."""

    run: str = "default"
    """name of the run"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    output: str | None = None
    """file or directory to write (default: tokenizer.json beside the run's own tokenizer)"""


def export_tokenizer(argv: list[str] | None = None) -> None:
    """The command `export_tokenizer`."""
    settings = config.parse(ExportTokenizerSettings, argv, prog="nanochat export_tokenizer")
    directory = Path(settings.out_dir or runtime.out_root()) / settings.run / "tokenizer"
    tokenizer = Tokenizer.load(directory)
    path = tokenizer.export_hf(settings.output or directory)
    runtime.print0(f"{path}: {tokenizer.vocab_size} tokens")
