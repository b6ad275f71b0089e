"""Chat with documents: what is retrieved, how the prompt is laid out, what comes back."""

import threading

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat.data.answers import ABSTENTION
from nanochat.engine.prefix import PrefixCache
from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.rag.calibration import Weights
from nanochat.rag.citation_stream import CitationStream
from nanochat.rag.citations import parse
from nanochat.rag.grounded import GroundedChat, as_messages, lay_out
from nanochat.retrieval.document import Document, Hit
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
CITE, CITED, ABSTAIN, DOC_END = (TOKENIZER.special(n) for n in ("cite_start", "cite_end", "abstain", "doc_end"))
DOCUMENTS = [
    Document("torwick", "Torwick was founded by Mara Velt.", "Torwick", "towns.jsonl"),
    Document("mara", "Mara Velt was born in Fairfield.", "Mara Velt"),
    Document("orvane", "Orvane lies on the river Rill.", "Orvane"),
]


class Shelf:
    """Finds documents that share a capitalised word with the query, in the shelf's order."""

    def __init__(self, documents=DOCUMENTS) -> None:
        self.documents, self.queries = list(documents), []

    def __len__(self) -> int:
        return len(self.documents)

    def search(self, queries, k=5):
        self.queries += queries
        return [self.find(query, k) for query in queries]

    def find(self, query, k):
        words = {word.strip("?.!") for word in query.split() if word[0].isupper()}
        found = [d for d in self.documents if words & set(d.text.replace(".", " ").split())][:k]
        return [Hit(d.id, 1.0 / n, n, d) for n, d in enumerate(found, 1)]

    def get(self, id):
        return next(d for d in self.documents if d.id == id)


class Scripted:
    """A model that says what it is told, and keeps the prompts that it was given."""

    def __init__(self, *script, context: int = 1000) -> None:
        self.script = [*script, TOKENIZER.eot]
        self.config = ModelConfig(vocab_size=TOKENIZER.vocab_size, sequence_len=context)
        self.device = torch.device("cpu")
        self.at, self.read = 0, []

    def init_states(self, batch, max_len=0):
        return []

    def __call__(self, ids, states, lengths=None):
        self.read += ids.flatten().tolist()
        return torch.zeros(ids.shape[0], ids.shape[1], 1)

    def logits(self, hidden):
        out = torch.zeros(hidden.shape[0], TOKENIZER.vocab_size)
        out[:, self.script[self.at % len(self.script)]] = 9.0
        self.at += 1
        return out

    @property
    def prompt(self) -> str:
        return TOKENIZER.decode(self.read)


def cite(n) -> list[int]:
    return [CITE, *TOKENIZER.encode(str(n)), CITED]


def text(words: str) -> list[int]:
    return TOKENIZER.encode(words)


def scripted(*script, knowledge=None, context: int = 1000, **options) -> GroundedChat:
    model = Scripted(*script, context=context)
    options = {"cache": PrefixCache(0), **options}
    return GroundedChat(model, TOKENIZER, knowledge or Shelf(), **options)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def said(content) -> dict:
    return {"role": "assistant", "content": content}


def drain(stream):
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_an_answer_brings_its_citations_documents_and_support():
    chat = scripted(*cite(1), *text("Mara Velt founded Torwick."))
    answer = chat.chat("Who founded Torwick?")
    assert answer.text == "Mara Velt founded Torwick. [1]"
    assert answer.documents == (DOCUMENTS[0],)
    assert answer.citations == (DOCUMENTS[0],)
    assert answer.sources == ["[1] Torwick (towns.jsonl)"]
    assert str(answer) == "Mara Velt founded Torwick. [1]\n[1] Torwick (towns.jsonl)"
    assert answer.query == "Who founded Torwick?"
    assert len(answer.support) == len(answer.answer.sentences) == 1
    assert answer.support[0].score > 0.5
    assert answer.support[0].embedding is None
    assert not answer.abstained
    assert answer.seconds > 0
    made_up = scripted(*cite(1), *text("Dirk Amsel founded Torwick.")).chat("Who founded Torwick?")
    assert made_up.support[0].score < answer.support[0].score


def test_several_citations_come_behind_their_sentences_as_they_are_written():
    script = [*cite(2), *cite(1), *text("Mara Velt of Fairfield founded it. "), *cite(7), *cite(1), *text("So it is.")]
    pieces, answer = drain(scripted(*script, reread=False).stream_chat("Who is Mara of Torwick?"))
    assert "".join(pieces) == answer.text == "Mara Velt of Fairfield founded it. [2] [1] So it is. [1]"
    assert answer.answer.render() == answer.text
    assert answer.answer.invalid == ("7",)
    assert [d.id for d in answer.citations] == ["mara", "torwick"]
    assert len(pieces) > 10


