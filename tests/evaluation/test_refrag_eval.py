"""Evaluation of a model that searches: puppets whose behaviour is known give metrics that are known; a random model
goes through the command."""

import json
import re
from dataclasses import replace

import pytest
from puppet import searcher
from readers import build_reader, hotpot

from nanochat import checkpoint
from nanochat.data.answers import ABSTENTION
from nanochat.data.world import World
from nanochat.engine.tools import Request
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import rag_commands
from nanochat.evaluation.rag import Options
from nanochat.evaluation.rag_questions import world_questions
from nanochat.evaluation.rag_result import SEARCHING
from nanochat.evaluation.refrag import HopAsker, Hops, measure_refrag
from nanochat.rag.tasks import as_document
from nanochat.retrieval.document import Hit
from nanochat.tokenizer import Tokenizer

WORLD = World(7, 20, 60)
TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
N, U = 12, 4
QUESTIONS = world_questions(WORLD, N, U, hops=(2, 3))
FACTS = {q.question: q for q in QUESTIONS}


class Shelf:
    """Finds the documents whose names a query holds, the one that it names first at the top."""

    def __init__(self):
        self.documents = {d.id: d for d in map(as_document, WORLD.documents("new"))}

    def search(self, queries, k=5):
        found = []
        for query in queries:
            named = sorted((query.find(d.title), d.id) for d in self.documents.values() if d.title in query)
            some = [*(i for _, i in named), *(i for i in self.documents if self.documents[i].title not in query)]
            found.append([Hit(i, 1.0, n, self.documents[i]) for n, i in enumerate(some[:k], 1)])
        return found

    def get(self, id):
        return self.documents[id]

    def __contains__(self, id):
        return id in self.documents

    def __len__(self):
        return len(self.documents)


def follow(question, results):
    """Searches for one gold document after the other; answers when it has all, abstains when one does not come."""
    fact, titles = FACTS[question], {title: n for result in results for n, title, _ in result}
    wanted = [WORLD.document(int(g.split("-")[0]))["title"] for g in fact.gold]
    if len(results) < len(wanted):
        return [{"type": "search", "text": wanted[len(results)]}]
    if not wanted or not set(wanted) <= set(titles):
        return [{"type": "abstain", "text": ABSTENTION}]
    return [*({"type": "cite", "text": str(titles[w])} for w in wanted), {"type": "text", "text": fact.sentence}]


def guess(question, results):
    """Searches once and claims whatever it read."""
    if not results:
        return [{"type": "search", "text": question}]
    return [{"type": "cite", "text": "1"}, {"type": "text", "text": "Brimholt Brim."}]


def measure(reply, hops=Hops(3, 1), conditions=tuple(SEARCHING), questions=QUESTIONS, knowledge=None):  # noqa: B008
    model = searcher(TOKENIZER, reply, 6000)
    options = Options(batch_size=64, n_latency=2)
    return measure_refrag(model, TOKENIZER, knowledge or Shelf(), questions, options, hops, conditions)


