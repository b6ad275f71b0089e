"""A Milvus in this process, knowledge bases in it, and an embedder that counts: for the tests of test_milvus*.py."""

import math
import os

import pytest
from hypothesis import HealthCheck, settings

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from nanochat.retrieval.document import Document
from nanochat.retrieval.embed import make_embedder
from nanochat.retrieval.milvus import MilvusKnowledgeBase
from nanochat.retrieval.milvus_client import Connection

EMBEDDER = make_embedder("hashed:32")
WORDS = ["moon", "sun", "air", "cheese", "water", "iron", "stone", "light", "night", "star"]
FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
DOCUMENTS = [
    Document("moon", "The Moon has no air.", metadata={"lang": "en", "year": 1969, "tags": ["rock", "night"]}),
    Document("sun", 'The Sun is hot and "big".', source="book", metadata={"lang": "de", "year": 2000.5, "ok": True}),
    Document("../a/b", "Iron and stone, no cheese.", title="Stones", metadata={"year": 1990, "none": None}),
    Document("empty", "", metadata={"lang": "en"}),
    Document("zażółć 文", "水と光 water light", metadata={"lang": "pl"}),
]


class Failing:
    """An embedder that counts, and fails when told to."""

    name, dimension = EMBEDDER.name, EMBEDDER.dimension

    def __init__(self) -> None:
        self.n, self.fail_at = 0, math.inf

    def embed(self, texts):
        self.n += len(texts)
        if self.n > self.fail_at:
            raise RuntimeError("out of memory")
        return EMBEDDER.embed(texts)

    def embed_queries(self, texts):
        return EMBEDDER.embed_queries(texts)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    place = str(tmp_path_factory.mktemp("milvus") / "lite.db")
    connection = Connection(place)  # keeps the server running between tests
    yield place
    connection.close()


@pytest.fixture
def make(uri):
    """New knowledge bases in one server."""
    opened = []

    def create(**options):
        options = {"kind": "hybrid", **options}
        if options["kind"] != "bm25":
            options.setdefault("embedder", EMBEDDER)
        opened.append(MilvusKnowledgeBase.create(uri, collection=f"kb{os.urandom(6).hex()}", **options))
        return opened[-1]

    yield create
    for kb in opened:
        for name in (kb.collection, f"{kb.collection}_versions"):
            kb._call("drop_collection", name)
        kb.close()


def ids(hits):
    return [hit.id for hit in hits]


def held(kb):
    return {document.id: document for document in kb.documents()}