def test_the_answer_is_written_from_the_documents_that_the_draft_cites():
    draft, answer = [*cite(2), *text("In Orvane."), TOKENIZER.eot], [*cite(2), *text("In Fairfield.")]
    chat = scripted(*draft, *answer)
    pieces, found = drain(chat.stream_chat("Where was Mara of Torwick born?"))
    assert "".join(pieces) == found.text == "In Fairfield. [2]"
    assert len(pieces) > 1
    assert found.documents == (DOCUMENTS[0], DOCUMENTS[1])
    assert found.citations == (DOCUMENTS[1],)
    first, again = chat.model.prompt.split("<|bos|>")[1:]
    assert " Torwick1<" in first
    assert " Mara Velt2<" in again
    assert " Torwick1<" not in again


def test_a_draft_stands_where_there_is_nothing_to_read_again():
    everything = [*cite(1), *cite(2), *text("Mara Velt of Fairfield.")]
    for script in (everything, text("Nobody knows."), [ABSTAIN, *text("I do not know.")]):
        chat = scripted(*script)
        assert chat.chat("Who is Mara of Torwick?").completion.ids == [*script, TOKENIZER.eot]
        assert chat.model.prompt.count("<|bos|>") == 1
    alone = scripted(*cite(1), *text("Mara Velt."))
    alone.chat("Who founded Torwick?")  # one document: no draft
    assert alone.model.prompt.count("<|bos|>") == 1


def test_a_draft_that_cites_only_what_is_not_there_becomes_an_abstention():
    chat = scripted(CITE, *text("Kay Oakes2"), CITED, *text("In Fairfield."))
    answer = chat.chat("Where was Mara of Torwick born?")
    assert answer.abstained
    assert (answer.text, answer.citations, answer.support) == (ABSTENTION, (), ())
    assert not scripted(CITE, *text("Kay Oakes2"), CITED, *text("So."), reread=False).chat("Mara of Torwick?").abstained


TOKENS = [CITE, CITED, ABSTAIN, DOC_END, *b" \n12a.", *"é".encode(), 0xE2]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=25), st.integers(0, 12))
@example([CITE, *b"1", CITED, *b" ", ABSTAIN, *b"1"], 1)  # a blank before: no abstention
@example([CITE, *b"1", CITED, 0xE2, ABSTAIN, *b"1"], 1)
def test_the_stream_says_what_the_whole_answer_says(ids, n_documents):
    names = [f" {n}" for n in range(1, n_documents + 1)]
    stream = CitationStream(TOKENIZER, names)
    pieces = [*map(stream.feed, ids), stream.flush()]
    assert "".join(pieces) == parse(ids, TOKENIZER, names).render()


def test_documents_come_first_then_the_conversation_without_old_citations():
    chat = scripted(*text("In Fairfield."))
    system = {"role": "system", "content": "Be brief."}
    old = {"role": "retrieval", "content": [{"type": "document", "title": "1", "text": "old"}]}
    turns = [system, old, user("Who founded Torwick?"), said("Mara Velt. [1]"), user("Where was she born?")]
    answer = chat.chat(turns)
    assert answer.query == "Where was she born? Torwick Mara Velt"
    assert [d.id for d in answer.documents] == ["torwick", "mara"]
    prompt = chat.model.prompt
    order = ["Be brief.", "<|retrieval_start|>", "founded by", "Fairfield", "Who founded"]
    order += ["Mara Velt.<|assistant", "Where was"]
    places = [prompt.index(part) for part in order]
    assert places == sorted(places)
    assert "[1]" not in prompt
    assert "old" not in prompt
    parts = [{"type": "cite", "text": "1"}, {"type": "text", "text": "Mara."}]
    with_parts = [user("Who founded Torwick?"), said(parts)]
    chat = scripted(*text("x"))
    chat.chat([*with_parts, user("Why, Mara?")])
    assert "<|cite_start|>" not in chat.model.prompt


def test_nothing_found_is_an_abstention_without_asking_the_model():
    chat = scripted(*text("Nonsense."))
    pieces, answer = drain(chat.stream_chat("Who built Underwade?"))
    assert "".join(pieces) == answer.text == ABSTENTION
    assert answer.abstained
    assert (answer.documents, answer.citations, answer.support, answer.sources) == ((), (), (), [])
    assert answer.completion is None
    assert chat.model.read == []