def test_a_model_that_follows_the_chain():
    result = measure(follow)
    metrics = {name: metric.value for name, metric in result.metrics().items()}
    assert metrics["refrag_em"] == metrics["refrag_em_2_hops"] == metrics["refrag_em_3_hops"] == 1.0
    assert metrics["refrag_all_gold_recall"] == metrics["refrag_citation_precision"] == 1.0
    assert metrics["refrag_hallucination_rate"] == 0.0
    assert metrics["refrag_abstain_unanswerable"] == 1.0
    assert metrics["refrag_queries"] == pytest.approx((N // 2 * 2 + N // 2 * 3) / (N + U))
    assert metrics["refrag_shuffled_em"] == metrics["refrag_shuffled_all_gold_recall"] == 0.0
    assert metrics["refrag_latency_ms"] > metrics["refrag_retrieval_ms"] > 0
    table = result.table()
    for row in ("REFRAG, shuffled", "three hops", "searches a question"):
        assert row in table


def test_hops_that_do_not_suffice_and_a_model_that_makes_things_up():
    metrics = {name: metric.value for name, metric in measure(follow, Hops(2, 1), ("refrag",)).metrics().items()}
    assert metrics["refrag_em_2_hops"] == 1.0
    assert metrics["refrag_em_3_hops"] == 0.0
    metrics = {name: metric.value for name, metric in measure(guess, Hops(3, 2), ("refrag",)).metrics().items()}
    assert metrics["refrag_em"] == 0.0
    assert metrics["refrag_hallucination_rate"] == 1.0
    assert metrics["refrag_all_gold_recall"] < 0.5


def test_one_search_is_given_as_many_documents():
    asked = []

    class Counting(Shelf):
        def search(self, queries, k=5):
            asked.append(k)
            return super().search(queries, k)

    names = measure(follow, Hops(3, 2), ("refrag", "rag", "closed_book"), QUESTIONS[:4], Counting()).metrics()
    assert asked[0] == 6
    expected = {"multihop_one_shot_em", "multihop_one_shot_retrieval_recall", "closed_book_new_em", "refrag_em"}
    assert expected <= set(names)
    assert not {"rag_em", "retrieval_recall", "citation_precision"} & set(names)


def test_two_questions_of_the_same_words_are_told_apart():
    """Each with gold of its own: neither is shown it when it gets what another question found."""
    first, second = QUESTIONS[0], QUESTIONS[2]
    same = [first, replace(second, question=first.question), QUESTIONS[4]]
    asker = HopAsker(searcher(TOKENIZER, guess, 6000), TOKENIZER, Shelf(), same, Options(), 4000, hops=Hops(1, 60))
    tool = asker.tool("refrag_shuffled", range(3))
    for i, result in enumerate(tool.run([Request("anything", i) for i in range(3)])):
        shown = {document.id for document in result.value.documents}
        assert not shown & set(same[i].gold)
        assert shown >= set(same[1 - i].gold) - set(same[i].gold) if i < 2 else shown


def test_searches_that_fail():
    class Flaky(Shelf):
        def search(self, queries, k=5):
            if any(re.search(self.bad, query) for query in queries):
                raise NanochatError("the disk is gone")
            return super().search(queries, k)

    shelf = Flaky()
    shelf.bad = re.escape(WORLD.document(int(QUESTIONS[0].gold[-1].split("-")[0]))["title"]) + "$"
    metrics = measure(follow, conditions=("refrag",), knowledge=shelf).metrics()
    assert 0.3 < metrics["refrag_em"].value < 1.0
    with pytest.raises(UsageError, match="something to search"):
        measure_refrag(searcher(TOKENIZER, follow), TOKENIZER, None, QUESTIONS, Options(), Hops())
    with pytest.raises(UsageError, match="max_hops 0"):
        measure(follow, Hops(0))


def test_questions_of_several_hops_come_by_turns():
    assert [len(q.gold) for q in QUESTIONS[:4]] == [2, 3, 2, 3]
    assert [len(q.gold) for q in QUESTIONS[N:]] == [0] * U
    assert world_questions(WORLD, 5, 0) == world_questions(WORLD, 5, 0, 0, (1,))


@pytest.fixture(scope="module")
def out_dir(reader_tokenizer, tmp_path_factory):
    """A run with a checkpoint of the REFRAG stage."""
    out, model = tmp_path_factory.mktemp("out"), build_reader(reader_tokenizer)
    reader_tokenizer.save(out / "demo" / "tokenizer")
    meta = {"stage": "refrag", "model_config": model.config.to_dict(), "metrics": {},
            "tokenizer_hash": reader_tokenizer.hash}  # fmt: skip
    checkpoint.save(out / "demo" / "refrag", 3, {"model": model.state_dict()}, meta)
    return out


SMALL = ["--max_problems", "6", "--max_unanswerable", "2", "--max_tokens", "6", "--latency_questions", "1",
         "--max_hops", "1"]  # fmt: skip


@pytest.mark.parametrize("query", ["model", "template"])
def test_the_command(out_dir, capsys, query):
    arguments = ["--out_dir", str(out_dir), "--mode", "refrag", "--questions", "world:seed=7,known=20,new=60"]
    rag_commands.rag_eval([*arguments, "--query", query, "--retriever_type", "simple", *SMALL])
    record = json.loads((out_dir / "demo" / "refrag_eval_refrag.json").read_text())
    assert (record["kind"], record["max_hops"], record["hop_k"]) == ("refrag_eval", 1, 2)
    assert {"refrag_em", "refrag_em_2_hops", "refrag_queries", "refrag_shuffled_em", "multihop_one_shot_em",
            "rag_gold_em", "closed_book_new_em"} <= set(record["metrics"])  # fmt: skip
    assert "REFRAG" in capsys.readouterr().out


def test_the_command_with_questions_that_bring_documents(out_dir, tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text("\n".join(json.dumps(hotpot(i)) for i in range(3)))
    rag_commands.rag_eval(["--out_dir", str(out_dir), "--mode", "refrag", "--questions", str(path), "--retriever_type",
                           "simple", "--conditions", "refrag", *SMALL])  # fmt: skip
    record = json.loads((out_dir / "demo" / "refrag_eval_refrag.json").read_text())
    assert record["metrics"]["refrag_em"]["n"] == 3


def test_wrong_flags_are_listed():
    with pytest.raises(UsageError) as caught:
        rag_commands.RagEvalSettings(hops=(4,), max_hops=0, conditions=("refrag",)).check()
    for part in ("--hops 4", "--max_hops 0", "--conditions refrag: must be among closed_book, rag"):
        assert part in str(caught.value)


def test_the_longest_answer_is_longer_where_the_model_searches():
    longest = {mode: rag_commands.RagEvalSettings(mode=mode).longest for mode in ("rag", "refrag")}
    assert longest == {"rag": 64, "refrag": 128}
    assert rag_commands.RagEvalSettings(mode="refrag", max_tokens=7).longest == 7
    with pytest.raises(UsageError, match="--max_tokens 0"):
        rag_commands.RagEvalSettings(max_tokens=0).check()
