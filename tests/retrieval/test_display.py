"""What searches print."""

from nanochat.retrieval import display
from nanochat.retrieval.document import Document, Hit


def test_texts_cannot_command_the_terminal() -> None:
    hit = Hit("x\x1b[2J", 1.0, 1, Document("x\x1b[2J", "a\x1b]0;evil\x07b\nsecond\u202e", "T\r"))
    for text in (display.hits_table("q", [hit]), display.hits_table("q", [hit], full=True)):
        assert all(c.isprintable() or c == "\n" for c in text)


def test_excerpts_show_what_was_asked_for() -> None:
    document = Document("x", "padding " * 50 + "the needle stands here " + "more " * 50, "A title that is long")
    text = display.excerpt(document, "where is the needle?", 80)
    assert "needle stands here" in text
    assert text.startswith("A title that is long: …")
    assert len(text) <= 80
    assert display.excerpt(Document("x", "short"), "needle", 80) == "short"
    numbered = Document("x", " ".join(f"w{i}" for i in range(1000)))
    assert " w700 " in display.excerpt(numbered, "w700", 60)
