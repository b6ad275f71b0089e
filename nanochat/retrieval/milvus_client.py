"""The connection to Milvus, the history of versions in it, and the lock that keeps a second writer out.

A knowledge base is two collections, NAME with the passages and NAME_versions with one row for each version (row -1: the
settings). Inserting a version's row is the commit: rows of passages with a higher version number are invisible. While a
writer works, a third collection, NAME_writer, exists: creating a collection is the one thing that Milvus lets only one
of two clients do.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.manifest import Version

MOST_ROWS = 16_384  # that one query or search may ask for
_PAGE = 1000  # rows a request, when all are read
_SETTINGS = -1  # the number of the row with the settings
_lite_users: dict[str, int] = {}  # local file -> connections of this process
_lite_lock = threading.Lock()


def import_pymilvus() -> Any:
    """The client library. Raises UsageError where it is not installed."""
    try:
        engine = importlib.import_module("pymilvus")
    except ImportError as error:
        raise UsageError("a knowledge base in Milvus needs pymilvus: pip install 'nanochat[milvus]'") from error
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs each error that it raises, with a traceback
    return engine


class Connection:
    """A client whose failures are NanochatErrors that name the server and the request.

    `uri` is http(s)://host:port of a cluster, or a local file that ends in .db: then milvus-lite answers, in this
    process. Raises UsageError for other places, NanochatError when there is no answer."""

    def __init__(self, uri: str, token: str = "", database: str = "", timeout: float = 30.0) -> None:
        self.uri, self.database, self._closed = uri, database, False
        self.local = not uri.startswith(("http://", "https://", "tcp://", "unix:"))
        if self.local and not uri.endswith(".db"):
            raise UsageError(f"{uri!r} is no Milvus: give http://host:19530, or a local file that ends in .db")
        engine = import_pymilvus()
        if self.local:
            self._take_local(+1)
        try:
            self._client = engine.MilvusClient(uri=uri, token=token, db_name=database, timeout=timeout)
        except Exception as error:
            if self.local:
                self._take_local(-1)
            raise NanochatError(self._unreachable(error)) from error
        self._failure = engine.MilvusException

    def _unreachable(self, error: Exception) -> str:
        if self.local:
            return f"cannot open {self.uri} ({error}); is it open in another process? milvus-lite allows one at a time"
        return f"no Milvus answers at {self.uri} ({error}); is it running, and are address, token and database right?"

    def _take_local(self, change: int) -> None:
        """Count who uses milvus-lite's server for the file, and stop it after the last: other processes may want it."""
        try:
            manager = importlib.import_module("milvus_lite.server_manager").server_manager_instance
        except ImportError as error:
            raise UsageError(f"{self.uri} is a local file: pip install 'nanochat[milvus]' with milvus-lite") from error
        path = os.path.abspath(self.uri)
        with _lite_lock:
            if change > 0:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            _lite_users[path] = _lite_users.get(path, 0) + change
            if not _lite_users[path]:
                manager.release_server(path)

    def __call__(self, request: str, *arguments: Any, **options: Any) -> Any:
        """A method of pymilvus.MilvusClient. Raises NanochatError."""
        self.check_open()
        with self._failures(request):
            return getattr(self._client, request)(*arguments, **options)

    @contextlib.contextmanager
    def _failures(self, request: str) -> Iterator[None]:
        try:
            yield
        except self._failure as error:
            raise NanochatError(f"Milvus at {self.uri} refused {request}: {error.message}") from error

    def rows(self, collection: str, expression: str, fields: list[str]) -> Iterator[dict[str, Any]]:
        """All rows that an expression selects, by ascending primary key, however many. Strongly consistent."""
        options = {"batch_size": _PAGE, "filter": expression, "output_fields": fields, "consistency_level": "Strong"}
        pages = self("query_iterator", collection, **options)
        try:
            while page := self._page(pages):
                yield from page
        finally:
            pages.close()

    def _page(self, pages: Any) -> list[dict[str, Any]]:
        with self._failures("query"):
            return list(pages.next())

    def create(self, collection: str, schema: Any, indexes: list[dict[str, Any]]) -> None:
        """Make a collection with its indexes, and load it. Reads see every write before them (consistency "Strong")."""
        self("create_collection", collection, schema=schema, consistency_level="Strong")
        for index in indexes:
            params = import_pymilvus().MilvusClient.prepare_index_params()
            params.add_index(**index)
            self("create_index", collection, params, sync=False)
        self("load_collection", collection)

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[Connection]:
        try:
            yield self
        except BaseException:
            self.close()
            raise

    def check_open(self) -> None:
        if self._closed:
            raise UsageError(f"the knowledge base at {self.uri} was closed")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._client.close()
        if self.local:
            self._take_local(-1)


