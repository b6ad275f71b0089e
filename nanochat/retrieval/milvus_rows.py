"""How documents lie in a Milvus collection: the schema, documents to rows and back, filters to Milvus expressions.

A row is a passage. It carries the versions [added, removed) in which it exists, so a search at a version is a search
with a filter. Strings that users choose (ids, metadata) never stand in an expression: they are looked up by hash, or
compared in an encoding that keeps their order, so no quoting rule of any Milvus release matters. What an expression
lets through is compared with the filter itself once more, so a filter stays exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from nanochat.errors import UsageError
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.chunk import Span, spans
from nanochat.retrieval.document import Document, metadata_json
from nanochat.retrieval.filters import OWN_FIELDS, Condition, field_values
from nanochat.retrieval.milvus_client import import_pymilvus

FOREVER = 2**62  # `removed` of a row that nobody removed
MAX_TEXT_BYTES = 65_535  # of a VARCHAR in Milvus
MAX_FACETS = 4_096  # of an ARRAY in Milvus
MAX_JSON_BYTES = 65_536  # of a JSON field in Milvus
ORDERED_BYTES = 64  # of a text that comparisons see there; the rest is compared here
EXACT = 2**53  # numbers beyond are compared here, whatever a server rounds them to
_INDEXED = ("key", "hash", "added", "removed", "facets")
_SIGNS = {"gte": ("highest", ">="), "gt": ("highest", ">"), "lte": ("lowest", "<="), "lt": ("lowest", "<")}

DOCUMENT_FIELDS = ("row", "key", "part", "start", "end", "id", "title", "source", "content", "metadata")
JOIN_FIELDS = (*DOCUMENT_FIELDS, "before", "after", "hash", "parts", "added", "removed")
WRITE_FIELDS = (*JOIN_FIELDS, "facets", "ordered")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a knowledge base's rows hold, and how documents are cut into them."""

    lexical: bool
    dimension: int | None  # of the vectors; None: no dense index
    analyser: Analyser
    chunk_words: int
    overlap_words: int

    @property
    def fields(self) -> list[str]:
        """All fields that a client writes (Milvus itself makes `sparse` from `tokens`)."""
        return [*WRITE_FIELDS, *(["tokens"] if self.lexical else []), *(["dense"] if self.dimension else [])]


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document on its way into Milvus, with the text between it and its neighbours where they do not meet:
    the whole document can be put together again."""

    document: Document
    part: int
    parts: int
    before: str
    after: str
    tokens: str


def schema(shape: Shape) -> Any:
    """The collection's schema, for pymilvus."""
    engine = import_pymilvus()
    DataType = engine.DataType
    made = engine.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    made.add_field("row", DataType.INT64, is_primary=True)
    for name in ("part", "parts", "start", "end", "added", "removed"):
        made.add_field(name, DataType.INT64)
    for name in ("key", "hash"):
        made.add_field(name, DataType.VARCHAR, max_length=32)
    for name in ("id", "title", "source", "content", "before", "after", "metadata"):
        made.add_field(name, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    made.add_field(
        "facets", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=MAX_FACETS, max_length=16
    )
    made.add_field("ordered", DataType.JSON)
    if shape.lexical:
        plain = {"tokenizer": "standard"}  # terms arrive made: no filter, no stemmer
        made.add_field(
            "tokens", DataType.VARCHAR, max_length=MAX_TEXT_BYTES, enable_analyzer=True, analyzer_params=plain
        )
        made.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        made.add_function(engine.Function("bm25", engine.FunctionType.BM25, ["tokens"], ["sparse"]))
    if shape.dimension:
        made.add_field("dense", DataType.FLOAT_VECTOR, dim=shape.dimension)
    return made


def indexes(shape: Shape, dense_index: str | None, local: bool) -> list[dict[str, Any]]:
    """For pymilvus. milvus-lite scans scalar fields as fast without an index, and knows none for arrays."""
    made: list[dict[str, Any]] = []
    if shape.lexical:
        bm25 = {"bm25_k1": 1.2, "bm25_b": 0.75}  # those of the local index
        params = {"params": bm25} if local else bm25  # pymilvus takes one level away, milvus-lite wants it
        kind = "SPARSE_INVERTED_INDEX"
        made.append({"field_name": "sparse", "index_type": kind, "metric_type": "BM25", "params": params})
    if shape.dimension:
        kind = dense_index or ("FLAT" if local else "AUTOINDEX")
        made.append({"field_name": "dense", "index_type": kind, "metric_type": "IP"})
    if not local:
        made += [{"field_name": name, "index_type": "INVERTED"} for name in _INDEXED]
    return made


# -- documents and rows ------------------------------------------------------------------------------------------------


def key_of(id: str) -> str:
    """32 hexadecimal digits that stand for an id in expressions."""
    return blake2b(id.encode(), digest_size=16).hexdigest()


def check_sizes(document: Document) -> None:
    """Raises UsageError for what no row can hold: Milvus limits texts, arrays and JSON."""
    sizes = {"id": document.id, "title": document.title, "source": document.source}
    sizes["metadata"] = metadata_json(document.metadata)
    for name, text in sizes.items():
        if (size := len(text.encode())) > MAX_TEXT_BYTES:
            raise UsageError(
                f"document {document.id[:80]!r}: its {name} has {size:,} bytes; Milvus takes {MAX_TEXT_BYTES:,}. "
                "Shorten it, or keep this document in a local knowledge base"
            )
    if (n := len(facets(document))) > MAX_FACETS:
        raise UsageError(f"document {document.id[:80]!r}: {n:,} metadata values; Milvus takes {MAX_FACETS:,}")
    if len(json.dumps(ordered(document)).encode()) > MAX_JSON_BYTES:
        raise UsageError(f"document {document.id[:80]!r}: too much metadata; Milvus takes {MAX_JSON_BYTES:,} bytes")


def passages(document: Document, shape: Shape) -> list[Passage]:
    """The document cut into passages that fit into rows. Raises UsageError where that cannot be done."""
    check_sizes(document)
    text = document.content
    wanted = spans(text, shape.chunk_words, shape.overlap_words)
    cuts = [cut for span in wanted for cut in _fitting(document, span, shape)]
    made: list[Passage] = []
    end = 0
    for part, ((start, stop), words) in enumerate(cuts):
        whole = len(cuts) == 1 and (start, stop) == (0, len(text))
        piece = document if whole else _piece(document, (start, stop))
        before, after = text[end:start], text[stop:] if part == len(cuts) - 1 else ""
        if max(len(before.encode()), len(after.encode())) > MAX_TEXT_BYTES:
            raise UsageError(f"document {document.id[:80]!r}: over {MAX_TEXT_BYTES:,} bytes of white space on end")
        made.append(Passage(piece, part, len(cuts), before, after, words))
        end = max(end, stop)
    return made


def _fitting(document: Document, span: Span, shape: Shape) -> Iterator[tuple[Span, str]]:
    """The span with its tokens, halved until both fit into a VARCHAR (long words, scripts without spaces)."""
    piece = _piece(document, span)
    words = tokens(shape.analyser.terms(piece.text)) if shape.lexical else ""
    if max(len(piece.content.encode()), len(words.encode())) <= MAX_TEXT_BYTES:
        yield span, words
        return
    start, end = span
    if end - start < 1000:
        raise UsageError(f"document {document.id[:80]!r}: its title is too long for Milvus; shorten it")
    middle = (start + end) // 2
    space = document.content.find(" ", middle, min(middle + 500, end - 1))
    cut = middle if space < 0 else space + 1
    yield from _fitting(document, (start, cut), shape)
    yield from _fitting(document, (cut, end), shape)


def _piece(document: Document, span: Span) -> Document:
    content = document.content[span[0] : span[1]]
    return Document(document.id, content, document.title, document.source, document.metadata, span)


def row_of(passage: Passage, hash: str, number: int, version: int, shape: Shape, vector: Any) -> dict[str, Any]:
    """The row with this number, existing from `version` on. `vector` has the shape's dimension, if it has one."""
    document = passage.document
    start, end = document.span or (-1, -1)
    row = {
        "row": number, "key": key_of(document.id), "hash": hash, "part": passage.part, "parts": passage.parts,
        "start": start, "end": end, "before": passage.before, "after": passage.after, "added": version,
        "removed": FOREVER, "id": document.id, "title": document.title, "source": document.source,
        "content": document.content, "metadata": metadata_json(document.metadata), "facets": facets(document),
        "ordered": ordered(document),
    }  # fmt: skip
    if shape.lexical:
        row["tokens"] = passage.tokens
    if shape.dimension:
        row["dense"] = vector
    return row


def document_of(row: Mapping[str, Any]) -> Document:
    """The passage in a row."""
    span = None if row["start"] < 0 else (int(row["start"]), int(row["end"]))
    metadata = json.loads(row["metadata"]) if row["metadata"] else {}
    return Document(row["id"], row["content"], row["title"], row["source"], metadata, span)


def joined(rows: Sequence[Mapping[str, Any]]) -> Document:
    """The whole document from the rows of its passages, in order."""
    if len(rows) == 1 and rows[0]["start"] < 0:
        return document_of(rows[0])
    pieces: list[str] = []
    end = 0
    for row in rows:
        repeated = max(end - int(row["start"]), 0)  # the overlap
        pieces += [row["before"], row["content"][repeated:], row["after"]]
        end = max(end, int(row["end"]))
    whole = document_of(rows[0])
    return Document(whole.id, "".join(pieces), whole.title, whole.source, whole.metadata)


def tokens(terms: Iterable[str]) -> str:
    """Terms as a text that the standard tokenizer cuts back into the same terms, whether or not it makes them
    lower-case: letters and digits stay, terms with anything else become hexadecimal digits."""
    return " ".join(t if t.isalnum() and t == t.lower() else f"0x{t.encode().hex()}" for t in terms)


# -- filters -----------------------------------------------------------------------------------------------------------


def facets(document: Document) -> list[str]:
    """A hash for each (key, value) that an equality can ask for, and one for each key that has a value."""
    found: dict[str, None] = {}
    for key, values in _fields(document):
        found[_has(key)] = None
        for value in values:
            found[_facet(key, value)] = None
    return list(found)


def ordered(document: Document) -> dict[str, Any]:
    """What comparisons see: the lowest and highest number, and the lowest and highest text, of each key."""
    found: dict[str, Any] = {}
    for key, values in _fields(document):
        for is_text in (False, True):
            some = [value for value in values if isinstance(value, str) == is_text]
            if some:
                found[_name("lowest", is_text, key)] = _sortable(min(some))
                found[_name("highest", is_text, key)] = _sortable(max(some))
    return found


def visible(version: int) -> str:
    """The expression for rows that exist at a version."""
    return f"added <= {version} and removed > {version}"


def any_of(field: str, hexes: Iterable[str]) -> str:
    """The expression for rows whose field is one of these hexadecimal texts."""
    return f"{field} in [" + ", ".join(f'"{one}"' for one in hexes) + "]"


def expression(conditions: Mapping[str, Condition], version: int) -> str:
    """Rows that exist at a version and may pass the conditions (from `filters.check`); none that passes is left out."""
    parts = [visible(version)]
    for key, condition in conditions.items():
        parts.append(f'array_contains(facets, "{_has(key)}")')
        parts += [_test(key, operator, operand) for operator, operand in condition.items()]
    return " and ".join(parts)


def _test(key: str, operator: str, operand: Any) -> str:
    if operator in ("eq", "ne"):
        return ("not " if operator == "ne" else "") + f'array_contains(facets, "{_facet(key, operand)}")'
    if operator == "in":
        inside = ", ".join(f'"{_facet(key, value)}"' for value in operand)
        return f"array_contains_any(facets, [{inside}])" if inside else "row < 0"
    which, sign = _SIGNS[operator]
    is_text = isinstance(operand, str)
    cut = len(operand.encode()) >= ORDERED_BYTES if is_text else not abs(operand) < EXACT
    if cut:
        sign = sign[0] + "="  # near the border `filters.matches` decides
    literal = f'"{_sortable(operand)}"' if is_text else repr(_sortable(operand))
    return f'ordered["{_name(which, is_text, key)}"] {sign} {literal}'


def _fields(document: Document) -> Iterator[tuple[str, list[int | float | str]]]:
    """The keys that have a value, and their values as filters see them."""
    own = {name: getattr(document, name) for name in OWN_FIELDS}
    for key, value in {**document.metadata, **own}.items():
        if values := field_values(value):
            yield key, values


def _facet(key: str, value: int | float | str) -> str:
    """16 hexadecimal digits for a key's value; equal numbers have the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = f"s{value}" if isinstance(value, str) else f"n{value!r}"
    return blake2b(text.encode(), digest_size=8, key=_short(key)).hexdigest()


def _has(key: str) -> str:
    return blake2b(b"has", digest_size=8, key=_short(key)).hexdigest()


def _name(which: str, is_text: bool, key: str) -> str:
    return f"{which}_{'text' if is_text else 'number'}_{_short(key).hex()}"


def _short(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=8).digest()


def _sortable(value: float | int | str) -> float | int | str:
    """Texts in hexadecimal, which sorts as UTF-8 does, and that as code points do; numbers without infinity."""
    if isinstance(value, str):
        return value.encode()[:ORDERED_BYTES].hex()
    return value if abs(value) < 1e300 else 1e300 if value > 0 else -1e300
