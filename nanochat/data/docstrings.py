"""What a fresh interpreter says about its standard library: the process that `python_docs.py` starts.

Modules are imported here and looked through, so this runs in a process of its own, with nothing but the standard
library to import, and writes one record a line. Objects come from `inspect`, under the name that users import them by;
what importing does not show (private helpers, modules of other systems) comes from the sources, unimported.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from nanochat.data.docstring_sources import Record, Unit, definitions

UNIMPORTED = frozenset(("antigravity", "this", "idlelib", "turtledemo", "lib2to3"))  # they open windows, print, write
LEFT_OUT = re.compile(r"(^|\.)(__main__|tests?|idle_test)(\.|$)|^_?xx|^_test|^_ctypes_test$")
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
PLUMBING = frozenset(("__dict__", "__doc__", "__module__", "__weakref__"))


def main() -> None:
    """`-c "... main()" ROOT MODULE ...`: records of the modules (top-level names) as lines of JSON, on stdout."""
    with os.fdopen(os.dup(1), "w", encoding="ascii") as out:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what modules print
        for record in records(sys.argv[2:]):
            print(json.dumps(record._asdict()), file=out)


def records(names: Iterable[str]) -> Iterator[Record]:
    """Everything with a documentation string of the modules and packages with these top-level names; several records
    may have one text."""
    chosen = set(names)
    found = list(units(chosen))
    modules = {unit.name: module for unit in found if (module := imported(unit.name)) is not None}
    called: dict[str, str] = {}  # home -> name
    taken: set[str] = set()
    for record in objects(modules, chosen):
        called.setdefault(record.home, record.name)
        if record.text:
            taken |= {record.name, record.home}
            yield record
    for unit in found:
        for record in definitions(unit):
            home, mark, comments = record.home.partition("#")
            own = shown_name(record.module) + record.name[len(record.module) :]
            record = record._replace(name=f"{called[home]}{mark}{comments}" if home in called else own)
            if taken.isdisjoint((record.name, record.home)):
                taken.add(record.name)
                yield record
    if "pydoc_data" in chosen and (topics := imported("pydoc_data.topics")):
        for name, text in sorted(topics.topics.items()):
            yield Record(f"help({name!r})", "topic", "pydoc_data.topics", "", "", text)


def units(names: Iterable[str]) -> Iterator[Unit]:
    """The modules with these names and those inside of packages, without importing any of them."""
    for name in sorted(names):
        if LEFT_OUT.search(name):
            continue
        with contextlib.suppress(ImportError, ValueError, AttributeError):
            if (spec := find_spec(name)) is not None:
                yield from _inside(name, spec)


def _inside(name: str, spec: ModuleSpec) -> Iterator[Unit]:
    origin = spec.origin or ""
    if origin == "frozen":
        origin = getattr(spec.loader_state, "filename", None) or ""
    yield Unit(name, origin if origin.endswith(".py") else "")
    for part in sorted(pkgutil.iter_modules(spec.submodule_search_locations or []), key=lambda part: part.name):
        inner = f"{name}.{part.name}"
        if LEFT_OUT.search(inner):
            continue
        with contextlib.suppress(ImportError, AttributeError):
            found = part.module_finder.find_spec(inner, None)
            if found is not None:
                yield from _inside(inner, found)


def imported(name: str) -> ModuleType | None:
    """The module, or None for one that does not work here, whatever it raises."""
    if name.split(".")[0] in UNIMPORTED:
        return None
    try:
        return importlib.import_module(name)
    except BaseException:  # SystemExit too
        return None


def shown_name(module: str) -> str:
    """posixpath or ntpath, whichever this system uses, is known as os.path."""
    return "os.path" if module == os.path.__name__ else module


class Place(NamedTuple):
    """Where an object was found: `name` is module and attribute."""

    name: str
    module: str
    attribute: str
    value: Any


def objects(modules: dict[str, ModuleType], chosen: set[str]) -> Iterator[Record]:
    """A record for each module, class, function, method and descriptor; `text` is empty for one without its own."""
    places: dict[int, list[Place]] = {}
    for name, module in modules.items():
        yield Record(shown_name(name), "module", name, f"{name}:", "", own_text(module))
        for attribute, value in vars(module).items():
            if is_documented(value) and belongs(value, chosen):
                parts = [] if name == "builtins" else [shown_name(name)]
                place = Place(".".join([*parts, attribute]), name, attribute, value)
                places.setdefault(id(value), []).append(place)
    best = [min(found, key=lambda place: rank(place, modules[place.module])) for found in places.values()]
    walked: set[int] = set()
    for place in sorted(best, key=lambda place: place.name):
        if isinstance(place.value, type):
            yield from members(place.value, place.name, place.module, walked)
        else:
            yield described(place.value, place.name, "function", place.module)


def is_documented(value: Any) -> bool:
    """Whether it is a class, a routine, or another object with a text that is not its type's."""
    if isinstance(value, ModuleType):
        return False
    return isinstance(value, type) or inspect.isroutine(value) or bool(own_text(value))


