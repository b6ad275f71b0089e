"""Readers of test collections: each format in small, each error with file and line, the real collections if there."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import NanochatError
from nanochat.retrieval import formats

DATA = Path(__file__).parents[3] / "shared" / "data"

TOPICS = """
<top>
<num> Number: 301
<title> International
   Organized Crime

<desc> Description:
Identify organizations.
</top>
<top><num>302</num><title>Topic: Polio</title></top>
<topic number="303"><query>Hubble</query></topic>
"""
CRAN = """.I 1
.T
a title .
.A
smith, j.
.B
journal 1
.W
a title .
some text
.A
more text
.I
end .
.I 2
.T
.A
.B
.W
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        (TOPICS, {"301": "International Organized Crime", "302": "Polio", "303": "Hubble"}),
        (".I 001\r\n.W\r\nfirst\r\nquery .\r\n.I 004\r\n.W\r\nsecond .\r\n", {"1": "first query .", "2": "second ."}),
        ('{"_id": "a", "text": "b"}\n\n{"id": 7, "query": "c"}', {"a": "b", "7": "c"}),
        ('\ufeff{"id": "a", "question": "é\u2028x"}\n', {"a": "é\u2028x"}),
        ("a\tb c\nd\t\n", {"a": "b c", "d": ""}),
    ],
)
def test_queries(tmp_path, text, queries):
    assert formats.read_queries(write(tmp_path / "queries", text)) == queries


@pytest.mark.parametrize(
    ("name", "text", "qrels"),
    [
        ("qrels", "1 0 d1 2\n1 0 d2 -1\n\n2 Q0 d1 0\n", {"1": {"d1": 2, "d2": -1}, "2": {"d1": 0}}),
        ("t.tsv", "query-id\tcorpus-id\tscore\nq 1\td 1\t1\n", {"q 1": {"d 1": 1}}),
        ("t.tsv", "q1\td1\t1\n", {"q1": {"d1": 1}}),
        ("cranqrel", "1 184 2\n1 486 -1\n2 3 1\n2 4 5\n", {"1": {"184": 1, "486": 1}, "2": {"3": 1, "4": 0}}),
        ("gold", '{"id": "a", "gold": ["x", "y"]}\n{"id": "b"}\n', {"a": {"x": 1, "y": 1}}),
        ("gold", '{"id": "a", "gold": []}\n{"id": "c", "gold": {"x": 2}}', {"c": {"x": 2}}),
    ],
)
def test_qrels(tmp_path, name, text, qrels):
    assert formats.read_qrels(write(tmp_path / name, text)) == qrels


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"id": "a", "query": "b"}\n{"id": ', "line 2: not JSON"),
        ('{"id": "a", "query": "b"}\n[1]', "line 2: a JSON object was expected, not list"),
        ('{"id": "a", "query": "b"}\n\n{"id": "a", "query": "c"}', "line 3: query 'a' stands in this file twice"),
        ('{"id": "a", "topic": "b"}', "line 1: no field 'query' or 'question' or 'text', only 'id', 'topic'"),
        ('{"id": true, "query": "b"}', "line 1: field 'id' must be a text, not bool"),
        ('{"id": "a", "query": 3}', "line 1: field 'query' must be a text, not int"),
        ('{"id": "a", "query": "b"}\n' + "[" * 100_000, "line 2: (JSON nested too deeply|not JSON)"),
        ("a\tb\nc d\n", "line 2: expected JSON"),
        ("<top>\n<num> 1\n<title> x\n<top>\n", "line 4: <top> inside the topic of line 1"),
        ("<top>\n<num> 1\n<title> x\n", "line 1: this <top> has no </top>"),
        ("<top>\n<num> 1\n</top>\n", "line 1: a topic needs <num> and <title>"),
        ("</top>\n", "line 1: </top> without <top>"),
        (".I 1\ntext\n", "line 2: expected '.I number' and a field"),
        (" \n\n", "holds no query"),
    ],
)
def test_bad_queries(tmp_path, text, says):
    path = write(tmp_path / "queries", text)
    with pytest.raises(NanochatError, match=says) as error:
        formats.read_queries(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("q", "1 0 d1 1\n1 0 d1\n1 x\n", "line 2: grade 'd1' is not a whole number"),
        ("q", "1 0 d1 1\n1 0\n", "line 2: expected 'query 0 document grade'"),
        ("q", "1 0 d1 1\n1 0 d1 2\n", "line 2: document 'd1' has two different grades for query '1'"),
        ("q", "1 0 d1 1\n1 0 d2 1.5\n", "line 2: grade '1.5'"),
        ("q", "\n", "holds no relevance judgement"),
        ("cranqrel", "1 184 2\n1 3 7\n", "line 2: Cranfield has the relevance codes"),
        ("gold", '{"id": "a", "gold": "x"}', "line 1: field 'gold' must be a list"),
        ("gold", '{"id": "a", "gold": {"x": 1.5}}', "line 1: field 'gold' must be a list"),
        ("gold", '{"id": "a"}', "holds no relevance judgement"),
    ],
)
def test_bad_qrels(tmp_path, name, text, says):
    path = write(tmp_path / name, text)
    with pytest.raises(NanochatError, match=says) as error:
        formats.read_qrels(path)
    assert str(path) in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(NanochatError, match=r"cannot read .*nowhere: No such file"):
        formats.read_queries(tmp_path / "nowhere")
    latin = tmp_path / "latin"
    latin.write_bytes(b"a\tb\nc\t\xe9\n")
    with pytest.raises(NanochatError, match="latin, line 2: not UTF-8"):
        formats.read_queries(latin)


