"""Documents into the prompt: one retrieval block of numbered documents under a token budget.

    <|retrieval_start|><|doc_start|> Title1<|doc_title_end|> text<|doc_end|><|doc_start|> ...2<|doc_title_end|> ...

The number stands right behind the title, and a citation repeats both: so it is "what came after this name", the look-up
that models learn first. The blanks in front give a name the same tokens here as inside of a sentence.

Training, evaluation and chat all call `retrieval_message`, so a model meets at work what it was trained on. The block
stands before the question: the documents are a stable prefix whose state can be kept. Their text is encoded as plain
bytes by the tokenizer and never becomes a special token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from nanochat.data.shuffle import Draws
from nanochat.errors import UsageError
from nanochat.retrieval.document import Document
from nanochat.tokenizer import Tokenizer

ORDERS = ("best_first", "best_last", "shuffled")
GAP = " … "  # between pieces of one source that do not touch


class Block(NamedTuple):
    """A retrieval message, and its documents as the model sees them: number n is documents[n - 1]."""

    message: dict[str, Any]
    documents: tuple[Document, ...]
    trimmed: int = 0  # tokens left out to stay within the budget
    dropped: int = 0  # documents left out altogether


def retrieval_message(
    documents: Sequence[Document],
    tokenizer: Tokenizer | None = None,
    max_tokens: int = 0,
    order: str = "best_first",
    seed: int = 0,
) -> Block:
    """The block of `documents` (best first).

    Pieces of one source become one document, equal texts one; then, with a tokenizer and `max_tokens`, the longest
    documents lose their ends until all fit, and when even 16 tokens each would not fit, the worst leave. `order`:
    best_first, best_last, or shuffled by `seed`. Raises UsageError for another order.
    """
    if order not in ORDERS:
        raise UsageError(f"document order {order!r}: must be one of {', '.join(ORDERS)}")
    chosen, before = distinct(aggregate(documents)), len(documents)
    trimmed = dropped = 0
    if tokenizer is not None and max_tokens:
        chosen, trimmed, dropped = fit(chosen, tokenizer, max_tokens)
    if order == "best_last":
        chosen = chosen[::-1]
    elif order == "shuffled":
        draws, rest = Draws(seed), list(chosen)
        chosen = [rest.pop(draws.below(len(rest))) for _ in range(len(rest))]
    assert len(chosen) <= before
    return Block({"role": "retrieval", "content": document_parts(chosen)}, tuple(chosen), trimmed, dropped)


def result_part(documents: Sequence[Document], first: int = 1) -> dict[str, Any]:
    """What a search of the model's own brought, as a part of its message; numbers count on from `first`."""
    return {"type": "result", "text": "", "documents": document_parts(documents, first)}


def document_parts(documents: Sequence[Document], first: int = 1) -> list[dict[str, Any]]:
    """Documents as parts of a message, numbered from `first`."""
    return [
        {"type": "document", "title": heading(document.title, n), "text": f" {preface(document)}{document.content}"}
        for n, document in enumerate(documents, first)
    ]


HEADING = 48  # characters of a title that stand before the number, and that a citation repeats


def heading(title: str, number: int) -> str:
    """What stands over a document and what cites it: the title's beginning and the number. A title that ends with a
    digit gets a colon, so that the number can always be told from it."""
    short = _beginning(title)
    if short[-1:].isdigit():
        short += ":"
    return f" {short}{number}"


def headings(documents: Sequence[Document]) -> list[str]:
    """Those of documents numbered from 1."""
    return [heading(document.title, n) for n, document in enumerate(documents, 1)]


def focused(message: dict[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """A retrieval message with these of its documents only, under their old headings."""
    return {**message, "content": [message["content"][n - 1] for n in sorted(set(numbers))]}


def preface(document: Document) -> str:
    """What comes before the text under a heading: the title where the heading has only its beginning."""
    return f"{document.title}\n" if len(" ".join(document.title.split())) > HEADING else ""


def _beginning(title: str) -> str:
    """At most HEADING characters, whole words where there are any."""
    title = " ".join(title.split())
    if len(title) <= HEADING:
        return title
    return title[: HEADING + 1].rsplit(" ", 1)[0][:HEADING]


def aggregate(documents: Sequence[Document]) -> list[Document]:
    """Passages of one source joined into one document, in the order of the source, at the place of its best passage."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.id, []).append(document)
    return [_join(group) for group in groups.values()]


def _join(pieces: list[Document]) -> Document:
    """Overlaps are written once."""
    spans = sorted({piece.span: piece for piece in pieces if piece.span is not None}.items(), key=lambda item: item[0])
    if len(pieces) == 1 or len(spans) < 2:
        return pieces[0]
    content, (start, end) = spans[0][1].content, spans[0][0]
    for (low, high), piece in spans[1:]:
        if high <= end:
            continue
        content += piece.content[end - low :] if low <= end else GAP + piece.content
        end = high
    return replace(pieces[0], content=content, span=(start, end))


def distinct(documents: Sequence[Document]) -> list[Document]:
    """Without documents that say the same."""
    seen: dict[str, Document] = {}
    for document in documents:
        seen.setdefault(said(document), document)
    return list(seen.values())


def said(document: Document) -> str:
    """Title and text, whatever the blanks and capitals: equal for documents that say the same."""
    return " ".join(document.text.lower().split())


LEAST = 16  # tokens of text that a document keeps


def fit(
    documents: Sequence[Document], tokenizer: Tokenizer, max_tokens: int, first: int = 1
) -> tuple[list[Document], int, int]:
    """Documents, numbered from `first`, that fit into `max_tokens` as a block; tokens trimmed; documents dropped.

    All texts are cut to one common length, the largest that fits, so that short ones stay whole.
    """
    kept = list(documents)
    texts = [tokenizer.encode(f" {document.content}") for document in kept]
    over = [heading(document.title, n) + preface(document) for n, document in enumerate(kept, first)]
    fixed = [len(tokenizer.encode(text)) + 3 for text in over]
    while kept and sum(fixed) + sum(min(LEAST, len(text)) for text in texts) + 2 > max_tokens:
        kept.pop()
        texts.pop()
        fixed.pop()
    room, cap = max_tokens - 2 - sum(fixed), 0
    for i, length in enumerate(sorted(map(len, texts))):
        cap = room // (len(texts) - i)
        if length > cap:
            break
        room -= length
    trimmed = 0
    for i, text in enumerate(texts):
        if len(text) > cap:
            kept[i], cut = _shortened(kept[i], text, cap, tokenizer)
            trimmed += cut
    return kept, trimmed, len(documents) - len(kept)


def _shortened(document: Document, ids: list[int], cap: int, tokenizer: Tokenizer) -> tuple[Document, int]:
    """The first `cap` tokens at most of the text with its leading blank, ended at a whole character."""
    decode: Callable[[list[int]], bytes] = tokenizer.decode_bytes
    text, keep = decode(ids[:cap]).decode("utf-8", errors="ignore"), cap
    while len(tokenizer.encode(text)) > cap:  # cutting inside a word can make more tokens of what is left
        keep -= 1
        text = decode(ids[:keep]).decode("utf-8", errors="ignore")
    text = text[1:]
    start = 0 if document.span is None else document.span[0]
    return replace(document, content=text, span=(start, start + len(text))), len(ids) - keep
