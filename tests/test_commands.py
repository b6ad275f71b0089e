"""Every command in the documentation: it parses as written, and the path from text to chat runs (on tiny settings).

Parsing happens for real: the command's own function is called, and stopped where it has its settings.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import cli, config
from nanochat.tasks.registry import open_mixture

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.M | re.S)

# Later flags win, so these make a documented training command take a second.
TINY = {
    "tok_train": ["--vocab_size=400"],
    "base_train": ["--depth=2", "--d_model=64", "--head_dim=32", "--sequence_len=64"],
    "mid_train": [],
    "chat_sft": [],
    "base_eval": ["--eval_tokens=256", "--max_tokens=4", "--samples=1", "--batch_size=4"],
    "report": [],
    "chat_cli": ["--max_tokens=4"],
}
TRAIN = ["--num_iterations=2", "--max_minutes=0", "--device_batch_size=2", "--eval_tokens=256", "--save_every=0"]


def blocks(kind: str) -> list[tuple[str, str]]:
    """(page, text) of the code blocks of a kind."""
    return [(page.name, text) for page in PAGES for name, text in BLOCK.findall(page.read_text()) if name == kind]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command in the documentation: in bash blocks, and in code inside text that is one."""
    found = []
    for page, text in blocks("bash"):
        found += [(page, words) for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    for page in PAGES:
        for code in re.findall(r"`((?:nanochat|make|python -m|torchrun) [^`…<]+)`", page.read_text()):
            words = shlex.split(code)
            if words[0] != "nanochat" or words[1] in cli.COMMANDS:  # else it is a message that begins so
                found.append((page.name, words))
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def nanochat_argv(words: list[str]) -> list[str] | None:
    """The arguments of `nanochat` that a documented command amounts to; None when it is another program."""
    words = list(words)
    if words[0] == "torchrun":
        words = words[words.index("-m") - 1 :]
        words[0] = "python"
    if words[:2] == ["python", "-m"] and words[2].startswith("scripts."):
        assert (ROOT / "scripts" / f"{words[2].removeprefix('scripts.')}.py").exists()
        return [words[2].removeprefix("scripts."), *words[3:]]
    if words[:3] == ["python", "-m", "nanochat.retrieval"]:
        return ["retrieval", *words[3:]]
    return words[1:] if words[0].removeprefix(".venv/bin/") == "nanochat" else None


class Stop(Exception):
    """Raised in place of work."""


def parsed(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that a command would run with; of `download`, the arguments of its work."""
    seen: list[Any] = []

    def parse(*arguments: Any, **options: Any) -> Any:
        seen.append(real(*arguments, **options))
        raise Stop

    def download(*arguments: Any) -> Any:
        seen.append(arguments)
        raise Stop

    real = config.parse
    with monkeypatch.context() as patch:
        patch.setattr(config, "parse", parse)
        patch.setattr("nanochat.data.download.download_shards", download)
        with contextlib.suppress(Stop):
            cli._function(argv[0])(argv[1:])
    return seen[0]


def described(entry: tuple[str, list[str]]) -> str:
    return f"{entry[0]}: {' '.join(entry[1])}"


@pytest.mark.parametrize("entry", commands(), ids=map(described, commands()))
def test_documented_commands_parse(entry: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, words = entry
    monkeypatch.chdir(ROOT)
    argv = nanochat_argv(words)
    if argv is not None:
        settings = parsed(argv, monkeypatch)
        if hasattr(settings, "check"):
            settings.check()
    elif words[0] == "make":
        dry = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
    elif words[0].removeprefix(".venv/bin/") == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M)
        assert set(re.findall(r"\w+(?=[\],])", " ".join(words))) <= set(extras)
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        helped = subprocess.run([sys.executable, "-m", words[2], "--help"], cwd=ROOT, capture_output=True, text=True)
        assert helped.returncode == 0, helped.stderr
        assert all(flag in helped.stdout for flag in words[3:] if flag.startswith("--"))
    else:
        assert words[0] == "python3", f"no test runs {words[0]}"


def test_there_are_commands_to_test() -> None:
    documented = {argv[0] for _, words in commands() if (argv := nanochat_argv(words))}
    assert documented >= set(cli.COMMANDS) - {"export_tokenizer", "chat_eval"}
    assert len(commands()) > 25


def test_as_the_project_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    promised = "python -m scripts.mid_train configs/hybrid_early_t_late_m_d20.py --device_batch_size=2"
    settings = parsed(nanochat_argv(shlex.split(promised)) or [], monkeypatch)
    assert (settings.depth, settings.pattern, settings.ssm, settings.device_batch_size) == (20, "early", "M", 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory with ~/texts, and chats.jsonl in the working directory."""
    home = tmp_path_factory.mktemp("home")
    (home / "texts").mkdir()
    for i in range(80):
        (home / "texts" / f"{i}.txt").write_text(f"Text {i}. Once upon a time there was a number called {i * i}.\n")
    chats = [(f"What is {i}?", f"A number, {i}.") for i in range(40)]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
        for asked, said in chats
    ]
    (home / "chats.jsonl").write_text("\n".join(lines))
    return home


@contextlib.contextmanager
def inside(home: Path) -> Iterator[io.StringIO]:
    """At home, with standard output kept."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("HOME", str(home))
        patch.setenv("NANOCHAT_OUT", str(home / "out"))
        patch.chdir(home)
        yield out


@pytest.fixture(scope="module")
def answers(home: Path) -> dict[str, str]:
    """What each command of the README's "Your own text" prints: the block runs as it stands, on tiny settings."""
    text = next(text for page, text in blocks("bash") if page == "README.md" and "tok_train" in text)
    said = {}
    for line in text.splitlines():
        name, *argv = nanochat_argv(shlex.split(line, comments=True)) or ["?"]
        tiny = TINY[name] + (TRAIN if name in ("base_train", "mid_train", "chat_sft") else [])
        with inside(home) as out:
            cli._function(name)([*argv, *tiny])
        said[name] = out.getvalue()
    return said


def test_own_text_of_the_readme_runs(home: Path, answers: dict[str, str]) -> None:
    assert list(answers) == list(TINY)
    assert "val_bpb" in answers["base_eval"]
    assert answers["chat_cli"].endswith("\n")  # whatever two steps of training have to say
    for stage in ("base", "mid", "sft"):
        assert (home / "out" / "mine" / stage / "step_000002" / "model.safetensors").exists()
    assert (home / "out" / "mine" / "report.html").exists()


def test_python_of_the_readme_runs(home: Path, answers: dict[str, str]) -> None:
    (text,) = [text for page, text in blocks("python") if page == "README.md"]
    with inside(home) as out:
        exec(compile(text, "README.md", "exec"), {})
    assert len(out.getvalue()) > 4


def test_config_file_of_the_documentation_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = [text for page, text in blocks("python") if page == "configuration.md"]
    (tmp_path / "my_config.py").write_text(text)
    settings = parsed(["base_train", str(tmp_path / "my_config.py")], monkeypatch)
    assert (settings.depth, settings.total_batch_size) == (12, 131072)
    settings.check()


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, flags=re.M)[1].split()) - {"help"}  # type: ignore[index]
    shown = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^make ([\w-]+)", shown.stdout, flags=re.M)) == phony