@given(st.text())
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(text.encode("utf-8", "replace"))
    for read in (formats.read_queries, formats.read_qrels, formats.read_trec_run):
        with contextlib.suppress(NanochatError):
            read(path)


def test_runs_survive_a_round_trip(tmp_path):
    run = {"1": {"a": 0.1, "b": -3.5, "c": 0.1}, "2": {"d/..": 1e-12}}
    formats.write_trec_run(tmp_path / "run", run)
    assert formats.read_trec_run(tmp_path / "run") == run
    formats.write_trec_run(tmp_path / "run", {"1": ["x", "y"]})
    assert formats.read_trec_run(tmp_path / "run") == {"1": {"x": 2, "y": 1}}
    with pytest.raises(NanochatError, match="white space"):
        formats.write_trec_run(tmp_path / "run", {"1": ["x y"]})
    with pytest.raises(NanochatError, match="cannot write"):
        formats.write_trec_run(tmp_path / "no" / "run", run)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("1 Q0 d 1", "line 2: expected 'query Q0"),
        ("1 Q0 d 1 high x", "line 2: score 'high'"),
        ("1 Q0 d 1 nan x", "line 2: the score is not a number"),
        ("1 Q0 a 2 1 x", "line 2: document 'a' stands twice"),
    ],
)
def test_bad_runs(tmp_path, line, says):
    with pytest.raises(NanochatError, match=says):
        formats.read_trec_run(write(tmp_path / "run", f"1 Q0 a 1 1 x\n{line}\n"))


def test_beir(tmp_path):
    corpus = ['{"_id": "d1", "title": "T", "text": "body", "metadata": {"year": 1}}', '{"_id": "d2", "text": ""}']
    write(tmp_path / "corpus.jsonl", "\n".join(corpus))
    write(tmp_path / "queries.jsonl", '{"_id": "q1", "text": "x"}\n{"_id": "q2", "text": "train only"}\n')
    write(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t2\n")
    read = formats.beir(tmp_path)
    assert [d.id for d in read.documents] == [d.id for d in read.documents] == ["d1", "d2"]
    first = next(iter(read.documents))
    assert (first.title, first.content, first.metadata) == ("T", "body", {"year": 1})
    assert read.queries == {"q1": "x"}
    assert read.qrels == {"q1": {"d1": 2}}
    write(tmp_path / "qrels" / "test.tsv", "q9\td1\t2\n")
    with pytest.raises(NanochatError, match="lacks query 'q9'"):
        formats.beir(tmp_path)
    write(tmp_path / "corpus.jsonl", '{"_id": "d1", "title": 3, "text": "body"}\n')
    with pytest.raises(NanochatError, match=r"corpus.jsonl, line 1: field 'title'"):
        list(read.documents)


def test_cranfield_in_small(tmp_path):
    write(tmp_path / "cran.all.1400", CRAN)
    write(tmp_path / "cran.qry", ".I 003\n.W\nwhat ?\n")
    write(tmp_path / "cranqrel", "1 1 3\n")
    read = formats.cranfield(tmp_path)
    one, two = read.documents
    assert (one.id, one.title, one.content) == ("1", "a title .", "some text more text end .")
    assert one.metadata == {"authors": "smith, j.", "published": "journal 1"}
    assert (two.id, two.title, two.content, two.metadata) == ("2", "", "", {})
    assert read.queries == {"1": "what ?"}
    assert read.qrels == {"1": {"1": 1}}


def test_hotpotqa_in_small(tmp_path):
    context, facts = '[["A", ["One.", " Two."]], ["B", []]]', '[["A", 0], ["A", 1]]'
    line = f'{{"_id": "q", "question": "who?", "context": {context}, "supporting_facts": {facts}}}'
    read = formats.hotpotqa(write(tmp_path / "h.jsonl", line))
    assert [(d.id, d.title, d.content) for d in read.documents] == [("A", "A", "One. Two."), ("B", "B", "")]
    assert read.qrels == {"q": {"A": 1}}
    assert read.queries == {"q": "who?"}
    with pytest.raises(NanochatError, match="line 1: 'context' and 'supporting_facts'"):
        formats.hotpotqa(write(tmp_path / "h.jsonl", line.replace('["A", ["One.", " Two."]]', "7")))
    with pytest.raises(NanochatError, match=r"line 2: question 'q' stands"):
        formats.hotpotqa(write(tmp_path / "h.jsonl", f"{line}\n{line}"))


@pytest.mark.skipif(not (DATA / "cranfield").is_dir(), reason="needs the Cranfield collection")
def test_the_real_cranfield():
    read = formats.cranfield(DATA / "cranfield")
    assert len(list(read.documents)) == 1400
    assert list(read.queries) == list(read.qrels) == [str(i) for i in range(1, 226)]
    assert sum(map(len, read.qrels.values())) == 1837
    assert {d.id for d in read.documents if not d.content} == {"471", "995"}
    assert read.queries["3"].startswith("what problems of heat conduction in composite slabs")


@pytest.mark.skipif(not (DATA / "hotpotqa").is_dir(), reason="needs the HotpotQA sample")
def test_the_real_hotpotqa():
    read = formats.hotpotqa(DATA / "hotpotqa" / "sample200.jsonl")
    known = {d.id for d in read.documents}
    assert (len(known), len(read.queries)) == (1971, 200)
    assert all(len(gold) == 2 and known.issuperset(gold) for gold in read.qrels.values())