def test_the_model_abstains():
    answer = scripted(ABSTAIN, *text(ABSTENTION)).chat("Who ruled Torwick?")
    assert answer.abstained
    assert answer.text == ABSTENTION
    assert answer.documents
    assert answer.support == ()


def test_thanks_are_answered_without_a_search():
    chat = scripted(*text("You are welcome!"))
    answer = chat.chat([user("Who founded Torwick?"), said("Mara Velt."), user("Thank you!")])
    assert answer.text == "You are welcome!"
    assert answer.query == ""
    assert chat.knowledge.queries == []
    assert "retrieval_start" not in chat.model.prompt


def test_a_query_of_ones_own():
    def shouted(messages) -> str:
        return f" {messages[-1]['content'].title()} "

    chat = scripted(*text("x"), rewrite=shouted)
    assert chat.chat("what of orvane?").query == "What Of Orvane?"
    assert chat.knowledge.queries == ["What Of Orvane?"]
    query, hits = chat.retrieve([user("torwick")])
    assert (query, [hit.id for hit in hits]) == ("Torwick", ["torwick"])


def test_long_documents_and_questions_fit_the_context(caplog):
    long = [Document(str(i), f"Torwick {i} " + "word " * 400, f"Torwick {i}") for i in range(4)]
    for question in ("Who founded Torwick?", "Torwick " + "and so on " * 300 + "the end?"):
        chat = scripted(*text("x"), knowledge=Shelf(long), context=400)
        answer = chat.chat(question)
        assert 200 < len(chat.model.read) <= 300  # a quarter is left for the answer
        assert 1 <= len(answer.documents) <= 4
        for document in answer.documents:  # the model saw them as they are returned
            assert document.content in chat.model.prompt
        assert question[-8:] in chat.model.prompt
    assert "the question is too long for the context" in caplog.text
    chat = scripted(*text("x"), knowledge=Shelf(long), document_tokens=60, context=400)
    assert sum(len(text(d.content)) for d in chat.chat("Who founded Torwick?").documents) <= 60


def test_no_document_fits(caplog):
    chat = scripted(*text("x"), knowledge=Shelf(), context=24)
    assert chat.chat("Torwick?").text == ABSTENTION
    assert "documents fits into" in caplog.text


