"""From the command line to a listening socket, and back at SIGTERM; what settings refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from tiny_server import TOKENIZER, tiny_model

from nanochat import checkpoint, config
from nanochat.errors import NanochatError, UsageError
from nanochat.serving.server import chat_web, listen, load_models
from nanochat.serving.settings import KEY_VARIABLE, ServeSettings

KEY = "k" * 20


@pytest.fixture
def run(tmp_path) -> Path:
    """A directory of runs: `out/tiny` with the stages sft and rag."""
    for stage in ("sft", "rag"):
        model = tiny_model(stage).model
        meta = {"stage": stage, "model_config": model.config.to_dict(), "tokenizer_hash": TOKENIZER.hash, "metrics": {}}
        checkpoint.save(tmp_path / "out" / "tiny" / stage, 1, {"model": model.state_dict()}, meta)
    TOKENIZER.save(tmp_path / "out" / "tiny" / "tokenizer")
    return tmp_path / "out"


def test_all_stages_that_chat_are_served(run):
    settings = config.parse(ServeSettings, ["--out_dir", str(run)])
    assert list(load_models(settings)) == ["tiny-sft", "tiny-rag"]
    settings = config.parse(ServeSettings, ["--out_dir", str(run), "--source", "rag"])
    assert list(load_models(settings)) == ["tiny-rag"]
    with pytest.raises(UsageError, match="served already"):
        load_models(config.parse(ServeSettings, ["--out_dir", str(run), "--source", "rag", str(run / "tiny" / "rag")]))
    with pytest.raises(NanochatError, match="sft"):
        load_models(ServeSettings(out_dir=str(run / "nowhere")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "open to others"), (["--host", "example.org"], "open to others"),
        (["--api_key", "short"], "16 or more"), (["--port", "99999"], "--port"), (["--max_rows", "0"], "--max_rows"),
        (["--cors_origins", "*"], "origin such as"), (["--api_key_file", "/nowhere"], "cannot read"),
        (["--rate_limit", "-1"], "--rate_limit"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(flags, message, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=message):
        chat_web(flags)


def test_keys_come_from_flag_file_and_environment(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text(f"{'f' * 20}\n{KEY}\n")
    monkeypatch.setenv(KEY_VARIABLE, "e" * 20)
    settings = ServeSettings(api_key=(KEY,), api_key_file=str(tmp_path / "keys"), host="0.0.0.0")
    settings.check()
    assert settings.keys() == (KEY, "e" * 20, "f" * 20)
    assert settings.requests_per_minute == 300
    assert ServeSettings(rate_limit=5).requests_per_minute == 5


def test_an_address_in_use_is_told_before_models_are_loaded():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NanochatError, match=f"port {port}.*--port"):
            chat_web(["--port", str(port), "--out_dir", "/nowhere"])
    for nowhere in ("no.such.host.invalid", "a" * 70):
        with pytest.raises(UsageError, match="--host"):
            listen(nowhere, 0)


def test_no_limit_on_slow_clients(start):
    with start(idle_seconds=0).client() as client:
        for _ in range(2):
            assert client.get("/health").status_code == 200
            time.sleep(0.05)


START = "import sys; from nanochat.serving.server import chat_web; sys.exit(chat_web(sys.argv[1:]))"


def test_sigterm_lets_answers_come_to_their_end(run, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop(KEY_VARIABLE, None)
    flags = ["--out_dir", str(run), "--port", "0", "--source", "sft", "--drain_seconds", "20"]
    server = subprocess.Popen(
        [sys.executable, "-c", START, *flags], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        lines = iter(server.stderr.readline, "")
        url = next(m[0] for line in lines if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
        drained: list[str] = []
        threading.Thread(target=lambda: drained.extend(lines), daemon=True).start()
        deadline = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60) as response:
            chunks = response.iter_lines()
            next(chunks)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in chunks if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.wait(30) in (0, -signal.SIGTERM)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
    assert "Traceback" not in "".join(drained)
