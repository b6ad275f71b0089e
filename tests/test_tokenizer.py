"""Tokenizer and conversation layout: round trips, no special token from text, masks, trimming, export, damage."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from nanochat import tokenizer as module
from nanochat.conversation import PARTS, ROLES
from nanochat.errors import NanochatError, UsageError
from nanochat.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

TEXTS = [Path(__file__).read_text(), Path(module.__file__).read_text(), "Grüße aus Köln, 你好世界, Привет мир! 🙂 " * 9]
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=200)  # includes lone surrogates
WITH_NAMES = st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.text(max_size=20)), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 1200)


def as_read(text: str) -> str:
    """Pairs of surrogates are one character, lone ones become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- text


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(ANY_TEXT, WITH_NAMES), bos=st.booleans())
def test_any_text_round_trips_and_never_becomes_special(tok: Tokenizer, text: str, bos: bool) -> None:
    ids = tok.encode(text, bos=bos)
    if bos:
        assert ids.pop(0) == tok.bos
    assert tok.decode(ids) == as_read(text)
    assert not any(tok.is_special(i) for i in ids)
    assert tok.token_bytes[ids].sum() == len(as_read(text).encode())


def test_vocabulary_is_as_large_as_asked_and_every_byte_is_in_it(tok: Tokenizer) -> None:
    assert tok.vocab_size == 1200 == len(tok.token_bytes)
    assert (tok.token_bytes[: -len(SPECIAL_TOKENS)] > 0).all()
    assert tok.token_bytes[-len(SPECIAL_TOKENS) :].sum() == 0
    assert tok.token_bytes.dtype == np.int32
    assert sorted(tok.decode_bytes([i]) for i in range(256)) == [bytes([b]) for b in range(256)]
    assert [tok.decode([tok.special(name)]) for name in SPECIAL_TOKENS] == list(SPECIAL_TOKENS)
    assert len({tok.special(name) for name in SPECIAL_TOKENS}) == len(SPECIAL_TOKENS)
    assert tok.special("bos") == tok.bos
    assert tok.special("<|assistant_end|>") == tok.eot


def test_numbers_are_split_in_groups_of_two_digits(tok: Tokenizer) -> None:
    assert max(len(tok.decode([i])) for i in tok.encode("1234567890" * 5)) <= 2


@pytest.mark.parametrize("text", [" " * 1_200_000, "\n \n" * 50_000, "x" * 200_000, "word " * 60_000, "é" * 100_000])
def test_very_long_texts(tok: Tokenizer, text: str) -> None:
    assert tok.decode(tok.encode(text)) == text


def test_slices_are_where_the_pattern_cuts_anyway(tok: Tokenizer) -> None:
    text = "\n".join(TEXTS) * 12
    assert len(text) > 2 * module._SLICE
    assert tok.encode(text) == tok._encoding.encode_ordinary(text)


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=60), threads=st.integers(1, 3), bos=st.booleans())
def test_batches_equal_single_texts(tok: Tokenizer, texts: list[str], threads: int, bos: bool) -> None:
    assert tok.encode_batch(texts, threads, bos) == [tok.encode(text, bos) for text in texts]


def test_ids_and_names_that_do_not_exist(tok: Tokenizer) -> None:
    for bad in (-1, tok.vocab_size):
        with pytest.raises(UsageError, match=r"outside the vocabulary \(0 to 1199\)"):
            tok.decode([5, bad])
    with pytest.raises(UsageError, match="no special token 'bot'"):
        tok.special("bot")


@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=st.text(max_size=60))
def test_stream_decoder_gives_whole_characters(tok: Tokenizer, data: st.DataObject, text: str) -> None:
    any_ids = st.lists(st.integers(0, tok.vocab_size - 1), max_size=30)
    ids = data.draw(st.one_of(st.just(tok.encode(text)), any_ids))
    decoder = StreamDecoder(tok)
    pieces = [decoder.feed(i) for i in ids] + [decoder.flush()]
    assert "".join(pieces) == tok.decode(ids)


