"""RAG evaluation: readers whose behaviour is known, in place of the engine, give metrics that are known; a random model
goes through the command."""

import json
import re
from dataclasses import replace

import pytest
from readers import build_reader, hotpot

from nanochat.data.answers import ABSTENTION
from nanochat.data.world import World
from nanochat.engine.generate import Completion
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import rag
from nanochat.evaluation.rag import Options, evaluate_rag, measure_rag
from nanochat.evaluation.rag_questions import world_questions
from nanochat.evaluation.rag_result import CONDITIONS, parts
from nanochat.intervals import share
from nanochat.rag.citations import number_of
from nanochat.rag.questions import RagQuestion, load_questions
from nanochat.rag.tasks import as_document
from nanochat.retrieval.document import Document, Hit

WORLD = World(7, 20, 60)


@pytest.fixture(scope="module")
def tokenizer(reader_tokenizer):
    return reader_tokenizer


@pytest.fixture(scope="module")
def model(reader):
    return reader


class Shelf:
    """Knows the world's documents. Finds the named entity's, then others; `miss` says which questions find only the
    others."""

    def __init__(self, documents=None, miss=lambda query: False):
        found = (as_document(r) for r in WORLD.documents("new")) if documents is None else documents
        self.documents, self.miss = {d.id: d for d in found}, miss

    def search(self, queries, k=5):
        return [self.one(query, k) for query in queries]

    def one(self, query, k):
        named = [d for d in self.documents.values() if d.title in query]
        others = [d for d in self.documents.values() if d.title not in query]
        order = others if self.miss(query) else [*named, *others]
        return [Hit(d.id, 1.0, n, d) for n, d in enumerate(order[:k], 1)]

    def get(self, id):
        return self.documents[id]

    def __contains__(self, id):
        return id in self.documents

    def __len__(self):
        return len(self.documents)


def read_prompt(tokenizer, ids):
    """(question, [(number, content)]) of a prompt; documents None without a retrieval block."""
    text = tokenizer.decode(ids)
    question = re.findall(r"<\|user_start\|>(.*?)<\|user_end\|>", text, re.DOTALL)[-1]
    if "<|retrieval_start|>" not in text:
        return question, None
    shown = re.findall(r"<\|doc_start\|>(.*?)<\|doc_title_end\|>(.*?)<\|doc_end\|>", text, re.DOTALL)
    return question, [(number_of(title), body.strip()) for title, body in shown]


class Reader:
    """Stands in for the engine: `answer(question, documents)` gives (cited numbers, text), or None to abstain."""

    def __init__(self, model, tokenizer, max_rows=0):
        self.tokenizer = tokenizer

    def generate_batch(self, prompts, sampling=None, n=1):
        found = []
        for ids in prompts:
            said, special = self.answer(*read_prompt(self.tokenizer, ids)), self.tokenizer.special
            if said is None:
                out = [special("abstain"), *self.tokenizer.encode(ABSTENTION)]
            else:
                cites = [[special("cite_start"), *self.tokenizer.encode(str(c)), special("cite_end")] for c in said[0]]
                out = [*(i for cite in cites for i in cite), *self.tokenizer.encode(said[1])]
            found.append(Completion([*out, self.tokenizer.eot], "", [], "stop"))
        return found


N, U = 60, 20  # questions with and without an answer
FACTS = {q.question: q for q in world_questions(WORLD, N, U)}


class Perfect(Reader):
    """Answers from the documents, cites, and abstains when they do not say."""

    def answer(self, question, documents):
        fact = FACTS[question]
        for number, content in documents or []:
            entity = int(fact.gold[0].split("-")[0]) if fact.gold else -1
            if entity >= 0 and WORLD.document(entity)["content"] == content:
                return (number,), fact.sentence
        return None


class Liar(Reader):
    """Never abstains, always cites document 1 (and one that is not there) and repeats its first sentence."""

    def answer(self, question, documents):
        if not documents:
            return (), "Brimholt."
        return (documents[0][0], 9), documents[0][1].split(".")[0] + "."


class Knower(Reader):
    """Knows every answer by heart, and cites nothing."""

    def answer(self, question, documents):
        return ((), FACTS[question].answers[0]) if FACTS[question].answers else None


