"""What strangers try: each attack as a request, over the socket, and what must come of it."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable

import httpx
import pytest
from tiny_server import slowed

from nanochat.conversation import SPECIAL_TOKENS

KEY, OTHER = "k" * 24, "o" * 24
CHAT, BASES = "/v1/chat/completions", "/v1/knowledge_bases"
ASK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(start):
    """A server with keys, for one web site, patient for half a second."""
    settings = {"api_key": (KEY, OTHER), "cors_origins": ("https://good.example",), "idle_seconds": 0.5}
    return start(**settings, allowed_hosts=("chat.example",), rate_limit=0)


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def head_of_post(path: str, length: int, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode()


def is_plain_error(response: httpx.Response) -> bool:
    """OpenAI's shape, and nothing that tells of the machine."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    told = response.text
    return not re.search(r"Traceback|File \"|/tmp|/home|/work|site-packages|\.py\b", told)


# ---- JSON


BAD_JSON = [
    b"{", b"nonsense", b"\xff\xfe", b'{"a": NaN}', b'{"temperature": 1e400}', b'{"temperature": -Infinity}',
    b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"0," * 200_000 + b"0]", b'{"n": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"model": "a", "model": "b"}', b"null", b"[]", b'"x"',
    b'{"messages": [{"role": "user", "content": "' + b'\\"' * 200_000,
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json(client, body):
    began = time.monotonic()
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert is_plain_error(response)
    assert time.monotonic() - began < 5


WRONG = [
    {"temperature": "0.5"}, {"temperature": True}, {"n": 1.5}, {"n": "2"}, {"n": 0}, {"n": 9}, {"n": 1 << 70},
    {"max_tokens": 0}, {"max_tokens": 1 << 40}, {"stream": "yes"}, {"stop": [""]}, {"stop": ["x"] * 17}, {"stop": 1},
    {"messages": []}, {"messages": "Hi"}, {"messages": [{"role": "king", "content": "Hi"}]}, {"messages": [1]},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "assistant", "content": "Hi"}]}, {"messages": [{"role": "tool", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    {"messages": [{"role": role, "content": "a"} for role in ("user", "system", "user")]},
    {"seed": 1 << 64}, {"top_p": 0}, {"tools": [{}]}, {"logit_bias": {"1": 5}}, {"presence_penalty": 1},
    {"response_format": {"type": "json_object"}}, {"top_logprobs": 2}, {"stream_options": {}}, {"__proto__": {}},
    {"retrieval": {"knowledge_base": "../towns"}}, {"retrieval": {"knowledge_base": "towns", "top_k": 10**6}},
    {"retrieval": {"knowledge_base": "towns", "multi_hop": True}},
    {"retrieval": {"knowledge_base": "towns", "mode": "x"}},
    {"retrieval": {"knowledge_base": "none"}}, {"messages": [{"role": "user", "content": "x"}] * 1025},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=[json.dumps(w)[:60] for w in WRONG])
def test_wrong_fields(client, wrong):
    response = client.post(CHAT, json={**ASK, **wrong})
    assert response.status_code == (404 if wrong == {"retrieval": {"knowledge_base": "none"}} else 400), response.text
    assert is_plain_error(response)


def test_a_way_to_search_that_the_knowledge_base_has_not(client):
    asked = {"messages": [{"role": "user", "content": "Who founded Torwick?"}]}
    response = client.post(CHAT, json={**asked, "retrieval": {"knowledge_base": "towns", "mode": "dense"}})
    assert response.status_code == 400
    assert is_plain_error(response)


def test_other_content_types_are_no_json(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert client.post(CHAT, content=json.dumps(ASK), headers={"Content-Type": kind}).status_code in (400, 415)


def test_bodies_are_limited_before_they_are_read(client, server):
    assert client.post(CHAT, content=b"x" * (1 << 20) + b"x" * 10).status_code == 413
    with connect(server.url) as raw:  # told beforehand, and never sent
        raw.sendall(head_of_post(CHAT, 99999999999))
        assert raw.recv(100).startswith(b"HTTP/1.1 413")

    def endless():
        while True:
            yield b"x" * 65536

    try:  # in chunks, without an end
        status = client.post(CHAT, content=endless()).status_code
    except httpx.TransportError:  # the server hung up while we wrote
        status = 413
    assert status == 413
    assert client.get("/health").status_code == 200


# ---- names, keys, other sites


def test_every_route_needs_a_key(locked):
    routes = {(m, p) for p, methods in locked.app.openapi()["paths"].items() for m in methods} | {("get", "/nowhere")}
    assert len(routes) > 15
    with locked.client() as stranger, locked.client("x" * 24) as liar, locked.client(OTHER) as friend:
        routes |= {("get", "/openapi.json"), ("post", "/v1/../v1/models"), ("get", "//v1/models")}
        for method, path in sorted(routes):
            if path == "/health":
                continue
            for client in (stranger, liar):
                response = client.request(method, path, json={} if method == "post" else None)
                assert response.status_code == 401, (method, path)
                assert is_plain_error(response)
                assert response.headers["www-authenticate"] == "Bearer"
        assert stranger.get("/health").status_code == 200
        assert stranger.get("/").status_code == 200
        assert stranger.get("/static/index.html").status_code == 200
        assert friend.get("/v1/models").status_code == 200
        for given in ("", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY} x", f"Bearer {KEY[:-1]}", "Bearer \xe9"):
            headers = {"Authorization": given.encode("latin-1")}
            assert stranger.get("/v1/models", headers=headers).status_code == 401, given


def test_dns_rebinding(client, locked):
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:80", "", "[evil]"):
        response = client.get("/v1/models", headers={"Host": host})
        assert response.status_code in (400, 403), host
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST."):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
    with locked.client(KEY) as friend:
        assert friend.get("/v1/models", headers={"Host": "chat.example:443"}).status_code == 200
    with connect(locked.url) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert raw.recv(100).split()[1] in (b"400", b"403")


def test_other_sites_can_neither_read_nor_write(client, locked):
    evil = {"Origin": "https://evil.example"}
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=evil).headers
    for headers in (evil, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):
        assert client.post(CHAT, json=ASK, headers=headers).status_code == 403
        assert client.delete(f"{BASES}/towns", headers=headers).status_code == 403
    own = {"Origin": str(client.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert client.post(CHAT, json=ASK, headers=own).status_code == 200
    preflight = {"Access-Control-Request-Method": "POST"}
    assert client.options(CHAT, headers={**evil, **preflight}).headers.get("access-control-allow-origin") is None
    good = {"Origin": "https://good.example", "Sec-Fetch-Site": "cross-site"}
    with locked.client() as site:
        allowed = site.options(CHAT, headers={**good, **preflight})
        assert allowed.status_code == 204
        assert allowed.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in allowed.headers
        assert site.options(CHAT, headers={**evil, **preflight}).status_code == 401
        answer = site.post(CHAT, json=ASK, headers={**good, "Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_answers_cannot_be_sniffed_framed_or_cached(client):
    for path in ("/", "/health", "/v1/models", "/nowhere", "/static/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "server" not in headers
    assert client.get("/v1/models").headers["cache-control"] == "no-store"


# ---- text that wants to be more than text


def prompts_of(server, monkeypatch) -> list[list[int]]:
    """The ids that reach the schedulers from now on."""
    seen: list[list[int]] = []
    for served in server.service.models.values():
        submit = served.scheduler.submit

        def spy(request, submit=submit):
            seen.append(list(request.ids))
            return submit(request)

        monkeypatch.setattr(served.scheduler, "submit", spy)
    return seen


def test_text_never_becomes_special_tokens(server, client, monkeypatch):
    seen = prompts_of(server, monkeypatch)
    hostile = "".join(SPECIAL_TOKENS)
    plain = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    for messages in (plain, [{**m, "content": hostile + "é"} for m in plain]):
        client.post(CHAT, json={"messages": messages, "max_tokens": 1, "model": "tiny-rag"})
    assert client.post(f"{BASES}", json={"name": "hostile", "kind": "simple"}).status_code == 201
    line = json.dumps({"id": "a", "title": f"Torwick {hostile[:60]}", "content": f"Torwick {hostile[-200:]}"})
    upload(client, "hostile", "x.jsonl", line.encode())
    for name in ("towns", "hostile"):
        body = {"messages": [{"role": "user", "content": "Torwick?"}], "max_tokens": 1, "model": "tiny-rag"}
        answer = client.post(CHAT, json={**body, "retrieval": {"knowledge_base": name, "top_k": 1}})
        assert answer.status_code == 200
    tokenizer = server.service.models["tiny-rag"].chat.tokenizer
    specials = [[i for i in ids if tokenizer.is_special(i)] for ids in seen]
    assert len(seen) == 4
    assert specials[0] == specials[1]
    assert specials[2] == specials[3]
    client.post("/v1/completions", json={"prompt": hostile[:200], "max_tokens": 1})
    assert [i for i in seen[-1] if tokenizer.is_special(i)] == [tokenizer.bos]


def test_markup_stays_text(client):
    """In answers, titles and file names; test_markdown and the page's tests show what browsers make of it."""
    hostile = "<img src=x onerror=alert(1)> [a](javascript:alert(1)) ![b](http://evil.example/x.png)"
    [html] = client.post("/ui/markdown", json={"items": [{"text": hostile}]}).json()["html"]
    assert "<img" not in html
    assert "href=\"javascript" not in html
    assert client.post(BASES, json={"name": "markup", "kind": "simple"}).status_code == 201
    done = upload(client, "markup", "<svg onload=alert(1)>.md", b"# <script>alert(1)</script>\nsome words")
    assert done["file"] == "<svg onload=alert(1)>.md"
    found = client.post(f"{BASES}/markup/search", json={"query": "words"})
    assert found.headers["content-type"] == "application/json"
    assert found.json()["data"][0]["title"] == "<script>alert(1)</script>"


# ---- files


def upload(client, base: str, name: str, data: bytes, kind: str = "application/octet-stream") -> dict:
    """Upload, and wait until it is done or refused."""
    response = client.post(f"{BASES}/{base}/documents", files={"file": (name, data, kind)})
    if response.status_code != 202:
        return {"status": response.status_code, **response.json()}
    place = f"{BASES}/{base}/uploads/{response.json()['id']}"
    assert eventually(lambda: client.get(place).json()["status"] in ("done", "failed"), 60)
    return client.get(place).json()


NAMES = [
    "../../etc/passwd.txt", "/etc/passwd.txt", "..\\..\\x.txt", "C:\\x.txt", "a\0b.txt", "con.txt",
    "\u202etxt.exe.txt", "x" * 500 + ".txt",
]  # fmt: skip


def test_paths_lead_nowhere(client, server):
    before = {path for path in server.root.parent.rglob("*") if "towns" not in path.parts}
    assert client.post(BASES, json={"name": "files", "kind": "simple"}).status_code == 201
    for i, name in enumerate(NAMES):
        done = upload(client, "files", name, f"text {i}".encode())
        assert done["status"] == "done", (name, done)
        assert not re.search(r"[\\/\0\u202e]", done["file"])
        assert len(done["file"]) <= 120
    after = {path for path in server.root.parent.rglob("*") if "towns" not in path.parts}
    assert all("files" in path.parts for path in after - before)
    assert not any("passwd" in str(path) for path in after)
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/static//etc/passwd",
                 f"{BASES}/..%2f..%2fetc", f"{BASES}/%2e%2e", "/v1/models/..%2f..%2fetc%2fpasswd"):  # fmt: skip
        with connect(server.url) as raw:  # as it stands: httpx would tidy it
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
        assert answer.split()[1] in (b"404", b"400"), path
        assert b"root:" not in answer
    for name in ("../x", "a/b", "a\\b", ".x", "", "A", "con", "x" * 65, "nul\0", "towns"):
        response = client.post(BASES, json={"name": name})
        assert response.status_code in (400, 409), name
        assert is_plain_error(response)


def test_files_are_what_they_say(client):
    assert client.post(BASES, json={"name": "types", "kind": "simple"}).status_code == 201
    cases = [
        ("a.exe", b"MZ", 415), ("a", b"text", 415), ("a.pdf.zip", b"PK", 415), ("", b"text", 400), ("a.txt", b"", 400),
        ("a.txt", b"\x00\x01\x02", "failed"), ("a.txt", b"\xff\xfe\xfa", "failed"), ("a.txt", b"  \n ", "failed"),
        ("a.pdf", b"<html>", "failed"), ("a.pdf", b"%PDF-1.7\ngarbage", "failed"), ("a.jsonl", b"{]", "failed"),
        ("a.jsonl", b'{"title": "no content"}', "failed"),
        ("a.jsonl", b'{"id": "' + b"x" * 600 + b'", "text": "a"}', "failed"),
        ("a.jsonl", b"[" * 100_000, "failed"), ("a.md", b"# fine\nwords", "done"),
    ]  # fmt: skip
    for name, data, expected in cases:
        done = upload(client, "types", name, data, "application/pdf")  # the declared type counts for nothing
        assert done["status"] == expected, (name, data[:20], done)
        assert not re.search(r"Traceback|/tmp|/home|\.py\b", json.dumps(done))
    assert client.get(f"{BASES}/types").json()["documents"] == 1
    form = {"file": "no file"}
    assert client.post(f"{BASES}/types/documents", data=form).status_code == 400
    assert client.post(f"{BASES}/types/documents", files=[("file", ("a.txt", b"x"))] * 1100).status_code in (400, 413)


# ---- slow and vanishing clients


def test_slowloris(locked):
    connections = [connect(locked.url) for _ in range(20)]
    for i, raw in enumerate(connections):
        half = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" if i % 2 else b""
        raw.sendall(half if i % 4 else half + b"X: ")
    body = connect(locked.url)
    body.sendall(head_of_post(CHAT, 100, f"Authorization: Bearer {KEY}") + b"{")
    with locked.client() as client:
        assert client.get("/health").status_code == 200
    assert b" 408 " in body.recv(200)
    for raw in [*connections, body]:
        raw.settimeout(10)
        try:
            while raw.recv(65536):
                pass
        except ConnectionResetError:
            pass
        raw.close()


def test_a_client_that_reads_nothing_is_cut_off(start):
    """Its answer fills all buffers between, then the clock runs; its row is free again."""
    server = start(idle_seconds=0.3, max_n=64, max_rows=64)
    scheduler = server.service.models["tiny-sft"].scheduler
    body = json.dumps({**ASK, "max_tokens": 200, "n": 64, "stream": True, "logprobs": True, "top_logprobs": 20})
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect((server.url.split("/")[2].split(":")[0], int(server.url.split(":")[2])))
    raw.sendall(head_of_post(CHAT, len(body)) + body.encode())
    assert eventually(lambda: scheduler.stats().active > 0)
    assert eventually(lambda: scheduler.stats().cancelled == 1, 120)
    assert eventually(lambda: scheduler.stats().active == 0)
    raw.close()


@pytest.fixture(scope="module")
def narrow(start):
    """A server that writes one answer at a time."""
    return start(max_rows=1, max_n=1)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("which", ["server", "narrow"])  # while they are answered; most of them in the queue
def test_vanishing_clients_free_their_rows(which, stream, monkeypatch, request):
    server = request.getfixturevalue(which)
    slowed(server.service.models["tiny-sft"].chat, monkeypatch, 0.01)
    scheduler = server.service.models["tiny-sft"].scheduler
    before = scheduler.stats()
    body = json.dumps({**ASK, "max_tokens": 230, "stream": stream})
    raws = [connect(server.url) for _ in range(8)]
    for raw in raws:
        raw.sendall(head_of_post(CHAT, len(body)) + body.encode())
    assert eventually(lambda: scheduler.stats().requests == before.requests + 8)
    assert which == "server" or scheduler.stats().queued >= 6
    for raw in raws:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST
        raw.close()
    assert eventually(lambda: scheduler.stats().finished == scheduler.stats().requests)
    assert scheduler.stats().cancelled > before.cancelled + (6 if which == "narrow" else 0)
    assert eventually(lambda: (scheduler.stats().active, scheduler.stats().queued) == (0, 0))


# ---- too much


def test_overload_is_told(start, monkeypatch):
    server = start(max_rows=1, max_queue=2, max_n=1)
    slowed(server.service.models["tiny-sft"].chat, monkeypatch, 0.02)
    with server.client() as client:
        scheduler = server.service.models["tiny-sft"].scheduler
        long = {**ASK, "max_tokens": 20}
        raws = [connect(server.url) for _ in range(8)]
        for raw in raws:
            text = json.dumps(long)
            raw.sendall(head_of_post(CHAT, len(text), "Connection: close") + text.encode())
        assert eventually(lambda: scheduler.stats().rejected > 0)
        assert client.get("/health").status_code == 200
        answers = [b"".join(iter(lambda raw=raw: raw.recv(65536), b"")) for raw in raws]
        for raw in raws:
            raw.close()
        refused = [answer for answer in answers if answer.split()[1] == b"429"]
        assert 1 <= len(refused) <= 7
        assert all(re.search(rb"(?i)retry-after: [1-9]", answer) for answer in refused)
        assert all(answer.split()[1] in (b"200", b"429") for answer in answers)


def test_rates_are_limited_by_key(start):
    server = start(api_key=(KEY, OTHER), rate_limit=5)
    with server.client(KEY) as one, server.client(OTHER) as two:
        statuses = [one.get("/v1/models").status_code for _ in range(8)]
        assert statuses == [200] * 5 + [429] * 3
        assert int(one.get("/v1/models").headers["retry-after"]) >= 1
        assert two.get("/v1/models").status_code == 200
        assert one.get("/health").status_code == 200
