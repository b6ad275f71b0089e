"""Lines that a user types: editing and history where the terminal allows, and messages of several lines."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

HISTORY, READLINE_HISTORY = ".nanochat_history", ".nanochat_readline_history"  # each in a format of its own
MOST_HISTORY = 1000  # lines that readline keeps
QUOTES = '"""'  # around a message of several lines



def read_message(read: Callable[[str], str]) -> str:
    """A message: a line, the lines between two of triple quotes, or lines that a backslash joins. `read` gives a line
    for a prompt; raises what it raises."""
    text = read("> ")
    if text.lstrip().startswith(QUOTES):
        text = text.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + read(". ")
        return text.rstrip().removesuffix(QUOTES).strip()
    while text.endswith("\\"):
        text = text[:-1] + "\n" + read(". ")
    return text.strip()


def reader(commands: Sequence[str], home: Path | None = None) -> Callable[[str], str]:
    """What reads a line: at a terminal with editing, history and completion, by prompt_toolkit where it is installed,
    else by readline; from a pipe just the lines. commands: what Tab completes. home: where the history is kept
    (default: the user's home directory)."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    home = Path.home() if home is None else home
    with contextlib.suppress(ImportError):
        return _prompt_toolkit(home / HISTORY, commands)
    with contextlib.suppress(ImportError):
        _readline(home / READLINE_HISTORY, commands)
    return input


def _private(path: Path) -> Path:
    """The file, made so that only its owner can read it: what one asks is nobody else's business."""
    try:
        path.touch(mode=0o600)
    except OSError:
        return Path(os.devnull)
    return path


def _prompt_toolkit(history: Path, commands: Sequence[str]) -> Callable[[str], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))  # Alt-Enter
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(_private(history))),
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
    )
    return session.prompt


def _readline(history: Path, commands: Sequence[str]) -> None:
    import readline

    history = _private(history)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(MOST_HISTORY)
    readline.set_completer(lambda text, n: [*(c for c in commands if c.startswith(text)), None][n])
    readline.set_completer_delims("")
    readline.parse_and_bind("tab: complete")
    atexit.register(partial(readline.write_history_file, history))
