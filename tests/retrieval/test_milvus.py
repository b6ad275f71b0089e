"""MilvusKnowledgeBase against milvus-lite, a Milvus in this process that speaks the same client API."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from milvus_server import DOCUMENTS, EMBEDDER, WORDS, Failing, held, ids

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import filters
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.document import Document, Found
from nanochat.retrieval.fusion import rrf
from nanochat.retrieval.hybrid import fuse
from nanochat.retrieval.milvus import MilvusKnowledgeBase
from nanochat.retrieval.milvus_client import Connection
from nanochat.retrieval.milvus_rows import MAX_TEXT_BYTES, tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
# -- documents ---------------------------------------------------------------------------------------------------------


def test_documents_come_back_as_they_went_in(make):
    kb = make()
    change = kb.add(DOCUMENTS)
    assert (change.version, change.added, len(kb), kb.version) == (1, 5, 5, 1)
    assert list(kb.documents()) == DOCUMENTS
    assert all(kb.get(document.id) == document and document.id in kb for document in DOCUMENTS)
    assert kb.verify() == []
    with pytest.raises(UsageError, match="no document 'mars'"):
        kb.get("mars")
    assert "mars" not in kb


def test_long_documents_are_cut_and_joined(make):
    kb = make(chunk_words=60, overlap_words=5)
    words = [WORDS[i * i % 7] + str(i) for i in range(400)]
    english = Document("long", " \n" + "  ".join(words) + "\t ", title="A title")
    chinese = Document("文", "".join(chr(0x4E00 + i * 7 % 3000) for i in range(24_000)))  # 72 kB without a space
    kb.add([english, chinese])
    assert kb.get("long") == english
    assert kb.get("文") == chinese
    [hit] = kb.search(words[100], 1, mode="bm25")
    start, end = hit.document.span
    assert hit.document.content == english.content[start:end]
    assert words[100] in hit.document.content
    assert kb.search(chinese.content[23_990:23_995], 1, mode="bm25")[0].id == "文"  # the end is indexed too
    assert kb.verify() == []


def test_what_milvus_cannot_hold_is_refused_before_anything_is_stored(make):
    kb = make(kind="bm25")
    long = "x" * (MAX_TEXT_BYTES + 1)
    for bad in (Document(long, "a"), Document("a", "b", title=long), Document("a", "b", metadata={"k": long})):
        with pytest.raises(UsageError, match="65,535"):
            kb.add([Document("fine", "text"), bad])
    with pytest.raises(UsageError, match="4,096"):
        kb.add([Document("a", "b", metadata={"k": list(range(5000))})])
    assert (kb.version, len(kb)) == (0, 0)
    assert kb.add([Document("fine", "text"), Document("a", "b", title=long)], on_error="skip").skipped == 1
    assert list(held(kb)) == ["fine"]


def test_lone_surrogates_become_replacement_characters(make):
    kb = make(kind="bm25")
    kb.add([Document("half", "moon \ud83d light", metadata={"k": "\ud83d"})])
    assert kb.get("half") == Document("half", "moon \ufffd light", metadata={"k": "\ufffd"})
    assert ids(kb.search("moon \ud83d", 5, {"k": "\ufffd"})) == ["half"]


def test_duplicates_and_repetitions_are_counted(make):
    kb = make(kind="bm25")
    one = Document("one", "moon air")
    assert kb.add([one, one, Document("two", "moon air")]).__dict__ == {
        "version": 1, "added": 1, "updated": 0, "deleted": 0, "unchanged": 1, "duplicates": 1, "skipped": 0,
    }  # fmt: skip
    assert kb.add([one]).unchanged == 1
    with pytest.raises(UsageError, match="`update` replaces it"):
        kb.add([Document("one", "other")])
    with pytest.raises(UsageError, match="of another one"):
        kb.add([Document("two", "moon air")], on_duplicate="raise")
    assert kb.add([Document("two", "moon air")], on_duplicate="keep").added == 1
    change = kb.update([Document("one", "x1"), Document("one", "x2"), Document("new", "x3"), Document("new", "x4")])
    assert (change.updated, change.added) == (1, 1)
    assert {id: document.content for id, document in held(kb).items()} == {"two": "moon air", "one": "x2", "new": "x4"}
    assert kb.verify() == []


def test_ingest_reads_jsonl_and_goes_on(make, tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(f'{{"id": "d{i}", "text": "stone {i}"}}\n' for i in range(10)) + "no json\n")
    kb = make(kind="bm25")
    with pytest.raises(UsageError, match="line 11"):
        kb.ingest(path, commit_every=4, progress=False)
    assert len(kb) == 8  # whole versions only
    change = kb.ingest(path, on_error="skip", commit_every=4, progress=False)
    assert (change.added, change.unchanged, change.skipped, len(kb)) == (2, 8, 1, 10)


def test_vectors_are_computed_once(make):
    embedder = Failing()
    kb = make(kind="dense", embedder=embedder)
    documents = [Document(f"d{i}", f"{WORDS[i % 10]} {i}") for i in range(600)]
    embedder.fail_at = 400
    with pytest.raises(RuntimeError, match="out of memory"):
        kb.add(documents)
    assert (kb.version, len(kb), list(kb.documents())) == (0, 0, [])
    first, embedder.n, embedder.fail_at = embedder.n, 0, math.inf
    kb.add(documents)
    assert embedder.n <= 600 - 256 < first
    assert (len(kb), kb.verify()) == (600, [])
    texts = ["handed over"]
    kb.stage(texts, EMBEDDER.embed(["something else"]))
    embedder.n = 0
    kb.add([Document("x", texts[0])])
    assert embedder.n == 0
    assert kb.search("something else", 1)[0].id == "x"


# -- search ------------------------------------------------------------------------------------------------------------


def bm25(corpus, query, k1=1.2, b=0.75):
    """Scores by the formula of Robertson and Zaragoza, with Lucene's idf."""
    terms = [Analyser().terms(text) for text in corpus]
    mean = sum(map(len, terms)) / len(terms)
    scores = []
    for words in terms:
        score = 0.0
        for term in Analyser().query_terms(query):
            n, f = sum(term in other for other in terms), words.count(term)
            idf = math.log(1 + (len(terms) - n + 0.5) / (n + 0.5))
            score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(words) / mean))
        scores.append(score)
    return np.array(scores)