def belongs(value: Any, chosen: set[str]) -> bool:
    """Whether one of the chosen modules defines it, as far as it says; private modules work for public ones."""
    top = home_of(value).split(".")[0]
    return not top or is_private(top) or top in chosen


def rank(place: Place, module: ModuleType) -> tuple[bool, bool, bool, int, str]:
    """Least for the name that users know: public, declared by its module, near its definition, short."""
    home = home_of(place.value)
    declared = place.attribute in getattr(module, "__all__", ()) or home == place.module
    is_near = not home or is_private(home) or f"{home}.".startswith(f"{place.module}.")
    return is_private(place.name), not declared, not is_near, len(place.name), place.name


def is_private(name: str) -> bool:
    """Whether a part begins with an underscore, or it is of the modules behind `os`."""
    parts = name.split(".")
    return parts[0] in ("posix", "nt") or any(part.startswith("_") and not part.endswith("__") for part in parts)


def home_of(value: Any) -> str:
    """The module that an object says it comes from."""
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) else ""


def members(cls: type, name: str, module: str, walked: set[int]) -> Iterator[Record]:
    """A class and what it defines itself; what it inherits belongs to the classes where it stands."""
    if id(cls) in walked:
        return
    walked.add(id(cls))
    record = described(cls, name, "class", module)
    yield record
    for attribute, value in sorted(vars(cls).items()):
        if attribute in PLUMBING:
            continue
        inner = f"{name}.{attribute}"
        if isinstance(value, type):
            if value.__qualname__.startswith(f"{cls.__qualname__}."):
                yield from members(value, inner, module, walked)
            continue
        value = getattr(value, "__func__", value)  # of class methods and static methods
        if inspect.isroutine(value):
            kind = "method"
        elif inspect.isdatadescriptor(value) or own_text(value):
            kind = "attribute"
        else:
            continue
        yield described(value, inner, kind, module)._replace(home=f"{record.home}.{attribute}")


def described(value: Any, name: str, kind: str, module: str) -> Record:
    home = home_of(value) or module
    qualified = getattr(value, "__qualname__", name)
    return Record(name, kind, module, f"{home}:{qualified}", signature(value), own_text(value))


def own_text(value: Any) -> str:
    """The documentation string, unless it is that of the value's type, or nothing but a call."""
    try:
        text = value.__doc__
        inherited = None if isinstance(value, type) or inspect.isroutine(value) else type(value).__doc__
    except Exception:  # a descriptor of its own making
        return ""
    if not isinstance(text, str) or text == inherited:
        return ""
    text = inspect.cleandoc(text).strip()
    return "" if re.fullmatch(r"[\w.]+\(.*\)", text) else text  # as dataclasses and named tuples get one


def is_written(default: Any) -> bool:
    """Whether it is no default, or one that looks the same in source code and in every process."""
    return default is inspect.Parameter.empty or not ("<" in repr(default) or isinstance(default, set | frozenset))


class _Elided:
    def __repr__(self) -> str:
        return "..."


def signature(value: Any) -> str:
    """`(a, b=1)`, or nothing where it is unknown. A default that no source code could write becomes `...`."""
    if not callable(value):
        return ""
    try:
        found = inspect.signature(value)
        parameters = [
            p if is_written(p.default) else p.replace(default=_Elided())
            for p in found.parameters.values()
        ]
        text = str(found.replace(parameters=parameters))
    except Exception:  # a signature, default or annotation that cannot be shown
        return ""
    return ADDRESS.sub("", text)
