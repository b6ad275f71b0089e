from collections.abc import Sequence

from nanochat.data.answers import contains_answer
from nanochat.data.world import World
from nanochat.rag.citations import number_of, parse
from nanochat.rag.prompt import retrieval_message
from nanochat.rag.questions import RagQuestion
from nanochat.rag.tasks import Given, RagWorld, Retrieved, Wrapped, ask_about
from nanochat.retrieval.document import Document, Hit
from nanochat.tasks.task import message_text
from nanochat.tasks.world import WorldQuestions
from nanochat.tokenizer import Tokenizer

T = Tokenizer([bytes([i]) for i in range(256)])


class Shelf:
    """Finds the documents that share most words with the question."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = {d.id: d for d in documents}
        self.calls: list[int] = []

    def search(self, queries: Sequence[str], k: int = 5) -> list[list[Hit]]:
        self.calls.append(len(queries))
        return [self.one(query, k) for query in queries]

    def one(self, query: str, k: int) -> list[Hit]:
        words = set(query.lower().split())
        best = sorted(self.documents.values(), key=lambda d: -len(words & set(d.text.lower().split())))
        return [Hit(d.id, 1.0, n, d) for n, d in enumerate(best[:k], 1)]

    def get(self, id: str) -> Document:
        return self.documents[id]


def test_every_answer_of_a_context_stands_in_the_document_it_cites() -> None:
    task = RagWorld(seed=5, n=60, documents=4, questions=5, absent=0.3)
    abstained = answered = 0
    for i in range(len(task)):
        messages = task[i]["messages"]
        documents = messages[0]["content"]
        assert 1 <= len(documents) <= 4
        for question, answer in zip(messages[1::2], messages[2::2]):
            number = number_of(answer["content"][0]["text"])
            abstains = answer["content"][1]["type"] == "abstain"
            abstained, answered = abstained + abstains, answered + (not abstains)
            if not number:  # somebody whom no document is about
                name = answer["content"][0]["text"].strip()
                assert abstains
                assert name in question["content"]
                assert all(name not in document["title"] for document in documents)
                continue
            document = documents[number - 1 if len(documents) > 1 else 0]
            title = document["title"].rstrip("0123456789").strip()
            assert document["title"] == f" {title}{number}" == answer["content"][0]["text"]
            assert title in question["content"]
    assert 0.2 < abstained / (abstained + answered) < 0.4
    alone = [number_of(d[0]["title"]) for i in range(60) if len(d := task[i]["messages"][0]["content"]) == 1]
    assert len(alone) > 20
    assert set(alone) == {1, 2, 3, 4}  # as when a cited document is read again


def test_contexts_are_the_same_each_time_and_never_share_a_world() -> None:
    assert RagWorld(seed=2)[17] == RagWorld(seed=2)[17]
    texts = {part["text"] for i in range(50) for part in RagWorld(seed=2)[i]["messages"][0]["content"]}
    assert len(texts) > 75  # 88 documents on average


def test_the_judge_wants_the_right_document_and_the_right_answer() -> None:
    task = RagWorld(seed=1, n=30, documents=3, questions=1, absent=0.0)
    for i in range(10):
        conversation = task[i]
        cite, said = conversation["messages"][-1]["content"]
        good = f"<|cite_start|>{cite['text']}<|cite_end|>{said['text']}"
        assert task.evaluate(conversation, good)
        assert not task.evaluate(conversation, said["text"])
        assert not task.evaluate(conversation, f"<|cite_start|>9<|cite_end|>{said['text']}")
        assert not task.evaluate(conversation, f"<|cite_start|>{cite['text']}<|cite_end|>Somebody else.")
        assert not task.evaluate(conversation, "<|abstain|>I do not know.")
    nothing = RagWorld(seed=1, n=30, documents=3, questions=1, absent=0.999)[0]
    assert task.evaluate(nothing, "<|abstain|>I do not know.")
    assert not task.evaluate(nothing, "<|cite_start|>1<|cite_end|>Something.")


def questions_and_shelf() -> tuple[list[RagQuestion], Shelf]:
    documents = [Document(f"d{i}", f"The colour of thing{i} is shade{i}.", f"thing{i}") for i in range(40)]
    questions = [
        RagQuestion(f"q{i}", f"colour of thing{i}", (f"shade{i}",), f"thing{i} is shade{i}.", (f"d{i}",))
        for i in range(40)
    ]
    return questions, Shelf(documents)


def test_retrieved_documents_hold_the_gold_or_the_answer_abstains() -> None:
    questions, shelf = questions_and_shelf()
    task = Retrieved(questions, shelf, top_k=3, keep_gold=True, absent=0.4, seed=1)
    left_out = 0
    for i in range(len(task)):
        conversation = task[i]
        texts = [part["text"] for part in conversation["messages"][0]["content"]]
        gold = any(contains_answer(text, f"shade{i}") for text in texts)
        assert gold != conversation["abstain"]
        left_out += conversation["abstain"]
        if gold:
            number = conversation["gold_numbers"][0]
            assert contains_answer(texts[number - 1], f"shade{i}")
    assert 8 <= left_out <= 24
    assert len(shelf.calls) == 1  # 40 questions, searched together and remembered


def test_a_gold_document_that_is_not_found_takes_the_last_place() -> None:
    _, shelf = questions_and_shelf()
    hidden = RagQuestion("h", "nothing like it", ("shade7",), "It is shade7.", ("d7",))
    kept = Retrieved([hidden], shelf, top_k=3, keep_gold=True)[0]
    assert not kept["abstain"]
    assert len(kept["messages"][0]["content"]) == 3
    assert Retrieved([hidden], shelf, top_k=3)[0]["abstain"]


def test_given_documents_and_several_gold_ones() -> None:
    documents = tuple(Document(str(i), f"text {i}", f"T{i}") for i in range(4))
    question = RagQuestion("q", "Which?", ("yes",), "yes", ("1", "3"), documents)
    conversation = Given([question], seed=3)[0]
    parts = conversation["messages"][-1]["content"]
    assert [p["type"] for p in parts] == ["cite", "cite", "text"]
    assert [number_of(p["text"]) for p in parts[:2]] == conversation["gold_numbers"]
    half = ask_about(question, retrieval_message(documents[:2]))
    assert half["abstain"]  # one of two gold documents is not enough


def test_any_chat_task_can_be_wrapped() -> None:
    world = World(0, 20, 40)
    inner = WorldQuestions(world, limit=5)
    shelf = Shelf([Document(d["id"], d["content"], d["title"]) for d in world.documents("known")])
    task = Wrapped(inner, shelf, top_k=2)
    assert len(task) == 5
    for i in range(5):
        roles = [m["role"] for m in task[i]["messages"]]
        assert roles == ["retrieval", "user", "assistant"]
        assert task.evaluate(task[i], message_text(inner[i]["messages"][-1]))
        shown = {part["title"].rstrip("0123456789").strip() for part in task[i]["messages"][0]["content"]}
        assert world.name(inner.question(i).entity) in shown


def test_what_the_model_says_is_read_as_it_was_written() -> None:
    conversation = RagWorld(seed=9, n=5, documents=2, questions=1, absent=0.0)[0]
    rendered = T.render(conversation)
    produced = [i for i, m in zip(rendered.ids, rendered.mask) if m]
    answer = parse(produced, T, [part["title"] for part in conversation["messages"][0]["content"]])
    assert list(answer.citations) == conversation["gold_numbers"]
    assert answer.text == conversation["messages"][-1]["content"][1]["text"].strip()