def test_bm25_agrees_with_the_formula(make):
    rng = np.random.default_rng(0)
    corpus = [" ".join(rng.choice(WORDS, rng.integers(3, 30))) + f" {i}" for i in range(40)]
    kb = make(kind="bm25")
    kb.add([Document(str(i), text) for i, text in enumerate(corpus)])
    for query in ("moon", "iron star 7", "water the water", "cheese nothing"):
        expected = bm25(corpus, query)
        hits = kb.search(query, 40)
        assert len(hits) == np.count_nonzero(expected)
        got = np.array([hit.score for hit in hits])
        np.testing.assert_allclose(got, np.sort(expected)[::-1][: len(hits)], rtol=1e-4)
        np.testing.assert_allclose(got, expected[[int(hit.id) for hit in hits]], rtol=1e-4)


def test_dense_agrees_with_numpy_and_hybrid_with_fusion(make):
    rng = np.random.default_rng(1)
    corpus = [" ".join(rng.choice(WORDS, 6)) + f" {i}" for i in range(60)]
    kb = make()
    kb.add([Document(str(i), text) for i, text in enumerate(corpus)])
    queries = ["moon stone", "star light 11"]
    scores = EMBEDDER.embed_queries(queries) @ EMBEDDER.embed(corpus).T
    dense = kb.search(queries, 60, mode="dense")
    for hits, row in zip(dense, scores):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row)[::-1], atol=1e-5)
        np.testing.assert_allclose([hit.score for hit in hits], row[[int(hit.id) for hit in hits]], atol=1e-5)
    lexical = kb.search(queries, 60, mode="bm25")
    for fused, parts in zip(kb.search(queries, 20, reranker=None), zip(lexical, dense)):
        lists = [Found(np.array([int(h.id) for h in p], np.int64), np.array([h.score for h in p])) for p in parts]
        expected = dict(zip(*(x.tolist() for x in rrf(lists, 120))))
        assert [hit.rank for hit in fused] == list(range(1, 21))
        np.testing.assert_allclose([hit.score for hit in fused], sorted(expected.values())[:-21:-1], atol=2e-3)


