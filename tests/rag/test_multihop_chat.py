"""Chat that searches: a puppet that follows the chain, through the real loop."""

import pytest
from puppet import Puppet, searcher
from test_multihop import DOCUMENTS, TOKENIZER, Shelf

from nanochat.data.answers import ABSTENTION
from nanochat.engine.prefix import PrefixCache
from nanochat.errors import NanochatError, UsageError
from nanochat.rag.multihop_chat import MultiHopChat

QUESTION = "Where was the founder of Torwick born?"


def chain(question, results):
    """Searches for Torwick, for its founder, and answers."""
    titles = {title: n for result in results for n, title, _ in result}
    if "Torwick" not in titles:
        return [{"type": "text", "text": "Let me see."}, {"type": "search", "text": "Torwick founded"}]
    if "Mara Velt" not in titles:
        return [{"type": "search", "text": "Mara Velt she"}]
    return [
        *({"type": "cite", "text": str(titles[name])} for name in ("Torwick", "Mara Velt")),
        {"type": "text", "text": "The founder of Torwick was born in Brimholt."},
    ]


def build(reply=chain, **options):
    model = searcher(TOKENIZER, reply, options.pop("sequence_len", 2000))
    return MultiHopChat(model, TOKENIZER, options.pop("knowledge", Shelf()), **{"top_k": 1, **options})


def test_searches_reads_and_answers_with_citations():
    answer = build().chat(QUESTION)
    assert answer.text == "Let me see. The founder of Torwick was born in Brimholt. [1] [2]"
    assert answer.answer.text == "The founder of Torwick was born in Brimholt."
    assert [hop.query for hop in answer.hops] == ["Torwick founded", "Mara Velt she"]
    assert [d.id for d in answer.citations] == ["d0", "d1"]
    assert answer.sources == ["[1] Torwick", "[2] Mara Velt"]
    assert len(answer.support) == 1
    assert answer.completion.finish_reason == "stop"
    assert len(answer.completion.ids) == len(answer.completion.logprobs) == sum(answer.rollout.sampled)
    assert str(answer).endswith("[2] Mara Velt")


def test_the_stream_is_the_text():
    def keep(stream):
        pieces.append((yield from stream))

    pieces = []
    *shown, _ = [*keep(build().stream_chat(QUESTION)), ""]
    assert "".join(shown) == pieces[0].text
    assert len(shown) > 20


def test_an_answer_that_rests_on_what_was_not_found_is_none():
    def made_up(question, results):
        if not results:
            return [{"type": "search", "text": "Torwick founded"}]
        names = ({"type": "cite", "text": name} for name in ("1", " Kay Oakes"))
        return [*names, {"type": "text", "text": "She was born in Brimholt."}]

    def keep(stream):
        found.append((yield from stream))

    found = []
    pieces = list(keep(build(made_up).stream_chat(QUESTION)))
    assert found[0].text == "".join(pieces) == ABSTENTION
    assert found[0].abstained
    assert not found[0].citations
    assert not found[0].support


def test_a_query_that_is_begun_and_not_ended_is_no_answer():
    wanted = [TOKENIZER.special("search_start"), *TOKENIZER.encode(" Mara Velt."), TOKENIZER.eot]

    def policy(ids):
        begun = TOKENIZER.special("assistant_start")
        return wanted[min(len(ids) - ids.index(begun) - 1, len(wanted) - 1)] if begun in ids else TOKENIZER.eot

    chat = MultiHopChat(Puppet(TOKENIZER.vocab_size, policy), TOKENIZER, Shelf(), top_k=1)
    found = []

    def keep(stream):
        found.append((yield from stream))

    pieces = list(keep(chat.stream_chat(QUESTION)))
    assert "".join(pieces) == found[0].text == ABSTENTION
    assert found[0].abstained
    assert not found[0].support


def test_stop_strings_end_the_answer():
    answer = build().chat(QUESTION, stop="was born")
    assert answer.text == "Let me see. The founder of Torwick "
    assert answer.completion.finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [1, 5, 11, 12, 30])
