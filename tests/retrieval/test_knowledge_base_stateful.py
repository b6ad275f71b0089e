"""A knowledge base against a model of it: a dictionary for each version. Any order of changes, then every question."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nanochat.errors import UsageError
from nanochat.retrieval import generation, writer
from nanochat.retrieval.document import Document
from nanochat.retrieval.filters import check, matches
from nanochat.retrieval.knowledge_base import KnowledgeBase

WORDS = ("moon", "sun", "sea")
DOCUMENTS = st.builds(
    Document,
    st.sampled_from(["a", "b/../c", "d", "e", "f"]),
    st.lists(st.sampled_from([*WORDS, "rock"]), max_size=9).map(" ".join),
    metadata=st.dictionaries(st.just("n"), st.integers(0, 2), max_size=1),
)
SOME = st.lists(DOCUMENTS, max_size=4)
FILTERS = st.sampled_from([None, {"n": 1}, {"n": {"gte": 1}}, {"n": {"ne": 1}}, {"id": ["a", "d"]}])


class Model(RuleBasedStateMachine):
    """`states[v]` is what version v holds: id -> document."""

    @initialize(kind=st.sampled_from(["simple", "bm25"]))
    def create(self, kind: str) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.kb = KnowledgeBase.create(self.directory / "kb", kind=kind, chunk_words=4, overlap_words=1)
        self.states: dict[int, dict[str, Document]] = {0: {}}
        self.tags: dict[str, int] = {}
        self.reader: tuple[KnowledgeBase, dict[str, Document]] | None = None

    @property
    def now(self) -> dict[str, Document]:
        return self.states[max(self.states)]

    def changed(self, state: dict[str, Document], before: int) -> None:
        """The change made a version exactly when there was one."""
        assert self.kb.version == before + (self.kb.version != before)
        if self.kb.version == before:
            assert state == self.now
        else:
            self.states[self.kb.version] = state

    @rule(documents=SOME)
    def add(self, documents: list[Document]) -> None:
        state, before, duplicates = dict(self.now), self.kb.version, 0
        for document in documents:
            if document.id in state:
                if state[document.id] != document:
                    with pytest.raises(UsageError, match="already there with other content"):
                        self.kb.add(documents)
                    assert self.kb.version == before
                    return
            elif any((d.content, d.metadata) == (document.content, document.metadata) for d in state.values()):
                duplicates += 1
            else:
                state[document.id] = document
        change = self.kb.add(documents)
        assert (change.added, change.duplicates) == (len(state) - len(self.now), duplicates)
        self.changed(state, before)

    @rule(documents=SOME)
    def update(self, documents: list[Document]) -> None:
        state, before = {**self.now, **{d.id: d for d in documents}}, self.kb.version
        change = self.kb.update(documents)
        assert change.added == len(state) - len(self.now)
        if change.version == before:
            assert state == self.now
        else:
            self.states[change.version] = state

    @rule(ids=st.lists(st.sampled_from(["a", "b/../c", "d", "nobody"]), max_size=3))
    def delete(self, ids: list[str]) -> None:
        state, before = {id: d for id, d in self.now.items() if id not in ids}, self.kb.version
        assert self.kb.delete(ids).deleted == len(self.now) - len(state)
        self.changed(state, before)

    @rule(name=st.sampled_from(["one", "two"]), data=st.data())
    def tag(self, name: str, data: st.DataObject) -> None:
        self.tags[name] = data.draw(st.sampled_from(sorted(self.states)))
        self.kb.tag(name, self.tags[name])

    @rule(keep=st.integers(1, 3))
    def compact(self, keep: int) -> None:
        kept = set(sorted(self.states)[-keep:]) | set(self.tags.values())
        assert self.kb.compact(keep) == len(self.states.keys() - kept)
        self.states = {number: state for number, state in self.states.items() if number in kept}

    @rule()
    def reindex(self) -> None:
        self.kb.reindex()

    @rule()
    def reopen(self) -> None:
        self.kb.close()
        self.kb = KnowledgeBase.open(self.directory / "kb")

    @rule()
    def begin_reading(self) -> None:
        if self.reader is not None:
            self.reader[0].close()
        self.reader = KnowledgeBase.open(self.directory / "kb"), self.now

    @rule(data=st.data(), filter=FILTERS, word=st.sampled_from(WORDS), k=st.integers(1, 4))
    def ask_an_old_version(self, data: st.DataObject, filter: Any, word: str, k: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.states)))
        with self.kb.at(number) as old:
            self.compare(old, self.states[number], filter, word, k)

    @rule(filter=FILTERS, word=st.sampled_from(WORDS), k=st.integers(1, 20))
    def ask(self, filter: Any, word: str, k: int) -> None:
        self.compare(self.kb, self.now, filter, word, k)

    def compare(self, kb: KnowledgeBase, state: dict[str, Document], filter: Any, word: str, k: int) -> None:
        assert {d.id: d for d in kb.documents()} == state
        assert len(kb) == len(state)
        for id in ("a", "b/../c", "nobody"):
            assert (id in kb) == (id in state)
            if id in state:
                assert kb.get(id) == state[id]
        expected = {id for id, d in state.items() if word in d.content.split() and matches(d, check(filter))}
        assert {hit.id for hit in kb.search(word, 99, filter)} == expected
        best = kb.search(word, k, filter, unique=True)
        assert len(best) == len({hit.id for hit in best}) == min(k, len(expected))
        for hit in best:
            assert word in hit.document.content.split()
            assert hit.document.content == state[hit.id].content[slice(*(hit.document.span or (None,)))]

    @invariant()
    def readers_keep_what_they_have(self) -> None:
        if getattr(self, "reader", None) is not None:
            assert self.reader is not None
            self.compare(*self.reader, None, "moon", 3)

    @invariant()
    def all_is_whole(self) -> None:
        if hasattr(self, "kb"):
            assert self.kb.verify() == []
            assert {v.number: v.documents for v in self.kb.versions()} == {n: len(s) for n, s in self.states.items()}
            assert {tag: v.number for v in self.kb.versions() for tag in v.tags} == self.tags

    def teardown(self) -> None:
        if hasattr(self, "kb"):
            self.kb.close()
            if self.reader is not None:
                self.reader[0].close()
            shutil.rmtree(self.directory)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that merges, several segments and dropped rows happen to a few documents."""
    monkeypatch.setattr(writer, "MERGE_SEGMENTS", 3)
    monkeypatch.setattr(writer, "SEGMENT_DOCUMENTS", 2)
    monkeypatch.setattr(writer, "MERGE_DEAD", 2)
    monkeypatch.setattr(generation, "SMALL", 2)


class TestModel(Model.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(
        max_examples=8, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
    )


@pytest.mark.slow
class TestModelAtLength(Model.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(
        max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