def test_weighted_fusion_is_that_of_the_local_knowledge_base(make):
    kb = make(fusion="weighted", weights=[0.3, 0.7])
    kb.add([Document(str(i), f"{WORDS[i % 10]} {WORDS[i * 3 % 7]} {i}") for i in range(30)])
    query = "moon iron 4"
    lists = [kb.search(query, 30, mode=mode) for mode in ("bm25", "dense")]
    founds = [Found(np.array([int(h.id) for h in p], np.int64), np.array([h.score for h in p])) for p in lists]
    expected = fuse(founds, 7, "weighted", [0.3, 0.7])
    hits = kb.search(query, 7, reranker=None)
    assert [int(hit.id) for hit in hits] == expected.rows.tolist()
    np.testing.assert_allclose([hit.score for hit in hits], expected.scores, rtol=1e-5)


def test_queries_that_find_nothing_and_k_that_is_too_large(make):
    kb = make()
    assert kb.search("moon") == []
    kb.add(DOCUMENTS)
    for query in ("", "   ", "?!"):
        assert kb.search(query, 3) == []
    assert kb.search("the", 3, mode="bm25") != []  # only a stop word: it counts
    assert kb.search("unheardof", 3, mode="bm25") == []
    assert len(kb.search("moon", 10**6, mode="dense")) == 4  # the empty document is no hit
    assert kb.search([], 3) == []
    assert [len(hits) for hits in kb.search(["moon", "", "the sun"], 1)] == [1, 0, 1]
    for k in (0, -1, True, 1.5):
        with pytest.raises(UsageError, match="k must be"):
            kb.search("moon", k)
    with pytest.raises(UsageError, match="no mode 'simple'"):
        kb.search("moon", mode="simple")
    with pytest.raises(UsageError, match="a query must be a text"):
        kb.search([3])


def test_unique_normalize_and_rerank(make):
    class Shortest:
        name = "shortest"

        def scores(self, query, documents):
            return [-len(document.content) for document in documents]

    kb = make(chunk_words=6, overlap_words=1)
    kb.add([Document(name, " ".join(["moon", *WORDS] * n)) for n, name in enumerate("abc", 1)])
    assert len(kb.search("moon", 9)) > 3
    assert sorted(ids(kb.search("moon", 9, unique=True))) == ["a", "b", "c"]
    scores = [hit.score for hit in kb.search("moon", 4, normalize=True)]
    assert (scores[0], scores[-1]) == (1.0, 0.0)
    lengths = [len(hit.document.content) for hit in kb.search("moon", 3, reranker=Shortest())]
    assert lengths == sorted(lengths)


VALUES = st.one_of(
    st.sampled_from(["a", "b", "", "é", 'q"uote\\', "x" * 70, "x" * 70 + "y"]),
    st.sampled_from([0, 1, -1, 2.0, 2.5, 10**20, -(2**63), 2**53 + 1, True, False, None]),
)
KEYS = st.sampled_from(["k", "other key", 'a"\\]b', "id"])
FILTERS = st.dictionaries(
    KEYS,
    st.one_of(
        VALUES.filter(lambda v: v is not None),
        st.lists(VALUES.filter(lambda v: v is not None), max_size=3),
        st.dictionaries(
            st.sampled_from(["gt", "gte", "lt", "lte", "ne", "eq"]),
            VALUES.filter(lambda v: v is not None),
            min_size=1,
            max_size=2,
        ),
    ),
    max_size=2,
)