def run(monkeypatch, model, tokenizer, reader, shelf=None, questions=None, **options):
    monkeypatch.setattr(rag, "Engine", reader)
    options = {"top_k": 3, "n_latency": 2, "order": "best_first", **options}
    return measure_rag(model, tokenizer, shelf or Shelf(), questions or list(FACTS.values()), Options(**options))


# ---- readers whose metrics are known


def test_a_perfect_reader_is_perfect_where_it_can_read(monkeypatch, model, tokenizer):
    result = run(monkeypatch, model, tokenizer, Perfect)
    metrics = result.metrics()
    assert metrics["rag_em"] == metrics["rag_gold_em"] == share(N, N)
    assert metrics["rag_f1"].value == 1.0
    assert metrics["closed_book_new_em"] == metrics["rag_shuffled_em"] == metrics["no_documents_em"] == share(0, N)
    assert metrics["hallucination_rate"] == share(0, N + U)
    assert metrics["citation_precision"] == metrics["citation_recall"] == share(N, N)
    assert metrics["abstain_unanswerable"] == metrics["closed_book_new_abstain_unanswerable"] == share(U, U)
    assert metrics["rag_abstain_answerable"] == share(0, N)
    assert metrics["rag_shuffled_abstain_answerable"] == share(N, N)
    assert metrics["retrieval_recall"] == metrics["rag_gold_retrieval_recall"] == share(N, N)
    assert metrics["rag_shuffled_retrieval_recall"] == share(0, N)
    assert metrics["rag_latency_ms"].value > 0
    assert metrics["rag_latency_ms"].n == 2
    assert metrics["retrieval_ms"].n == N + U
    assert list(result.columns) == list(CONDITIONS)


def test_a_perfect_reader_abstains_where_the_search_fails(monkeypatch, model, tokenizer):
    def miss(query):
        return sum(map(ord, query)) % 3 == 0

    missed = sum(miss(q.question) for q in FACTS.values() if q.answerable)
    metrics = run(monkeypatch, model, tokenizer, Perfect, Shelf(miss=miss)).metrics()
    assert N / 6 < missed < N / 2
    assert metrics["rag_em"] == metrics["retrieval_recall"] == share(N - missed, N)
    assert metrics["rag_abstain_answerable"] == share(missed, N)
    assert metrics["hallucination_rate"] == share(0, N + U)
    assert metrics["rag_gold_em"] == share(N, N)


def test_a_liar_is_caught(monkeypatch, model, tokenizer):
    result = run(monkeypatch, model, tokenizer, Liar)
    metrics = result.metrics()
    lucky = sum(j.right for j in result.columns["rag"].judged)
    assert metrics["rag_em"] == share(lucky, N)
    assert metrics["hallucination_rate"] == share(N + U - lucky, N + U)
    assert metrics["citation_precision"].value == pytest.approx(lucky / (2 * (N + U)))
    assert metrics["citation_recall"] == share(lucky, N + U)
    assert metrics["abstain_unanswerable"] == share(0, U)
    assert metrics["closed_book_new_hallucination_rate"].value > 0.95
    assert 0 < lucky < N / 2  # the first sentence of the right document sometimes answers


def test_who_knows_by_heart_is_right_without_support(monkeypatch, model, tokenizer):
    metrics = run(monkeypatch, model, tokenizer, Knower).metrics(new=False)
    assert metrics["closed_book_em"] == metrics["rag_shuffled_em"] == metrics["no_documents_em"] == share(N, N)
    assert metrics["closed_book_hallucination_rate"] == share(0, N + U)
    assert metrics["hallucination_rate"] == share(0, N + U)  # the documents are there, and say so
    assert metrics["rag_shuffled_hallucination_rate"] == metrics["no_documents_hallucination_rate"] == share(N, N)
    assert metrics["citation_recall"] == share(0, N)
    assert "citation_precision" not in metrics


def test_shuffling_takes_the_gain_from_citing_the_first(monkeypatch, model, tokenizer):
    def first(order):
        return run(monkeypatch, model, tokenizer, Perfect, order=order, n_latency=0).metrics()["always_cite_first"]

    assert first("best_first") == share(N, N)
    assert 0.15 < first("shuffled").value < 0.55  # one of three
    assert run(monkeypatch, model, tokenizer, Perfect, order="shuffled").metrics()["citation_precision"] == share(N, N)


