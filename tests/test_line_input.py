"""Lines at a terminal: editing, history, completion. (Messages of several lines: test_terminal.py.)"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.line_input import HISTORY, READLINE_HISTORY, reader

pty = pytest.importorskip("pty")  # which Windows does not have

PROGRAM = """
import sys
from pathlib import Path
if "{without}":
    sys.modules["{without}"] = None
from nanochat.line_input import reader, read_message
read = reader(["/retry", "/new"], Path("{home}"))
for _ in range({n}):
    print("GOT", repr(read_message(read)), flush=True)
"""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, home: Path, n: int, without: str = "none") -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-c", PROGRAM.format(home=home, n=n, without=without)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True
        )
        os.close(slave)
        self.seen = ""

    def expect(self, text: str) -> None:
        while text not in self.seen:
            assert select.select([self.master], [], [], 30)[0], f"waiting for {text!r}, saw {self.seen!r}"
            self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.close(self.master)
        assert self.process.returncode == 0


@pytest.mark.parametrize(
    ("without", "history"),
    [("none", HISTORY), ("prompt_toolkit", READLINE_HISTORY)],
    ids=["prompt_toolkit", "readline"],
)
def test_history_and_completion(tmp_path, without, history):
    if without == "none":
        pytest.importorskip("prompt_toolkit")
    first = Terminal(tmp_path, 2, without)
    first.expect(">")
    first.type("hello there\r")
    first.expect("GOT 'hello there'")
    first.expect(">")
    first.type("/re\t")
    first.expect("try")
    first.type("\r")
    first.expect("GOT '/retry'")
    first.close()
    assert "hello there" in (tmp_path / history).read_text()
    assert (tmp_path / history).stat().st_mode & 0o077 == 0
    second = Terminal(tmp_path, 1, without)
    second.expect(">")
    second.type("\x1b[A\x1b[A\r")  # up, up
    second.expect("GOT 'hello there'")
    second.close()


def test_alt_enter_begins_a_line(tmp_path):
    pytest.importorskip("prompt_toolkit")
    terminal = Terminal(tmp_path, 1)
    terminal.expect(">")
    terminal.type("one\x1b\rtwo\r")
    terminal.expect(r"GOT 'one\ntwo'")
    terminal.close()


def test_a_pipe_is_read_as_it_is(tmp_path):
    assert reader([], tmp_path) is input
    assert list(tmp_path.iterdir()) == []
