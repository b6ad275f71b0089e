"""Whole documents read from Milvus, and whether all that should be there is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from nanochat.retrieval.document import Document, document_hash
from nanochat.retrieval.manifest import Version
from nanochat.retrieval.milvus_client import Connection
from nanochat.retrieval.milvus_rows import JOIN_FIELDS, joined, key_of


def whole_documents(call: Connection, collection: str, where: str) -> Iterator[tuple[Document, list[dict[str, Any]]]]:
    """Documents with the rows of their passages, which lie side by side, in the order in which they were added."""
    rows = call.rows(collection, where, list(JOIN_FIELDS))
    for _, group in itertools.groupby(rows, lambda row: int(row["row"]) - int(row["part"])):
        some = list(group)
        yield joined(some), some


def problems(call: Connection, collection: str, versions: Sequence[Version]) -> Iterator[str]:
    """What is wrong, as sentences. Reads all texts."""
    documents, passages = Counter[int](), Counter[int]()
    for document, rows in whole_documents(call, collection, "row >= 0"):
        first = rows[0]
        if [int(row["part"]) for row in rows] != list(range(int(first["parts"]))):
            yield f"Document {document.id!r} has {len(rows)} of its {first['parts']} passages."
        elif document_hash(document).hex() != first["hash"] or key_of(document.id) != first["key"]:
            yield f"Document {document.id!r} is not what was stored: its hash is another."
        for one in versions:
            if int(first["added"]) <= one.number < int(first["removed"]):
                documents[one.number] += 1
                passages[one.number] += len(rows)
    for one in versions:
        found = documents[one.number], passages[one.number]
        if found != (one.documents, one.passages):
            yield (
                f"Version {one.number} should hold {one.documents} documents in {one.passages} passages; found are "
                f"{found[0]} in {found[1]}."
            )
