"""Uploaded files: known by what they hold, read by type, put into a knowledge base one after the other.

Nothing here is named by a client: files stay in memory, documents get ids made of their content, and what the client
calls a file is text to show, cleaned.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import unicodedata
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from prometheus_client import Counter

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import jsonl
from nanochat.retrieval.document import Document
from nanochat.retrieval.text_files import decoded, text_title
from nanochat.runtime import log
from nanochat.serving import pdf_text
from nanochat.serving.errors import ApiError, without_paths
from nanochat.serving.knowledge import MAX_DOCUMENTS, Shelf

TYPES = (".txt", ".md", ".markdown", ".jsonl", ".pdf")
MAX_WAITING = 8
MAX_REMEMBERED = 256
MAX_NAME = 120  # characters of a file's name that are shown
MAX_ID = 512  # characters of a document's id
PDF_SECONDS = 60


@dataclass
class Upload:
    """One file on its way. `documents` were found in it, `done` of them have been taken in."""

    id: str
    knowledge_base: str
    file: str
    bytes: int
    status: str = "waiting"  # processing, done, failed
    documents: int = 0
    done: int = 0
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    error: str | None = None

    def card(self) -> dict[str, object]:
        return {"object": "upload", **asdict(self)}


class Uploads:
    """The queue of files and the one thread that reads them."""

    def __init__(self, shelf: Shelf, max_bytes: int, counter: Counter) -> None:
        self.shelf, self.max_bytes, self._counter = shelf, max_bytes, counter
        self._all: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")

    def submit(self, knowledge_base: str, name: str, data: bytes) -> Upload:
        """Line a file up. Raises ApiError for a type that is not taken, an empty or a too large one, and when too many
        wait already."""
        shown = clean_name(name)
        kind = Path(shown).suffix.lower()
        if kind not in TYPES:
            raise ApiError(415, f"this type is not taken; send one of {', '.join(TYPES)}", param="file")
        if not data:
            raise ApiError(400, "the file is empty", param="file")
        if len(data) > self.max_bytes:
            raise ApiError(413, f"the file is larger than {self.max_bytes:,} bytes", code="too_large", param="file")
        upload = Upload(f"upload-{uuid.uuid4().hex}", knowledge_base, shown, len(data))
        with self._lock:
            if sum(one.status in ("waiting", "processing") for one in self._all.values()) >= MAX_WAITING:
                raise ApiError(429, "too many files are waiting; try again later", code="overloaded", retry_after=5)
            self._all[upload.id] = upload
            while len(self._all) > MAX_REMEMBERED:
                self._all.popitem(last=False)
        self._thread.submit(self._process, upload, kind, data)
        return upload

    def get(self, knowledge_base: str, id: str) -> Upload:
        """Raises ApiError (404)."""
        with self._lock:
            found = self._all.get(id)
        if found is None or found.knowledge_base != knowledge_base:
            raise ApiError(404, "there is no such upload", code="not_found")
        return found

    def busy(self, knowledge_base: str) -> bool:
        """Whether files are on their way into it."""
        with self._lock:
            waiting = [one for one in self._all.values() if one.status in ("waiting", "processing")]
        return any(one.knowledge_base == knowledge_base for one in waiting)

    def close(self) -> None:
        """Let the file that is being read come to its end; the others are lost."""
        self._thread.shutdown(cancel_futures=True)

    def _process(self, upload: Upload, kind: str, data: bytes) -> None:
        upload.status = "processing"
        try:
            documents = read(kind, upload.file, data)
            upload.documents = len(documents)
            base = self.shelf.open(upload.knowledge_base)
            if len(base) + len(documents) > MAX_DOCUMENTS:
                raise UsageError(f"a knowledge base holds at most {MAX_DOCUMENTS:,} documents")
            change = base.update(_counted(documents, upload))
            upload.added, upload.updated, upload.unchanged = change.added, change.updated, change.unchanged
            upload.status = "done"
        except (NanochatError, ApiError) as error:
            upload.error, upload.status = without_paths(str(getattr(error, "detail", error))), "failed"
        except Exception:
            log.exception("an upload failed")
            upload.error, upload.status = "the server could not read this file", "failed"
        self._counter.labels(upload.status).inc()


def _counted(documents: list[Document], upload: Upload) -> Iterator[Document]:
    for document in documents:
        yield document
        upload.done += 1


def clean_name(name: str) -> str:
    """What a client calls its file, as text to show: the last part of a path, without control characters."""
    last = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(c for c in unicodedata.normalize("NFC", last) if unicodedata.category(c)[0] != "C").strip()
    stem, dot, kind = shown.rpartition(".")
    return f"{stem[: MAX_NAME - len(kind) - 1]}{dot}{kind}" if dot and len(kind) < 16 else shown[:MAX_NAME]


# ---- from bytes to documents


def read(kind: str, name: str, data: bytes) -> list[Document]:
    """The documents of a file. Raises UsageError, which says what is wrong with it."""
    documents = READERS[kind](name, data)
    if not any(document.content.strip() for document in documents):
        raise UsageError("there is no text in this file")
    return documents


def _plain(name: str, data: bytes) -> list[Document]:
    try:
        text = decoded(data)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return [Document(_id(data), text, text_title(name, text), name)]


def _jsonl(name: str, data: bytes) -> list[Document]:
    documents = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = jsonl.parse(line)
            if len(document.id) > MAX_ID:
                raise ValueError(f"an id of more than {MAX_ID} characters")
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number}: {error}") from None
        documents.append(document)
    return documents


def _pdf(name: str, data: bytes) -> list[Document]:
    """A document for each page, read by a process of its own with limits: such files can be bombs."""
    if not data[:1024].lstrip().startswith(b"%PDF-"):
        raise UsageError("this is no PDF file")
    try:
        command = [sys.executable, "-I", pdf_text.__file__]
        done = subprocess.run(command, input=data, capture_output=True, timeout=PDF_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UsageError(f"reading this PDF took longer than {PDF_SECONDS} s") from None
    if done.returncode == pdf_text.REFUSED:
        raise UsageError(done.stderr.decode("utf-8", "replace").strip())
    if done.returncode:
        log.warning("a PDF could not be read: exit code %d", done.returncode)
        raise UsageError("this PDF is damaged, or too large to read")
    stem, id = Path(name).stem, _id(data)
    pages = json.loads(done.stdout)
    return [
        Document(f"{id}-{n}", text, f"{stem}, page {n}", name, {"page": n})
        for n, text in enumerate(pages, 1)
        if text.strip()
    ]


READERS: dict[str, Callable[[str, bytes], list[Document]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".markdown": _plain,
    ".jsonl": _jsonl,
    ".pdf": _pdf,
}


def _id(data: bytes) -> str:
    return f"file-{hashlib.sha256(data).hexdigest()[:24]}"
