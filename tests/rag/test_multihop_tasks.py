"""Multi-hop questions: traces are what the tool would have shown, they lead to the answer, and the judge knows it."""

from itertools import pairwise

import pytest

from nanochat.data.answers import contains_answer
from nanochat.errors import UsageError
from nanochat.rag.citations import number_of
from nanochat.rag.multihop_tasks import MemorySearcher, MultiHopQuestions, MultiHopWorld, gold_queries, judge, trace
from nanochat.rag.questions import RagQuestion
from nanochat.retrieval.document import Document
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])


def parts(conversation: dict) -> list[dict]:
    return conversation["messages"][1]["content"]


def citations(conversation: dict) -> list[int]:
    return [number_of(part["text"]) for part in parts(conversation) if part["type"] == "cite"]


def shown(conversation: dict) -> list[dict]:
    return [document for part in parts(conversation) for document in part.get("documents", [])]


def test_traces_of_the_world_reach_the_answer() -> None:
    task = MultiHopWorld(n=120, absent=0.0)
    hops = set()
    for conversation in (task[i] for i in range(len(task))):
        kinds = [part["type"] for part in parts(conversation)]
        n = conversation["hops"]
        hops.add(n)
        assert kinds == ["search", "result"] * n + ["cite"] * n + ["text"]
        documents = shown(conversation)
        assert [number_of(d["title"]) for d in documents] == list(range(1, len(documents) + 1))
        assert len({d["text"] for d in documents}) == len(documents)  # never shown twice
        cited = [documents[number - 1] for number in citations(conversation)]
        assert contains_answer(cited[-1]["text"], conversation["answers"][0])
        for before, after in pairwise(cited):  # each document names the next
            assert contains_answer(before["text"], after["title"].rstrip("0123456789").rstrip(":"))
        assert len(conversation["gold_documents"]) == n
    assert hops == {1, 2, 3}


def test_a_trace_is_right_and_masked_as_it_should_be() -> None:
    task = MultiHopWorld(n=30, absent=0.3)
    kinds = set()
    for conversation in (task[i] for i in range(len(task))):
        rendered = TOKENIZER.render(conversation)
        said = TOKENIZER.decode(rendered.ids).split("<|assistant_start|>")[1].removesuffix("<|assistant_end|>")
        assert task.evaluate(conversation, said)
        assert not task.evaluate(conversation, said.replace("<|result_end|>", "<|result_end|>Not ", 1) + " or so")
        result = False
        for token, produced in zip(rendered.ids, rendered.mask):
            result |= token == TOKENIZER.special("result_start")
            assert not (result and produced)
            result &= token != TOKENIZER.special("result_end")
        assert conversation["abstain"] == (parts(conversation)[-1]["type"] == "abstain")
        kinds.add(conversation["abstain"])
    assert kinds == {True, False}


def test_each_query_goes_on_with_the_plan_of_the_one_before() -> None:
    task = MultiHopWorld((3,), n=20, absent=0.0, top_k=1)
    for i in range(len(task)):
        chain = task.question(i).hop_chain
        queries = [part["text"].strip().split(" > ") for part in parts(task[i]) if part["type"] == "search"]
        assert [len(query) for query in queries] == [3, 2, 1]
        assert [query[1:] for query in queries] == [[r for _, r, _ in chain[at + 1 :]] for at in range(3)]
        for (first, *_), (entity, relation, _) in zip(queries, chain):
            assert first == f"{task.world(i)[0].name(entity)} {relation}"


def test_traces_look_first_and_decide_then() -> None:
    task = MultiHopWorld((1,), n=80, absent=0.99, top_k=1)
    kinds = set()
    for i in range(len(task)):
        conversation, question = task[i], task.question(i)
        if question.answerable:
            continue
        assert [part["type"] for part in parts(conversation)] == ["search", "result", "cite", "abstain"]
        looked = parts(conversation)[2]["text"]
        titles = [document["title"] for document in shown(conversation)]
        exists = question.entity >= 0
        assert (looked in titles) if exists else (number_of(looked) == 0)
        assert looked.strip().rstrip("0123456789") in question.text
        kinds.add(exists)
    assert kinds == {True, False}