class History:
    """Settings and versions of a knowledge base, in the collection NAME_versions."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._call, self.collection = connection, f"{name}_versions"

    @property
    def exists(self) -> bool:
        return bool(self._call("has_collection", self.collection))

    def create(self, settings: dict[str, Any]) -> None:
        """Raises NanochatError when it is there."""
        engine = import_pymilvus()
        schema = engine.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("number", engine.DataType.INT64, is_primary=True)
        schema.add_field("record", engine.DataType.VARCHAR, max_length=65_535)
        schema.add_field("nothing", engine.DataType.FLOAT_VECTOR, dim=2)  # Milvus wants a vector in each collection
        index = {"field_name": "nothing", "index_type": "FLAT", "metric_type": "L2"}
        self._call.create(self.collection, schema, [index])
        self.put(Version(0, time.time(), "created", 0, 0))
        self._upsert(_SETTINGS, settings)  # last: without it there is no knowledge base

    def settings(self) -> dict[str, Any]:
        """Raises NanochatError when creating was interrupted."""
        found = self._records(f"number == {_SETTINGS}")
        if not found:
            raise NanochatError(f"{self.collection} at {self._call.uri} was not created to its end: drop it")
        return found[0][1]

    def find(self, version: int | str | None) -> Version:
        """A version by number or tag; None: the newest. Raises UsageError, naming what there is."""
        versions = self.versions()
        for one in versions[-1:] if version is None else versions:
            if version is None or version == one.number or version in one.tags:
                return one
        held = ", ".join(" ".join([str(one.number), *one.tags]) for one in versions[-20:])
        raise UsageError(f"no version {version!r} of {self.collection.removesuffix('_versions')!r}; there are {held}")

    def versions(self, since: int = 0) -> list[Version]:
        """From number `since` on, oldest first."""
        found = self._records(f"number >= {since}")
        return [Version(number, **{**record, "tags": tuple(record["tags"])}) for number, record in found]

    def put(self, version: Version) -> None:
        """Write a version, or its new tags."""
        record = asdict(version)
        self._upsert(record.pop("number"), record)

    def tag(self, version: Version, name: str) -> None:
        """Give a version a tag, which any other loses."""
        for other in self.versions():
            if name in other.tags and other.number != version.number:
                self.put(replace(other, tags=tuple(tag for tag in other.tags if tag != name)))
        self.put(replace(version, tags=tuple(sorted({*version.tags, name}))))

    def untag(self, name: str) -> None:
        """Raises UsageError for a tag that is not there."""
        version = self.find(str(name))
        self.put(replace(version, tags=tuple(tag for tag in version.tags if tag != name)))

    def compact(self, keep: int | Iterable[int | str], rows: str) -> int:
        """Drop versions, as MilvusKnowledgeBase.compact, and what no other holds from the collection `rows`."""
        versions = self.versions()
        if isinstance(keep, int):
            if keep < 1:
                raise UsageError(f"keep must be 1 version or more, not {keep}")
            numbers = {one.number for one in versions[-keep:]}
        else:
            numbers = {self.find(one).number for one in ([keep] if isinstance(keep, str) else keep)}
        numbers |= {versions[-1].number, *(one.number for one in versions if one.tags)}
        gone = [one.number for one in versions if one.number not in numbers]
        for start in range(0, len(gone), _PAGE):  # first: nobody shall find a version whose passages are going
            self._call("delete", self.collection, ids=gone[start : start + _PAGE])
        before = -1
        for number in sorted(numbers):  # what lived between two kept versions only
            self._call("delete", rows, filter=f"added > {before} and removed <= {number}")
            before = number
        return len(gone)

    def _records(self, expression: str) -> list[tuple[int, dict[str, Any]]]:
        rows = self._call.rows(self.collection, expression, ["number", "record"])
        return sorted((int(row["number"]), json.loads(row["record"])) for row in rows)

    def _upsert(self, number: int, record: dict[str, Any]) -> None:
        row = {"number": number, "record": json.dumps(record, ensure_ascii=False), "nothing": [0.0, 0.0]}
        self._call("upsert", self.collection, [row])


class WriterLock:
    """The right to write. It outlives a process that was killed: `take` notices that when it ran on this machine; from
    another machine `break_lock` is needed, by someone who knows."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._call, self.collection, self.held = connection, f"{name}_writer", False

    def take(self, timeout: float) -> None:
        """Raises NanochatError when another writer holds it for longer than `timeout` seconds."""
        if self.held:
            return
        end = time.monotonic() + timeout
        while not self._try():
            owner = self.owner()
            if owner and owner["host"] == _host() and not _alive(owner["process"]):
                self._call("drop_collection", self.collection)
            elif time.monotonic() >= end:
                raise NanochatError(
                    f"another writer holds {self.collection.removesuffix('_writer')} at {self._call.uri} "
                    f"({_say(owner)}): wait for it; if it is dead, call break_lock()"
                )
            else:
                time.sleep(0.1)
        self.held = True

    def _try(self) -> bool:
        """Milvus refuses to create what exists with another schema, and the owner's name makes each schema another."""
        owner = {"host": _host(), "process": os.getpid(), "time": round(time.time()), "key": uuid.uuid4().hex[:8]}
        engine = import_pymilvus()
        schema = engine.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("number", engine.DataType.INT64, is_primary=True)
        schema.add_field(f"owner_{json.dumps(owner).encode().hex()}", engine.DataType.FLOAT_VECTOR, dim=2)
        try:
            self._call("create_collection", self.collection, schema=schema)
        except NanochatError:
            if not self._call("has_collection", self.collection):
                raise
            return False
        return True

    def owner(self) -> dict[str, Any] | None:
        """Who holds it: host, process, time; None when nobody does."""
        with contextlib.suppress(NanochatError, ValueError):
            for field in self._call("describe_collection", self.collection)["fields"]:
                if field["name"].startswith("owner_"):
                    found: dict[str, Any] = json.loads(bytes.fromhex(field["name"].removeprefix("owner_")))
                    return found
        return None

    def release(self) -> None:
        if self.held:
            self.held = False
            self._call("drop_collection", self.collection)

    def break_lock(self) -> None:
        """Take it from a writer that is dead. Two writers at once would destroy the history."""
        self._call("drop_collection", self.collection)


def staging_directory(uri: str, collection: str) -> Path:
    """Where vectors wait on this machine until they are committed: beside a local file, else in the user's cache."""
    name = f"{collection}-{blake2b(uri.encode(), digest_size=6).hexdigest()}"
    if uri.endswith(".db") and "://" not in uri:
        return Path(f"{uri}.staging") / collection
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "nanochat" / "milvus" / name


def _host() -> str:
    return socket.gethostname()[:40]  # a field's name has 255 characters


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _say(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "unknown"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["time"]))
    return f"process {owner['process']} on {owner['host']} since {when}"
