"""Reading a knowledge base in Milvus: opening, searching, its documents and versions. milvus.py adds the changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanochat.errors import UsageError
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.document import Document, Embedder, Hit, clean_text
from nanochat.retrieval.filters import check
from nanochat.retrieval.interface import SearchesPassages
from nanochat.retrieval.manifest import Version
from nanochat.retrieval.milvus_check import problems, whole_documents
from nanochat.retrieval.milvus_client import Connection, History, staging_directory
from nanochat.retrieval.milvus_rows import Shape, any_of, key_of, passages, visible
from nanochat.retrieval.milvus_search import Searcher, answer
from nanochat.retrieval.opening import check_analyser, check_embedder, make_directory
from nanochat.retrieval.search import Query

FORMAT = 1
LOCK_TIMEOUT = 60.0  # seconds that a second writer waits
PLACE = "milvus.json"  # what `save` writes
Opened = TypeVar("Opened", bound="MilvusReader")


class MilvusReader(SearchesPassages):
    """A knowledge base in Milvus as `open` opens it, to be read."""

    def __init__(
        self,
        connection: Connection,
        collection: str,
        settings: Mapping[str, Any],
        version: Version,
        embedder: Embedder | None = None,
        read_only: bool = False,
        pinned: bool = False,
        owns: bool = True,
    ) -> None:
        self._call, self.collection, self.settings, self._version = connection, collection, dict(settings), version
        self.read_only, self._pinned, self._embedder = read_only, pinned, embedder
        self._owns = owns  # the connection
        self.lock_timeout = LOCK_TIMEOUT
        self.staging = staging_directory(connection.uri, collection)  # vectors of an ingestion that is under way
        self._history = History(connection, collection)
        self.shape = shape_of(settings)  # how documents become rows

    # -- opening -------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls: type[Opened],
        uri: str,
        *,
        collection: str = "knowledge",
        embedder: Embedder | str | None = None,
        analyser: Any = None,
        version: int | str | None = None,
        read_only: bool = False,
        token: str = "",
        database: str = "",
    ) -> Opened:
        """Open a knowledge base; with `version`, a number or a tag, a read-only view of it. Another embedder or
        analyser than it was built with is an error, and so is a newer format."""
        with Connection(uri, token, database).closed_on_error() as connection:
            history = History(connection, collection)
            if not history.exists:
                raise UsageError(f"no knowledge base {collection!r} at {uri}; `create` makes one")
            for name in (collection, history.collection):
                connection("load_collection", name)
            settings = history.settings()
            if settings["format"] > FORMAT:
                raise UsageError(f"{collection!r} at {uri} has format {settings['format']}: install a newer nanochat")
            where = Path(f"{uri} {collection}")
            made = check_embedder(where, settings, embedder)
            check_analyser(where, settings, analyser)
            pinned = version is not None
            return cls(connection, collection, settings, history.find(version), made, read_only or pinned, pinned)

    def at(self: Opened, version: int | str) -> Opened:
        """A read-only view of a version, by number or tag, over the same connection."""
        found = self._history.find(version)
        return type(self)(self._call, self.collection, self.settings, found, self._embedder, True, True, False)

    def refresh(self) -> bool:
        """Move on to the newest version; whether there was a newer state."""
        before = self._version
        if not self._pinned:
            self._version = self._history.find(None)
        return self._version != before

    def save(self, directory: str | Path) -> None:
        """Write down, in a directory that is new or empty, where this knowledge base is: its documents stay there."""
        place = {"uri": self._call.uri, "collection": self.collection, "database": self._call.database}
        make_directory(Path(directory))
        (Path(directory) / PLACE).write_text(json.dumps(place) + "\n")

    @classmethod
    def load(cls: type[Opened], directory: str | Path, **options: Any) -> Opened:
        """Open what `save` wrote down; `options` as in `open` (the token is not saved)."""
        path = Path(directory) / PLACE
        if not path.exists():
            raise UsageError(f"{directory} has no {PLACE}: `save` makes one")
        place = json.loads(path.read_text())
        return cls.open(place.pop("uri"), **{**place, **options})

    def close(self) -> None:
        """End the connection, which the views made by `at` use too; closing one of those does nothing."""
        if self._owns:
            self._call.close()

    def __repr__(self) -> str:
        return f"<MilvusKnowledgeBase {self._place}: {self.kind}, version {self.version}, {len(self):,} documents>"

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """bm25, dense or hybrid."""
        return str(self.settings["kind"])

    @property
    def version(self) -> int:
        """The number of the version that is searched."""
        return self._version.number

    @property
    def _place(self) -> str:
        return f"{self._call.uri} {self.collection}"

    @property
    def embedder(self) -> Embedder:
        """The embedder of a dense or hybrid knowledge base; made at first use. Raises UsageError when it is one of
        your own that was not given."""
        if self._embedder is None:
            described = self.settings.get("embedder")
            if described is None:
                raise UsageError(f"a knowledge base of kind {self.kind!r} has no embedder")
            if described["spec"] is None:
                name = repr(described["name"])
                raise UsageError(f"{self._place} was built with the embedder {name} of your own: give it as `embedder`")
            self._embedder = check_embedder(Path(self._place), self.settings, described["spec"])
            assert self._embedder is not None
        return self._embedder

    def _answers(self, texts: Sequence[str], query: Query) -> list[list[Hit]]:
        self._call.check_open()
        searcher = Searcher(self._call, self.collection, self.shape, self.settings, self._version)
        return answer(searcher, texts, query, check(query.filter), lambda: self.embedder)

    def get(self, id: str) -> Document:
        """The whole document with this id. Raises UsageError when there is none."""
        if isinstance(id, str):
            where = f"{any_of('key', [key_of(clean_text(id))])} and {visible(self.version)}"
            for document, _ in whole_documents(self._call, self.collection, where):
                return document
        raise UsageError(f"no document {id!r} in version {self.version} of {self._place}")

    def __contains__(self, id: object) -> bool:
        if not isinstance(id, str):
            return False
        where = f"{any_of('key', [key_of(clean_text(id))])} and part == 0 and {visible(self.version)}"
        return any(True for _ in self._call.rows(self.collection, where, ["row"]))

    def __len__(self) -> int:
        return self._version.documents

    def documents(self) -> Iterator[Document]:
        """All documents, whole, in the order in which they were added."""
        for document, _ in whole_documents(self._call, self.collection, visible(self.version)):
            yield document

    def passages(self, document: Document) -> list[str]:
        """The texts that this knowledge base would index and embed for a document."""
        return [passage.document.text for passage in passages(document, self.shape)]

    def versions(self) -> list[Version]:
        """All versions that can be searched, as of now, oldest first, with their tags."""
        return self._history.versions()

    def stats(self) -> dict[str, Any]:
        """Counts and settings, as JSON values. `rows` counts the passages of all versions."""
        [count] = self._call("query", self.collection, filter="", output_fields=["count(*)"])
        return {
            "path": self._place,
            "kind": self.kind,
            "version": self.version,
            "versions": len(self.versions()),
            "documents": self._version.documents,
            "passages": self._version.passages,
            "rows": int(count["count(*)"]),
            "embedder": self.settings["embedder"]["name"] if "embedder" in self.settings else None,
            "analyser": self.settings.get("analyser"),
            "chunk_words": self.settings["chunk_words"],
            "overlap_words": self.settings["overlap_words"],
            "created": self.settings["created"],
        }

    def verify(self) -> list[str]:
        """Read all texts of all versions and compare them with their hashes, and count them: what is wrong, as
        sentences. Vectors and files are Milvus's own to check."""
        return list(problems(self._call, self.collection, self.versions()))


def shape_of(settings: Mapping[str, Any]) -> Shape:
    embedder = settings.get("embedder")
    return Shape(
        lexical="analyser" in settings,
        dimension=embedder["dimension"] if embedder else None,
        analyser=Analyser.of(settings.get("analyser")),
        chunk_words=settings["chunk_words"],
        overlap_words=settings["overlap_words"],
    )