@pytest.fixture(scope="module")
def varied(uri):
    """Documents of all sorts of metadata, all found by one word."""
    rng = np.random.default_rng(5)
    values = ["a", "b", "é", 'q"uote\\', "x" * 70, "x" * 70 + "y", 0, 1, -1, 2, 2.5, 10**20, -(2**63), 2**53 + 1]
    values += [True, False, None, ["a", 1], [2.5, "b", -1], [], {"a": 1}]
    documents = []
    for i in range(80):
        keys = rng.permutation(["k", "other key", 'a"\\]b'])[: rng.integers(0, 4)].tolist()
        metadata = {key: values[rng.integers(len(values))] for key in keys}
        documents.append(Document(str(i), f"moon {i}", metadata=metadata))
    with MilvusKnowledgeBase.create(uri, collection="varied", kind="bm25") as kb:
        kb.add(documents, on_duplicate="keep")
        yield kb, documents


@given(FILTERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_filters_are_exact(varied, filter):
    kb, documents = varied
    expected = {document.id for document in documents if filters.matches(document, filters.check(filter))}
    assert set(ids(kb.search("moon", 80, filter))) == expected
    assert len(kb.search("moon", 5, filter)) == min(5, len(expected))


def test_a_bad_filter_is_an_error(make):
    with pytest.raises(UsageError, match="unknown comparison"):
        make(kind="bm25").search("moon", 1, {"k": {"like": "a"}})


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda t: not t.isspace()), max_size=5))
def test_tokens_are_cut_back_into_as_many_terms(words):
    import re

    terms = [word for word in words if not any(c.isspace() for c in word)]
    found = re.findall(r"\w+", tokens(terms).lower())  # what milvus-lite's standard tokenizer does
    assert len(found) == len(terms)
    assert Counter(Counter(found).values()) == Counter(Counter(terms).values())


# -- opening -----------------------------------------------------------------------------------------------------------


def test_opening_what_does_not_fit_is_a_clear_error(make, uri, tmp_path):
    kb = make()
    with pytest.raises(UsageError, match=r"built with the embedder 'hashed.*32"):
        MilvusKnowledgeBase.open(uri, collection=kb.collection, embedder="hashed:64")
    with pytest.raises(UsageError, match="built with the analyser"):
        MilvusKnowledgeBase.open(uri, collection=kb.collection, analyser="german")
    with pytest.raises(UsageError, match="no knowledge base 'nothing'"):
        MilvusKnowledgeBase.open(uri, collection="nothing")
    with pytest.raises(UsageError, match="exists at"):
        MilvusKnowledgeBase.create(uri, collection=kb.collection)
    with pytest.raises(UsageError, match="give http"):
        MilvusKnowledgeBase.open(str(tmp_path / "kb"))
    with pytest.raises(UsageError, match="letters, digits"):
        MilvusKnowledgeBase.create(uri, collection="a-b")
    with pytest.raises(UsageError, match=r"unknown kind .* 'simple'"):
        MilvusKnowledgeBase.create(uri, kind="simple")
    with pytest.raises(NanochatError, match=r"no Milvus answers at http://127\.0\.0\.1:9"):
        Connection("http://127.0.0.1:9", timeout=0.5)


def test_a_newer_format_is_refused(make, uri):
    kb = make(kind="bm25")
    kb._history._upsert(-1, {**kb.settings, "format": 99})
    with pytest.raises(UsageError, match="newer nanochat"):
        MilvusKnowledgeBase.open(uri, collection=kb.collection)


def test_a_wrong_dimension_is_an_error(make):
    class Wrong(Failing):
        def embed(self, texts):
            return np.ones((len(texts), 3), np.float32)

    kb = make(embedder=Wrong())
    with pytest.raises(UsageError, match="shape"):
        kb.add(DOCUMENTS)
    assert (kb.version, list(kb.documents())) == (0, [])


def test_the_guide_does_what_it_says(tmp_path, monkeypatch, capsys):
    guide = Path(__file__).parents[2] / "docs" / "knowledge-bases-cluster.md"
    code = guide.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(guide), "exec"), {})
    assert capsys.readouterr().out == "1 moon The Moon has no air.\nThe Moon has no air.\n"
