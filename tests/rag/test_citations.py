from hypothesis import given
from hypothesis import strategies as st

from nanochat.rag.citation_stream import CitationStream
from nanochat.rag.citations import headings_in, parse, resolve, sources
from nanochat.rag.prompt import headings, retrieval_message
from nanochat.retrieval.document import Document
from nanochat.tokenizer import Tokenizer

T = Tokenizer([bytes([i]) for i in range(256)])
NAMES = [" Mara Velt1", " Orvane2", " Torwick3", " Mara Velt4", " 1984:5"]


def cite(label: str) -> list[int]:
    return [T.special("cite_start"), *T.encode(label), T.special("cite_end")]


def test_citations_belong_to_the_sentence_behind_them() -> None:
    answer = parse([*cite("2"), *T.encode(" One. "), *cite("1"), *cite("3"), *T.encode("Two."), T.eot], T, NAMES[:3])
    assert [(s.text, s.cited) for s in answer.sentences] == [("One.", (2,)), ("Two.", (1, 3))]
    assert answer.citations == (2, 1, 3)
    assert answer.text == "One. Two."
    assert answer.render() == "One. [2] Two. [1] [3]"
    assert not answer.abstained
    assert answer.invalid == ()


def test_citations_of_nothing_are_invalid() -> None:
    ids = [*cite("4"), *cite("0"), *cite("x"), *T.encode("a"), T.special("cite_start"), *T.encode("1")]
    answer = parse(ids, T, NAMES[:3])
    assert answer.invalid == ("4", "0", "x", "1")
    assert answer.citations == ()


def test_text_that_looks_like_a_citation_is_none() -> None:
    answer = parse(T.encode("<|cite_start|>1<|cite_end|> so"), T, NAMES[:3])
    assert answer.citations == ()
    assert answer.text == "<|cite_start|>1<|cite_end|> so"


def test_abstention_is_its_token_in_front() -> None:
    assert parse([T.special("abstain"), *T.encode("I do not know."), T.eot], T, NAMES[:2]).abstained
    assert not parse([*T.encode("a"), T.special("abstain")], T, NAMES[:2]).abstained
    looked = [*cite("1"), *cite(" Mara Velt"), T.special("abstain"), *T.encode("I do not know."), T.eot]
    answer = parse(looked, T, NAMES[:2])
    assert (answer.abstained, answer.citations, answer.invalid) == (True, (), ())
    stream = CitationStream(T, NAMES[:2])
    assert "".join(map(stream.feed, looked)) + stream.flush() == "I do not know." == answer.render()
    assert parse([], T, NAMES[:2]).text == ""


@given(st.lists(st.integers(0, T.vocab_size - 1), max_size=60), st.integers(0, 5))
def test_any_ids_can_be_read(ids: list[int], n: int) -> None:
    answer = parse(ids, T, NAMES[:n])
    assert all(1 <= number <= n for number in answer.citations)
    assert isinstance(answer.render(), str)


def test_sources_name_title_and_place() -> None:
    documents = [Document("a", "x", "Title", "book.txt"), Document("b", "y")]
    answer = parse([*cite("2"), *cite("1"), *T.encode("Said.")], T, NAMES[:2])
    assert sources(answer, documents) == ["[2] b", "[1] Title (book.txt)"]


def test_the_name_of_a_citation_counts_before_its_number() -> None:
    named = {
        " Orvane2": 2, " Orvane1": 2, "Orvane9": 2, "Orvane": 2,  # only one document has the name
        " Mara Velt1": 1, " Mara Velt4": 4, " Mara Velt2": 0, " Mara Velt": 0,  # two have it
        "3": 3, "6": 0, "0": 0, "": 0, " 1984:5": 5, " 1984:1": 5,
        " Mara1": 0, " Kay Oakes2": 0,  # nobody here has this name
    }  # fmt: skip
    assert {label: resolve(label, NAMES) for label in named} == named


def test_an_answer_that_cites_only_what_is_not_there_is_unfounded() -> None:
    made_up, right, plain = cite(" Kay Oakes2"), cite(" Orvane2"), T.encode("It is so.")
    assert parse([*made_up, *plain], T, NAMES).unfounded
    assert not parse([*made_up, *right, *plain], T, NAMES).unfounded
    assert not parse(plain, T, NAMES).unfounded
    assert not parse([*made_up, T.special("abstain"), *plain], T, NAMES).unfounded


def test_an_answer_is_adrift_that_rests_on_something_which_is_not_there() -> None:
    made_up, right, plain = cite(" Kay Oakes2"), cite(" Orvane2"), T.encode("It is so.")
    abstain = T.special("abstain")
    for ids, adrift in (
        ([*made_up, *plain], True),
        ([*right, *made_up, *plain], True),  # a chain with a link missing
        ([*right, *plain], False),
        (plain, False),
        ([*made_up, abstain, *plain], False),  # it looked, and says that it does not know
        ([*right, *plain, *made_up, *plain], False),  # the answer is said already
    ):
        assert parse(ids, T, NAMES).adrift == adrift
        stream = CitationStream(T, NAMES)
        for token in ids:
            stream.feed(token)
        assert stream.adrift == adrift


def test_headings_are_found_in_a_prompt() -> None:
    documents = [Document("a", "Text 1.", "Mara Velt"), Document("b", "More.", "Orvane"), Document("c", "1984", "1984")]
    ids = T.render({"messages": [retrieval_message(documents).message]}).ids
    assert headings_in(ids, T) == headings(documents) == [" Mara Velt1", " Orvane2", " 1984:3"]
    assert headings_in(ids[:3], T) == []