def test_skipping_special_tokens_skips_what_a_citation_names():
    tok = Tokenizer([bytes([i]) for i in range(256)])
    start, end, eot = (tok.special(name) for name in ("cite_start", "cite_end", "assistant_end"))
    decoder = StreamDecoder(tok, skip_special=True)
    ids = [start, *tok.encode(" Torwick1"), end, *tok.encode("Yes."), start, *tok.encode("Never ended")]
    assert decoder.feed(ids) + decoder.flush() == "Yes."
    assert decoder.feed([start, *tok.encode("x"), eot, *tok.encode("next")]) + decoder.flush() == "next"


def test_stream_decoder_holds_back_half_a_character(tok: Tokenizer) -> None:
    ids = tok.encode("\U0001fae8")  # not in the training text: four tokens of a byte each
    decoder = StreamDecoder(tok, skip_special=True)
    assert [decoder.feed(i) for i in ids] == ["", "", "", "\U0001fae8"]
    assert decoder.feed([tok.bos, ids[0]]) == ""
    assert decoder.flush() == "�"
    assert decoder.feed(tok.encode("ok")) == "ok"


# ---- training


def test_training_is_deterministic_across_processes(tok: Tokenizer) -> None:
    code = (
        "import json, sys; from nanochat.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), 1200).hash)"
    )
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, input=json.dumps(TEXTS), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tok.hash


def test_training_reads_at_most_max_chars_and_streams() -> None:
    taken = []

    def texts():
        for i in range(10_000):
            taken.append(i)
            yield f"text number {i} of ten thousand "

    Tokenizer.train(texts(), 300, max_chars=1000)
    assert len(taken) < 50


def test_a_small_text_gives_a_smaller_vocabulary_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tok = Tokenizer.train(["abc abc abd"], 5000)
    assert 256 + len(SPECIAL_TOKENS) < tok.vocab_size < 300
    assert "instead of 5000" in caplog.text
    assert tok.decode(tok.encode("abc xyz")) == "abc xyz"


def test_surrogates_and_huge_texts_in_training() -> None:
    tok = Tokenizer.train(["a\ud800b" * 10, "\ud83d\ude42 " * 10, " " * 1_100_000], 300)
    assert tok.decode(tok.encode("\ud800")) == "�"


def test_training_refuses_nonsense() -> None:
    with pytest.raises(UsageError, match="vocab_size 100 is too small"):
        Tokenizer.train(["x"], 100)
    for nothing in ([], [""]):
        with pytest.raises(NanochatError, match="no text"):
            Tokenizer.train(nothing, 300)

    def broken():
        yield "some text"
        raise NanochatError("shard 7 is corrupt")

    with pytest.raises(NanochatError, match="shard 7"):
        Tokenizer.train(broken(), 300)


# ---- files


def test_save_and_load(tok: Tokenizer, tmp_path: Path) -> None:
    file = tok.save(tmp_path / "tokenizer")
    again = Tokenizer.load(tmp_path / "tokenizer")
    assert again.hash == tok.hash
    assert again.encode(TEXTS[2]) == tok.encode(TEXTS[2])
    assert again.special_tokens == tok.special_tokens
    assert [p.name for p in file.parent.iterdir()] == ["bpe.json"]


