"""Settings of `nanochat chat_web`, and what they may not be."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat import runtime
from nanochat.errors import UsageError

KEY_VARIABLE = "NANOCHAT_API_KEY"
MIN_KEY = 16  # characters
RATE_LIMIT = 300  # requests a minute, where there are keys


@dataclass(frozen=True)
class ServeSettings:
    """Serve trained models: a chat page and an OpenAI-compatible API."""

    source: tuple[str, ...] = ()
    """stages or paths of checkpoints, one or several (default: those of sft, rag, refrag and rl that there are)"""
    run: str | None = None
    """name of the run (default: the one that wrote this stage last)"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    host: str = "127.0.0.1"
    """address to listen on; another one than this computer's own needs a key"""
    port: int = 8000
    """port to listen on (0: any that is free)"""
    api_key: tuple[str, ...] = ()
    """keys that clients must show; other users of this computer see them here: better $NANOCHAT_API_KEY or a file"""
    api_key_file: str | None = None
    """file with a key a line"""
    allowed_hosts: tuple[str, ...] = ()
    """names by which clients reach this server, besides addresses, localhost and this computer's name"""
    cors_origins: tuple[str, ...] = ()
    """web sites whose pages may call the API, as https://example.org (default: none)"""
    behind_proxy: bool = False
    """a reverse proxy on this computer says who the client is (X-Forwarded-For)"""
    knowledge_dir: str | None = None
    """directory of the knowledge bases (default: knowledge_bases in the directory of all runs)"""
    embedder: str = ""
    """embedder of new knowledge bases and of /v1/embeddings (default: minilm, where it is installed)"""
    uploads: bool = True
    """clients may create and delete knowledge bases and upload documents"""
    max_rows: int = 32
    """answers that are written at the same time"""
    max_queue: int = 64
    """requests that wait; further ones are told to come back later"""
    memory_mb: int = 0
    """memory for the states of running answers (0: no limit but max_rows)"""
    prefix_cache_mb: int = 256
    """memory for the states of conversations and documents that were read already, for each model"""
    prefill_chunk: int = 256
    """tokens of a long prompt that are read between two steps of the others"""
    pace_ms: float = 30.0
    """milliseconds between two pieces of a streamed answer, at least; 0: every token on its own"""
    rate_limit: int | None = None
    """requests a minute of one key, or of one address where there are no keys; 0: no limit (default: 300 with keys)"""
    max_n: int = 8
    """answers to one request"""
    max_body_mb: float = 1.0
    """largest request"""
    max_upload_mb: float = 20.0
    """largest document to upload"""
    max_seconds: float = 600.0
    """longest time for one answer, waiting included"""
    idle_seconds: float = 30.0
    """longest wait for a client that sends its request, or reads its answer, too slowly (0: no limit)"""
    drain_seconds: float = 30.0
    """at SIGTERM: time for the answers that are being written"""
    quantize: Literal["fp32", "bf16", "int8"] | None = None
    """weights in fewer bytes, for speed"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:N"""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""
    access_log: bool = False
    """a line in the log for each request"""

    def check(self) -> None:
        """Raises UsageError for values out of range, and for an open address without a key."""
        for name in ("max_rows", "max_queue", "max_n", "prefill_chunk", "max_body_mb", "max_upload_mb", "max_seconds"):
            if getattr(self, name) <= 0:
                raise UsageError(f"--{name} {getattr(self, name)}: expected more than 0")
        for name in ("memory_mb", "prefix_cache_mb", "idle_seconds", "drain_seconds", "rate_limit", "pace_ms"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"--{name} {getattr(self, name)}: expected at least 0")
        if not 0 <= self.port < 65536:
            raise UsageError(f"--port {self.port}: expected 0 to 65535")
        for origin in self.cors_origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise UsageError(f"--cors_origins {origin}: expected an origin such as https://example.org")
        if not self.keys() and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host} is open to others: set a key for them with --api_key_file or ${KEY_VARIABLE}, "
                "or listen on 127.0.0.1"
            )

    def keys(self) -> tuple[str, ...]:
        """The keys of flag, file and environment. Raises UsageError for one that is too short or no plain text."""
        found = [*self.api_key, *os.environ.get(KEY_VARIABLE, "").split()]
        if self.api_key_file is not None:
            try:
                found += Path(self.api_key_file).read_text(encoding="utf-8").split()
            except (OSError, UnicodeDecodeError) as error:
                why = (isinstance(error, OSError) and error.strerror) or error
                raise UsageError(f"cannot read --api_key_file {self.api_key_file}: {why}") from None
            if not found:
                raise UsageError(f"--api_key_file {self.api_key_file} holds no key")
        for key in found:
            if len(key) < MIN_KEY or not key.isascii() or not key.isprintable():
                raise UsageError(f"an API key needs {MIN_KEY} or more plain letters; `openssl rand -hex 24` makes one")
        return tuple(dict.fromkeys(found))

    @property
    def requests_per_minute(self) -> int:
        return self.rate_limit if self.rate_limit is not None else RATE_LIMIT * bool(self.keys())

    @property
    def knowledge_root(self) -> Path:
        root = Path(self.knowledge_dir) if self.knowledge_dir else self.runs / "knowledge_bases"
        return root.expanduser().resolve()

    @property
    def runs(self) -> Path:
        return Path(self.out_dir or runtime.out_root())


def is_loopback(host: str) -> bool:
    """Whether only this computer reaches the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
