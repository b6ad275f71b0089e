"""Documents out of text, jsonl and parquet files: streamed, with every fault named by file and line."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nanochat.errors import NanochatError, UsageError

log = logging.getLogger("nanochat")

TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSON_SUFFIXES = (".jsonl",)
PARQUET_SUFFIXES = (".parquet",)
FIELDS = ("text", "content")  # the field or column that holds the document: the first of these that is there
_MANUALS = re.compile(r"man([1-9])\w*")
PIECE_MIN, PIECE_MAX = 4096, 8192  # bytes: longer text files become pieces of this size


class Faults:
    """What to do with a damaged file or record: raise NanochatError, or skip it, count it and log the first few.

    A fault that a later pass meets again counts once.
    """

    def __init__(self, on_error: str = "raise") -> None:
        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.on_error = on_error
        self._seen: set[int] = set()

    @property
    def count(self) -> int:
        """Faults skipped so far."""
        return len(self._seen)

    def __call__(self, message: str) -> None:
        if self.on_error == "raise":
            raise NanochatError(f"{message}; repair or remove it, or skip such records with on_error=skip")
        if hash(message) in self._seen:
            return
        self._seen.add(hash(message))
        if self.count <= 10:
            log.warning("skipped: %s%s", message, " (further ones are counted only)" if self.count == 10 else "")


def suffix(path: Path) -> str:
    """The suffix that tells the format: `.jsonl` for `a.jsonl.gz`."""
    suffixes = path.suffixes
    return (suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else path.suffix).lower()


def list_files(path: Path) -> list[Path]:
    """All files below a directory that can be read as documents, in the order of their relative paths.

    Links are followed, and what several paths lead to is listed once, so links in a circle end too. Hidden files and
    directories, pipes and devices are left out. Raises UsageError when there is nothing to read.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or directory; give a directory with txt, jsonl or parquet files")
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    n_files = 0
    for folder, folders, names in os.walk(path, followlinks=True):
        if not _is_new(Path(folder), seen):
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        visible = [Path(folder, n) for n in sorted(names) if not n.startswith(".")]
        n_files += len(visible)
        found += [p for p in visible if _is_readable(p) and _is_new(p, seen)]
    if not n_files:
        raise UsageError(f"{path}: the directory is empty; put txt, jsonl or parquet files there")
    if not found:
        raise UsageError(
            f"{path}: none of its {n_files} files is of a kind that can be read "
            f"({', '.join(TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES)}, manual pages in man1 to man9; text and "
            "jsonl also with .gz)"
        )
    return sorted(found, key=lambda p: p.relative_to(path).parts)


def _is_readable(path: Path) -> bool:
    """Whether the name says that it holds documents. ls.1.gz does in a directory man1: elsewhere .1 means anything."""
    kind = suffix(path)
    if kind in TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES:
        return True
    section = _MANUALS.fullmatch(path.parent.name)
    return section is not None and kind.startswith(f".{section[1]}")


