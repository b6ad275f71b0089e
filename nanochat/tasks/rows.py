"""Rows of a public data set: from the hub's parquet export, or from a local jsonl or parquet file of the same form."""

from __future__ import annotations

import json
import os
import zlib
from array import array
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from nanochat.data.download import data_dir, fetch
from nanochat.data.files import JSON_SUFFIXES, PARQUET_SUFFIXES, Faults, open_parquet, read_json_lines, suffix
from nanochat.errors import NanochatError, UsageError
from nanochat.tasks.task import check_index

HUB_URL = "https://huggingface.co"  # $NANOCHAT_HUB_URL names a mirror
T = TypeVar("T")


class Rows(Protocol):
    """Numbered rows of a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...

    def where(self, i: int) -> str:
        """File and line of row i, for messages."""


class JsonRows:
    """The lines of a jsonl file. Each is checked once, then only its place is kept (of a .gz file: the row)."""

    def __init__(self, path: Path, kinds: tuple[type, ...] = (dict,)) -> None:
        self.path = path
        self._packed: list[Any] | None = [] if path.suffix == ".gz" else None
        self._numbers, self._offsets = array("q"), array("q")
        try:
            for number, offset, row in read_json_lines(path, Faults(), kinds):
                self._numbers.append(number)
                self._offsets.append(offset)
                if self._packed is not None:
                    self._packed.append(row)
        except (OSError, EOFError, zlib.error) as error:
            raise NanochatError(f"{path}: cannot be read ({error})") from None

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Any:
        if self._packed is not None:
            return self._packed[i]
        with self.path.open("rb") as file:  # opened anew: threads and forked workers share nothing
            file.seek(self._offsets[i])
            try:
                return json.loads(file.readline())
            except ValueError:
                raise NanochatError(f"{self.where(i)}: the file changed while it was in use") from None

    def where(self, i: int) -> str:
        """File and line of row i."""
        return f"{self.path}, line {self._numbers[i]}"


class ParquetRows:
    """The rows of parquet files, mapped and not read into memory."""

    def __init__(self, paths: list[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.paths = paths
        try:
            for path in paths:
                open_parquet(path).close()
            self._table = pa.concat_tables([pq.read_table(path, memory_map=True) for path in paths])
        except (OSError, pa.ArrowException) as error:
            names = ", ".join(map(str, paths))
            raise NanochatError(f"{names}: cannot be read ({error}); delete it to fetch it again") from None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, i: int) -> Any:
        return self._table.slice(i, 1).to_pylist()[0]

    def where(self, i: int) -> str:
        """File and row."""
        return f"{self.paths[0] if len(self.paths) == 1 else self.paths[0].parent}, row {i + 1}"


def open_rows(repo: str, subset: str, split: str, path: str | Path | None, kinds: tuple[type, ...] = (dict,)) -> Rows:
    """Rows of a local file, of a directory with [SUBSET-]SPLIT.jsonl[.gz] or .parquet, or (no path) from the hub."""
    if path is None:
        return ParquetRows(fetch_hub(repo, subset, split))
    found = Path(path).expanduser()
    if found.is_dir():
        names = [f"{stem}{end}" for stem in (f"{subset}-{split}", split) for end in (".jsonl", ".jsonl.gz", ".parquet")]
        candidates = [found / name for name in names if (found / name).is_file()]
        if not candidates:
            raise UsageError(f"{found}: holds none of {', '.join(names)}; name the file with path=FILE")
        found = candidates[0]
    if not found.is_file():
        raise UsageError(f"{found}: no such file")
    if suffix(found) in JSON_SUFFIXES:
        return JsonRows(found, kinds)
    if suffix(found) in PARQUET_SUFFIXES:
        return ParquetRows([found])
    raise UsageError(f"{found}: the file must be .jsonl, .jsonl.gz or .parquet")


def fetch_hub(repo: str, subset: str, split: str) -> list[Path]:
    """The parquet files of a data set on the hub, fetched once into the data directory."""
    directory = data_dir() / "tasks" / repo.replace("/", "--") / subset / split
    hub = (os.environ.get("NANOCHAT_HUB_URL") or HUB_URL).rstrip("/")
    listing = fetch(f"{hub}/api/datasets/{repo}/parquet/{subset}/{split}", directory / "files.json")
    try:
        urls = json.loads(listing.read_text(encoding="utf-8"))
        if not isinstance(urls, list) or not urls or not all(isinstance(u, str) for u in urls):
            raise ValueError("not a list of addresses")
    except ValueError as error:
        listing.unlink()
        raise NanochatError(f"{hub}: unexpected answer for {repo} ({error}); try again later") from None
    return [fetch(url, directory / f"{i:05d}.parquet") for i, url in enumerate(urls)]


class RowTask:
    """A task whose conversation i is made from one row. `seed` shuffles the rows (None: the file's order)."""

    eval_type = "generative"

    def __init__(self, name: str, rows: Rows, limit: int | None = None, seed: int | None = 42) -> None:
        self.name, self.rows = name, rows
        if not len(rows):
            raise NanochatError(f"{name}: the data has no rows")
        if limit is not None and limit < 1:
            raise UsageError(f"{name}: limit={limit} must be at least 1")
        order = np.arange(len(rows)) if seed is None else np.random.default_rng(seed).permutation(len(rows))
        self._order = order[:limit]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        at = int(self._order[check_index(i, len(self))])
        try:
            return self.conversation(self.rows[at])
        except ValueError as error:
            raise NanochatError(f"{self.rows.where(at)}: no row of {self.name}: {error}") from None

    def conversation(self, row: Any) -> dict[str, Any]:
        """The conversation of a row. Raises ValueError that says what is wrong with it."""
        raise NotImplementedError

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Whether the completion is right."""
        raise NotImplementedError


def need(row: Any, key: str, kind: type[T]) -> T:
    """The value of a field. Raises ValueError when it is missing or of another type."""
    if not isinstance(row, dict) or key not in row:
        raise ValueError(f"field {key!r} is missing")
    value = row[key]
    if not isinstance(value, kind):
        raise ValueError(f"field {key!r} is {type(value).__name__}, expected {kind.__name__}")
    return value


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """The value, when it is allowed. Raises UsageError."""
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def multiple_choice(question: str, letters: list[str], choices: list[str], answer: str, **more: Any) -> dict[str, Any]:
    """A conversation that asks for a letter. The letter follows its choice: small models bind it better that way."""
    if len(letters) != len(choices) or answer not in letters:
        raise ValueError(f"{len(choices)} choices, letters {letters}, answer {answer!r} do not fit together")
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    prompt = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "letters": letters, **more}


class MultipleChoiceTask(RowTask):
    """A task answered by a letter of `conversation["letters"]`."""

    eval_type = "categorical"

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Whether the completion is the right letter."""
        return completion.strip().rstrip(".)") == conversation["messages"][-1]["content"]