def test_no_more_is_said_than_was_asked_for(max_tokens):
    answer = build().chat(QUESTION, max_tokens=max_tokens)
    queries = sum(len(TOKENIZER.encode(call.text)) + 2 for call in answer.rollout.calls)
    assert len(answer.completion.ids) - queries == max_tokens
    assert answer.completion.finish_reason == "length"
    assert len(answer.hops) == (0 if max_tokens <= 11 else 2)  # "Let me see." comes first
    if max_tokens <= 11:
        assert answer.text == "Let me see."[:max_tokens]


def test_earlier_turns_lose_their_citations_and_the_last_question_counts():
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi. [3]"},
            {"role": "user", "content": QUESTION}]  # fmt: skip
    answer = build().chat(said)
    assert "Hi.<|assistant_end|>" in TOKENIZER.decode(answer.rollout.prompt)
    assert len(answer.hops) == 2


@pytest.mark.parametrize("max_hops", [0, 1])
def test_hops_are_limited_and_then_the_model_has_to_answer(max_hops):
    answer = build(max_hops=max_hops).chat(QUESTION, max_tokens=20)
    assert len(answer.hops) == max_hops
    assert answer.rollout.finish_reason in ("stop", "length")
    assert answer.rollout.ids.count(TOKENIZER.special("search_start")) == max_hops


def test_a_model_that_never_stops_searching_is_stopped():
    answer = build(lambda question, results: [{"type": "search", "text": "Torwick"}], max_hops=3).chat(QUESTION)
    assert [len(hop.documents) for hop in answer.hops] == [1, 0, 0]
    assert answer.text.endswith("Torwick")  # what it writes when it cannot begin a search


def test_a_knowledge_base_that_answers_nothing():
    class Nothing:
        def search(self, queries, k=5):
            return [[] for _ in queries]

    def reply(question, results):
        if not results:
            return [{"type": "search", "text": "Torwick"}]
        return [{"type": "abstain", "text": "I do not know."}]

    answer = build(reply, knowledge=Nothing()).chat(QUESTION)
    assert (answer.abstained, answer.documents, answer.support) == (True, (), ())


def test_a_search_that_fails_is_an_error():
    class Gone:
        def search(self, queries, k=5):
            raise NanochatError("the knowledge base is gone")

    with pytest.raises(NanochatError, match="the knowledge base is gone"):
        build(knowledge=Gone()).chat(QUESTION)


def test_a_second_turn_reads_only_what_is_new():
    """The answers, and everything searched, are those without a cache."""
    plain, cached = build(cache=PrefixCache(0)), build()
    said, read = [], {plain: [], cached: []}
    for question in (QUESTION, "And the river of Orvane?", QUESTION):
        said.append({"role": "user", "content": question})
        before = [chat.model.n_read for chat in (plain, cached)]
        one, other = plain.chat(said), cached.chat(said)
        assert one.rollout.prompt == other.rollout.prompt
        assert (one.rollout.ids, one.text, one.hops) == (other.rollout.ids, other.text, other.hops)
        for chat, n in zip((plain, cached), before):
            read[chat].append(chat.model.n_read - n)
        said.append({"role": "assistant", "content": one.text})
    saved = [a - b for a, b in zip(read[plain], read[cached])]
    assert saved[0] == 0
    first = len(TOKENIZER.render_prompt({"messages": said[:1]}).ids)
    assert saved[1] == first - 1  # the whole prompt of the turn before, but the token that begins an answer
    assert saved[2] > 2 * first
    assert sum(saved) == cached.cache.tokens_saved
    again = build(cache=cached.cache)
    with pytest.raises(UsageError, match="states of another model"):
        again.chat(QUESTION)


def test_wrong_arguments_are_refused():
    class Empty(Shelf):
        def __len__(self):
            return 0

    model = Puppet(TOKENIZER.vocab_size, lambda ids: TOKENIZER.eot)
    for options, message in (({"max_hops": -1}, "max_hops -1"), ({"top_k": 0}, "top_k 0")):
        with pytest.raises(UsageError, match=message):
            MultiHopChat(model, TOKENIZER, Shelf(), **options)
    with pytest.raises(UsageError, match="holds no documents"):
        MultiHopChat(model, TOKENIZER, Empty())
    with pytest.raises(UsageError, match="must end with a question"):
        MultiHopChat(model, TOKENIZER, Shelf(DOCUMENTS)).chat([])
