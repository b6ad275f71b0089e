"""What a run's files become for other programs, and theirs for a run: tokenizers, and models of Mamba blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat import checkpoint, config, runtime
from nanochat.engine.load import load_checkpoint
from nanochat.errors import UsageError
from nanochat.model import interop
from nanochat.model.lm import LM
from nanochat.model.vocabulary import read_tokenizer, reorder
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


@dataclass(frozen=True)
class ExportModelSettings:
    """Write a model of Mamba or Mamba-2 blocks as others read it, with its tokenizer.json."""

    source: str = "sft"
    """which model: a stage (base, mid, sft), or the path of a checkpoint, stage or run directory"""
    run: str | None = None
    """name of the run (default: the one that wrote this stage last)"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    output: str = ""
    """directory to write"""
    layout: str = "transformers"
    """transformers (MambaForCausalLM, Mamba2ForCausalLM) or state-spaces (mamba_ssm)"""


@dataclass(frozen=True)
class ImportModelSettings:
    """Take over a public Mamba or Mamba-2 checkpoint (layout of state-spaces or transformers) as the base of a run."""

    weights: str = ""
    """directory with config.json and model.safetensors or pytorch_model.bin"""
    tokenizer: str = ""
    """its tokenizer.json, or a directory with one of ours (default: tokenizer.json in WEIGHTS)"""
    run: str = "imported"
    """name of the run to make: its base stage and tokenizer"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    sequence_len: int = interop.TRAINED_LEN
    """tokens a row in later stages"""


def export_tokenizer(argv: list[str] | None = None) -> None:
    """The command `export_tokenizer`."""
    settings = config.parse(ExportTokenizerSettings, argv, prog="nanochat export_tokenizer")
    directory = runtime.run_path(settings.out_dir, settings.run) / "tokenizer"
    tokenizer = Tokenizer.load(directory)
    path = tokenizer.export_hf(settings.output or directory)
    runtime.print0(f"{path}: {tokenizer.vocab_size} tokens")


def export_model(argv: list[str] | None = None) -> None:
    """The command `export_model`."""
    settings = config.parse(ExportModelSettings, argv, prog="nanochat export_model")
    if not settings.output:
        raise UsageError("--output: name the directory to write the model to")
    loaded = load_checkpoint(settings.source, settings.run, settings.out_dir, device="cpu", dtype="float32")
    path = interop.write(settings.output, loaded.model, settings.layout)
    loaded.tokenizer.export_hf(path)
    runtime.print0(f"{path}: {loaded.path} in the layout of {settings.layout}")


def import_model(argv: list[str] | None = None) -> None:
    """The command `import_model`. Raises UsageError when the run already has a base."""
    settings = config.parse(ImportModelSettings, argv, prog="nanochat import_model")
    if not settings.weights:
        raise UsageError("--weights: name the directory of the checkpoint")
    run = runtime.run_path(settings.out_dir, settings.run)
    if checkpoint.latest(run / "base") or (run / "tokenizer").exists():
        raise UsageError(f"--run {settings.run}: {run} already has a tokenizer or a base; choose another name")
    model, tokenizer = adopted(settings)
    tokenizer.save(run / "tokenizer")
    meta = {
        "stage": "base", "model_config": model.config.to_dict(), "tokenizer_hash": tokenizer.hash, "source": "",
        "metrics": {}, "n_steps": 0, "imported_from": str(settings.weights),
    }  # fmt: skip
    with checkpoint.lock(run / "base"):
        path = checkpoint.save(run / "base", 0, {"model": model.state_dict()}, meta)
    counts = model.n_params()
    blocks = f"{model.config.depth} blocks of {model.config.blocks[0]}"
    runtime.print0(f"{path}: {blocks}, {counts['total'] / 1e6:.2f}M parameters, {tokenizer.vocab_size} tokens")


def adopted(settings: ImportModelSettings) -> tuple[LM, Tokenizer]:
    """The model over the tokens of its tokenizer, and the tokenizer."""
    weights, given = Path(settings.weights), Path(settings.tokenizer or Path(settings.weights) / "tokenizer.json")
    model = interop.from_layout(*interop.read(weights), sequence_len=settings.sequence_len)
    if (given / "bpe.json").is_file():
        tokenizer = Tokenizer.load(given)
        return reorder(model, range(tokenizer.vocab_size)), tokenizer
    tokenizer, rows = read_tokenizer(given / "tokenizer.json" if given.is_dir() else given)
    return reorder(model, rows), tokenizer
