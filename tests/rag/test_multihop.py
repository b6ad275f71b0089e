"""Search as a tool: what rows are shown, how documents are numbered, and the hooks; hops by template."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine.tools import Call, Request
from nanochat.errors import UsageError
from nanochat.rag.multihop import Asking, SearchTool, documents_of, found_nothing, hops_of, search_in_hops
from nanochat.rag.prompt import retrieval_message
from nanochat.rag.template import named_first, template_query
from nanochat.retrieval.document import Document, Hit
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
NAMES = ("Torwick", "Mara Velt", "Brimholt", "Orvane", "Bram Cobb")
TEXTS = (
    "Torwick was founded by Mara Velt.", "She was born in Brimholt.", "Brimholt lies by the sea.",
    "Orvane makes boats.", "Bram Cobb likes soup.",
)  # fmt: skip
DOCUMENTS = [Document(f"d{i}", text, name) for i, (name, text) in enumerate(zip(NAMES, TEXTS))]


class Shelf:
    """Finds documents by the words that they share with a query, in their order; notes what it was asked."""

    def __init__(self, documents=tuple(DOCUMENTS)):
        self.documents, self.asked = list(documents), []

    def search(self, queries, k=5):
        self.asked.append((list(queries), k))
        found = []
        for query in queries:
            words = set(query.lower().split())
            shared = [(len(words & set(d.text.lower().replace(".", "").split())), d) for d in self.documents]
            best = sorted((each for each in shared if each[0]), key=lambda each: -each[0])[:k]
            found.append([Hit(d.id, float(n), i, d) for i, (n, d) in enumerate(best, 1)])
        return found


def run(tool, *queries, prompt=0, max_tokens=0):
    """The calls of one row that asks one query after the other."""
    calls = ()
    for query in queries:
        result = tool.run([Request(query, prompt, calls, max_tokens)])[0]
        calls = (*calls, Call(0, query, result.value, 0, tool.name))
    return calls


def test_passages_that_became_one_document_do_not_crowd_out_the_next():
    pieces = ((0, "one"), (50, "two"))
    passages = [Document("a", f"Torwick {text}", "Torwick", span=(at, at + 20)) for at, text in pieces]
    others = [Document(name, f"Torwick {name}", name.upper()) for name in "bc"]
    calls = run(SearchTool(TOKENIZER, Shelf([*passages, *others]), 2), "Torwick", "Torwick")
    assert [[d.id for d in hop.documents] for hop in hops_of(calls)] == [["a"], ["b", "c"]]


def test_what_a_query_plans_is_not_searched_for():
    shelf = Shelf()
    calls = run(SearchTool(TOKENIZER, shelf, 1), " Torwick founder > birthplace > river", "Mara Velt > ", "a>b")
    assert [queries for queries, _ in shelf.asked] == [["Torwick founder"], ["Mara Velt"], ["a>b"]]
    assert [hop.query for hop in hops_of(calls)] == ["Torwick founder", "Mara Velt", "a>b"]
    assert calls[0].text == " Torwick founder > birthplace > river"  # what the model wrote stays as it is


def test_documents_are_numbered_on_and_shown_once():
    tool = SearchTool(TOKENIZER, Shelf(), 2)
    calls = run(tool, "Torwick founded", "Torwick born in Brimholt", "nothing at all here ever")
    hops = hops_of(calls)
    assert [[d.id for d in hop.documents] for hop in hops] == [["d0"], ["d1", "d2"], []]
    assert [hop.first for hop in hops] == [1, 2, 4]
    assert [d.id for d in documents_of(calls)] == ["d0", "d1", "d2"]
    again = tool.run([Request("Torwick founded", 0, calls)])[0]
    assert again.value.documents == ()
    assert TOKENIZER.decode(TOKENIZER.render_parts(again.parts).ids) == "<|result_start|><|result_end|>"


def test_results_look_as_documents_do_in_a_prompt_and_are_never_trained_on():
    tool = SearchTool(TOKENIZER, Shelf(), 2)
    part = tool.run([Request("Torwick founded")])[0].parts[0]
    block = retrieval_message([DOCUMENTS[0]]).message
    assert part["documents"] == block["content"]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": [
        {"type": "search", "text": "Torwick"}, part, {"type": "cite", "text": "1"}, {"type": "text", "text": "So."},
    ]}]  # fmt: skip
    rendered = TOKENIZER.render({"messages": messages})
    start, end = (rendered.ids.index(TOKENIZER.special(name)) for name in ("result_start", "result_end"))
    assert not any(rendered.mask[start : end + 1])
    assert all(rendered.mask[rendered.ids.index(TOKENIZER.special("search_start")) : start])
    assert all(rendered.mask[end + 1 :])
    assert rendered.ids[start : end + 1] == TOKENIZER.render_parts([part]).ids


def test_all_rows_search_together_each_where_its_prompt_belongs():
    shelves = [Shelf(), Shelf(DOCUMENTS[3:])]
    tool = SearchTool(TOKENIZER, [shelves[0], shelves[1], shelves[0]], 1)
    results = tool.run([Request("Torwick", 0), Request("Orvane", 1), Request("Bram", 2), Request("", 0)])
    assert [[d.id for d in r.value.documents] for r in results] == [["d0"], ["d3"], ["d4"], []]
    assert shelves[0].asked == [(["Torwick", "Bram"], 1)]
    assert shelves[1].asked == [(["Orvane"], 1)]


def test_passages_of_one_source_become_one_document_and_new_ones_still_come():
    text = "Mara Velt sang. Mara Velt danced. Mara Velt slept."
    pieces = [Document("m", text[a:b], "Mara", span=(a, b)) for a, b in ((0, 15), (15, 33), (33, 50))]
    calls = run(SearchTool(TOKENIZER, Shelf(pieces), 2), "velt sang danced", "velt slept")
    assert [d.content for d in documents_of(calls)] == [text[:33], text[33:]]


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 300), st.integers(1, 5))
def test_results_fit(max_tokens, top_k):
    tool = SearchTool(TOKENIZER, Shelf([Document(d.id, d.content * 9, d.title) for d in DOCUMENTS]), top_k)
    query = "born founded lies makes likes"
    cut, whole = (tool.run([Request(query, 0, (), n)])[0] for n in (max_tokens, 0))
    n_cut, n_whole = (len(TOKENIZER.render_parts(result.parts).ids) for result in (cut, whole))
    assert n_cut <= max_tokens
    assert cut.value.cut == (n_cut < n_whole)


def test_a_document_that_did_not_fit_can_be_found_again():
    shelf = Shelf([Document(f"d{i}", f"boats {'word ' * 30}{i}", f"Name {'abc'[i]}") for i in range(3)])
    tool = SearchTool(TOKENIZER, shelf, 2)
    calls = run(tool, "boats", max_tokens=50)
    hop = hops_of(calls)[0]
    assert ([hit.id for hit in hop.hits], [d.id for d in hop.documents], hop.cut) == (["d0"], ["d0"], True)
    result = tool.run([Request("boats", 0, calls)])[0]
    assert [d.id for d in result.value.documents] == ["d1", "d2"]


def test_what_fits_counts_as_shown_under_all_its_names():
    twins = [Document("a", "Torwick lies by the sea.", "Torwick"), Document("b", "Torwick lies by the sea.", "Torwick")]
    calls = run(SearchTool(TOKENIZER, Shelf(twins), 2), "Torwick", "Torwick", max_tokens=200)
    assert [[d.id for d in hop.documents] for hop in hops_of(calls)] == [["a"], []]


def test_hooks_are_told_where_the_answer_stands():
    seen = []

    def query(asking):
        seen.append(asking)
        return f"{asking.written} founded"

    tool = SearchTool(
        TOKENIZER, Shelf(), 2, query=query, select=lambda asking, hits: hits[:1], stop=found_nothing,
        questions=["Q0", "Q1"], depth=4,
    )  # fmt: skip
    first = tool.run([Request("Torwick", 1)])[0]
    assert (first.value.query, [d.id for d in first.value.documents], first.last) == ("Torwick founded", ["d0"], False)
    calls = (Call(0, "Torwick", first.value, 0),)
    second = tool.run([Request("Torwick", 1, calls)])[0]
    assert (second.value.documents, second.last) == ((), True)
    assert [(a.question, len(a.hops), a.prompt) for a in seen] == [("Q1", 0, 1), ("Q1", 1, 1)]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "x", "documents": []},
        {"type": "result", "text": "", "documents": "x"},
        {"type": "result", "text": "", "documents": [{"type": "text", "text": "x"}]},
        {"type": "result", "text": "", "documents": [{"type": "document", "title": 3, "text": "x"}]},
    ],
)
def test_only_results_hold_documents(part):
    with pytest.raises(UsageError, match="part 0"):
        TOKENIZER.render_parts([part])


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match="top_k 0"):
        SearchTool(TOKENIZER, Shelf(), 0)
    with pytest.raises(UsageError, match="depth -1"):
        SearchTool(TOKENIZER, Shelf(), 1, depth=-1)


def test_hops_without_a_model():
    shelf = Shelf()
    questions = ["Where was the founder of Torwick born?", "Who likes soup?", "xyzzy"]
    found = search_in_hops(shelf, questions, 3, 2, query=template_query, select=named_first, depth=5)
    assert [d.id for hop in found[0] for d in hop.documents][:2] == ["d0", "d1"]
    assert found[2] == (found[2][0],)  # nothing was found: no second search
    assert len(shelf.asked[0][0]) == 3
    assert all(len(queries) < 3 for queries, _ in shelf.asked[1:])


def test_the_template_asks_what_is_left_of_the_question():
    shelf = Shelf()
    question = "Where was the founder of Torwick born?"
    hops = search_in_hops(shelf, [question], 2, 1, query=template_query)[0]
    assert hops[0].query == question
    assert hops[1].query == "Where was the founder of born? Mara Velt"
    assert template_query(_asking(question, hops[:1] * 2)) != ""
    assert template_query(_asking(question, (hops[0]._replace(documents=()),))) == ""


def _asking(question, hops):
    return Asking(question, question, tuple(hops))


def test_named_documents_come_first():
    hits = [Hit(d.id, 1.0, i, d) for i, d in enumerate(reversed(DOCUMENTS), 1)]
    first = named_first(_asking("Is Orvane near Torwick?", ()), hits)
    assert [hit.id for hit in first] == ["d3", "d0"]
    hop = search_in_hops(Shelf(), ["Torwick"], 1, 1, query=template_query)[0]
    assert [hit.id for hit in named_first(_asking("Who?", hop), hits)] == ["d1"]  # its text names Mara Velt