def test_a_place_that_cannot_be_written(tok: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (tok.save, tok.export_hf):
        with pytest.raises(NanochatError, match=r"could not (save|write)"):
            write(tmp_path / "file" / "tokenizer")


def test_missing_and_damaged_files_are_named(tok: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match=r"no tokenizer at .*bpe\.json.*tok_train"):
        Tokenizer.load(tmp_path)
    file = tok.save(tmp_path)
    good = file.read_text()
    record = json.loads(good)
    for damaged in (
        good[: len(good) // 2],
        good.replace('"QQ=="', '"Qg=="', 1),
        "[]",
        "",
        json.dumps({**record, "format_version": 2}),
        json.dumps({key: value for key, value in record.items() if key != "sha256"}),
    ):
        assert damaged != good
        file.write_text(damaged)
        with pytest.raises(NanochatError, match=r"bpe\.json"):
            Tokenizer.load(tmp_path)


@pytest.fixture(scope="module")
def hf(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    return HFTokenizer.from_file(str(tok.export_hf(tmp_path_factory.mktemp("hf"))))


LINES = [line for text in TEXTS for line in text.split("\n")]


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(max_size=100), st.sampled_from(LINES), st.text(" \n\tab1'.é", max_size=60)))
def test_hugging_face_gives_the_same_ids(tok: Tokenizer, hf: HFTokenizer, text: str) -> None:
    ids = tok.encode(text)
    hf.encode_special_tokens = True  # read special names in text as text, as ours always does
    assert hf.encode(text).ids == ids
    assert hf.decode(ids) == text


def test_hugging_face_knows_the_special_tokens(tok: Tokenizer, hf: HFTokenizer) -> None:
    assert hf.get_vocab_size() == tok.vocab_size
    assert [hf.token_to_id(name) for name in SPECIAL_TOKENS] == [tok.special(name) for name in SPECIAL_TOKENS]
    hf.encode_special_tokens = False
    assert hf.encode("<|user_start|>hi").ids == [tok.special("user_start"), *tok.encode("hi")]
    assert hf.decode([tok.bos, *tok.encode("hi")]) == "hi"


# ---- conversations


def chat(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def masked(tok: Tokenizer, rendered: module.Rendered) -> str:
    return tok.decode(i for i, m in zip(rendered.ids, rendered.mask) if m)


def test_layout_and_mask_of_every_part(tok: Tokenizer) -> None:
    conversation = chat(
        ("system", "S"),
        ("user", [{"type": "text", "text": "look: "}, {"type": "code", "text": "x=1"}]),
        ("assistant", [
            {"type": "text", "text": "A"},
            {"type": "search", "text": "q"},
            {"type": "result", "text": "r"},
            {"type": "tool_call", "text": "1+1"},
            {"type": "tool_output", "text": "2"},
            {"type": "cite", "text": "3"},
            {"type": "code", "text": "y=2"},
            {"type": "abstain", "text": "N"},
        ]),
        ("tool", "T"),
        ("retrieval", [{"type": "document", "title": "D", "text": "body"}]),
        ("user", "Q"),
        ("assistant", "Z"),
    )  # fmt: skip
    rendered = tok.render(conversation)
    assert tok.decode(rendered.ids) == (
        "<|bos|><|system_start|>S<|system_end|><|user_start|>look: <|code_start|>x=1<|code_end|><|user_end|>"
        "<|assistant_start|>A<|search_start|>q<|search_end|><|result_start|>r<|result_end|>"
        "<|tool_call_start|>1+1<|tool_call_end|><|tool_output_start|>2<|tool_output_end|><|cite_start|>3<|cite_end|>"
        "<|code_start|>y=2<|code_end|><|abstain|>N<|assistant_end|><|tool_output_start|>T<|tool_output_end|>"
        "<|retrieval_start|><|doc_start|>D<|doc_title_end|>body<|doc_end|><|retrieval_end|>"
        "<|user_start|>Q<|user_end|><|assistant_start|>Z<|assistant_end|>"
    )
    assert masked(tok, rendered) == (
        "A<|search_start|>q<|search_end|><|tool_call_start|>1+1<|tool_call_end|><|cite_start|>3<|cite_end|>"
        "<|code_start|>y=2<|code_end|><|abstain|>N<|assistant_end|>Z<|assistant_end|>"
    )
    assert rendered[2:] == (0, 0)
    prompt = tok.render_prompt(conversation)
    assert prompt.ids[-1] == tok.special("assistant_start")
    assert prompt.ids == rendered.ids[: len(prompt.ids)]
    assert prompt.mask == [*rendered.mask[: len(prompt.ids) - 1], 0]


text_parts = st.text(max_size=12)


@st.composite
def conversations(draw: st.DrawFn) -> dict:
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(text_parts)})
    for role in draw(st.lists(st.sampled_from(["user", "assistant", "tool", "retrieval"]), min_size=1, max_size=8)):
        kinds = st.sampled_from(ROLES[role][1])
        part = st.fixed_dictionaries({"type": kinds, "text": st.one_of(text_parts, WITH_NAMES)})
        messages.append({"role": role, "content": draw(st.one_of(text_parts, st.lists(part, max_size=4)))})
    return {"messages": messages}