def _is_new(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether this directory or plain file was not met before; notes it. What is not there is: reading it will tell."""
    try:
        found = path.stat()
    except OSError:
        return True
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)) or (found.st_dev, found.st_ino) in seen:
        return False
    seen.add((found.st_dev, found.st_ino))
    return True


def read_documents(path: Path, faults: Faults) -> Iterator[str]:
    """The documents of one file, in order. Text that is only white space is no document."""
    kind = suffix(path)
    try:
        if kind in PARQUET_SUFFIXES:
            texts = read_parquet(path, faults)
        elif kind in JSON_SUFFIXES:
            texts = _read_jsonl(path, faults)
        else:
            texts = read_text(path, faults)
        for text in texts:
            if text and not text.isspace():
                yield text
    except (OSError, EOFError, zlib.error) as error:
        faults(f"{path}: cannot be read ({str(error) or type(error).__name__})")


def open_binary(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked when its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


# Text -----------------------------------------------------------------------------------------------------------------


def read_text(path: Path, faults: Faults, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """A text file, or its bytes start..stop: whole when at most PIECE_MAX bytes long, else in pieces.

    Joined, the pieces are the text again, without losses. A piece ends at a paragraph where it can, else at a line, a
    blank, or between characters.
    """
    with open_binary(path) as file:
        file.seek(start)
        left = (1 << 62) if stop is None else stop - start
        buffer, offset = b"", start
        while True:
            more = file.read(min(left, 1 << 18))
            left -= len(more)
            buffer += more
            position = 0
            while len(buffer) - position > PIECE_MAX or (not more and position < len(buffer)):
                end = position + _cut(buffer[position : position + PIECE_MAX + 1])
                text = _decode(buffer[position:end], path, offset, faults)
                if text is not None:
                    yield text.removeprefix("\ufeff") if offset == 0 else text
                offset += end - position
                position = end
            buffer = buffer[position:]
            if not more:
                return


def _cut(window: bytes) -> int:
    """Where the first piece of a window ends: at its end when it is short enough."""
    if len(window) <= PIECE_MAX:
        return len(window)
    for border in (b"\n\n", b"\n\r\n", b"\n", b" "):
        at = window.rfind(border, PIECE_MIN, PIECE_MAX)
        if at >= 0:
            return at + len(border)
    end = PIECE_MAX
    while end > PIECE_MAX - 4 and window[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def _decode(data: bytes, path: Path, offset: int, faults: Faults) -> str | None:
    if (at := data.find(0)) >= 0:
        faults(f"{path}: not text, a zero at byte {offset + at}")
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        faults(f"{path}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x})")
        return None


# Records --------------------------------------------------------------------------------------------------------------


def read_json_lines(path: Path, faults: Faults, kinds: tuple[type, ...] = (dict,)) -> Iterator[tuple[int, int, Any]]:
    """(line number from 1, offset in bytes, value) for each line of a jsonl file that is not blank."""
    offset = 0
    with open_binary(path) as file:
        for number, line in enumerate(file, 1):
            here, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except UnicodeDecodeError as error:
                faults(f"{path}, line {number}: not UTF-8 at byte {error.start} of the line")
            except ValueError as error:
                faults(f"{path}, line {number}: not valid JSON ({error})")
            except RecursionError:
                faults(f"{path}, line {number}: not valid JSON (nested too deeply)")
            else:
                if isinstance(value, kinds):
                    yield number, here, value
                else:
                    faults(f"{path}, line {number}: expected a JSON object, got {type(value).__name__}")


def _read_jsonl(path: Path, faults: Faults) -> Iterator[str]:
    for number, _, record in read_json_lines(path, faults):
        field = next((f for f in FIELDS if f in record), None)
        if field is None:
            faults(f"{path}, line {number}: no field {' or '.join(map(repr, FIELDS))} (it has {_some(record)})")
        elif _is_text(record[field], f"{path}, line {number}: {field!r}", faults):
            yield record[field]


def _some(names: Any) -> str:
    names = [repr(n) for n in names]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"


def _is_text(value: Any, where: str, faults: Faults) -> bool:
    if not isinstance(value, str):
        faults(f"{where} is {type(value).__name__}, not text")
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        faults(f"{where} holds a lone surrogate (U+{ord(value[error.start]):04X}) at character {error.start}")
        return False
    return True


def open_parquet(path: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile`. Raises OSError when it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise OSError(f"not a parquet file, or damaged: {error}") from None


def read_parquet(path: Path, faults: Faults, start: int = 0) -> Iterator[str]:
    """The texts of a parquet file from row `start` on; row groups before it are not read."""
    import pyarrow as pa

    with open_parquet(path) as file:
        names = file.schema_arrow.names
        column = next((f for f in FIELDS if f in names), None)
        if column is None:
            faults(f"{path}: no column {' or '.join(map(repr, FIELDS))} (it has {_some(names)})")
            return
        row = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if row + n_rows <= start:
                row += n_rows
                continue
            try:
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        row += 1
                        if row > start:
                            yield from _parquet_text(value, f"{path}, row {row}: {column!r}", faults)
            except pa.ArrowException as error:
                raise OSError(f"damaged in row group {group}: {error}") from None


def _parquet_text(value: Any, where: str, faults: Faults) -> Iterator[str]:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        faults(f"{where} is not UTF-8 at byte {error.start}")
        return
    if _is_text(text, where, faults):
        yield text