def test_long_conversations_lose_their_oldest_turns_but_not_the_documents(caplog):
    turns = [message for i in range(20) for message in (user(f"Question {i} of Torwick"), said(f"Answer {i}."))]
    block, messages = lay_out([*turns, user("Last, Torwick?")], DOCUMENTS[:1], TOKENIZER, 300)
    assert block.documents == (DOCUMENTS[0],)
    ids = TOKENIZER.render_prompt({"messages": messages}).ids
    assert len(ids) <= 300
    shown = TOKENIZER.decode(ids)
    assert "founded by Mara" in shown
    assert "Answer 19." in shown
    assert "Question 0 " not in shown
    assert messages[1]["role"] == "user"
    assert "the oldest" in caplog.text


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=6),
    question=st.integers(1, 400),
    found=st.lists(st.integers(0, 300), max_size=4),
    limit=st.integers(12, 400),
)
def test_any_conversation_fits(lengths, question, found, limit):
    turns = [(user if i % 2 == 0 else said)("w" * n) for i, n in enumerate(lengths[: len(lengths) // 2 * 2])]
    documents = [Document(str(i), f"{i}" * n, "t") for i, n in enumerate(found)]
    block, messages = lay_out([*turns, user("q" * question)], documents, TOKENIZER, limit)
    ids = TOKENIZER.render_prompt({"messages": messages}, limit).ids
    assert len(ids) <= limit
    if limit >= 40:
        assert TOKENIZER.render_prompt({"messages": messages}).ids == ids  # nothing was left to cut
        assert ids.count(DOC_END) == len(block.documents)


def test_wrong_calls_say_what_is_wrong():
    for options, message in (
        ({"top_k": 0}, "top_k 0: expected at least 1"),
        ({"order": "random"}, "document order 'random'"),
        ({"document_tokens": -1}, "document_tokens -1"),
        ({"knowledge": Shelf([Document("x", "y")][:0])}, "holds no documents"),
    ):
        knowledge = options.pop("knowledge", Shelf())
        with pytest.raises(UsageError, match=message):
            GroundedChat(Scripted(), TOKENIZER, knowledge, **options)
    chat = scripted(*text("x"))
    with pytest.raises(UsageError, match="unknown sampling option 'temprature'"):
        chat.chat("Torwick?", temprature=1.0)
    for messages in ([], [said("x")], [{"role": "system", "content": "x"}]):
        with pytest.raises(UsageError, match="must end with a question"):
            chat.chat(messages)
    assert as_messages([user("a"), said("b")]) == [user("a")]


# ---- a real model


@pytest.fixture(scope="module")
def model() -> LM:
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, sequence_len=400, depth=2, d_model=32, head_dim=16, head_dim2=16, d_state2=16
    )
    model = LM.build(config, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0.0, p.size(1) ** -0.5)
    return model.eval().requires_grad_(False)


def test_the_cache_changes_no_answer_and_is_shared_by_threads(model):
    plain = GroundedChat(model, TOKENIZER, Shelf(), cache=PrefixCache(0))
    cached = GroundedChat(model, TOKENIZER, Shelf())
    questions = ["Who founded Torwick?", "When did Mara Velt found Torwick?", "Where is Torwick?", "Orvane?"]
    expected = [plain.chat(q, max_tokens=12).text for q in questions]
    assert [cached.chat(q, max_tokens=12).text for q in questions] == expected
    assert cached.cache.hits == 2
    assert cached.cache.tokens_saved > 90
    assert len(plain.cache) == 0
    found: dict[str, str] = {}

    def ask(question: str) -> None:
        found[question] = cached.chat(question, max_tokens=12).text

    threads = [threading.Thread(target=ask, args=(q,)) for q in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict(zip(questions, expected))


def test_contrast_is_one_more_sign(model):
    with pytest.raises(UsageError, match="support by lexical and contrast needs a calibration"):
        GroundedChat(model, TOKENIZER, Shelf(), contrast=True, calibration={frozenset({"lexical"}): Weights(-4.0, 8.0)})
    chat = GroundedChat(model, TOKENIZER, Shelf(), contrast=True)
    answer = chat.chat("Who founded Torwick?", max_tokens=12)
    assert all(support.contrast is not None for support in answer.support)


@pytest.mark.parametrize(
    "script",
    [
        [CITE, *text(" Torwick was founded by nobody.")],  # a citation that never ends
        [*cite(1)],
        [CITE],
    ],
)
def test_an_answer_that_only_cites_is_an_abstention(script):
    pieces, answer = drain(scripted(*script, top_k=1).stream_chat("Who founded Torwick?"))
    assert "".join(pieces) == answer.text == ABSTENTION
    assert answer.abstained
    assert answer.support == ()


def test_a_draft_that_was_cut_off_says_so():
    answer = scripted(CITE, *text(" Torwick")).chat("Who founded Torwick and Mara Orvane?", max_tokens=3)
    assert answer.abstained
    assert answer.completion.finish_reason == "length"


def test_documents_that_lose_their_ends_are_spoken_of(caplog):
    long = Document("long", "Torwick is old. " * 300, "Torwick")
    scripted(*text("Yes."), knowledge=Shelf([long])).chat("Is Torwick old?")
    assert "the documents are too long for" in caplog.text
    caplog.clear()
    scripted(*text("Yes.")).chat("Is Torwick old?")
    assert "too long" not in caplog.text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "expected a question or a list of messages, got NoneType"),
        (5, "got int"),
        ([{"role": "user"}], "message 0 must be"),
        ([user("Torwick?"), "and"], "message 1 must be"),
    ],
)
def test_what_is_no_conversation(messages, message):
    with pytest.raises(UsageError, match=message):
        scripted(*text("Yes.")).chat(messages)


@pytest.mark.parametrize("knowledge", [5, object()])
def test_what_cannot_be_searched_is_refused_at_once(knowledge):
    with pytest.raises(UsageError, match="expected a knowledge base, its path, or a retriever"):
        GroundedChat(Scripted(), TOKENIZER, knowledge)


@pytest.mark.parametrize("found", [[], [["a title"]], [[], []]])
def test_a_retriever_that_finds_no_hits(found):
    class Odd:
        def search(self, queries, k=5):
            return found

    with pytest.raises(UsageError, match=r"Odd.search must return a list of nanochat.retrieval.Hit for each of 1"):
        scripted(*text("Yes."), knowledge=Odd()).chat("Torwick?")
