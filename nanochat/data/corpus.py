"""Where pretraining text comes from: the tiny world, files of any kind, the public shards. One epoch, always one order.

Validation is fixed: a document belongs to it when its content's hash says so (one in `VAL_EVERY`), whatever other files
are there. In a corpus so small that no document's hash does, the document with the smallest hash is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from nanochat.data.download import MAX_SHARD, data_dir, shard_name
from nanochat.data.files import (
    TEXT_SUFFIXES,
    Faults,
    list_files,
    open_parquet,
    read_documents,
    read_parquet,
    read_text,
    suffix,
)
from nanochat.data.shuffle import Shuffle, mix
from nanochat.data.spec import nearest, read_options, split_spec
from nanochat.data.world import VAL_WORDING, World
from nanochat.errors import NanochatError, UsageError

log = logging.getLogger("nanochat")

VAL_EVERY = 50  # one document in so many is kept for validation: 2%
WORLD_OPTIONS = {"seed": int, "known": int, "new": int, "wordings": int, "dialogues": float}


class Corpus(Protocol):
    """Text for pretraining."""

    name: str

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        """The documents of "train" or "val", from number `start` on: finite, one epoch, always in the same order."""


def _check_split(split: str) -> None:
    if split not in ("train", "val"):
        raise UsageError(f"split must be 'train' or 'val', got {split!r}")


class WorldCorpus:
    """The tiny world as text: its known entities in `wordings` wordings, in a shuffled order.

    `dialogues` is the share of documents that are chats (about training pairs only). Validation: the same entities, at
    most 2000 of them, in a wording of their own.
    """

    def __init__(self, world: World, wordings: int = 20, dialogues: float = 0.1) -> None:
        if wordings < 1:
            raise UsageError(f"world: wordings={wordings} must be at least 1")
        if not 0 <= dialogues < 1:
            raise UsageError(f"world: dialogues={dialogues} is a share of the documents and must be in [0, 1)")
        self.world, self.wordings = world, wordings
        self.name = f"world:seed={world.seed},known={world.n_known},wordings={wordings},dialogues={dialogues}"
        self._n_documents = wordings * world.n_known
        self._n = self._n_documents + round(self._n_documents * dialogues / (1 - dialogues))
        self._order = Shuffle(self._n, mix(0xC0FFEE, world.seed))

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        """See `Corpus`. `start` costs nothing."""
        _check_split(split)
        world = self.world
        if split == "val":
            for i in range(start, min(world.n_known, 2000)):
                yield world.document(i, VAL_WORDING)["content"]
            return
        for place in range(start, self._n):
            index = self._order(place)
            if index < self._n_documents:
                wording, entity = divmod(index, world.n_known)
                yield world.document(entity, wording)["content"]
            else:
                yield dialogue_text(world.dialogue(index - self._n_documents))


def dialogue_text(conversation: dict[str, Any]) -> str:
    """A conversation of plain strings as text, one line a message."""
    return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in conversation["messages"])


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


class FileCorpus:
    """Files of text, jsonl or parquet, split by content hash. Nothing but the current record is held in memory.

    `start` has to read what it skips, but for files that an earlier pass of this object has counted.
    """

    def __init__(self, name: str, paths: list[Path], on_error: str = "raise") -> None:
        self.name, self.paths = name, paths
        self.faults = Faults(on_error)
        self._counts: dict[tuple[int, str], int] = {}
        self._val_hash: int | None = None  # the smallest hash, where no other document is for validation
        self._settled = False

    @property
    def n_skipped(self) -> int:
        """Damaged files and records skipped so far (`on_error="skip"`)."""
        return self.faults.count

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        """See `Corpus`. Raises NanochatError at the first damaged record, unless these are to be skipped."""
        _check_split(split)
        self._settle()
        for index, path in enumerate(self.paths):
            known = self._counts.get((index, split))
            if known is not None and start >= known:
                start -= known
                continue
            n = 0
            for text in read_documents(path, self.faults):
                if self._is_val(_hash(text)) == (split == "val"):
                    n += 1
                    if n > start:
                        yield text
            self._counts[index, split] = n
            start = max(0, start - n)

    def _is_val(self, code: int) -> bool:
        return code % VAL_EVERY == 0 if self._val_hash is None else code == self._val_hash

    def _settle(self) -> None:
        """Reads until a document for validation and one for training are seen: as a rule some dozens."""
        if self._settled:
            return
        seen: set[str] = set()
        smallest = largest = -1  # hashes
        faults = Faults(self.faults.on_error)  # its own: this look ahead must not count faults twice
        for text in (text for path in self.paths for text in read_documents(path, faults)):
            code = _hash(text)
            seen.add("val" if code % VAL_EVERY == 0 else "train")
            smallest = code if smallest < 0 else min(smallest, code)
            largest = max(largest, code)
            if len(seen) == 2:
                self._settled = True
                return
        if not seen:
            reason = f"; {faults.count} damaged files or records were skipped" if faults.count else ""
            raise NanochatError(f"{self.name}: no text in any of its {len(self.paths)} files{reason}")
        if smallest == largest:
            raise NanochatError(
                f"{self.name}: only one document, so nothing would be left to validate on; add text, or take the end "
                "of a text file for validation with FILE.txt?val=tail10"
            )
        self._val_hash = smallest
        self._settled = True


class TailCorpus:
    """One text file whose last `percent` % are for validation (the convention of nanoGPT's character recipes)."""

    def __init__(self, name: str, path: Path, percent: float, on_error: str = "raise") -> None:
        if not 0 < percent < 100:
            raise UsageError(f"{name}: val=tail{percent:g} must be between 0 and 100 (percent)")
        if suffix(path) not in TEXT_SUFFIXES or path.suffix == ".gz":
            raise UsageError(f"{name}: val=tail needs one plain text file ({', '.join(TEXT_SUFFIXES)})")
        self.name, self.path = name, path
        self.faults = Faults(on_error)
        with path.open("rb") as file:
            size = path.stat().st_size
            self._border = int(size * (1 - percent / 100))
            file.seek(self._border)
            for byte in file.read(3):  # not inside a character
                if byte & 0xC0 != 0x80:
                    break
                self._border += 1
            if not 0 < self._border < size:
                raise NanochatError(f"{name}: {size} bytes are too few to split")

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        """See `Corpus`."""
        _check_split(split)
        low, high = (0, self._border) if split == "train" else (self._border, None)
        n = 0
        for text in read_text(self.path, self.faults, low, high):
            if text and not text.isspace():
                n += 1
                if n > start:
                    yield text


class ShardCorpus:
    """The public shards: the last one (number MAX_SHARD) is for validation. `start` reads no row group before it."""

    def __init__(self, directory: Path, on_error: str = "raise") -> None:
        self.name = f"climbmix:{directory}"
        self.faults = Faults(on_error)
        shards = [p for p in list_files(directory) if p.name.startswith("shard_") and suffix(p) == ".parquet"]
        self._paths = {
            "train": [p for p in shards if p.name != shard_name(MAX_SHARD)],
            "val": [p for p in shards if p.name == shard_name(MAX_SHARD)],
        }

    @property
    def complete(self) -> bool:
        """Whether there is a shard to train on and the one to validate on."""
        return all(self._paths.values())

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        """See `Corpus`."""
        _check_split(split)
        for path in self._paths[split]:
            try:
                if self.faults.on_error == "raise":  # all rows are documents: those before `start` need not be read
                    n_rows = open_parquet(path).metadata.num_rows
                    if start < n_rows:
                        yield from read_parquet(path, self.faults, start)
                    start = max(0, start - n_rows)
                    continue
                for text in read_parquet(path, self.faults):
                    if start:
                        start -= 1
                    else:
                        yield text
            except OSError as error:
                self.faults(f"{path}: cannot be read ({error})")


def open_corpus(spec: str, on_error: str = "raise") -> Corpus:
    """The corpus that a line of configuration names.

    - `world:seed=0,known=200,new=200,wordings=20,dialogues=0.1`: the tiny world, embedded
    - a directory, or a file, of txt, md, rst, jsonl (each also .gz) or parquet; options after a question mark:
      `?on_error=skip`, and for one text file `?val=tail10` (its last 10% for validation)
    - `climbmix`, `climbmix:path=DIR`: the public shards that `nanochat.data.download` fetched

    Raises UsageError when it names nothing that is there.
    """
    name, options = split_spec(spec) if spec.split(":")[0] in ("world", "climbmix") else ("", {})
    if name == "world":
        return open_world_corpus(spec, options)
    if name == "climbmix":
        given = read_options(spec, options, {"path": str})
        return _open_shards(Path(given["path"]).expanduser() if "path" in given else data_dir() / "climbmix", on_error)
    location, _, query = spec.partition("?")
    given = read_options(spec, dict(_pairs(spec, query)), {"val": str, "on_error": str})
    on_error = given.get("on_error", on_error)
    path = Path(location).expanduser()
    if not location or not path.exists():
        hint = "" if "/" in location or "." in location else f"; {nearest(location, ('world', 'climbmix'))}"
        raise UsageError(f"corpus {spec!r}: no such file or directory{hint}")
    val = given.get("val", "hash")
    if val.startswith("tail"):
        return TailCorpus(spec, path, read_options(spec, {"val": val[4:] or "10"}, {"val": float})["val"], on_error)
    if val != "hash":
        raise UsageError(f"corpus {spec!r}: val must be 'hash' or 'tailN' (the last N percent), got {val!r}")
    return FileCorpus(location, list_files(path) if path.is_dir() else [_readable(path)], on_error)


def open_world(options: dict[str, Any]) -> World:
    """The world of the options seed, known, new (those that are there)."""
    names = {"seed": "seed", "known": "n_known", "new": "n_new"}
    return World(**{names[k]: v for k, v in options.items() if k in names})


def open_world_corpus(spec: str, options: dict[str, str]) -> WorldCorpus:
    """A `WorldCorpus` from the options of a spec."""
    given = read_options(spec, options, WORLD_OPTIONS)
    return WorldCorpus(open_world(given), **{k: given[k] for k in ("wordings", "dialogues") if k in given})


def _pairs(spec: str, query: str) -> Iterator[tuple[str, str]]:
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"corpus {spec!r}: expected key=value after '?', got {item!r}")
        yield key, value


def _readable(path: Path) -> Path:
    kinds = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
    if suffix(path) not in kinds:
        raise UsageError(f"{path}: cannot tell how to read it; its name must end in one of {', '.join(kinds)} (or .gz)")
    return path


def _open_shards(directory: Path, on_error: str) -> Corpus:
    if not directory.is_dir():
        raise UsageError(f"{directory}: no shards there; fetch some with: nanochat download -n 8")
    shards = ShardCorpus(directory, on_error)
    if shards.complete:
        return shards
    log.warning(
        "%s: %s and a training shard are not both there; validation is one document in %d instead",
        directory, shard_name(MAX_SHARD), VAL_EVERY,
    )  # fmt: skip
    return FileCorpus(f"climbmix:{directory}", list_files(directory), on_error)
