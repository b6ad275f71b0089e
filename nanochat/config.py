"""Settings of a command: a frozen dataclass, its defaults < `configs/x.py` < flags. tyro parses and prints the help.

    nanochat base_train configs/hybrid_d12.py --device_batch_size=2 --no-compile --tasks gsm8k arc

- A config file is plain Python assignments, run in a namespace of its own. Names with a leading underscore, modules,
  functions and classes are ignored; any other name must be a field. Several files apply in order.
- `--key value`, `--key=value`, `-` and `_` all parse. Booleans: `--flag`, `--no-flag`, `--flag false`, `--flag=1`.
- Lists: repeat the flag, or give several values after it. Commas do not split: they belong to the value.
- A command may name `positional` fields, for the words that belong to no flag; it then takes no config files.
- Every field has a default and, as its help, the docstring below it.

Every mistake is a UsageError (exit code 2) that names the flag or the file and line, with the nearest known name.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import io
import json
import os
import sys
import traceback
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union

import tyro

from nanochat.errors import NanochatError, UsageError

C = TypeVar("C")

_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


@dataclass(frozen=True)
class Parsed(Generic[C]):
    """A configuration, where each value that is not a default came from (`configs/x.py:3` or `--depth`), and what files
    set that the caller asked to `ignore`."""

    config: C
    sources: dict[str, str]
    ignored: dict[str, Any]


def parse(
    config_class: type[C],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    positional: Sequence[str] = (),
) -> C:
    """The configuration that a command line asks for. `--help` prints every field and exits. Raises UsageError."""
    return parse_with_sources(config_class, argv, prog, positional=positional).config


def parse_with_sources(
    config_class: type[C],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    ignore: Collection[str] = (),
    positional: Sequence[str] = (),
) -> Parsed[C]:
    """As `parse`, and says where values came from. `ignore`: names that files may set without being fields here, for a
    file that several commands share."""
    assert is_dataclass(config_class)
    files, flags, wants_help = _split(config_class, list(sys.argv[1:] if argv is None else argv), positional)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    ignored: dict[str, Any] = {}
    for file in files:
        for name, (value, line) in read_file(file).items():
            if name in ignore and name not in _hints(config_class):
                ignored[name] = value
            else:
                values[name] = _checked(config_class, name, value, f"{file}:{line}")
            sources[name] = f"{file}:{line}"
    default = _with_values(config_class, values)
    if wants_help:
        _help(config_class, default, prog, positional)
    sources |= {name: f"--{name}" for name in flags}
    return Parsed(_apply(config_class, default, flags), sources, ignored)


# ---- config files


def read_file(path: str | Path) -> dict[str, tuple[Any, int]]:
    """The assignments of a config file: name -> (value, line). Raises UsageError naming file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the config file {path}: {_reason(error)}") from None
    namespace: dict[str, Any] = {"__name__": "config", "__file__": str(path)}
    try:
        tree = ast.parse(text, str(path))
        exec(compile(tree, str(path), "exec"), namespace)
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: {error.msg}; a config file holds plain Python assignments") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        raise UsageError(f"{path}:{lines[-1] if lines else 1}: {type(error).__name__}: {error}") from error
    lines_of = {
        node.id: node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return {
        name: (value, lines_of.get(name, 1))
        for name, value in namespace.items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType | types.FunctionType | type)
    }


# ---- flags


