"""Adapters for external judges; the server of a chat model is played by a thread."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.rag.judges import ChatJudge, FunctionJudge
from nanochat.retrieval.document import Document

DOCUMENTS = [Document("1", "Mara was born in Torwick.", "Mara"), Document("2", "Bram plays.", "Bram")]


@pytest.fixture
def server():
    """A server that answers with `server.reply` and keeps the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.requests.append((self.path, self.headers.get("X-Key"), body))
            status, reply = found.reply
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *_):
            pass

    found = HTTPServer(("127.0.0.1", 0), Handler)
    found.requests, found.reply = [], (200, "{}")
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def judge_at(server):
    return ChatJudge(f"http://127.0.0.1:{server.server_port}/v1/", "m", {"X-Key": "k"})


def reply(text, tops=None):
    choice = {"message": {"content": text}}
    if tops is not None:
        choice["logprobs"] = {"content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in tops]}]}
    return 200, json.dumps({"choices": [choice]})


def test_a_function_judges_document_by_document():
    seen = []

    def entails(premise, claim):
        seen.append((premise, claim))
        return 0.9 if "Torwick" in premise else 0.2

    judge = FunctionJudge(entails, "nli")
    assert judge.judge("Where?", "In Torwick.", DOCUMENTS) == 0.9
    assert seen == [("Mara\nMara was born in Torwick.", "In Torwick."), ("Bram\nBram plays.", "In Torwick.")]
    assert judge.judge("Where?", "In Torwick.", []) == 0.0
    with pytest.raises(NanochatError, match=r"nli: returned 1\.5"):
        FunctionJudge(lambda *_: 1.5, "nli").judge("", "", DOCUMENTS)


def test_a_chat_model_says_yes_or_no(server):
    server.reply = reply(" Yes.")
    assert judge_at(server).judge("Where?", "In Torwick.", DOCUMENTS) == 1.0
    path, key, body = server.requests[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "k", "m")
    asked = body["messages"][0]["content"]
    assert all(text in asked for text in ("[1] Mara\nMara was", "[2] Bram", "Question: Where?", "Claim: In Torwick."))
    server.reply = reply("no")
    assert judge_at(server).judge("Where?", "In Torwick.", DOCUMENTS) == 0.0


def test_log_probabilities_grade_the_answer(server):
    server.reply = reply("Yes", [("Yes", -0.5), (" yes", -3.0), ("No", -1.5), ("Maybe", -1.0)])
    yes, no = 0.6065306597 + 0.0497870684, 0.2231301601
    assert judge_at(server).judge("", "", DOCUMENTS) == pytest.approx(yes / (yes + no))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply("Perhaps"), "neither yes nor no"),
        ((500, "broken"), "500"),
        ((200, "{}"), "KeyError"),
        ((200, "?"), "m at"),
    ],
)
def test_a_server_that_fails_is_an_error_with_its_name(server, answer, message):
    server.reply = answer
    with pytest.raises(NanochatError, match=message):
        judge_at(server).judge("", "", DOCUMENTS)


def test_an_address_without_http_is_an_error():
    with pytest.raises(UsageError, match="must begin with http"):
        ChatJudge("localhost:8000", "m")
