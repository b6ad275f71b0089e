"""Config: order of files and flags, every way to write a flag, and an error with its place for every mistake."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import config
from nanochat.errors import NanochatError, UsageError


@dataclass(frozen=True)
class Shared:
    """What stages share."""

    lr: float = 0.1
    """learning rate"""


@dataclass(frozen=True)
class Settings(Shared):
    """Train a thing."""

    depth: int = 4
    """layers"""
    device_batch_size: int = 8
    """rows a pass"""
    compile: bool = True
    """compile the model"""
    rope: bool | None = None
    """rotary positions"""
    window: int | None = None
    """attention window"""
    pattern: str | list[str] = "hybrid"
    """blocks"""
    tasks: tuple[str, ...] = ("world",)
    """chat tasks"""
    sizes: tuple[int, ...] = ()
    """some sizes"""
    name: str = ""
    """a name"""
    mode: Literal["fast", "slow"] = "fast"
    """how"""

    def __post_init__(self) -> None:
        if self.depth == 13:
            raise ValueError("depth 13 brings bad luck")


def parse(*argv: str) -> Settings:
    return config.parse(Settings, list(argv), prog="thing")


def file(tmp_path: Path, text: str, name: str = "c.py") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


# ---- order and forms


def test_defaults_then_files_then_flags(tmp_path: Path) -> None:
    one = file(tmp_path, "import math\n_half = 3\ndepth = 2 * _half\nlr = 1\ntasks = ['a', 'b']\ndef f(): pass\n")
    two = file(tmp_path, "depth = 7\nname = f'd{depth}'\n", "two.py")
    assert parse() == Settings()
    assert parse(one) == Settings(depth=6, lr=1.0, tasks=("a", "b"))
    assert parse(one, two).depth == 7
    assert parse(two, one).depth == 6
    assert parse("--depth=9", one) == Settings(depth=9, lr=1.0, tasks=("a", "b"))
    parsed = config.parse_with_sources(Settings, [one, "--lr", "2"])
    assert parsed.sources == {"depth": f"{one}:3", "lr": "--lr", "tasks": f"{one}:5"}
    assert isinstance(parse(one).lr, float)


def test_a_config_file_sees_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="NameError"):
        parse(file(tmp_path, "depth = Settings().depth"))
    parse(file(tmp_path, "depth = 5\n_secret = 1\n"))
    assert not hasattr(config, "_secret")


@pytest.mark.parametrize("form", ["--device_batch_size 2", "--device-batch-size 2", "--device_batch_size=2",
                                  "--device-batch-size=2", "--device-batch_size=1 --device_batch_size 2"])  # fmt: skip
def test_forms_of_a_flag(form: str) -> None:
    assert parse(*form.split()) == Settings(device_batch_size=2)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("", True), ("--compile", True), ("--no-compile", False), ("--no_compile", False), ("--compile False", False),
        ("--compile=1", True), ("--compile=0", False), ("--compile true", True), ("--compile=off", False),
        ("--no-compile --compile", True),
    ],
)  # fmt: skip
def test_forms_of_a_boolean(form: str, value: bool) -> None:
    assert parse(*form.split(), "--depth", "5") == Settings(compile=value, depth=5)


@pytest.mark.parametrize(("form", "value"), [("--rope", True), ("--no-rope", False), ("--rope=none", None)])
def test_forms_of_an_optional_boolean(form: str, value: bool | None) -> None:
    assert parse(form).rope is value


def test_lists_repeat_or_follow_each_other_and_keep_commas(tmp_path: Path) -> None:
    spec = "world:seed=0,known=200"
    assert parse("--tasks", spec).tasks == (spec,)
    assert parse("--tasks", "a", "b", "--depth", "2") == Settings(tasks=("a", "b"), depth=2)
    assert parse("--tasks=a", "--tasks=b").tasks == ("a", "b")
    assert parse("--tasks=").tasks == ()
    assert parse("--tasks", "a", file(tmp_path, "depth = 2")) == Settings(tasks=("a",), depth=2)
    assert parse("--sizes", "1", "-2").sizes == (1, -2)


def test_values_that_look_like_flags() -> None:
    assert parse("--lr", "-1e-3").lr == -1e-3
    assert parse("--name=--x").name == "--x"
    assert parse("--name", "-x").name == "-x"
    assert parse("--name=").name == ""
    assert parse("--window=None").window is None
    assert parse("--window", "64").window == 64
    assert parse("--pattern", "MMMT").pattern == "MMMT"


@settings(max_examples=25, deadline=None)
@given(depth=st.integers(14, 10**9), lr=st.floats(allow_nan=False), on=st.booleans(), text=st.text(max_size=20))
def test_any_value_survives_flags_and_json(depth: int, lr: float, on: bool, text: str) -> None:
    wanted = Settings(depth=depth, lr=lr, compile=on, name=text)
    assert parse(f"--depth={depth}", f"--lr={lr!r}", f"--compile={on}", f"--name={text}") == wanted
    assert config.from_json(Settings, config.to_json(wanted)) == wanted


# ---- mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--dpeth 3", r"unknown flag --dpeth, did you mean --depth\?"),
        ("--no-compil", r"unknown flag --no-compil, did you mean --no_compile\?"),
        ("--no-depth", "unknown flag --no-depth"),
        ("--depth x", "--depth x: expected an integer"),
        ("--lr 1 --depth 1.5", "--depth 1.5: expected an integer"),
        ("--window 1.5", "--window 1.5: expected an integer or None"),
        ("--mode medium", "--mode medium: expected one of fast, slow"),
        ("--compile maybe", "unexpected argument 'maybe'"),
        ("--compile=maybe", "--compile maybe: expected true or false"),
        ("--no-compile=1", "--no-compile takes no value"),
        ("--sizes 1 x", "--sizes 1 x: expected a list of an integer"),
        ("--depth", r"--depth needs a value \(an integer\)"),
        ("--depth --lr 1", "--depth needs a value"),
        ("stray", "unexpected argument 'stray'"),
        ("-d 3", "unexpected argument '-d'"),
        ("nothing/here.py", "cannot read the config file nothing/here.py: No such file"),
        ("--depth 13 --lr 1", "--depth 13: depth 13 brings bad luck"),
    ],
)
def test_mistakes_in_flags(argv: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(*argv.split())
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth = 4\n\ndepht = 5\n", r"c\.py:3: unknown setting 'depht', did you mean depth\?"),
        ("depth = '4'\n", r"c\.py:1: depth = '4': expected an integer"),
        ("lr = 1\ncompile = 1\n", r"c\.py:2: compile = 1: expected true or false"),
        ("tasks = 'a'\n", r"c\.py:1: tasks = 'a': expected a list of text"),
        ("depth = True\n", r"c\.py:1: depth = True: expected an integer"),
        ("mode = 'x'", "expected one of fast, slow"),
        ("x = (1\n", r"c\.py:1: .*plain Python assignments"),
        ("depth = 4\nlr = 1 / 0\n", r"c\.py:2: ZeroDivisionError"),
        ("def f():\n  return {}['a']\ndepth = f()\n", r"c\.py:2: KeyError"),
        ("depth = 13", "bad luck"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(file(tmp_path, text))


def test_a_flag_can_mend_a_file(tmp_path: Path) -> None:
    assert parse(file(tmp_path, "depth = 13"), "--depth", "12").depth == 12


def test_names_for_another_command_can_be_ignored(tmp_path: Path) -> None:
    path = file(tmp_path, "depth = 3\nd_model = 64\n")
    parsed = config.parse_with_sources(Settings, [path], ignore=("d_model", "depth"))
    assert parsed.config.depth == 3
    assert parsed.ignored == {"d_model": 64}
    assert parsed.sources["d_model"] == f"{path}:2"


def test_help_shows_every_field_with_default_and_docstring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(file(tmp_path, "depth = 99"), "--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for piece in ("thing", "Train a thing.", "--device_batch_size INT rows a pass (default: 8)", "layers (default: 99)",
                  "--lr FLOAT learning rate (default: 0.1)", "--compile, --no_compile", "{fast,slow}"):  # fmt: skip
        assert piece in text


# ---- saved configurations


def test_save_and_load(tmp_path: Path) -> None:
    wanted = Settings(depth=6, tasks=("a", "b"), pattern=["T", "M"])
    path = config.save(wanted, tmp_path / "base" / "config.json")
    assert config.load(Settings, path) == wanted
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"depth": 4', NanochatError, r"config\.json is damaged"),
        ("[1]", NanochatError, r"config\.json is damaged"),
        ('{"dept": 4}', UsageError, r"config\.json: unknown setting 'dept', did you mean depth\?"),
        ('{"depth": "4"}', UsageError, r"depth = '4': expected an integer"),
    ],
)
def test_damaged_json(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        config.load(Settings, tmp_path / "config.json")


def test_missing_json_and_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match=r"cannot read .*No such file"):
        config.load(Settings, tmp_path / "config.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(NanochatError, match="could not write"):
        config.save(Settings(), tmp_path / "file" / "config.json")


def test_differences() -> None:
    saved = {"depth": 4, "tasks": ["world"], "old": 1}
    assert config.differences(saved, Settings()) == {}
    assert config.differences(saved, Settings(depth=6)) == {"depth": (4, 6)}
    assert config.differences(saved, {"depth": 5}, ["depth"]) == {"depth": (4, 5)}


@dataclass(frozen=True)
class SearchSettings:
    """Search a thing."""

    place: str = ""
    """where"""
    words: tuple[str, ...] = ()
    """what for"""
    k: int = 5
    """how many"""


def search(*argv: str) -> SearchSettings:
    return config.parse(SearchSettings, list(argv), positional=("place", "words"))


@pytest.mark.parametrize(
    "argv",
    [
        ["here", "a.py", "-b", "--k", "3"],
        ["--k=3", "here", "a.py", "-b"],
        ["here", "--k", "3", "a.py", "-b"],
        ["a.py", "-b", "--k", "3", "--place", "here"],
        ["here", "--k", "3", "--words", "a.py", "-b"],
    ],
)
def test_positional_words_fill_their_fields_in_order(argv: list[str]) -> None:
    assert search(*argv) == SearchSettings("here", ("a.py", "-b"), 3)


def test_a_positional_word_too_many() -> None:
    with pytest.raises(UsageError, match="unexpected argument 'there'; --help"):
        config.parse(SearchSettings, ["here", "there"], positional=("place",))
    assert search() == SearchSettings()
