"""Documents from text files: one a file, named by its path, with its first heading or its name as title."""

from __future__ import annotations

import string
from itertools import pairwise
from pathlib import Path

from nanochat.errors import NanochatError
from nanochat.retrieval.document import Document

TEXT_FILES = (".txt", ".md", ".markdown", ".rst")
MAX_TITLE = 120  # characters


def is_text_file(path: Path) -> bool:
    return path.suffix.lower() in TEXT_FILES


def read_text_file(path: Path) -> Document | None:
    """The document; None for a file without text. Raises ValueError for what is no text, NanochatError for what cannot
    be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NanochatError(f"cannot read {path}: {error.strerror or error}") from error
    text = decoded(data)
    if not text.strip():
        return None
    return Document(path.as_posix(), text, text_title(path.name, text), path.as_posix())


def decoded(data: bytes) -> str:
    """Raises ValueError for what is no text, whatever its name says."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"this is no text in UTF-8 (byte {error.start})") from None
    if "\0" in text:
        raise ValueError("this is no text: it holds NUL characters")
    return text


def text_title(name: str, text: str) -> str:
    """The first heading of Markdown or reStructuredText, else the name of the file without its ending."""
    lines, heading = text.splitlines(), ""
    if name.lower().endswith((".md", ".markdown")):
        heading = next((line[2:].strip() for line in lines if line.startswith("# ")), "")
    elif name.lower().endswith(".rst"):  # a line of text, underlined by one punctuation mark
        pairs = ((above.strip(), below.strip()) for above, below in pairwise(lines))
        heading = next((above for above, below in pairs if _underlines(below, above)), "")
    return heading[:MAX_TITLE] or Path(name).stem


def _underlines(line: str, title: str) -> bool:
    is_line = len(set(line)) == 1 and line[0] in string.punctuation
    return is_line and len(line) >= len(title) > 0 and any(map(str.isalnum, title))