def real_text(tmp_path: Path, shared: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "texts").mkdir()
    for i in range(80):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Text {i}, and a number: {i * i}.\n" * 20)
    inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "OMP_NUM_THREADS")}
    where = {"NANOCHAT_OUT": str(tmp_path / "out"), "NANOCHAT_SHARED": str(shared)}
    environment = {**inherited, **where, **variables}  # nothing else: the script's variables have common names
    command = [str(ROOT / "runs" / "real_text.sh"), str(tmp_path / "texts"), "mine"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def write_public_files(shared: Path) -> None:
    """A few rows in the public formats, under the names that the script looks for."""
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    rows = {
        "gsm8k/train.jsonl": {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
        "gsm8k/test.jsonl": {"question": "1 + 2?", "answer": "#### 3"},
        "arc/ARC-Easy-test.jsonl": {"question": "Which?", "choices": choices, "answerKey": "B"},
        "mmlu/test.jsonl": {"question": "Which?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 3},
    }
    for name, row in rows.items():
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / name).write_text((json.dumps(row) + "\n") * 10)


@pytest.mark.parametrize("public", [True, False])
def test_real_text_script_calls_commands_that_parse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: bool
) -> None:
    """The script with a program that only writes down how it was called."""
    (tmp_path / "nanochat").write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" '' >> {tmp_path}/calls\n")
    (tmp_path / "nanochat").chmod(0o755)
    if public:
        write_public_files(tmp_path / "shared")
    done = real_text(tmp_path, tmp_path / "shared", NANOCHAT=str(tmp_path / "nanochat"))
    assert done.returncode == 0, done.stderr
    calls = [call.split("\n") for call in (tmp_path / "calls").read_text().strip().split("\n\n")]
    assert [call[0] for call in calls] == [
        *("tok_train", "base_train", "mid_train", "chat_sft", "base_eval", "chat_eval", "report", "chat_cli")
    ]
    monkeypatch.chdir(ROOT)
    settings = [parsed(call, monkeypatch) for call in calls]
    assert {s.run for s in settings} == {"mine"}
    trained, evaluated = (open_mixture(s.tasks) for s in (settings[3], settings[5]))
    assert (len(trained), len(evaluated)) == (10 + 8 + 8, 10 + 2 + 2) if public else len(trained) > len(evaluated) > 0


@pytest.mark.slow
def test_real_text_script_runs(tmp_path: Path) -> None:
    tiny = {"DEPTH": "2", "VOCAB": "400", "SEQ": "64", "BATCH": "2", "PROBLEMS": "2", "FLAGS": "--d_model=64"}
    minutes = dict.fromkeys(("MINUTES", "MID_MINUTES", "SFT_MINUTES"), "0.02")
    done = real_text(tmp_path, tmp_path / "none", **tiny, **minutes)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mine" / "report.html").exists()


def test_real_text_script_without_arguments_says_how_to_call_it() -> None:
    done = subprocess.run([str(ROOT / "runs" / "real_text.sh")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "runs/real_text.sh DIR" in done.stderr
    assert "NANOCHAT=" in done.stderr
