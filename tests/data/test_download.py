"""Downloads against a server on this machine that fails in every way a real one does."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanochat.data import download
from nanochat.data.download import MAX_SHARD, data_dir, download_shards, fetch, main, read_checksums, shard_name
from nanochat.errors import NanochatError, UsageError

BODY = bytes(range(256)) * 4000  # 1 MB
SHA = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; `script` says what goes wrong with the next requests, one entry each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.script: list[str] = []
        self.ranges = True
        self.etag = '"one"'
        self.log: list[str] = []  # the Range header of each request, "" without

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that the test breaks are no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.log.append(self.headers.get("Range", ""))
        fault = server.script.pop(0) if server.script else ""
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        if fault.isdigit():
            self.send_error(int(fault))
            return
        start = self._start(body) if server.ranges else 0
        if start and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", server.etag)
        self.end_headers()
        rest = body[start:]
        if fault == "drop":
            rest = rest[: len(rest) // 2]
            self.close_connection = True
        if fault == "garbage":
            rest = b"\0" * len(rest)
        self.wfile.write(rest)
        if fault == "drop":
            self.wfile.flush()
            self.connection.close()

    def _start(self, body: bytes) -> int:
        wanted = self.headers.get("Range", "")
        if not wanted or self.headers.get("If-Range", self.server.etag) != self.server.etag:
            return 0
        return int(wanted.removeprefix("bytes=").rstrip("-"))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.files["/a"] = BODY
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def get(server: Server, path: Path, **options: object) -> Path:
    return fetch(f"{server.url}/a", path, backoff=0.01, **options)  # type: ignore[arg-type]


def leftovers(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


def test_fetch_writes_the_file_and_nothing_else(server: Server, tmp_path: Path) -> None:
    seen: list[int] = []
    assert get(server, tmp_path / "deep" / "a", sha256=SHA, size=len(BODY), progress=seen.append).read_bytes() == BODY
    assert leftovers(tmp_path / "deep") == {"a"}
    assert sum(seen) == len(BODY)
    get(server, tmp_path / "deep" / "a", sha256=SHA)
    assert len(server.log) == 1  # what is there is kept


def test_dropped_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    server.script = ["drop"] * 3  # more than the tries: progress counts
    seen: list[int] = []
    assert get(server, tmp_path / "a", tries=2, progress=seen.append).read_bytes() == BODY
    assert server.log[0] == ""
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for r in server.log[1:]]
    assert starts == sorted(set(starts))
    assert len(starts) == 3
    assert sum(seen) == len(BODY)


def test_a_later_call_continues_a_partial_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(BODY[:700_000])
    seen: list[int] = []
    assert get(server, tmp_path / "a", sha256=SHA, progress=seen.append).read_bytes() == BODY
    assert server.log == ["bytes=700000-"]
    assert sum(seen) == len(BODY)


def test_a_complete_partial_file_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(BODY)
    assert get(server, tmp_path / "a").read_bytes() == BODY


def test_a_partial_file_that_is_too_long_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(BODY + b"more")
    assert get(server, tmp_path / "a").read_bytes() == BODY


def test_a_file_that_changed_is_fetched_from_the_start(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(b"old" * 1000)
    (tmp_path / "a.part.etag").write_text('"zero"')
    assert get(server, tmp_path / "a").read_bytes() == BODY
    assert leftovers(tmp_path) == {"a"}


def test_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges, server.script = False, ["drop", "drop"]
    seen: list[int] = []
    assert get(server, tmp_path / "a", progress=seen.append).read_bytes() == BODY
    assert sum(seen) == len(BODY)


def test_a_server_without_ranges_that_always_drops_ends(server: Server, tmp_path: Path) -> None:
    server.ranges, server.script = False, ["drop"] * 50
    with pytest.raises(NanochatError, match=r"/a: download failed.*the same command continues there"):
        get(server, tmp_path / "a")
    assert len(server.log) <= 7


@pytest.mark.parametrize("status", ["500", "503", "429"])
def test_passing_server_errors_are_retried(server: Server, tmp_path: Path, status: str) -> None:
    server.script = [status] * 3
    assert get(server, tmp_path / "a").read_bytes() == BODY
    server.script = [status] * 50
    with pytest.raises(NanochatError, match=f"HTTP {status}"):
        get(server, tmp_path / "b")


def test_a_no_is_not_retried(server: Server, tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match=r"/none: HTTP 404.*check the address"):
        fetch(f"{server.url}/none", tmp_path / "a")
    assert len(server.log) == 1
    assert leftovers(tmp_path) == set()


def test_wrong_bytes_are_noticed(server: Server, tmp_path: Path) -> None:
    server.script = ["garbage"]
    assert get(server, tmp_path / "a", sha256=SHA).read_bytes() == BODY  # the second try is right
    with pytest.raises(NanochatError, match=r"its sha256 is .*, expected 0000"):
        get(server, tmp_path / "b", sha256="0" * 64, tries=2)
    with pytest.raises(NanochatError, match="1024000 bytes came instead of 5"):
        get(server, tmp_path / "c", size=5, tries=2)
    assert leftovers(tmp_path) == {"a"}


def test_a_present_file_of_the_wrong_hash_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"wrong")
    assert get(server, tmp_path / "a", sha256=SHA).read_bytes() == BODY


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a", "http://no-such-host.invalid/a"])
def test_offline_is_said_once_and_soon(tmp_path: Path, url: str) -> None:
    start = time.monotonic()
    with pytest.raises(NanochatError, match=r"cannot be reached. Is this machine offline\?") as error:
        fetch(url, tmp_path / "a")
    assert time.monotonic() - start < 30
    assert "\n" not in str(error.value)


def test_a_disk_that_refuses(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").mkdir()
    with pytest.raises(NanochatError, match=r"a\.part: cannot be written"):
        get(server, tmp_path / "a")


def test_two_at_a_time_fetch_once(server: Server, tmp_path: Path) -> None:
    threads = [threading.Thread(target=get, args=(server, tmp_path / "a")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() == BODY
    assert len(server.log) == 1
    assert leftovers(tmp_path) == {"a"}


def test_a_lock_that_leaves_while_it_is_looked_at(tmp_path: Path) -> None:
    """Each holder removes the file: one who waited may find it gone at any moment, and only takes the next one."""
    inside, most, path = 0, 0, tmp_path / "lock"

    def take() -> None:
        nonlocal inside, most
        for _ in range(300):
            with download._locked(path):
                inside += 1
                most = max(most, inside)
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        for taken in [pool.submit(take) for _ in range(4)]:
            taken.result()
    assert most == 1
    assert not path.exists()


# Shards ---------------------------------------------------------------------------------------------------------------


def put_shards(server: Server, n: int) -> None:
    for i in (*range(n), MAX_SHARD):
        server.files[f"/{shard_name(i)}"] = bytes([i % 256]) * (10_000 + i)


def test_shards_are_fetched_in_parallel_and_kept(server: Server, tmp_path: Path) -> None:
    put_shards(server, 5)
    server.script = ["drop", "500", "drop"]
    paths = download_shards(5, tmp_path, server.url + "/", workers=3, quiet=True)
    assert [p.name for p in paths] == ["shard_06542.parquet", *(f"shard_0000{i}.parquet" for i in range(5))]
    assert [p.stat().st_size for p in paths] == [16_542, *range(10_000, 10_005)]
    n = len(server.log)
    download_shards(5, tmp_path, server.url, quiet=True)
    assert len(server.log) == n


def test_a_missing_shard_ends_it(server: Server, tmp_path: Path) -> None:
    put_shards(server, 2)
    with pytest.raises(NanochatError, match=r"shard_0000\d\.parquet: HTTP 404"):
        download_shards(200, tmp_path, server.url, workers=2, quiet=True)
    assert len(server.log) < 50


def test_an_interrupt_stops_the_others(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_shards(server, 200)

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_shards(200, tmp_path, server.url, workers=2, quiet=True)
    assert len(server.log) < 50


def test_command_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_shards(server, 1)
    monkeypatch.setenv("NANOCHAT_DATA", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DATA_URL", server.url)
    good = hashlib.sha256(server.files["/shard_00000.parquet"]).hexdigest()
    (tmp_path / "sums").write_text(f"{good}  shard_00000.parquet\n\n{good} *other\n")
    assert main(["-n", "1", "--sha256", str(tmp_path / "sums")]) == 0
    assert f"2 shards in {data_dir() / 'climbmix'}" in capsys.readouterr().out
    assert main(["-n", "2"]) == 1
    assert "HTTP 404" in capsys.readouterr().err
    assert main(["-n", "0"]) == 2
    assert "-n 0" in capsys.readouterr().err


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--workers 0"):
        download_shards(1, tmp_path, workers=0)
    (tmp_path / "sums").write_text("abc file\n")
    with pytest.raises(UsageError, match="sums, line 1: expected 'sha256  name'"):
        read_checksums(tmp_path / "sums")