def _split(
    config_class: type, argv: list[str], positional: Sequence[str] = ()
) -> tuple[list[str], dict[str, list[str]], bool]:
    """Config files, values by flag (checked for name and number, not yet for type), and whether help is wanted."""
    hints = _hints(config_class)
    files: list[str] = []
    words: list[str] = []
    flags: dict[str, list[str]] = {}
    rest = argv[::-1]
    while rest:
        token = rest.pop()
        if token in ("-h", "--help"):
            return files, flags, True
        if not token.startswith("--"):
            if positional:
                words.append(token)
                continue
            if not token.endswith(".py"):
                raise UsageError(f"unexpected argument {token!r}: expected a config file (*.py) or a --flag")
            files.append(token)
            continue
        key, equals, value = token[2:].partition("=")
        name, negated = key.replace("-", "_"), False
        if name not in hints and name.startswith("no_") and _is_bool(hints.get(name[3:])):
            name, negated = name[3:], True
        if name not in hints:
            bools = [f"no_{field}" for field, hint in hints.items() if _is_bool(hint)]
            raise UsageError(f"unknown flag --{key}{_nearest(name, [*hints, *bools], '--')}; --help lists all")
        if negated and equals:
            raise UsageError(f"--{key} takes no value, got {value!r}; use --{name}={value}")
        if _is_bool(hints[name]):
            if not equals and not negated and rest and rest[-1].lower() in _TRUE | _FALSE | {"none"}:
                value = rest.pop()
            flags[name] = ["False" if negated else _boolean(name, value or "true", hints[name])]
        elif _is_list(hints[name]):
            given = [value] if equals and value else []
            while not equals and rest and not rest[-1].startswith("--"):
                if rest[-1].endswith(".py") and not positional:
                    break
                given.append(rest.pop())
            flags[name] = flags.get(name, []) + given
        else:
            if not equals:
                if not rest or rest[-1].startswith("--"):
                    raise UsageError(f"--{name} needs a value ({_type_name(hints[name])})")
                value = rest.pop()
            flags[name] = [value]
    for name in positional:
        if words and name not in flags:
            n = len(words) if _is_list(hints[name]) else 1
            flags[name], words = words[:n], words[n:]
    if words:
        raise UsageError(f"unexpected argument {words[0]!r}; --help shows how to call it")
    return files, flags, False


def _apply(config_class: type[C], default: C, flags: dict[str, list[str]]) -> C:
    """tyro turns the texts into values. When it refuses, each flag is tried alone to name the one at fault."""
    hints = _hints(config_class)
    for name in [name for name in flags if hints[name] == tuple[str, ...]]:  # tyro would take "-x" for a flag
        object.__setattr__(default, name, tuple(flags[name]))
    flags = {name: values for name, values in flags.items() if hints[name] != tuple[str, ...]}

    def arguments(name: str) -> list[str]:
        if _is_list(hints[name]):
            return [f"--{name}", *flags[name]]
        if hints[name] is bool:
            return [f"--{name}" if flags[name] == ["True"] else f"--no_{name}"]
        return [f"--{name}={flags[name][0]}"]

    try:
        return _tyro(config_class, default, [argument for name in flags for argument in arguments(name)])
    except _Refused as error:
        for name in flags:
            try:
                _tyro(config_class, default, arguments(name))
            except _Refused as alone:
                given = " ".join(flags[name])
                why = alone.reason or f"expected {_type_name(hints[name])}"
                raise UsageError(f"--{name} {given}: {why}") from None
        raise UsageError(error.reason or "invalid arguments") from None


