"""The command line: `nanochat <command> ...`, one plain table, each command imported only when it is called.

`scripts/<command>.py` and the installed `nanochat` run the same function through the same error handling: a
NanochatError becomes its message and exit code, anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from importlib import import_module

from nanochat import __version__
from nanochat.errors import NanochatError, UsageError

# name -> (module:function, what it does). The function takes `argv: list[str] | None`.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("nanochat.pipeline:quickstart", "all in a row: tokenizer, base, mid, SFT, evaluation, report"),
    "chat_cli": ("nanochat.terminal:chat_cli", "talk to a model in the terminal (-p PROMPT for one answer)"),
    "chat_web": ("nanochat.serving.server:chat_web", "the chat page and an OpenAI-compatible API"),
    "tok_train": ("nanochat.training.commands:tok_train", "train a tokenizer"),
    "base_train": ("nanochat.training.commands:base_train", "pretrain on raw text"),
    "mid_train": ("nanochat.training.commands:mid_train", "go on with text and conversations mixed"),
    "chat_sft": ("nanochat.training.commands:chat_sft", "fine-tune on conversations"),
    "rag_finetune": ("nanochat.training.rag:rag_finetune", "fine-tune on documents in the prompt: cite, or abstain"),
    "chat_rl": ("nanochat.training.rl_commands:chat_rl", "reinforcement learning on tasks that can be checked"),
    "refrag_finetune": ("nanochat.training.refrag:refrag_finetune", "learn to search hop by hop: traces, then rewards"),
    "refrag_trace": ("nanochat.training.refrag_trace:refrag_trace", "show what a model searched, read and answered"),
    "reward_train": ("nanochat.training.reward_model:reward_train", "fit a reward model to preferences"),
    "base_eval": ("nanochat.evaluation.commands:base_eval", "evaluate a model on raw text"),
    "chat_eval": ("nanochat.evaluation.commands:chat_eval", "evaluate a model on chat tasks"),
    "rag_eval": ("nanochat.evaluation.rag_commands:rag_eval", "evaluate answers from documents: right, cited, made up"),
    "retrieval": ("nanochat.retrieval.commands:main", "knowledge bases: build, add, search, versions, evaluate ..."),
    "prepare_rag_dataset": ("nanochat.rag.dataset:main", "documents, questions and a knowledge base for rag_finetune"),
    "report": ("nanochat.report:main", "write the HTML report of a run"),
    "download": ("nanochat.data.download:main", "fetch public pretraining text"),
    "export_tokenizer": ("nanochat.export:export_tokenizer", "write a run's tokenizer as Hugging Face tokenizer.json"),
    "export_model": ("nanochat.export:export_model", "write a Mamba model as transformers or mamba_ssm read it"),
    "import_model": ("nanochat.export:import_model", "take over a public Mamba checkpoint as the base of a run"),
    "doctor": ("nanochat.doctor:main", "show this machine, the device and dtype that would be used, and why"),
}

EXTRAS = {"chat_web": "serve"}  # commands that as a whole need an extra of pyproject.toml

RESUMABLE = (
    "quickstart", "base_train", "mid_train", "chat_sft", "rag_finetune", "chat_rl", "refrag_finetune", "download",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `nanochat`. Exits with 0, the code of a NanochatError (1 or 2), or 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] in ("-V", "--version"):
        print(f"nanochat {__version__}")
        return
    run(argv[0], argv[1:])


def run(command: str, argv: list[str] | None = None) -> None:
    """Run one command and turn its errors into messages and exit codes. argv None: the arguments of this process."""
    try:
        code = _function(command)(list(sys.argv[1:] if argv is None else argv))
    except NanochatError as error:
        rank = os.environ.get("RANK")  # under torchrun
        print(f"rank {rank}: error: {error}" if rank else f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        hint = f"; the same call of {command} goes on where it stopped" if command in RESUMABLE else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader went away, as in `nanochat report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    if isinstance(code, int) and code:
        sys.exit(code)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "Train your own small ChatGPT (Transformer, Mamba or hybrid) and talk to it.",
            "",
            "usage: nanochat <command> [configs/x.py] [--flag value ...]",
            "",
            *lines,
            "",
            "nanochat <command> --help lists the flags of a command.",
        ]
    )


def _function(command: str) -> Callable[[list[str]], object]:
    name = command.replace("-", "_")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {command!r}; {hint}")
    module, function = COMMANDS[name][0].split(":")
    try:
        return getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if name not in EXTRAS or (error.name or "").startswith("nanochat"):
            raise
        raise UsageError(f"{name} needs {error.name}: pip install 'nanochat[{EXTRAS[name]}]'") from error
