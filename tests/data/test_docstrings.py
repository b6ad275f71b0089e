"""Objects under the names that users know, with texts of their own, and signatures that every process gives."""

import builtins
import sys
from types import ModuleType

import pytest

from nanochat.data.docstring_sources import Record
from nanochat.data.docstrings import imported, is_private, objects, own_text, signature, units

PRIVATE = '''
class Base:
    """The base."""
    def keep(self, a, b=object(), c=frozenset((1, 2)), *, d="x"):
        """Keep it."""
    def plain(self): ...
    value = property(lambda self: 1, doc="A value.")
    class Inner:
        """Inside."""
    alias = keep
class Child(Base):
    __slots__ = ("x",)
    @classmethod
    def make(cls):
        """Make one."""
def function():
    """A function."""
NUMBER = 3
'''


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """`pkg._impl` defines; `pkg` declares what is public; `other` has imported some of it."""
    impl, pkg, other = (ModuleType(name) for name in ("pkg._impl", "pkg", "other"))
    exec(PRIVATE, vars(impl))
    pkg.Base, pkg.function, pkg.__all__ = impl.Base, impl.function, ["Base", "function"]  # type: ignore[attr-defined]
    pkg.__doc__ = "  The package.\n\n  More."
    other.Base, other.f = impl.Base, impl.function  # type: ignore[attr-defined]
    return {module.__name__: module for module in (impl, pkg, other)}


def test_names_kinds_and_texts(package: dict[str, ModuleType]) -> None:
    found = {r.name: r for r in objects(package, {"pkg"}) if not r.name.split(".")[-1].startswith("__")}
    assert {name: (r.kind, r.text) for name, r in found.items() if r.text} == {
        "pkg": ("module", "The package.\n\nMore."),
        "pkg.Base": ("class", "The base."),
        "pkg.Base.keep": ("method", "Keep it."),
        "pkg.Base.alias": ("method", "Keep it."),
        "pkg.Base.value": ("attribute", "A value."),
        "pkg.Base.Inner": ("class", "Inside."),
        "pkg._impl.Child.make": ("method", "Make one."),
        "pkg.function": ("function", "A function."),
    }
    assert found["pkg.Base.keep"].signature == "(self, a, b=..., c=..., *, d='x')"
    assert found["pkg.Base.keep"].home == "pkg._impl:Base.keep"
    assert not any(name.startswith("pkg._impl.Child.keep") for name in found)  # what it inherits is not repeated
    only_imports = list(objects({"other": package["other"]}, {"other"}))
    assert only_imports == [Record("other", "module", "other", "other:", "", "")]


def test_builtins_go_without_their_module() -> None:
    found = {r.name: r for r in objects({"builtins": builtins}, {"builtins"})}
    assert found["str.split"].text == (str.split.__doc__ or "")[: len(found["str.split"].text)]
    assert (found["abs"].kind, found["abs"].signature) == ("function", "(x, /)")
    assert "builtins.abs" not in found


def test_texts_that_are_none_of_its_own() -> None:
    assert own_text(3) == own_text(True) == own_text([]) == ""
    assert own_text(type("Point", (), {"__doc__": "Point(x: int, y: int)"})) == ""
    assert own_text(property(doc="Mine.")) == "Mine."
    assert signature(object()) == signature(3) == ""


def test_private_names() -> None:
    assert [is_private(name) for name in ("a.b", "a.__init__", "a._b", "_a.b", "posix.stat", "a.B.__x")] == [
        False, False, True, True, True, True,
    ]  # fmt: skip


def test_modules_are_found_without_importing_them() -> None:
    left_alone = ("antigravity", "idlelib", "wsgiref")
    before = {name for name in sys.modules if name.startswith(left_alone)}
    found = {unit.name: unit.path for unit in units(["antigravity", "idlelib", "test", "sys", "wsgiref", "no_such"])}
    assert {name for name in sys.modules if name.startswith(left_alone)} == before
    assert found["sys"] == ""
    assert found["wsgiref.util"].endswith("util.py")
    assert "antigravity" in found
    assert not any("test" in name.split(".") or name.endswith("__main__") for name in found)
    assert imported("antigravity") is None
    assert imported("idlelib.help") is None
    assert imported("no_such_module") is None
