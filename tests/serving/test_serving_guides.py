"""docs/serving.md and docs/api.md: every request, program and message of theirs is real."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
from tiny_server import DOCUMENTS, TOKENIZER, tiny_model

from nanochat import checkpoint, config
from nanochat.engine.sampling import Sampling
from nanochat.serving.settings import KEY_VARIABLE, ServeSettings

ROOT = Path(__file__).parents[2]
SERVING, API = ((ROOT / "docs" / name).read_text() for name in ("serving.md", "api.md"))
ADDRESS = "http://127.0.0.1:8000"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.M | re.S)


def commands(page: str) -> list[list[str]]:
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def send(client: httpx.Client, words: list[str], files: dict[str, bytes]) -> httpx.Response:
    """What curl would send."""
    url, options = words[1], words[2:]
    assert url.startswith(ADDRESS)
    given = dict(zip(options[::2], options[1::2]))
    assert set(given) <= {"-H", "-d", "-F"}
    place = url.removeprefix(ADDRESS)
    if "-F" in given:
        field, _, name = given["-F"].partition("=@")
        return client.post(place, files={field: (name, files[name])})
    if "-d" not in given:
        return client.get(place)
    name, _, value = given["-H"].partition(": ")
    return client.post(place, content=given["-d"], headers={name: value})


def test_every_request_works(client):
    lines = [json.dumps({"id": d.id, "title": d.title, "content": d.content}) for d in DOCUMENTS]
    files = {"documents.jsonl": "\n".join(lines).encode()}
    asked = [words for words in commands(API) if words[0] == "curl"]
    assert len(asked) == 8
    for words in asked:
        response = send(client, words, files)
        assert response.status_code in (200, 201, 202), (words, response.text)


def test_the_error_is_as_shown(client):
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 3}
    assert client.post("/v1/chat/completions", json=body).json() == json.loads(blocks(API, "json")[0])


def test_every_program_works(server, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai")
    model = tiny_model(context=512).model
    meta = {"stage": "sft", "model_config": model.config.to_dict(), "tokenizer_hash": TOKENIZER.hash, "metrics": {}}
    checkpoint.save(tmp_path / "out" / "r" / "sft", 1, {"model": model.state_dict()}, meta)
    TOKENIZER.save(tmp_path / "out" / "r" / "tokenizer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_OUT", str(tmp_path / "out"))
    names: dict = {}
    for block in blocks(API, "python"):
        exec(block.replace(ADDRESS, server.url), names)
    names["client"].close()
    names["app"].state.service.close()
    assert names["answer"].trace[0]["documents"][0]["id"] == "torwick"
    assert len(capsys.readouterr().out) > 100


def test_every_command_parses(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    (tmp_path / "keys").write_text("k" * 48)
    for words in commands(SERVING):
        if words[0] == "export":
            monkeypatch.setenv(words[1].partition("=")[0], "k" * 48)
            continue
        assert words[:2] == ["nanochat", "chat_web"]
        flags = [str(tmp_path / "keys") if word == "/etc/nanochat/keys" else word for word in words[2:]]
        config.parse(ServeSettings, flags).check()
    unit = re.search(r"^ExecStart=\S+/nanochat chat_web (.*)$", SERVING, flags=re.M)
    assert unit is not None
    flags = unit[1].replace("/etc/nanochat/keys", str(tmp_path / "keys")).split()
    config.parse(ServeSettings, flags).check()


def test_the_tables_are_true():
    settings = ServeSettings()
    defaults = dict(re.findall(r"^\| [^|]+\| `--(\w+)` \| (\d+)[ |]", SERVING, flags=re.M))
    defaults.pop("rate_limit")
    assert defaults == {name: f"{getattr(settings, name):g}" for name in defaults}
    assert len(defaults) >= 6
    assert f"| {Sampling().max_tokens} | fewer when" in API
    assert f"| {Sampling().temperature} | 0 is greedy" in API


def test_messages_are_real():
    source = "".join(path.read_text() for path in (ROOT / "nanochat" / "serving").glob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)
    section = SERVING.split("## When something is wrong", 1)[1]
    quoted = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\| (`.*?) \|", section, flags=re.M)))
    assert len(quoted) >= 7
    assert [message for message in quoted if message not in source] == []


def test_every_route_is_documented(server):
    paths = {re.sub(r"\{(\w+):path\}", r"{\1}", path) for path in server.app.openapi()["paths"]}
    told = API.replace("…", "/v1/knowledge_bases")
    told = told.replace("/v1/models/{id}", "/v1/models/{name}")
    assert [path for path in sorted(paths) if path not in told and not path.startswith("/ui/")] == []
