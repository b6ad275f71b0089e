"""Documents made ready: the hash by which duplicates are known is the documented one; slices bound memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.retrieval import prepare
from nanochat.retrieval.chunk import spans
from nanochat.retrieval.document import Document, document_hash
from nanochat.retrieval.prepare import check, check_text, passage_texts, pieces, slices

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
DOCUMENTS = st.builds(Document, st.text(min_size=1), TEXTS, TEXTS, TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=2))


@given(DOCUMENTS)
def test_what_is_ready_can_be_stored_and_has_the_documented_hash(document: Document) -> None:
    ready = check(document)
    assert ready.hash == document_hash(ready.document)
    for text in (ready.document.content, ready.document.title, ready.document.source, ready.metadata):
        text.encode()
    said = [document.content, document.title, document.source, *document.metadata, *document.metadata.values()]
    if not any("\ud800" <= c <= "\udfff" for c in "".join(said)):  # in a repr they are escaped
        assert ready.document == document
    assert check(ready.document) == ready


def test_what_cannot_be_stored_is_refused() -> None:
    for bad in (Document("", "x"), Document("a\udfff", "x"), Document("a", 3), Document("a", "", source=None), "text"):  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            check(bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="an id must be a text"):
        check_text(7, "an id")


@given(st.text("ab \n", max_size=60), st.integers(1, 4))
def test_pieces_hold_the_content_once(content: str, chunk: int) -> None:
    cuts = spans(content, chunk, chunk // 2)
    rows = pieces(7, content, cuts)
    assert "".join(text for _, _, _, text in rows) == content
    assert [(start, end) for _, start, end, _ in rows] == cuts
    texts = passage_texts(Document("a", content, "T"), cuts)
    assert texts == [f"T\n{content[start:end]}" for start, end in cuts]


def test_slices_are_bounded_by_number_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "AT_ONCE", 3)
    monkeypatch.setattr(prepare, "CHARACTERS_AT_ONCE", 10)
    documents = [Document(str(i), "x" * n) for i, n in enumerate([1, 1, 1, 20, 4, 6, 1])]
    assert [len(part) for part in slices(iter(documents))] == [3, 1, 2, 1]
    assert list(slices([])) == []
