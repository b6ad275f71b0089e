"""Documents: the text indexes see, hashes, lone surrogates; the package imports nothing heavy."""

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.retrieval.document import (
    Document,
    Found,
    clean_text,
    content_hash,
    document_hash,
    metadata_json,
)

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))


def test_text_is_title_and_content() -> None:
    assert Document("a", "body").text == "body"
    assert Document("a", "body", title="Head").text == "Head\nbody"
    assert Document("a", "").text == ""


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_content_hash_tells_lists_apart(a: list[str], b: list[str]) -> None:
    assert (content_hash(*a) == content_hash(*b)) == (a == b)


def test_content_hash_knows_where_texts_end() -> None:
    for a, b in pairwise([("ab", "c"), ("a", "bc"), ("", "abc"), ("abc",), ("1,2:ab", "c"), ("a", "b", "c")]):
        assert content_hash(*a) != content_hash(*b)


def test_document_hash_ignores_id_source_and_order_of_keys() -> None:
    one = Document("a", "text", "title", "here", {"x": 1, "y": [2]})
    assert document_hash(one) == document_hash(Document("b", "text", "title", "there", {"y": [2], "x": 1}))
    different = Document("a", "text", "title", "here", {"x": 2, "y": [2]})
    for other in (Document("a", "text"), Document("a", "text", "title"), different):
        assert document_hash(one) != document_hash(other)


@given(ANY_TEXT)
def test_clean_text_can_be_stored_and_changes_nothing_else(text: str) -> None:
    clean = clean_text(text)
    assert clean.encode().decode() == clean == clean_text(clean)
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert clean == text


def test_clean_text_replaces_halves_and_joins_pairs() -> None:
    assert clean_text("a\ud800b") == "a\ufffdb"
    assert clean_text("\udc00\ud800") == "\ufffd\ufffd"
    assert clean_text("\ud83d\ude00") == "\U0001f600"


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": {1}}, {"x": object()}, {("a",): 1}])
def test_metadata_must_be_json(bad: dict) -> None:
    with pytest.raises((TypeError, ValueError)):
        metadata_json(bad)


def test_found_none_is_empty() -> None:
    assert not len(Found.none().rows)
    assert not len(Found.none().scores)


def test_the_package_imports_nothing_heavy() -> None:
    code = """
import sys
import nanochat.retrieval as r
assert "KnowledgeBase" in dir(r)
heavy = {"torch", "numpy", "tantivy", "faiss", "onnxruntime"} & sys.modules.keys()
assert not heavy, heavy
import nanochat.retrieval.knowledge_base, nanochat.retrieval.retriever
for name in r.__all__: getattr(r, name)
heavy = {"torch", "tantivy", "faiss", "onnxruntime", "ray", "pymilvus"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
