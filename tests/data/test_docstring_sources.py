"""Texts from sources that are never run."""

from pathlib import Path

import pytest

from nanochat.data.docstring_sources import Record, Unit, definitions

SOURCE = '''\
"""A module that would fail: importing it raises."""
# Why this module is here at all, told in a comment that has enough words.
raise SystemExit

if True:
    class Outer(Base, metaclass=Meta):
        """A class."""

        # Above a method stands why it does
        # what it does in the way that it does it.
        @property
        def inner(self, a, *, b=1) -> int:
            # total = a + b
            # print(total)
            def deep():
                """Deep inside."""
                # These words belong to the function that stands inside of the other one.
                return a
            return deep  # a comment behind code does not count, however long it may be

    async def bare(): ...

    def bare():
        """The second of that name."""
'''


@pytest.fixture
def found(tmp_path: Path) -> list[Record]:
    path = tmp_path / "m.py"
    path.write_text(SOURCE)
    return list(definitions(Unit("m", str(path))))


def test_what_is_said_of_each_definition(found: list[Record]) -> None:
    assert [(r.name, r.kind, r.signature, r.text.split(".")[0]) for r in found] == [
        ("m", "module", "", "A module that would fail: importing it raises"),
        ("m#comments", "comment", "", "Why this module is here at all, told in a comment that has enough words"),
        ("m.Outer", "class", "(Base)", "A class"),
        ("m.Outer.inner#comments", "comment", "(self, a, *, b=1) -> int", "Above a method stands why it does\nwhat it "
         "does in the way that it does it"),
        ("m.Outer.inner.deep", "function", "()", "Deep inside"),
        ("m.Outer.inner.deep#comments", "comment", "()", "These words belong to the function that stands inside of the "
         "other one"),
        ("m.bare", "function", "()", "The second of that name"),
    ]  # fmt: skip
    assert [r.home for r in found[:4]] == ["m:", "m:#comments", "m:Outer", "m:Outer.inner#comments"]


@pytest.mark.parametrize("source", [b"print 'two'", b"# coding: none-such\n", b'"""\xff"""', b"x = 1\n# few words\n"])
def test_sources_that_say_nothing(source: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_bytes(source)
    assert list(definitions(Unit("m", str(path)))) == []
    assert list(definitions(Unit("m", str(tmp_path / "none.py")))) == []
    assert list(definitions(Unit("m", ""))) == []
