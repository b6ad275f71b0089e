"""The command line: one table, lazy imports, error messages and exit codes; scripts are the same commands."""

import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

import nanochat
from nanochat import cli
from nanochat.errors import NanochatError, UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Put a function behind the command `report`."""

    def put(function) -> None:
        module = types.ModuleType("nanochat_test_command")
        module.main = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "report", (f"{module.__name__}:main", "test"))

    return put


def exit_code(*argv: str) -> int:
    try:
        cli.main(list(argv))
    except SystemExit as stop:
        return stop.code  # type: ignore[return-value]
    return 0


def test_arguments_reach_the_command(command) -> None:
    seen: list[list[str]] = []
    command(seen.append)
    assert exit_code("report", "--run", "x") == 0
    assert seen == [["--run", "x"]]


def raises(error: BaseException):
    def function(argv: list[str]) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("unknown flag --x"), 2, "error: unknown flag --x\n"),
        (NanochatError("disk full"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_errors_become_messages_and_codes(
    command, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    command(raises(error))
    assert exit_code("report") == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", message)


def test_bugs_keep_their_traceback_and_numbers_are_exit_codes(command) -> None:
    command(raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["report"])
    command(lambda argv: 3)
    assert exit_code("report") == 3
    command(lambda argv: {"not": "a code"})
    assert exit_code("report") == 0


def test_interrupted_training_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_function", lambda name: raises(KeyboardInterrupt()))
    assert exit_code("base_train") == 130
    assert "same call of base_train goes on" in capsys.readouterr().err


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("base_trian") == 2
    assert "did you mean base_train?" in capsys.readouterr().err
    assert exit_code("xyzzy") == 2
    assert "there is quickstart" in capsys.readouterr().err


def test_hyphens_are_underscores(command) -> None:
    cli.COMMANDS["report_card"] = cli.COMMANDS["report"]
    try:
        command(lambda argv: 4)
        cli.COMMANDS["report_card"] = cli.COMMANDS["report"]
        assert exit_code("report-card") == 4
    finally:
        del cli.COMMANDS["report_card"]


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["help"]):
        assert exit_code(*argv) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"nanochat {nanochat.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_function_and_a_script(name: str) -> None:
    module, _, function = cli.COMMANDS[name][0].partition(":")
    spec = find_spec(module)
    assert spec is not None, f"{module} is missing"
    assert f"def {function}(" in Path(str(spec.origin)).read_text()
    script = (ROOT / "scripts" / f"{name}.py").read_text()
    assert script.endswith(f'from nanochat.cli import run\n\nif __name__ == "__main__":\n    run("{name}")\n')
    assert len(script.splitlines()) <= 10


def test_scripts_are_the_commands() -> None:
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__"} == set(cli.COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, nanochat.cli; nanochat.cli.main(['--help']); import nanochat;"
        "heavy = {'torch', 'numpy', 'tyro', 'tiktoken'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("call", [["-m", "nanochat", "export_tokenizer"], ["-m", "scripts.export_tokenizer"]])
def test_a_script_and_the_command_end_alike(call: list[str], tmp_path: Path) -> None:
    argv = [sys.executable, *call, "--out-dir", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no tokenizer at {tmp_path}/default/tokenizer/bpe.json")


def test_a_command_without_its_extra_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "nanochat.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert exit_code("chat_web", "--run", "any") == 2
    assert capsys.readouterr().err == "error: chat_web needs uvicorn: pip install 'nanochat[serve]'\n"


def test_export_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = nanochat.Tokenizer.train(["some text to learn from"], 300)
    tokenizer.save(tmp_path / "run" / "tokenizer")
    assert exit_code("export_tokenizer", "--out_dir", str(tmp_path), "--run=run") == 0
    path = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    assert path.is_file()
    assert str(path) in capsys.readouterr().out


def test_public_names() -> None:
    assert nanochat.Tokenizer.__module__ == "nanochat.tokenizer"
    assert set(nanochat.__all__) <= set(dir(nanochat))
    with pytest.raises(AttributeError, match="no attribute 'Tokeniser'"):
        nanochat.Tokeniser  # noqa: B018 - reading it is the test