class Drafter(Reader):
    """Finds the gold document, and takes the value from it only where no other is in sight."""

    def answer(self, question, documents):
        fact = FACTS[question]
        gold = {WORLD.document(int(one.split("-")[0]))["content"] for one in fact.gold}
        found = [(number, content) for number, content in documents or [] if content in gold]
        if not found:
            return ("Kay Nobody3",), "Brimholt."  # cites what is not there
        return (found[0][0],), fact.sentence if len(documents) == 1 else "Brimholt."


def test_an_answer_is_written_from_the_documents_that_its_draft_cites(monkeypatch, model, tokenizer):
    metrics = run(monkeypatch, model, tokenizer, Drafter).metrics()
    assert metrics["rag_em"] == metrics["rag_gold_em"] == metrics["citation_precision"] == share(N, N)
    assert metrics["abstain_unanswerable"] == share(U, U)  # a draft that cites only what is not there is not believed
    assert metrics["rag_shuffled_em"] == share(0, N)
    once = run(monkeypatch, model, tokenizer, Drafter, reread=False).metrics()
    assert once["rag_em"] == share(0, N)
    assert once["abstain_unanswerable"] == share(0, U)
    assert once["rag_gold_em"] == share(N, N)


def test_silence_is_no_abstention(monkeypatch, model, tokenizer):
    class Silent(Reader):
        def answer(self, question, documents):
            return (), ""

    metrics = run(monkeypatch, model, tokenizer, Silent).metrics()
    assert metrics["hallucination_rate"] == share(N + U, N + U)
    assert metrics["abstain_unanswerable"] == share(0, U)
    assert "citation_recall" not in metrics


def test_the_calibrated_score_tells_true_answers_from_false_ones(monkeypatch, model, tokenizer):
    class Wavering(Perfect):
        """Changes the value in every second answer, and answers where it should not."""

        def answer(self, question, documents):
            said = super().answer(question, documents)
            if said is None and documents:
                return (1,), "The ghost of the hill is Olga Zinn."
            if said is None or sum(map(ord, question)) % 2:
                return said
            gold = FACTS[question].answers[0]
            return said[0], said[1].replace(gold, "Zinnholt")

    metrics = run(monkeypatch, model, tokenizer, Wavering).metrics()
    assert metrics["support_auc"].value > 0.97
    assert metrics["support_ece"].value < 0.15


def test_citations_without_gold_ids_are_judged_by_what_documents_hold(monkeypatch, model, tokenizer):
    documents = [Document("a", "Torwick has 99 boats.", "Torwick"), Document("b", "Nothing here.", "Brimholt")]
    questions = [
        RagQuestion("q1", "How many boats has Torwick?", ("99",), "", ()),
        RagQuestion("q2", "And how many boats in Brimholt?", ("7",), "", ()),
    ]

    class Counter(Reader):
        def answer(self, question, documents):
            if not documents:
                return None
            number = next((n for n, content in documents if "99" in content), 1)
            return (number,), "99" if "Torwick" in question else "7"

    monkeypatch.setattr(rag, "Engine", Counter)
    metrics = evaluate_rag(model, tokenizer, Shelf(documents), questions, 2, n_latency=0)
    assert metrics["rag_em"] == share(2, 2)
    assert metrics["hallucination_rate"] == share(1, 2)  # no document says 7
    assert metrics["citation_precision"] == share(1, 2)
    assert metrics["answer_in_prompt"] == share(1, 2)
    assert "retrieval_recall" not in metrics
    assert not [name for name in metrics if name.startswith("rag_gold")]


# ---- questions that bring their documents