def test_worlds_differ_and_equal_arguments_give_equal_questions() -> None:
    task, again, other = (MultiHopWorld(n=64, seed=seed, per_world=16) for seed in (1, 1, 2))
    assert [task[i] for i in (0, 17, 63, 5)] == [again[i] for i in (0, 17, 63, 5)]
    assert task[0] != other[0]
    assert task.searcher(0) is task.searcher(15)
    assert task.searcher(0) is not task.searcher(16)
    titles = [{d.title for d in task.world(i)[1].documents} for i in (0, 16)]
    assert titles[0] != titles[1]
    short = MultiHopWorld(n=5, absent=0.0, short=True)
    assert all(parts(short[i])[-1]["text"].strip() == short[i]["answers"][0] for i in range(5))


def test_judge() -> None:
    asked = {"abstain": False, "answers": ["Torwick"], "sentence": "She was born in Torwick."}
    start = "<|search_start|>x<|search_end|><|result_start|>Torwick<|result_end|>"
    for right in ("Torwick", "<|cite_start|>1<|cite_end|>She was born in Torwick.", "the Torwick."):
        assert judge(asked, start + right)
        assert judge(asked, right)
    for wrong in ("", "Torwick or Brimholt", "not Torwick", "<|abstain|>I do not know."):
        assert not judge(asked, start + wrong)
    assert judge({"abstain": True, "answers": [], "sentence": ""}, start + "<|abstain|>")
    assert not judge({"abstain": True, "answers": ["I do not know."], "sentence": ""}, start + "Torwick")


class Library(MemorySearcher):
    def get(self, id: str) -> Document:
        return next(document for document in self.documents if document.id == id)


LIBRARY = Library(
    [
        Document("band", "Rush is a rock band. Its drummer was Neil Peart.", "Rush (band)"),
        Document("drummer", "He was born in Hamilton.", "Neil Peart"),
        Document("other", "A town in Ontario.", "Hamilton"),
        Document("far", "Nothing to do with it.", "Zebra"),
    ]
)


def ask(text: str, *gold: str, answer: str = "Hamilton") -> RagQuestion:
    return RagQuestion("q", text, (answer,) if gold else (), answer if gold else "", gold)


@pytest.mark.parametrize(
    ("question", "queries", "order"),
    [
        (ask("Where was the drummer of Rush born?", "drummer", "band"), ["Rush", "Neil Peart"], ["band", "drummer"]),
        (ask("Where was the drummer born?", "drummer"), ["Where was the drummer born?"], ["drummer"]),
        (ask("Who is it?", "far", "drummer"), ["Who is it?", "Neil Peart"], ["far", "drummer"]),
        (ask("What is nowhere?"), ["What is nowhere?"], []),
    ],
)
def test_queries_that_lead_to_the_gold_documents(question: RagQuestion, queries: list[str], order: list[str]) -> None:
    assert gold_queries(question, LIBRARY) == (queries, order)


def test_questions_against_a_knowledge_base() -> None:
    questions = [ask("Where was the drummer of Rush born?", "drummer", "band"), ask("What is nowhere?")]
    task = MultiHopQuestions(questions, LIBRARY, top_k=1)
    conversation = task[0]
    assert citations(conversation) == [1, 2]
    assert conversation["gold_documents"] == ["band", "drummer"]
    assert conversation["hops"] == 2
    assert parts(task[1])[-1]["type"] == "abstain"
    assert task[1]["abstain"]
    lost = ask("Where is the thing?", "far", answer="here")  # never found: the trace says so, the judge does not
    unfound = MultiHopQuestions([lost], LIBRARY, top_k=1)[0]
    assert parts(unfound)[-1]["type"] == "abstain"
    assert not unfound["abstain"]
    with pytest.raises(UsageError, match="none of 2 questions"):
        MultiHopQuestions(questions, LIBRARY, hops=(3,))


def test_results_are_cut_to_the_room() -> None:
    content = trace(["Neil Peart"], LIBRARY, ["drummer"], "…", 3, TOKENIZER, max_result_tokens=80)
    assert len(TOKENIZER.render_parts([content[1]]).ids) <= 80


@pytest.mark.parametrize("options", [{"hops": ()}, {"hops": (4,)}, {"absent": 1.0}, {"entities": 10}, {"n": 0}])
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="multi-hop"):
        MultiHopWorld(**options)  # type: ignore[arg-type]


def test_searching_in_memory_finds_the_rare_words() -> None:
    assert [hit.id for hit in LIBRARY.search(["zebra"], 2)[0]] == ["far"]
    assert LIBRARY.search(["xyz", ""], 2) == [[], []]
    assert LIBRARY.search(["Neil Peart"], 1)[0][0].rank == 1
