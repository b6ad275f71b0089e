"""What Python says of its own library: the same on each call, each text once, under one name."""

import inspect
import json

import pytest

from nanochat.data import python_docs as module
from nanochat.data.docstring_sources import Record
from nanochat.data.python_docs import distinct, document, python_docs
from nanochat.errors import NanochatError, UsageError


def test_a_package() -> None:
    found = python_docs(["json", "heapq"])
    by_name = {record.name: record for record in found}
    assert list(by_name) == sorted(by_name)
    assert len(by_name) == len(found)
    assert len({" ".join(record.text.lower().split()) for record in found}) == len(found)
    for name in json.__all__:
        assert by_name[f"json.{name}"].text == inspect.getdoc(getattr(json, name))
    assert by_name["json.dumps"].signature == str(inspect.signature(json.dumps))
    assert by_name["json.decoder.py_scanstring"].kind == "function"  # the sources know it, users have the one in C
    assert by_name["heapq#comments"].kind == "comment"
    assert {record.module.split(".")[0] for record in found} == {"json", "heapq"}
    assert python_docs(["heapq", "json"]) == found


def test_one_record_for_a_text_and_a_name() -> None:
    def record(name: str, text: str, home: str = "", kind: str = "function") -> Record:
        return Record(name, kind, "m", home or f"m:{name}", "", text)

    same = [record("m._a", "Same."), record("m.longer", "same."), record("m.b", " Same.", "m:longer")]
    other = [record("m.c", "C."), record("m.c", "Another C."), record("m.d", "Words.", kind="comment")]
    found = distinct([*same, *other, record("m.e", "words."), record("m.f", " ")])
    assert [(r.name, r.text) for r in found] == [("m.c", "C."), ("m.e", "words."), ("m.longer", "same.")]


def test_documents() -> None:
    record = Record("m.C.f", "method", "m.n", "m.n:C.f", "(self, a=1)", "Does it.")
    made = document(record)
    assert (made["id"], made["title"], made["content"]) == ("m.C.f", "m.C.f", "m.C.f(self, a=1)\n\nDoes it.")
    assert made["source"].startswith("Python 3.")
    assert made["metadata"] == {"kind": "method", "module": "m"}
    made = document(record._replace(name="m.C.f#comments", kind="comment"))
    assert (made["id"], made["title"]) == ("m.C.f#comments", "m.C.f (comments)")
    assert made["content"] == "Comments in the source of m.C.f(self, a=1)\n\nDoes it."
    assert document(record._replace(kind="topic"))["content"] == "Does it."


def test_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--modules jsn: no module of the standard library; did you mean json\?"):
        python_docs(["jsn"])
    monkeypatch.setattr(module, "START", "raise SystemExit('it broke')")
    with pytest.raises(NanochatError, match=r"ended with code 1: it broke; choose --modules"):
        python_docs(["json"])
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(NanochatError, match="cannot start /no/such/python"):
        python_docs(["json"])
