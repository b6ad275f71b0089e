"""Files from the network: parallel, resumed where they stopped, checked, renamed into place when complete.

`nanochat download -n 8` fetches the public pretraining shards (ClimbMix, 400B tokens in 6543 shards, the
set that karpathy/nanochat trains on) and the one that validation uses. `NANOCHAT_DATA_URL` names another place of the
same layout, `NANOCHAT_DATA` the directory (~/.cache/nanochat).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import requests
from tqdm import tqdm

from nanochat.errors import NanochatError, UsageError

BASE_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
MAX_SHARD = 6542  # the last shard; it is for validation
TRIES = 5  # without progress in between
BACKOFF = 0.5  # seconds before the second try; doubles from try to try
OFFLINE_TRIES = 2  # when the host cannot even be reached
TIMEOUT = (5.0, 30.0)  # seconds to connect, seconds without a byte


def data_dir() -> Path:
    """Where downloaded data lies: `$NANOCHAT_DATA`, else ~/.cache/nanochat."""
    return Path(os.environ.get("NANOCHAT_DATA") or Path("~/.cache/nanochat")).expanduser()


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard_{index:05d}.parquet"


class _Again(Exception):
    """This try failed, another may not."""


def fetch(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    tries: int = TRIES,
    backoff: float = BACKOFF,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """The file at `url` as `path`. One that is there already (of the right hash or size, when these are given) is kept.

    The bytes go to `path` + ".part", which the next try or the next call continues (HTTP Range), and are renamed when
    size and hash are right. `progress` is called with the number of bytes of each piece that comes in.

    Raises NanochatError: server unreachable, an answer that says no (404...), a wrong size or hash, a full disk.
    """
    if _is_right(path, size, sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with _locked(path.with_name(path.name + ".lock")):
        if _is_right(path, size, sha256):  # another process was quicker
            return path
        if progress and part.exists():
            progress(part.stat().st_size)
        failures, furthest = 0, 0
        while True:
            try:
                _fetch_once(url, part, size, sha256, progress or (lambda n: None))
                break
            except (requests.RequestException, _Again) as error:
                now = part.stat().st_size if part.exists() else 0
                failures = 1 if now > furthest else failures + 1
                furthest = max(furthest, now)
                if failures >= (min(tries, OFFLINE_TRIES) if _is_unreachable(error) else tries):
                    raise NanochatError(_explain(url, part, error)) from None
                time.sleep(backoff * 2 ** (failures - 1))
            except OSError as error:
                why = error.strerror or str(error)
                raise NanochatError(f"{part}: cannot be written ({why}); {url} is incomplete") from None
        os.replace(part, path)
        _etag_file(part).unlink(missing_ok=True)
    return path


def _fetch_once(
    url: str, part: Path, size: int | None, sha256: str | None, progress: Callable[[int], object]
) -> None:
    """One request: continues `part`, and checks it. Raises `_Again` when another try may help."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    etag = _etag_file(part)
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag.exists():
            headers["If-Range"] = etag.read_text()
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        total = _total(answer.headers, have if answer.status_code == 206 else 0)
        if answer.status_code == 416 and total != have:  # our part is longer than the file: not the same file
            _discard(part)
            raise _Again("the partial file did not fit")
        if answer.status_code != 416:
            if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
                raise _Again(f"HTTP {answer.status_code} {answer.reason}")
            if answer.status_code not in (200, 206):
                raise NanochatError(f"{url}: HTTP {answer.status_code} {answer.reason}; check the address")
            resumed = answer.status_code == 206 and _range_start(answer.headers) == have
            if answer.status_code == 206 and not resumed:
                _discard(part)
                raise _Again("the server answered with another range")
            if not resumed:
                progress(-have)
            if (answer.headers.get("ETag") or "W/").startswith("W/"):
                etag.unlink(missing_ok=True)
            else:
                etag.write_text(answer.headers["ETag"])
            with part.open("ab" if resumed else "wb") as file:
                for data in answer.iter_content(1 << 16):
                    file.write(data)
                    progress(len(data))
    _verify(part, total, size, sha256)


def _verify(part: Path, total: int | None, size: int | None, sha256: str | None) -> None:
    """Raises `_Again` when the file is too short or wrong; what is wrong is deleted, what is short stays."""
    got = part.stat().st_size
    wanted = size if size is not None else total
    if wanted is not None and got != wanted:
        if got > wanted:
            _discard(part)
        raise _Again(f"{got} bytes came instead of {wanted}")
    if sha256 is not None and (found := _sha256(part)) != sha256:
        _discard(part)
        raise _Again(f"its sha256 is {found}, expected {sha256}")


