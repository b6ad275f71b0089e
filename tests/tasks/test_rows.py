"""Public data sets: real files where they are at hand, small ones of the same form, and a hub on this machine."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import download
from nanochat.errors import NanochatError, UsageError
from nanochat.tasks.arc import ARC
from nanochat.tasks.conversations import check_conversation, own_conversations
from nanochat.tasks.gsm8k import GSM8K, extract_number, solution_parts
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.mmlu import MMLU
from nanochat.tasks.rows import JsonRows
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.task import message_text

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
with_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared data not there")

MMLU_ROW = {"question": "2 + 2?", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1}
ARC_ROW = {
    "id": "x",
    "question": "What is wet?",
    "choices": {"text": ["sand", "water", "salt"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
GSM_ROW = {"question": "Half of 48?", "answer": "It is 48/2 = <<48/2=24>>24.\n#### 1,024"}
CODE_ROW = {
    "task_id": "HumanEval/0",
    "prompt": "def one():\n",
    "canonical_solution": "    return 1\n",
    "test": "def check(f):\n    assert f() == 1\n",
    "entry_point": "one",
}
CHAT_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def jsonl(path: Path, *rows: Any) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# What each makes of a row ---------------------------------------------------------------------------------------------


def test_mmlu(tmp_path: Path) -> None:
    task = MMLU(path=jsonl(tmp_path / "a.jsonl", MMLU_ROW))
    conversation = check_conversation(task[0])
    assert message_text(conversation["messages"][0]) == (
        "Multiple Choice question: 2 + 2?\n- 3=A\n- 4=B\n- 5=C\n- 6=D\n\n"
        "Respond only with the letter of the correct answer."
    )
    assert task.eval_type == "categorical"
    assert conversation["letters"] == ["A", "B", "C", "D"]
    assert conversation["subject"] == "arithmetic"
    assert [task.evaluate(conversation, c) for c in ("B", " B. ", "A", "4", "")] == [True, True, False, False, False]


def test_arc_keeps_the_labels_of_the_file(tmp_path: Path) -> None:
    task = ARC(path=jsonl(tmp_path / "a.jsonl", ARC_ROW))
    conversation = check_conversation(task[0])
    assert "- water=2\n- salt=3\n" in message_text(conversation["messages"][0])
    assert conversation["letters"] == ["1", "2", "3"]
    assert task.evaluate(conversation, "2")
    assert not task.evaluate(conversation, "1")


def test_gsm8k_calls_the_calculator(tmp_path: Path) -> None:
    task = GSM8K(path=jsonl(tmp_path / "a.jsonl", GSM_ROW))
    conversation = check_conversation(task[0])
    assert conversation["messages"][1]["content"] == [
        {"type": "text", "text": "It is 48/2 = "},
        {"type": "tool_call", "text": "48/2"},
        {"type": "tool_output", "text": "24"},
        {"type": "text", "text": "24.\n#### 1,024"},
    ]
    assert task.evaluate(conversation, "so #### 1024")
    assert task.evaluate(conversation, "#### 1,024.00")
    assert not task.evaluate(conversation, "#### 1025")
    assert not task.evaluate(conversation, "1024")
    assert not task.evaluate(conversation, "#### 1.0.24")


def test_gsm8k_parts() -> None:
    assert solution_parts("a<<1+1>>b") == [
        {"type": "text", "text": "a"},
        {"type": "tool_call", "text": "1+1"},
        {"type": "tool_output", "text": ""},
        {"type": "text", "text": "b"},
    ]
    assert [p["text"] for p in solution_parts("<<x=2=2>>")] == ["x=2", "2"]
    assert extract_number("#### -12.50.") == "-12.50"
    assert extract_number("#### ,") is None
    assert extract_number("none") is None


def test_humaneval_loads_and_does_not_pretend_to_judge(tmp_path: Path) -> None:
    task = HumanEval(path=jsonl(tmp_path / "HumanEval.jsonl.gz", CODE_ROW))
    conversation = check_conversation(task[0])
    assert message_text(conversation["messages"][1]) == "def one():\n    return 1\n"
    assert conversation["entry_point"] == "one"
    assert "assert f() == 1" in conversation["test"]
    with pytest.raises(NanochatError, match="not enabled yet"):
        task.evaluate(conversation, "def one(): return 1")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_conversations_of_every_kind(tmp_path: Path, name: str) -> None:
    answer = {"role": "assistant", "content": "a"}
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, answer]} for i in range(9)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        jsonl(path, *rows)
    task = own_conversations(path, seed=None)
    assert [task[i]["messages"][0]["content"] for i in range(9)] == [f"q{i}" for i in range(9)]
    assert sorted(c["messages"][0]["content"] for c in own_conversations(path)) == [f"q{i}" for i in range(9)]
    assert task.evaluate(task[0], "A")
    assert len(SmolTalk(path=path, limit=4)) == 4


def test_a_line_may_be_the_bare_list_of_messages(tmp_path: Path) -> None:
    assert own_conversations(jsonl(tmp_path / "a.jsonl", CHAT_ROW["messages"]))[0] == CHAT_ROW


def test_order_and_limit(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "test.jsonl", *({**GSM_ROW, "question": str(i)} for i in range(100)))

    def questions(task: GSM8K) -> list[str]:
        return [message_text(c["messages"][0]) for c in task]  # type: ignore[attr-defined]

    plain, shuffled = questions(GSM8K(path=path, seed=None)), questions(GSM8K(path=path))
    assert plain == [str(i) for i in range(100)]
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)
    assert questions(GSM8K(path=path, limit=7)) == shuffled[:7]
    assert questions(GSM8K(path=tmp_path)) == shuffled  # a directory: SPLIT.jsonl


# Real files -----------------------------------------------------------------------------------------------------------


@with_shared
@pytest.mark.parametrize(
    ("task", "n"),
    [
        (partial(MMLU, path=SHARED / "mmlu"), 3080),
        (partial(ARC, "ARC-Easy", path=SHARED / "arc"), 2376),
        (partial(ARC, "ARC-Challenge", path=SHARED / "arc"), 1172),
        (partial(GSM8K, "train", path=SHARED / "gsm8k"), 7473),
        (partial(GSM8K, "test", path=SHARED / "gsm8k"), 1319),
    ],
)
def test_real_files(task: Any, n: int) -> None:
    task = task()
    assert len(task) == n
    for i in range(0, n, 5):
        conversation = check_conversation(task[i])
        gold = message_text(conversation["messages"][-1])
        assert task.evaluate(conversation, gold)
        assert "<<" not in gold


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (MMLU, {**MMLU_ROW, "answer": 4}, "answer 4 is not in 0..3"),
        (MMLU, {**MMLU_ROW, "choices": ["a"]}, "do not fit together"),
        (MMLU, {"question": "q"}, "field 'answer' is missing"),
        (MMLU, {**MMLU_ROW, "question": 3}, "field 'question' is int, expected str"),
        (ARC, {**ARC_ROW, "answerKey": "9"}, "do not fit together"),
        (ARC, {**ARC_ROW, "choices": ["a"]}, "field 'choices' is list, expected dict"),
        (GSM8K, {**GSM_ROW, "answer": "24"}, "no number behind ####"),
        (HumanEval, {"prompt": "x"}, "field 'canonical_solution' is missing"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, task: Any, row: dict[str, Any], message: str) -> None:
    good = {MMLU: MMLU_ROW, ARC: ARC_ROW, GSM8K: GSM_ROW, HumanEval: CODE_ROW}[task]
    loaded = task(path=jsonl(tmp_path / "a.jsonl", good, row), seed=None)
    loaded[0]
    with pytest.raises(NanochatError, match=rf"a\.jsonl, line 2: no row of .*{message}"):
        loaded[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "at least one message"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "cat", "content": "x"}]}, "message 0 has role 'cat'"),
        ({"messages": [{"role": "user", "content": 5}]}, "content must be text or a list of parts"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, "no message of the"),
    ],
)
def test_wrong_conversations_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(NanochatError, match=rf"a\.jsonl, line 1: .*{message}"):
        own_conversations(jsonl(tmp_path / "a.jsonl", row))


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT_ROW) + "\n{oops\n")
    with pytest.raises(NanochatError, match="line 2: not valid JSON"):
        own_conversations(path)
    path.write_text("\n")
    with pytest.raises(NanochatError, match="the data has no rows"):
        own_conversations(path)
    (tmp_path / "a.jsonl.gz").write_bytes(b"no")
    with pytest.raises(NanochatError, match=r"a\.jsonl\.gz: cannot be read"):
        own_conversations(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(NanochatError, match=r"a\.parquet: cannot be read"):
        own_conversations(tmp_path / "a.parquet")
    rows = JsonRows(jsonl(path, CHAT_ROW))
    path.write_text("{")
    with pytest.raises(NanochatError, match="line 1: the file changed"):
        rows[0]


def test_bad_calls(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for call, message in (
        (lambda: MMLU("train"), "mmlu: split must be one of"),
        (lambda: ARC("ARC-Hard"), "arc: subset must be one of ARC-Easy, ARC-Challenge"),
        (lambda: GSM8K(path=tmp_path / "none.jsonl"), "none.jsonl: no such file"),
        (lambda: GSM8K(path=tmp_path), "holds none of main-test.jsonl"),
        (lambda: GSM8K(path=tmp_path / "a.csv"), "must be .jsonl"),
        (lambda: GSM8K(path=jsonl(tmp_path / "b.jsonl", GSM_ROW), limit=0), "limit=0"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


# The hub --------------------------------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that a server on this machine serves as the hub."""
    root = tmp_path / "hub"
    root.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("NANOCHAT_HUB_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("NANOCHAT_DATA", str(tmp_path / "data"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(download, "BACKOFF", 0.01)
        yield root
        server.shutdown()
        thread.join()


def publish(root: Path, url: str, repo: str, subset: str, split: str, *shards: list[dict[str, Any]]) -> None:
    listing = root / "api" / "datasets" / repo / "parquet" / subset / split
    listing.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{repo.replace('/', '-')}-{split}-{i}.parquet" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        pq.write_table(pa.Table.from_pylist(rows), root / name)
    listing.write_text(json.dumps([f"{url}/{name}" for name in names]))


def test_the_hub_is_asked_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = os.environ["NANOCHAT_HUB_URL"]
    publish(hub, url, "openai/gsm8k", "main", "test", [GSM_ROW] * 3, [GSM_ROW] * 2)
    publish(hub, url, "cais/mmlu", "all", "dev", [MMLU_ROW] * 4)
    publish(hub, url, "allenai/ai2_arc", "ARC-Easy", "train", [ARC_ROW])
    publish(hub, url, "HuggingFaceTB/smol-smoltalk", "default", "train", [CHAT_ROW] * 5)
    publish(hub, url, "openai/openai_humaneval", "openai_humaneval", "test", [CODE_ROW])
    for _ in range(2):
        assert len(GSM8K()) == 5
        assert [len(t) for t in (MMLU("dev"), ARC(split="train"), SmolTalk(), HumanEval())] == [4, 1, 5, 1]
        assert GSM8K()[0]["messages"][0]["content"] == GSM_ROW["question"]
        monkeypatch.setenv("NANOCHAT_HUB_URL", "http://127.0.0.1:9")  # the second time all is there


def test_the_hub_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_HUB_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NANOCHAT_DATA", str(tmp_path))
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    with pytest.raises(NanochatError, match=r"cannot be reached.*path=FILE"):
        GSM8K()


def test_an_unexpected_answer_of_the_hub_is_not_kept(hub: Path) -> None:
    listing = hub / "api" / "datasets" / "openai" / "gsm8k" / "parquet" / "main" / "test"
    listing.parent.mkdir(parents=True)
    listing.write_text('{"error": "later"}')
    with pytest.raises(NanochatError, match="unexpected answer for openai/gsm8k"):
        GSM8K()
    assert not list(download.data_dir().rglob("files.json"))
