"""Files to documents: what each type becomes, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from nanochat.errors import UsageError
from nanochat.serving import pdf_text, uploads
from nanochat.serving.errors import ApiError
from nanochat.serving.uploads import clean_name, read


def pdf(*pages: str) -> bytes:
    """A PDF with these texts, as small as can be."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for i, text in enumerate(pages):
        shown = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        page = f"/Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 {font} >> >>"
        objects += [f"<< {page} /Contents {4 + 2 * i} 0 R >>", f"<< /Length {len(shown)} >> stream\n{shown}\nendstream"]
    out, places = b"%PDF-1.4\n", []
    for n, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{n} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{at:010d} 00000 n \n" for at in places)
    size, at = len(objects) + 1, len(out)
    trailer = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{at}\n%%EOF"
    return out + f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def test_types():
    [text] = read(".txt", "notes.txt", "\ufeffKäse".encode())
    assert (text.title, text.source, text.content) == ("notes", "notes.txt", "Käse")
    assert text.id == read(".txt", "other.txt", "\ufeffKäse".encode())[0].id  # made of the content
    [titled], [plain] = read(".md", "a.md", b"intro\n# The Moon \nIt has no air."), read(".md", "a.md", b"no heading")
    assert (titled.title, plain.title) == ("The Moon", "a")
    lines = b'{"id": "a", "text": "x", "year": 1969}\n\n{"content": "y", "title": "Y"}\n'
    one, two = read(".jsonl", "a.jsonl", lines)
    assert (one.id, one.metadata["year"], two.title) == ("a", 1969, "Y")


def test_pages_of_a_pdf_are_documents():
    first, second = read(".pdf", "towns.pdf", pdf("Torwick was founded in 1203.", "", "Orvane lies on the Rill."))
    assert first.content.strip() == "Torwick was founded in 1203."
    assert (first.title, first.source, first.metadata["page"]) == ("towns, page 1", "towns.pdf", 1)
    assert second.title == "towns, page 3"
    assert first.id != second.id


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (".txt", b"\xff", "no text in UTF-8"), (".txt", b"a\0", "NUL"), (".txt", b" ", "no text in this file"),
        (".jsonl", b'{"text": "a"}\n{', "line 2"), (".jsonl", b"[1]", "line 1"), (".jsonl", b"", "no text"),
        (".pdf", b"MZ", "no PDF"), (".pdf", b"%PDF-1.4 nothing", "damaged"), (".pdf", pdf(""), "no text"),
        (".pdf", pdf("a")[:300], "damaged"),
    ],
)  # fmt: skip
def test_what_is_refused(kind, data, message):
    with pytest.raises(UsageError, match=message) as error:
        read(kind, "x" + kind, data)
    assert "/" not in str(error.value)


def test_a_bomb_hits_its_limits(monkeypatch):
    with pytest.raises(UsageError, match="more than 1000 pages"):
        read(".pdf", "x.pdf", pdf(*["a"] * 1001))
    monkeypatch.setattr(uploads, "PDF_SECONDS", 0.01)
    with pytest.raises(UsageError, match="took longer"):
        read(".pdf", "x.pdf", pdf("a"))


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_system_that_allows_less_memory_reads_pdfs_too():
    limited = ["sh", "-c", 'ulimit -v 900000; exec "$0" -I "$1"', sys.executable, pdf_text.__file__]
    done = subprocess.run(limited, input=pdf("Torwick"), capture_output=True, timeout=60, check=False)
    assert [text.strip() for text in json.loads(done.stdout)] == ["Torwick"], done.stderr.decode()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a.txt", "a.txt"), ("../../a.txt", "a.txt"), ("C:\\x\\a.txt", "a.txt"), ("a\0\x1b[0m.txt", "a[0m.txt"),
        ("\u202ea.txt", "a.txt"), ("x" * 300 + ".pdf", "x" * 116 + ".pdf"), ("", ""), ("/", ""), (".txt", ".txt"),
    ],
)  # fmt: skip
def test_clean_names(name, shown):
    assert clean_name(name) == shown


# ---- over HTTP


def wait(client, base: str, upload: dict) -> dict:
    deadline = time.monotonic() + 30
    while (now := client.get(f"/v1/knowledge_bases/{base}/uploads/{upload['id']}").json())["status"] != "done":
        assert now["status"] in ("waiting", "processing"), now
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return now