def _total(headers: Mapping[str, str], have: int) -> int | None:
    """The size of the whole file, where the answer tells it."""
    total = headers.get("Content-Range", "").rpartition("/")[2]
    if total.isdigit():
        return int(total)
    length = headers.get("Content-Length", "")
    return have + int(length) if length.isdigit() and "Content-Encoding" not in headers else None


def _range_start(headers: Mapping[str, str]) -> int:
    first = headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else -1


def _is_right(path: Path, size: int | None, sha256: str | None) -> bool:
    if not path.exists() or (size is not None and path.stat().st_size != size):
        return False
    return sha256 is None or _sha256(path) == sha256


def _discard(part: Path) -> None:
    part.unlink()
    _etag_file(part).unlink(missing_ok=True)


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _is_unreachable(error: Exception) -> bool:
    """No connection at all: no name resolution, no route, refused (a connection that broke is another thing)."""
    return "NewConnectionError" in repr(error) or "NameResolutionError" in repr(error)


def _explain(url: str, part: Path, error: Exception) -> str:
    kept = f"; {part.stat().st_size} bytes are kept, the same command continues there" if part.exists() else ""
    if _is_unreachable(error) or isinstance(error, requests.ConnectTimeout):
        host = url.split("/")[2] if "//" in url else url
        return (
            f"{url}: {host} cannot be reached. Is this machine offline? Local files serve as well (the corpus can be a "
            f"directory, a task takes path=FILE), and 'world' needs no network{kept}"
        )
    return f"{url}: download failed: {str(error) or type(error).__name__}{kept}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, so that the ranks of a run do not write one file. (No lock where the system has none.)"""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue  # the holder before us removed it
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open `file` is still the one at `path` (asked in one step: it may go at any moment)."""
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


# The public shards ----------------------------------------------------------------------------------------------------


def read_checksums(path: Path) -> dict[str, str]:
    """`{file name: sha256}` from a list as `sha256sum` writes it."""
    result = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, _, name = line.strip().partition(" ")
        if not line.strip():
            continue
        if len(digest) != 64 or not name.strip():
            raise UsageError(f"{path}, line {number}: expected 'sha256  name'")
        result[name.strip().lstrip("*")] = digest.lower()
    return result


def download_shards(
    n: int,
    directory: Path | None = None,
    base_url: str | None = None,
    workers: int = 4,
    checksums: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> list[Path]:
    """The first `n` training shards and the validation shard, `workers` at a time. What is there already is kept.

    Raises NanochatError at the first shard that cannot be had; the others stop, and the next call continues them.
    """
    if not 1 <= n <= MAX_SHARD:
        raise UsageError(f"-n {n}: the number of training shards must be between 1 and {MAX_SHARD}")
    if workers < 1:
        raise UsageError(f"--workers {workers}: must be at least 1")
    directory = directory or data_dir() / "climbmix"
    base_url = (base_url or os.environ.get("NANOCHAT_DATA_URL") or BASE_URL).rstrip("/")
    names = [shard_name(i) for i in (MAX_SHARD, *range(n))]
    with tqdm(total=0, unit="B", unit_scale=True, desc=f"{len(names)} shards", disable=quiet) as bar:
        _fetch_all(((f"{base_url}/{k}", directory / k, (checksums or {}).get(k)) for k in names), workers, bar.update)
    return [directory / name for name in names]


def _fetch_all(
    files: Iterable[tuple[str, Path, str | None]], workers: int, progress: Callable[[int], object]
) -> None:
    """Fetches all; the first failure, or Ctrl-C, ends the others between two pieces (what they have is kept)."""
    stop, counting = threading.Event(), threading.Lock()

    def count(n: int) -> None:
        if stop.is_set():
            raise NanochatError("stopped")
        with counting:
            progress(n)

    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(fetch, url, path, sha256=digest, progress=count) for url, path, digest in files]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    for job in done:
        job.result()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="nanochat download", description=about)
    parser.add_argument("-n", type=int, default=8, help="training shards, about 100 MB each (default 8)")
    parser.add_argument("--dir", type=Path, help="where to (default $NANOCHAT_DATA/climbmix)")
    parser.add_argument("--url", help="base address (default $NANOCHAT_DATA_URL, else the public one)")
    parser.add_argument("--workers", type=int, default=4, help="downloads at a time (default 4)")
    parser.add_argument("--sha256", type=Path, help="list of checksums as sha256sum writes it")
    given = parser.parse_args(arguments)
    try:
        checksums = read_checksums(given.sha256) if given.sha256 else None
        paths = download_shards(given.n, given.dir, given.url, given.workers, checksums)
    except NanochatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(paths)} shards in {paths[0].parent}; train on them with --data climbmix:path={paths[0].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