def test_hotpotqa_brings_its_documents(monkeypatch, model, tokenizer, tmp_path):
    class Copyist(Reader):
        def answer(self, question, documents):
            name = re.search(r"Mara \d+", question)[0]
            found = [(n, content) for n, content in documents or [] if content.startswith(name)]
            return ((found[0][0], 9), found[0][1]) if found else None

    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps([hotpot(i) for i in range(6)], indent=1))
    monkeypatch.setattr(rag, "Engine", Copyist)
    result = measure_rag(model, tokenizer, None, load_questions(path), Options(n_latency=0))
    metrics = result.metrics(new=False)
    assert metrics["rag_em"] == metrics["rag_gold_em"] == share(6, 6)
    assert metrics["rag_shuffled_em"] == metrics["closed_book_em"] == share(0, 6)
    assert metrics["retrieval_recall"].value == 1.0
    assert metrics["rag_gold_retrieval_all_gold"] == share(6, 6)
    assert metrics["rag_shuffled_retrieval_all_gold"] == share(0, 6)
    assert metrics["citation_precision"].value == 0.5  # one of two names no document
    assert metrics["citation_recall"] == share(6, 6)
    shown = [set(j.documents) for j in result.columns["rag_shuffled"].judged]
    assert all("Torwick" not in titles for titles in shown)  # its own gold paragraph, whoever brings it
    assert all(len(j.documents) == 2 for j in result.columns["rag_gold"].judged)


# ---- what is checked before anything is generated


class Never(Reader):
    def generate_batch(self, *_):
        raise AssertionError("the model was asked")


def refused(monkeypatch, model, tokenizer, knowledge, questions, error=UsageError, **options):
    monkeypatch.setattr(rag, "Engine", Never)
    with pytest.raises(error) as caught:
        evaluate_rag(model, tokenizer, knowledge, questions, **options)
    return str(caught.value)


def test_all_that_cannot_be_asked_is_said_at_once(monkeypatch, model, tokenizer):
    questions = [
        RagQuestion("q1", "Who?", ("Mara",), "", ("nowhere",)),
        RagQuestion("q2", "Where is it, " + "and where else, " * 400, ("Torwick",), "", ()),
    ]
    text = refused(monkeypatch, model, tokenizer, Shelf([]), questions)
    assert "the knowledge base is empty" in text
    assert "question q1: its gold document 'nowhere' is not in the knowledge base" in text
    assert re.search(r"question q2: needs \d+ tokens \(64 for the answer, 32 for documents\), .* has 1024", text)
    text = refused(monkeypatch, model, tokenizer, None, questions[:1])
    assert "q1: brings no documents" in text
    assert "is not in the question's documents" not in text  # which follows
    own = replace(questions[0], documents=(Document("here", "Mara."),), place="line 3")
    text = refused(monkeypatch, model, tokenizer, None, [own])
    assert "line 3, question q1: its gold document 'nowhere' is not in the question's documents" in text
    assert "there is no question" in refused(monkeypatch, model, tokenizer, Shelf(), [])


def test_many_problems_are_cut_short(monkeypatch, model, tokenizer):
    questions = [RagQuestion(f"q{i}", "Who?", ("Mara",), "", ("x",)) for i in range(50)]
    text = refused(monkeypatch, model, tokenizer, Shelf(), questions)
    assert "and 30 more" in text


def test_a_knowledge_base_that_finds_nothing_is_an_error(monkeypatch, model, tokenizer):
    class Blank(Shelf):
        def one(self, query, k):
            return []

    text = refused(monkeypatch, model, tokenizer, Blank(), list(FACTS.values()), NanochatError)
    assert f"finds no document for any of the {N + U} questions" in text


def test_a_few_questions_that_find_nothing_are_asked_without(monkeypatch, model, tokenizer, caplog):
    class Patchy(Shelf):
        def one(self, query, k):
            return [] if "Tell me" in query else super().one(query, k)

    nothing = sum("Tell me" in q for q in FACTS)
    metrics = run(monkeypatch, model, tokenizer, Perfect, Patchy()).metrics()
    assert f"{nothing} of {N + U} questions find no document" in caplog.text
    assert metrics["hallucination_rate"].value == 0.0


def test_wrong_options(monkeypatch, model, tokenizer):
    questions = list(FACTS.values())
    assert "rag_golden" in refused(monkeypatch, model, tokenizer, Shelf(), questions, conditions=["rag_golden"])
    assert "--top_k 0" in refused(monkeypatch, model, tokenizer, Shelf(), questions, top_k=0)


# ---- details


