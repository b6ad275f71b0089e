"""Traces: what they tell of an answer, and that files and pages keep it."""

import json
from dataclasses import replace

import pytest
from puppet import searcher
from test_multihop import TOKENIZER, Shelf
from test_multihop_chat import QUESTION, chain

from nanochat.engine.rollout import rollouts
from nanochat.engine.sampling import Sampling
from nanochat.engine.tools import Calculator
from nanochat.errors import NanochatError
from nanochat.rag.multihop import SearchTool
from nanochat.rag.traces import read_traces, show, trace_of, verdict, write_traces
from nanochat.report_traces import trace_page


def roll(reply, question=QUESTION, tools=None, **options):
    prompt = TOKENIZER.render_prompt({"messages": [{"role": "user", "content": question}]}).ids
    tools = tools or [SearchTool(TOKENIZER, Shelf(), 1)]
    return rollouts(searcher(TOKENIZER, reply, 2000), TOKENIZER, [prompt], Sampling(300, 0.0), 1, tools, **options)[0]


@pytest.fixture(scope="module")
def trace():
    given = {"answers": ["Brimholt"], "gold": ["d0", "d1", "d9"], "right": True, "rewards": {"answer": 1.0}}
    return trace_of(roll(chain), TOKENIZER, QUESTION, name="q1", reward=0.75, **given)


def test_a_trace_tells_what_happened(trace):
    assert [(turn.thinking, turn.wrote, turn.query) for turn in trace.turns] == [
        ("Let me see.", "Torwick founded", "Torwick founded"),
        ("", "Mara Velt she", "Mara Velt she"),
    ]
    assert [[(d.number, d.id, d.gold, d.cited) for d in turn.documents] for turn in trace.turns] == [
        [(1, "d0", True, True)], [(2, "d1", True, True)],
    ]  # fmt: skip
    assert trace.answer == "The founder of Torwick was born in Brimholt. [1] [2]"
    assert (trace.missing, trace.invalid, trace.finish_reason) == (("d9",), (), "stop")
    shown = show(trace)
    for part in ("q1: Where was", "Let me see.", "1. 'Torwick founded'", "* [1] Torwick: Torwick was founded", "<",
                 "right; gold: Brimholt; not found: d9; reward 0.75; answer 1.00"):  # fmt: skip
        assert part in shown


def test_a_query_that_a_hook_wrote_and_answers_that_went_wrong():
    tool = SearchTool(TOKENIZER, Shelf(), 1, query=lambda asking: "Orvane")
    reply = lambda question, results: [{"type": "search", "text": "Torwick"}]  # noqa: E731
    lost = trace_of(roll(reply, tools=[tool], max_calls=2), TOKENIZER, QUESTION)
    assert [(t.wrote, t.query) for t in lost.turns] == [("Torwick", "Orvane")] * 2
    assert [len(t.documents) for t in lost.turns] == [1, 0]
    assert "'Torwick' -> 'Orvane'" in show(lost)
    assert "nothing new was found" in show(lost)
    assert "(no answer)" in show(lost)
    assert "ended by calls" in verdict(lost)
    wrong = roll(lambda question, results: [{"type": "cite", "text": "7"}, {"type": "text", "text": "So."}])
    assert "cites what is not there: 7" in verdict(trace_of(wrong, TOKENIZER, QUESTION, right=False))


def test_other_tools_show_their_output():
    calls = [{"type": "tool_call", "text": "6*7"}]
    one = roll(lambda question, results: calls, tools=[Calculator()], max_calls=1)
    found = trace_of(one, TOKENIZER, "6*7?")
    assert [(turn.wrote, turn.output) for turn in found.turns] == [("6*7", "42")]
    assert "= 42" in show(found)
    assert "= 42" in trace_page([found])


def test_files_keep_traces_and_bad_lines_are_named(trace, tmp_path):
    path = tmp_path / "deep" / "traces.jsonl"
    write_traces(path, [trace, trace])
    assert read_traces(path) == [trace, trace]
    odd = replace(trace, question="one\u2028two\x85three\x0cfour\r\nfive")
    write_traces(path, [trace, odd])
    assert read_traces(path) == [trace, odd]
    path.write_text("{}\n")
    with pytest.raises(NanochatError, match=r"line 1: no trace \(it lacks 'turns'\)$"):
        read_traces(path)
    write_traces(path, [trace])
    for bad in ("nonsense", "[]", '{"name": 1}', json.dumps({"turns": [{"documents": [3]}]})):
        path.write_text(path.read_text().splitlines()[0] + f"\n\n{bad}\n")
        with pytest.raises(NanochatError, match="line 3"):
            read_traces(path)
    with pytest.raises(NanochatError, match=r"cannot read .*none\.jsonl: No such file or directory$"):
        read_traces(tmp_path / "none.jsonl")
    with pytest.raises(NanochatError, match="cannot write"):
        write_traces(path / "below", [])


def test_pages_escape_all_that_models_and_documents_say(trace):
    hit = trace.turns[0].documents[0]
    evil = "<script>alert(1)</script>\x00"
    turn = trace.turns[0].__class__(evil, evil, evil, (hit.__class__(1, evil, evil, evil, True, True),), evil)
    bad = trace.__class__(evil, evil, (turn,), evil, (evil,), (evil,), (evil,), False, 0.0, {evil: 1.0}, evil, evil)
    page = trace_page([bad, trace], evil)
    assert "<script" not in page
    assert "\x00" not in page
    assert page.count("&lt;script&gt;") > 8
    assert 'class="gold-hit"' in page
    assert page.count("<article") == page.count("</article>") == 2