@settings(max_examples=80, deadline=None)
@given(conversation=conversations())
def test_special_tokens_come_from_the_layout_alone(tok: Tokenizer, conversation: dict) -> None:
    """The number of special tokens follows from roles and part types, whatever the texts say; and so does the mask."""
    rendered = tok.render(conversation)
    expected, produced = 1, 0
    for message in conversation["messages"]:
        expected += 2
        speaks = message["role"] == "assistant"
        produced += speaks
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            start, end, producible = PARTS[part["type"]]
            n_marks = bool(start) + bool(end)
            expected += n_marks + (part["type"] == "document")
            if speaks and producible:
                produced += n_marks + len(tok.encode(part["text"]))
    assert sum(map(tok.is_special, rendered.ids)) == expected
    assert sum(rendered.mask) == produced
    assert len(rendered.mask) == len(rendered.ids)


@settings(max_examples=80, deadline=None)
@given(conversation=conversations(), max_tokens=st.integers(1, 60))
def test_max_tokens_holds_and_the_count_adds_up(tok: Tokenizer, conversation: dict, max_tokens: int) -> None:
    for render in (tok.render, tok.render_prompt):
        full, fitted = render(conversation), render(conversation, max_tokens)
        assert len(fitted.ids) == len(fitted.mask) <= max_tokens
        assert fitted.dropped_turns + fitted.truncated_tokens > 0 or fitted == full
        assert (fitted == full) == (len(full.ids) <= max_tokens)
        if render == tok.render_prompt:
            assert fitted.ids[-1] == tok.special("assistant_start")


def test_oldest_turns_go_first_and_the_system_message_stays(tok: Tokenizer) -> None:
    history = chat(
        ("system", "S"),
        ("user", "first"), ("assistant", "one"),
        ("retrieval", "doc"), ("user", "second"), ("assistant", "two"), ("tool", "t"), ("assistant", "more"),
        ("user", "third"),
    )  # fmt: skip
    full = tok.render_prompt(history)
    shorter = tok.render_prompt(history, len(full.ids) - 1)
    assert tok.decode(shorter.ids) == (
        "<|bos|><|system_start|>S<|system_end|><|retrieval_start|>doc<|retrieval_end|><|user_start|>second<|user_end|>"
        "<|assistant_start|>two<|assistant_end|><|tool_output_start|>t<|tool_output_end|>"
        "<|assistant_start|>more<|assistant_end|><|user_start|>third<|user_end|><|assistant_start|>"
    )
    assert shorter.dropped_turns == 1
    shortest = tok.render_prompt(history, len(shorter.ids) - 1)
    assert tok.decode(shortest.ids) == (
        "<|bos|><|system_start|>S<|system_end|><|user_start|>third<|user_end|><|assistant_start|>"
    )
    assert (shortest.dropped_turns, shortest.truncated_tokens) == (2, 0)


def test_one_long_turn_loses_middle_of_the_question_and_end_of_the_answer(tok: Tokenizer) -> None:
    question, answer = [str(i % 10) + " " for i in range(100)], "b c " * 100
    rendered = tok.render(chat(("system", "short"), ("user", "".join(question)), ("assistant", answer)), 60)
    assert len(rendered.ids) in (59, 60)
    assert rendered.dropped_turns == 0
    assert rendered.truncated_tokens > 100
    text = tok.decode(rendered.ids)
    assert "<|system_start|>short<|system_end|><|user_start|>0 1 2" in text
    assert "8 9 <|user_end|><|assistant_start|>b c " in text
    assert rendered.ids[-1] == tok.eot
    assert rendered.mask[-2:] == [1, 0]  # it did not end there: the end is not to be learned


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ({}, "at least one message"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["hi"]}, "message 0 must be"),
        (chat(("user", "x"), ("bot", "y")), "message 1 has role 'bot'; expected one of system, user"),
        (chat(("user", "x"), ("system", "y")), "message 1 has role 'system'; only message 0 may"),
        (chat(("user", 3)), r"message 0 \(user\): content must be text or a list of parts, got int"),
        (chat(("user", [{"type": "image", "text": ""}])), r"message 0 \(user\), part 0: type must be one of"),
        (chat(("user", [{"type": "tool_output", "text": "x"}])), "cannot hold 'tool_output' here, only text"),
        (chat(("assistant", [{"type": "text"}])), r"message 0 \(assistant\), part 0: text .* must be strings"),
        (chat(([], "x")), "message 0 has role"),
        (chat(("user", [{"type": [], "text": ""}])), "part 0: type must be"),
    ],
)
def test_bad_conversations_name_the_message(tok: Tokenizer, conversation: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tok.render(conversation)