def test_documents_are_cut_to_the_context_and_counted(monkeypatch, tokenizer, caplog):
    class Meter(Reader):
        def generate_batch(self, prompts, sampling=None, n=1):
            assert all(len(prompt) <= 256 - 64 for prompt in prompts)
            assert sum(len(p) > 160 for p in prompts) > len(prompts) / 2 or len(prompts) < 2
            return super().generate_batch(prompts)

        def answer(self, question, documents):
            return None

    small = build_reader(tokenizer, 256)
    monkeypatch.setattr(rag, "Engine", Meter)
    result = measure_rag(small, tokenizer, Shelf(), list(FACTS.values()), Options(n_latency=1), ["rag"])
    assert f"in {N + U} of {N + U} prompts documents were shortened or left out" in caplog.text
    assert all(j.cut for j in result.columns["rag"].judged)
    assert list(result.columns) == ["rag"]


def test_shuffled_documents_never_hold_the_gold_one_and_come_by_seed(monkeypatch, model, tokenizer):
    def shown(seed):
        result = run(monkeypatch, model, tokenizer, Perfect, seed=seed)
        for j in result.columns["rag_shuffled"].judged:
            assert WORLD.name(int(j.question.gold[0].split("-")[0])) not in j.documents
            assert j.documents
        return [j.documents for j in result.columns["rag_shuffled"].judged]

    assert shown(0) == shown(0) != shown(1)


def test_one_question_alone_is_shuffled_against_its_own_finds(monkeypatch, model, tokenizer):
    one = [next(iter(FACTS.values()))]
    result = run(monkeypatch, model, tokenizer, Perfect, questions=one)
    assert len(result.columns["rag_shuffled"].judged[0].documents) == 2
    assert result.metrics()["rag_em"] == share(1, 1)


def test_ranks_share_the_questions(monkeypatch, model, tokenizer):
    whole = run(monkeypatch, model, tokenizer, Perfect, n_latency=0).columns["rag"].judged
    gathered = []
    monkeypatch.setattr(rag, "gather", lambda items: gathered.append(items) or items)
    monkeypatch.setattr(rag.runtime, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(rag.runtime, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(rag, "Engine", Perfect)
        options = Options(3, order="best_first", n_latency=0)
        measure_rag(model, tokenizer, Shelf(), list(FACTS.values()), options, ["rag"])
    assert sorted(gathered[0] + gathered[1], key=lambda j: j.number) == whole


def test_shares_of_several_things_a_question_are_resampled():
    assert parts("x", [(1, 1), (0, 1), (0, 0)], 0) == {"x": share(1, 2)}
    assert parts("x", [(0, 0)], 0) == {}
    found = parts("x", [(2, 2), (0, 2), (1, 2), (2, 2)], 0)["x"]
    assert (found.value, found.n) == (0.625, 4)
    assert found.low < 0.625 < found.high


def test_the_table_has_a_column_a_condition(monkeypatch, model, tokenizer):
    lines = run(monkeypatch, model, tokenizer, Perfect).table().splitlines()
    assert all(title in lines[0] for title in CONDITIONS.values())
    assert any(line.startswith("right answer") and "1.000 [0.940, 1.000]" in line for line in lines)
    assert lines[-1].split() == ["questions", *map(str, (N + U, N + U, N, N, N))]
    assert len({len(line) for line in lines}) == 1


# ---- questions of the world


def test_world_questions_have_gold_documents_that_state_the_answer():
    questions = list(FACTS.values())
    assert [q.answerable for q in questions] == [True] * N + [False] * U
    held_out = 0
    for q in questions[:N]:
        document = WORLD.document(int(q.gold[0].split("-")[0]))
        assert q.gold == (document["id"],)
        assert q.answers[0].lower() in document["content"].lower()
        held_out += document["entity"] in WORLD.pool("new", "heldout")
    assert held_out == N // 4
    assert len({q.id for q in questions}) == N + U
    assert world_questions(WORLD, N, U, seed=1) != questions


def test_a_world_that_is_too_small_says_how_large_it_has_to_be():
    with pytest.raises(UsageError, match=r"give only 336 questions, not 1000") as error:
        world_questions(WORLD, 1000, 0)
    enough = int(re.search(r"new=(\d+)", str(error.value))[1])
    assert len(world_questions(World(7, 20, enough), 1000, 0)) == 1000
    with pytest.raises(UsageError, match="new=0"):
        world_questions(World(7, 20, 0), 10, 0)