class _Refused(Exception):
    """tyro refused. `reason`: the ValueError that the class itself raised, "" for a text that is no such value."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__()
        self.reason = str(cause) if isinstance(cause, ValueError) else ""


def _tyro(config_class: type[C], default: C, arguments: list[str]) -> C:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return tyro.cli(  # a description spares it the parsing of docstrings, half the time
                config_class, args=arguments, default=default, description="-", use_underscores=True
            )
        except SystemExit as error:  # what tyro makes of a bad value and of a ValueError in the class itself
            raise _Refused(error.__context__) from None


def _help(config_class: type, default: Any, prog: str | None, positional: Sequence[str]) -> None:
    about = inspect.cleandoc(config_class.__doc__ or "")
    if not positional:
        about += "\n\nConfig files (configs/x.py, plain assignments) may stand among the flags; flags override them."
    tyro.cli(config_class, args=["--help"], default=default, prog=prog, description=about, use_underscores=True)


def _boolean(name: str, text: str, hint: Any) -> str:
    if text.lower() in _TRUE | _FALSE:
        return str(text.lower() in _TRUE)
    if text.lower() == "none" and type(None) in typing.get_args(hint):
        return "None"
    raise UsageError(f"--{name} {text}: expected true or false")


# ---- JSON


def to_json(config: Any) -> str:
    """The resolved configuration as JSON text, one field a line, in the order of the class."""
    return json.dumps(asdict(config), indent=1, default=str) + "\n"


def from_json(config_class: type[C], text: str, where: str = "config.json") -> C:
    """What `to_json` wrote. Raises NanochatError for damaged text, UsageError for an unknown name or a bad type."""
    try:
        saved = json.loads(text)
    except ValueError as error:
        raise NanochatError(f"{where} is damaged: {error}") from None
    if not isinstance(saved, dict):
        raise NanochatError(f"{where} is damaged: expected an object with one key a setting")
    values = {name: _checked(config_class, name, value, where) for name, value in saved.items()}
    return config_class(**values)


def save(config: Any, path: str | Path) -> Path:
    """Write the resolved configuration next to the checkpoints, in one rename. Raises NanochatError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(to_json(config), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise NanochatError(f"could not write {path}: {_reason(error)}") from error
    return path


def load(config_class: type[C], path: str | Path) -> C:
    """Read what `save` wrote."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NanochatError(f"cannot read {path}: {_reason(error)}") from None
    return from_json(config_class, text, str(path))


def differences(saved: Any, now: Any, names: Iterable[str] | None = None) -> dict[str, tuple[Any, Any]]:
    """name -> (saved, now) where two configurations (dataclasses or mappings) disagree, of the names that both have.

    For "this contradicts the checkpoint": lists and tuples compare alike, since JSON knows only one of them.
    """
    before, after = _as_dict(saved), _as_dict(now)
    wanted = [name for name in before if name in after] if names is None else names
    plain = {name: (_plain(before.get(name)), _plain(after.get(name))) for name in wanted}
    return {name: (before.get(name), after.get(name)) for name, (old, new) in plain.items() if old != new}


# ---- fields and types


def _hints(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in fields(config_class) if field.init}


def _with_values(config_class: type[C], values: dict[str, Any]) -> C:
    """An instance with `values` over the defaults; `__post_init__` has not run, since flags are still to come."""
    config = object.__new__(config_class)
    for field in fields(config_class):  # type: ignore[arg-type]
        made = field.default_factory() if callable(field.default_factory) else field.default
        object.__setattr__(config, field.name, values.get(field.name, made))
    return config


def _checked(config_class: type, name: str, value: Any, where: str) -> Any:
    hints = _hints(config_class)
    if name not in hints:
        raise UsageError(f"{where}: unknown setting {name!r}{_nearest(name, hints)}")
    try:
        return _coerce(value, hints[name])
    except TypeError:
        raise UsageError(f"{where}: {name} = {value!r}: expected {_type_name(hints[name])}") from None


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as the field's type: an int may stand for a float, a list for a tuple. Raises TypeError otherwise."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for member in arguments:
            with contextlib.suppress(TypeError):
                return _coerce(value, member)
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin in (tuple, list) and isinstance(value, tuple | list):
        if origin is tuple and arguments[-1:] != (Ellipsis,):
            if len(value) == len(arguments):
                return tuple(_coerce(item, member) for item, member in zip(value, arguments))
        else:
            return origin(_coerce(item, arguments[0] if arguments else Any) for item in value)
    elif origin is dict and isinstance(value, dict):
        return {_coerce(key, arguments[0]): _coerce(item, arguments[1]) for key, item in value.items()}
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is type(None) and value is None:
        return None
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, list):
        return "a list of " + ", ".join(_type_name(member) for member in arguments if member is not Ellipsis)
    if hint is type(None):
        return "None"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _is_bool(hint: Any) -> bool:
    return hint is bool or set(typing.get_args(hint)) == {bool, type(None)}


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list)


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {prefix}{found[0]}?" if found else ""


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else asdict(config)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
