"""MilvusKnowledgeBase: versions, readers and writers, against milvus-lite."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from milvus_server import DOCUMENTS, EMBEDDER, FEW, held, ids

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Document
from nanochat.retrieval.milvus import MilvusKnowledgeBase
from nanochat.retrieval.milvus_client import WriterLock
from nanochat.retrieval.milvus_rows import key_of
from nanochat.retrieval.milvus_writer import MilvusWriter

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
# -- versions ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from("audc"), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=4)),
        max_size=6,
    )
)
@FEW
def test_any_version_is_what_a_dictionary_says(uri, steps):
    with MilvusKnowledgeBase.create(uri, collection=f"m{os.urandom(5).hex()}", kind="bm25", chunk_words=3,
                                    overlap_words=1) as kb:  # fmt: skip
        now, states = {}, {0: {}}
        for action, pairs in steps:
            documents = [Document(str(i), f"moon {'a b c d e '[: 2 * c]}{i}", metadata={"c": c}) for i, c in pairs]
            if action == "a":
                kb.add(fresh := [d for d in {d.id: d for d in documents}.values() if d.id not in now])
                now = now | {d.id: d for d in fresh}
            elif action == "u":
                kb.update(documents)
                now = now | {d.id: d for d in documents}
            elif action == "d":
                kb.delete([d.id for d in documents])
                now = {id: d for id, d in now.items() if id not in {d.id for d in documents}}
            else:
                kb.compact()
                states = {kb.version: now}
            states[kb.version] = now
        assert [one.number for one in kb.versions()] == sorted(states)
        for number, state in states.items():
            view = kb.at(number)
            assert (held(view), len(view)) == (state, len(state))
            assert set(ids(view.search("moon", 50, unique=True))) == set(state)
        assert kb.verify() == []
        for name in (kb.collection, f"{kb.collection}_versions"):
            kb._call("drop_collection", name)


def test_readers_keep_their_version_until_they_refresh(make, uri):
    kb = make()
    kb.add(DOCUMENTS[:2])
    with MilvusKnowledgeBase.open(uri, collection=kb.collection, embedder=EMBEDDER) as reader:
        kb.delete("moon")
        assert ids(reader.search("moon", 1, mode="bm25")) == ["moon"]
        assert reader.refresh()
        assert not reader.refresh()
        assert reader.search("moon", 1, mode="bm25") == []
        with pytest.raises(UsageError, match="read-only"):
            reader.at(1).add(DOCUMENTS)


def test_tags_keep_versions_through_compaction(make, uri):
    kb = make(kind="bm25")
    for document in DOCUMENTS[:4]:
        kb.add([document])
    kb.delete("moon")
    kb.tag("early", 1)
    kb.tag("late")
    assert kb.compact(keep=1) == 4  # versions 0, 2, 3 and 4
    assert [(one.number, one.tags) for one in kb.versions()] == [(1, ("early",)), (5, ("late",))]
    assert list(held(kb.at("early"))) == ["moon"]
    assert kb.stats()["rows"] == 4
    kb.untag("early")
    kb.tag("late", 1)
    assert kb.at("late").version == 1
    with pytest.raises(UsageError, match="no version 3"):
        kb.at(3)
    with pytest.raises(UsageError, match="no version 'early'"):
        MilvusKnowledgeBase.open(uri, collection=kb.collection, version="early")
    with pytest.raises(UsageError, match="no number"):
        kb.tag("7")
    assert kb.verify() == []


def test_verify_notices_what_changed_in_milvus(make):
    kb = make(kind="bm25", chunk_words=3, overlap_words=0)
    kb.add([*DOCUMENTS[:3], Document("cut", "a b c d e f g")])
    [row] = kb._call.rows(kb.collection, f'key == "{key_of("sun")}" and part == 0', kb.shape.fields)
    kb._call("upsert", kb.collection, [{**row, "content": row["content"].replace("S", "s")}])
    kb._call("delete", kb.collection, filter=f'key == "{key_of("cut")}" and part == 1')
    problems = " ".join(kb.verify())
    assert "'sun' is not what was stored" in problems
    assert "'cut' has 2 of its 3 passages" in problems
    assert "Version 1 should hold" in problems


# -- writers -----------------------------------------------------------------------------------------------------------


def test_a_change_that_died_is_undone_by_the_next(make, monkeypatch):
    kb = make()
    kb.add(DOCUMENTS)
    before = list(kb.documents())
    for step in ("_insert", "_mark", "commit"):
        original = getattr(MilvusWriter, step)

        def die(self, *arguments, original=original, step=step):
            if step != "commit" and arguments and arguments[-1] != 2**62:
                original(self, *arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(MilvusWriter, step, die)
            if step == "_mark":
                patch.setattr(MilvusWriter, "recover", lambda self: None)
            with pytest.raises(KeyboardInterrupt):
                kb.update([Document("moon", "cheese"), Document("new", "star")])
        assert (kb.version, list(kb.documents())) == (1, before)
        assert kb.verify() == []
    assert kb.update([Document("moon", "cheese")]).version == 2
    assert kb.verify() == []
    assert list(kb.at(1).documents()) == before
    assert kb.stats()["rows"] == len(DOCUMENTS) + 1


def test_one_writer_at_a_time(make, uri):
    kb = make(kind="bm25")
    lock = WriterLock(kb._call, kb.collection)
    lock.take(0)
    with MilvusKnowledgeBase.open(uri, collection=kb.collection) as second:
        second.lock_timeout = 0.2
        with pytest.raises(NanochatError, match=rf"another writer holds .*process {os.getpid()} on .*break_lock"):
            second.add(DOCUMENTS)
        assert second.search("moon") == []
        second.break_lock()
        assert second.add(DOCUMENTS).added == 5
    assert kb.refresh()


def test_the_lock_of_a_dead_process_is_taken(make, monkeypatch):
    kb = make(kind="bm25")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: dead.pid)
        WriterLock(kb._call, kb.collection).take(0)
    assert kb.add(DOCUMENTS).added == 5


def test_kill_leaves_whole_versions(tmp_path):
    place = str(tmp_path / "killed.db")
    script = f"""
        from nanochat.retrieval.milvus import MilvusKnowledgeBase
        from nanochat.retrieval.document import Document
        with MilvusKnowledgeBase.create({place!r}, kind="bm25") as kb:
            for i in range(100_000):
                kb.update([Document(str(j), f"moon {{i}} {{j}}") for j in range(5)])
                print(i, flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        last = int(process.stdout.readline())
    time.sleep(0.07)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with MilvusKnowledgeBase.open(place) as kb:
        assert kb.version >= last + 1
        rounds = {document.content.split()[1] for document in kb.documents()}
        assert rounds == {str(kb.version - 1)}
        assert len(kb) == 5
        assert kb.verify() == []
        kb.delete("0")
        assert kb.verify() == []
