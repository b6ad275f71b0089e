"""Documents of the Python standard library, from the interpreter that runs: what its modules, classes, functions,
methods and attributes say of themselves, the texts behind `help("with")`, and the comments in the sources.

    for one in python_docs(["json"]): print(one.name, one.text)

Nothing is downloaded. An interpreter always gives the same documents; another version has others.
"""

from __future__ import annotations

import difflib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanochat.data.docstring_sources import Record
from nanochat.data.docstrings import is_private
from nanochat.errors import NanochatError, UsageError

ROOT = Path(__file__).parents[2]  # of the package
START = "import sys; sys.path.append(sys.argv[1]); from nanochat.data.docstrings import main; main()"
HEADINGS = {"class": "class {}", "function": "{}", "method": "{}", "comment": "Comments in the source of {}"}


def python_docs(modules: Sequence[str] = ()) -> list[Record]:
    """Records with different texts and names, by name: of these top-level modules and packages, or of all.

    Raises UsageError for a module that the standard library does not have, NanochatError when they cannot be read."""
    check_modules(modules)
    chosen = sorted(modules or sys.stdlib_module_names)
    # no site-packages, no variables of the environment, no compiled files left behind
    command = [sys.executable, "-I", "-S", "-B", "-W", "ignore", "-c", START, str(ROOT), *chosen]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        raise NanochatError(f"cannot start {sys.executable}: {error.strerror or error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise NanochatError(
            f"reading the standard library of {sys.executable} ended with code {done.returncode}: {''.join(said)}; "
            "choose --modules to leave out the one that fails"
        )
    return distinct(Record(**json.loads(line)) for line in done.stdout.splitlines())


def check_modules(modules: Iterable[str]) -> None:
    """Raises UsageError for a name that is no top-level module of the standard library."""
    for name in modules:
        if name not in sys.stdlib_module_names:
            near = difflib.get_close_matches(name, sys.stdlib_module_names, n=1)
            hint = f"; did you mean {near[0]}?" if near else " (top-level names, such as json or email)"
            raise UsageError(f"--modules {name}: no module of the standard library{hint}")


def distinct(records: Iterable[Record]) -> list[Record]:
    """One record for each text and each name. The text stays with the object that users most likely mean: public, not
    an alias, short."""

    def order(record: Record) -> tuple[bool, bool, bool, int, str]:
        is_alias = record.name.rpartition(".")[2] != record.home.rpartition(".")[2].rpartition(":")[2]
        return record.kind == "comment", is_private(record.name), is_alias, len(record.name), record.name

    found: dict[str, Record] = {}
    texts: set[str] = set()
    for record in sorted(records, key=order):
        text = " ".join(record.text.split()).lower()
        if text and text not in texts and record.name not in found:
            texts.add(text)
            found[record.name] = record
    return [found[name] for name in sorted(found)]


def document(record: Record) -> dict[str, Any]:
    """A record as a line of JSONL: how it is called, then what it says."""
    title = record.name.replace("#comments", "")
    heading = HEADINGS[record.kind].format(f"{title}{record.signature}\n\n") if record.kind in HEADINGS else ""
    return {
        "id": record.name,
        "title": f"{title} (comments)" if record.kind == "comment" else title,
        "content": f"{heading}{record.text}",
        "source": f"Python {platform.python_version()}, {record.module}",
        "metadata": {"kind": record.kind, "module": record.module.partition(".")[0]},
    }