def test_the_life_of_a_knowledge_base(client):
    made = client.post("/v1/knowledge_bases", json={"name": "life"})
    assert made.status_code == 201
    assert made.json()["kind"] in ("hybrid", "simple")
    assert client.post("/v1/knowledge_bases", json={"name": "life"}).status_code == 409
    names = [base["id"] for base in client.get("/v1/knowledge_bases").json()["data"]]
    assert names == ["life", "towns"]
    lines = "\n".join(json.dumps({"id": f"d{i}", "text": f"town {i} of Midvale"}) for i in range(30)).encode()
    place = "/v1/knowledge_bases/life/documents"
    accepted = client.post(place, files={"file": ("towns.jsonl", lines)})
    assert accepted.status_code == 202
    done = wait(client, "life", accepted.json())
    assert (done["documents"], done["done"], done["added"]) == (30, 30, 30)
    again = wait(client, "life", client.post(place, files={"file": ("towns.jsonl", lines)}).json())
    assert (again["added"], again["unchanged"]) == (0, 30)
    changed = lines.replace(b"town 7 ", b"city 7 ")
    assert wait(client, "life", client.post(place, files={"file": ("x.jsonl", changed)}).json())["updated"] == 1
    hits = client.post("/v1/knowledge_bases/life/search", json={"query": "city 7", "top_k": 1}).json()["data"]
    assert [(hit["id"], hit["n"]) for hit in hits] == [("d7", 1)]
    listed = client.get(place, params={"limit": 3, "offset": 1}).json()["data"]
    assert [document["id"] for document in listed] == ["d1", "d2", "d3"]
    assert client.delete(f"{place}/d7").json()["deleted"]
    assert client.delete(f"{place}/d7").status_code == 404
    assert client.get("/v1/knowledge_bases/life").json()["documents"] == 29
    assert client.delete("/v1/knowledge_bases/life").json()["deleted"]
    assert client.get("/v1/knowledge_bases/life").status_code == 404
    assert client.post("/v1/knowledge_bases/life/search", json={"query": "x"}).status_code == 404
    assert client.get("/v1/knowledge_bases/life/uploads/" + accepted.json()["id"]).json()["status"] == "done"


def test_a_full_queue_is_told_and_a_busy_base_stays(client, server, monkeypatch):
    assert client.post("/v1/knowledge_bases", json={"name": "busy", "kind": "simple"}).status_code == 201
    go = threading.Event()
    real = uploads.read
    monkeypatch.setattr(uploads, "read", lambda *given: go.wait(20) and real(*given))
    try:
        answers = [
            client.post("/v1/knowledge_bases/busy/documents", files={"file": (f"{i}.txt", b"text %d" % i)})
            for i in range(uploads.MAX_WAITING + 1)
        ]
        assert [a.status_code for a in answers] == [202] * uploads.MAX_WAITING + [429]
        assert client.delete("/v1/knowledge_bases/busy").status_code == 409
        assert client.delete("/v1/knowledge_bases/busy/documents/a").status_code == 409
    finally:
        go.set()
    for answer in answers[:-1]:
        wait(client, "busy", answer.json())
    assert client.delete("/v1/knowledge_bases/busy").status_code == 200


def test_a_long_upload_holds_up_nobody(client, server, monkeypatch):
    assert client.post("/v1/knowledge_bases", json={"name": "long", "kind": "simple"}).status_code == 201
    went, go = threading.Event(), threading.Event()
    real = uploads._counted

    def slow(documents, upload):
        went.set()
        go.wait(30)
        return real(documents, upload)

    monkeypatch.setattr(uploads, "_counted", lambda *given: (one for some in [slow] for one in some(*given)))
    try:
        place = "/v1/knowledge_bases/long/documents"
        accepted = client.post(place, files={"file": ("a.txt", b"Torwick")})
        assert went.wait(10)
        for path in ("", "/long", "/long/documents"):  # while the knowledge base is being written
            assert client.get(f"/v1/knowledge_bases{path}", timeout=5).status_code == 200
    finally:
        go.set()
    wait(client, "long", accepted.json())
    assert client.delete("/v1/knowledge_bases/long").status_code == 200


def test_a_server_without_uploads(start):
    server = start(uploads=False)
    with server.client() as client:
        for method, path in (("POST", ""), ("DELETE", "/towns"), ("DELETE", "/towns/documents/orvane")):
            body = {"name": "x"} if method == "POST" else None
            assert client.request(method, f"/v1/knowledge_bases{path}", json=body).status_code == 403
        assert client.post("/v1/knowledge_bases/towns/search", json={"query": "Orvane"}).status_code == 200
        assert client.get("/ui/config").json()["retrieval"]["uploads"] is False


def test_files_too_large(start):
    server = start(max_upload_mb=0.01)
    with server.client() as client:
        place = "/v1/knowledge_bases/towns/documents"
        assert client.post(place, files={"file": ("a.txt", b"x" * 10_000)}).status_code == 202
        assert client.post(place, files={"file": ("a.txt", b"x" * 12_000)}).status_code == 413
        assert client.post(place, files={"file": ("a.txt", b"x" * 200_000)}).status_code == 413


def test_a_damaged_knowledge_base_spoils_no_other(start, caplog):
    server = start()
    with server.client() as client:
        assert client.post("/v1/knowledge_bases", json={"name": "bad", "kind": "simple"}).status_code == 201
        for manifest in (server.root / "bad").glob("manifest*"):
            manifest.write_text("{")
        assert [base["id"] for base in client.get("/v1/knowledge_bases").json()["data"]] == ["towns"]
        broken = client.get("/v1/knowledge_bases/bad")
        assert broken.status_code == 500
        assert str(server.root) not in broken.text
    assert "bad" in caplog.text


def test_reserved_names(server):
    with pytest.raises(ApiError, match="keep for themselves"):
        server.service.shelf.create("con", None)
