"""Loading a run, the Python API and the terminal, on a tiny model with random weights."""

import json

import pytest
import torch

import nanochat
from nanochat import checkpoint, terminal
from nanochat.chat import ChatModel, load, make_sampling
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.rag.grounded import GroundedAnswer, GroundedChat
from nanochat.terminal import chat_cli
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
GREEDY = {"temperature": 0.0, "max_tokens": 8}


def save_stage(out, stage: str, run: str = "r", tokenizer_hash: str = TOKENIZER.hash) -> None:
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, sequence_len=80, depth=2, d_model=32, head_dim=16, head_dim2=16, d_state2=16
    ).resolved()
    model = LM.build(config, seed=0)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    meta = {"stage": stage, "model_config": config.to_dict(), "tokenizer_hash": tokenizer_hash, "metrics": {}}
    checkpoint.save(out / run / stage, 5, {"model": model.state_dict()}, meta)
    TOKENIZER.save(out / run / "tokenizer")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("out")
    for stage in ("base", "sft"):
        save_stage(path, stage)
    return path


@pytest.fixture(scope="module")
def chat(out) -> ChatModel:
    return load("sft", out_dir=out)


def drain(stream):
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return "".join(pieces), end.value


def test_load_by_stage_run_and_path(out, monkeypatch):
    by_run = load("sft", run="r", out_dir=out)
    assert by_run.stage == "sft"
    assert load(out / "r" / "base").stage == "base"
    assert load(out / "r" / "sft" / "step_000005").path == by_run.path
    monkeypatch.setenv("NANOCHAT_OUT", str(out))
    assert nanochat.load("base").stage == "base"


def test_loading_leaves_random_numbers_alone(out):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load("sft", out_dir=out)
    assert torch.equal(before, torch.get_rng_state())


def test_chat_takes_text_or_messages_and_streams_the_same(chat):
    messages = [{"role": "user", "content": "Hi"}]
    answer = chat.chat("Hi", **GREEDY)
    assert chat.chat(messages, **GREEDY) == answer
    text, completion = drain(chat.stream_chat(messages, **GREEDY))
    assert text == completion.text == answer
    with_system = [{"role": "system", "content": "You are terse."}, *messages]
    assert isinstance(chat.chat(with_system, **GREEDY), str)


def test_generate_continues_text(chat):
    one = chat.generate("Once", **GREEDY)
    assert drain(chat.stream("Once", **GREEDY))[0] == one
    several = chat.generate("Once", n=3, seed=1, temperature=1.0, max_tokens=12)
    assert len(set(several)) == 3
    assert chat.generate("Once", n=1, **GREEDY) == [one]


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_quantized_models_answer(out, weights):
    assert isinstance(load("sft", out_dir=out, quantize=weights).chat("Hi", max_tokens=4), str)


def test_long_conversations_lose_their_oldest_turns(chat, caplog):
    turn = [{"role": "user", "content": "x" * 20}, {"role": "assistant", "content": "y" * 10}]
    ids = chat.render([*turn * 5, {"role": "user", "content": "last"}], max_tokens=256)
    assert len(ids) <= chat.context - chat.context // 4
    assert "last" in TOKENIZER.decode(ids)
    assert "the oldest 4 turn(s) are left out" in caplog.text
    chat.render("z" * 500, max_tokens=10)
    assert "tokens are left out" in caplog.text


def test_wrong_calls_say_what_is_wrong(chat, out, tmp_path):
    with pytest.raises(UsageError, match="unknown sampling option 'temprature'; did you mean temperature"):
        chat.chat("Hi", temprature=1.0)
    with pytest.raises(UsageError, match="tokens, the model's context only 80"):
        chat.generate("a" * 100)
    with pytest.raises(UsageError, match="expected one of fp32, bf16, int8"):
        load("sft", out_dir=out, quantize="int3")
    with pytest.raises(NanochatError, match="no such stage"):
        load("mid", out_dir=out)
    with pytest.raises(UsageError, match="--device tpu"):
        load("sft", out_dir=out, device="tpu")
    save_stage(tmp_path, "sft", tokenizer_hash="0" * 64)
    with pytest.raises(NanochatError, match="trained with another tokenizer"):
        load("sft", out_dir=tmp_path)


def test_a_checkpoint_whose_weights_do_not_fit_its_architecture(tmp_path):
    save_stage(tmp_path, "sft")
    path = tmp_path / "r" / "sft"
    meta = json.loads((path / "step_000005" / "meta.json").read_text())
    config = {**meta["model_config"], "depth": 3}
    keep = {"stage": "sft", "model_config": config, "tokenizer_hash": meta["tokenizer_hash"], "metrics": {}}
    checkpoint.save(path, 6, {"model": checkpoint.load(path / "step_000005").tensors["model"]}, keep)
    with pytest.raises(NanochatError, match="does not hold the weights"):
        load("sft", out_dir=tmp_path)


def test_sampling_options_become_sampling():
    assert make_sampling({"top_k": 3}) == Sampling(top_k=3)


def test_one_shot_prints_the_answer_and_the_speed(chat, out, capsys):
    assert chat_cli(["-p", "Hi", "--out_dir", str(out), "--temperature=0", "--max-tokens", "8"]) == 0
    shown = capsys.readouterr()
    assert shown.out == chat.chat("Hi", **GREEDY) + "\n"
    assert "tok/s" in shown.err


def test_a_base_model_continues_text_unless_told_otherwise(out, capsys):
    base = load("base", out_dir=out)
    common = ["-p", "Hi", "--out_dir", str(out), "--source", "base", "--temperature=0", "--max-tokens", "8"]
    chat_cli(common)
    assert capsys.readouterr().out == base.generate("Hi", **GREEDY) + "\n"
    chat_cli([*common, "--mode", "chat"])
    assert capsys.readouterr().out == base.chat("Hi", **GREEDY) + "\n"


def type_lines(monkeypatch, *lines) -> None:
    waiting = list(lines)

    def read(prompt=""):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)


def test_a_conversation_at_the_prompt(out, monkeypatch, capsys):
    type_lines(
        monkeypatch, "Hi", "/temp 0", "/top_k", "/retry", KeyboardInterrupt, "/nonsense", "/temp x", "/help", "/new", ""
    )
    assert chat_cli(["--out_dir", str(out), "--max_tokens=4"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("tok/s") == 2
    assert "temperature 0.0" in shown.out
    assert "/quit or Ctrl-D leaves" in shown.out
    assert "unknown command /nonsense" in shown.err
    assert "/temp x: expected a number" in shown.err
    assert "/retry" in shown.out


def test_the_session_keeps_the_conversation(chat, capsys):
    session = terminal.Session(chat, Sampling(max_tokens=4, temperature=0.0), system="Be brief.")
    session.answer("One?")
    session.answer("Two?")
    assert [m["role"] for m in session.messages] == ["system", "user", "assistant", "user", "assistant"]
    session.retry()
    assert len(session.messages) == 5
    session.command("/system Be long.")
    assert session.messages == [{"role": "system", "content": "Be long."}]
    session.retry()
    assert "no answer to try again" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(chat, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        yield "par"
        yield "tial"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream_chat", interrupted)
    session = terminal.Session(chat, Sampling())
    assert session.answer("Hi") == 130
    assert session.messages[-1] == {"role": "assistant", "content": "partial"}
    assert "[stopped]" in capsys.readouterr().err


# ---- from documents


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory):
    path = tmp_path_factory.mktemp("knowledge") / "kb"
    with nanochat.KnowledgeBase.create(path, kind="simple") as base:
        base.add(
            [
                nanochat.Document("torwick", "Mara Velt founded it.", "Torwick", "towns.jsonl"),
                nanochat.Document("orvane", "It lies on the river Rill.", "Orvane"),
            ]
        )
    return path


def test_a_model_with_knowledge(chat, knowledge, caplog):
    grounded = chat.with_knowledge(knowledge, top_k=1)
    assert caplog.text.count("was never trained on documents (stage sft)") == 1
    answer = grounded.chat("Who founded Torwick?", max_tokens=8)
    assert isinstance(answer, GroundedAnswer)
    assert [d.id for d in answer.documents] == ["torwick"]
    text, streamed = drain(grounded.stream_chat("Who founded Torwick?", max_tokens=8))
    assert text == streamed.text == answer.text
    assert caplog.text.count("was never trained on documents") == 1
    with nanochat.KnowledgeBase.open(knowledge) as base:
        for retriever, mode in ((base, None), (base, "simple"), (str(knowledge), "simple")):
            assert chat.with_knowledge(retriever, mode).retrieve("Torwick?")[1][0].id == "torwick"


def test_a_model_trained_on_documents_brings_no_warning(knowledge, tmp_path, caplog):
    save_stage(tmp_path, "rag")
    assert isinstance(load("rag", out_dir=tmp_path).with_knowledge(knowledge), GroundedChat)
    assert "never trained" not in caplog.text


def test_wrong_knowledge_says_what_is_wrong(chat, knowledge, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        chat.with_knowledge(tmp_path / "nothing")
    with pytest.raises(UsageError, match="is no knowledge base"):
        chat.with_knowledge(tmp_path)
    with nanochat.KnowledgeBase.create(tmp_path / "empty", kind="simple") as base:
        with pytest.raises(UsageError, match="holds no documents"):
            chat.with_knowledge(base)
        with pytest.raises(UsageError, match="holds no documents"):
            chat.with_knowledge(base, "simple")
    with pytest.raises(UsageError, match="holds no documents"):
        chat.with_knowledge(tmp_path / "empty")
    with pytest.raises(UsageError, match="unknown option 'topk' of with_knowledge; there is mode, top_k"):
        chat.with_knowledge(knowledge, topk=3)
    with pytest.raises(UsageError, match="only a KnowledgeBase can be searched in several ways"):
        chat.with_knowledge(object(), "dense")


def test_the_terminal_answers_from_documents(chat, out, knowledge, capsys):
    common = ["--out_dir", str(out), "--max_tokens", "8", "--knowledge_base", str(knowledge), "--documents", "1"]
    assert chat_cli(["-p", "Who founded Torwick?", *common]) == 0
    shown = capsys.readouterr()
    expected = chat.with_knowledge(knowledge, top_k=1).chat("Who founded Torwick?", max_tokens=8)
    assert shown.out == "\n".join([expected.text, *expected.sources]) + "\n"
    assert "1 document, support" in shown.err
    assert chat_cli(["-p", "Who built Underwade?", *common]) == 0
    shown = capsys.readouterr()
    assert shown.out == "I do not know.\n"
    assert "no document found" in shown.err


def test_the_terminal_shows_sources(chat, monkeypatch, capsys, knowledge):
    grounded = chat.with_knowledge(knowledge)
    cited = [TOKENIZER.special("cite_start"), *b"1", TOKENIZER.special("cite_end"), *b"Mara did.", TOKENIZER.eot]
    monkeypatch.setattr("nanochat.engine.generate.sample", lambda logits, *_: ([cited.pop(0)], [0.0]))
    session = terminal.Session(grounded, Sampling(temperature=0.0))
    session.answer("Who founded Torwick?")
    shown = capsys.readouterr()
    assert shown.out == "Mara did. [1]\n[1] Torwick (towns.jsonl)\n"
    assert ", 1 document, support 1.00]" in shown.err
    assert session.messages[-1] == {"role": "assistant", "content": "Mara did. [1]"}


def test_a_conversation_about_documents(out, knowledge, monkeypatch, capsys):
    type_lines(monkeypatch, "Who founded Torwick?", "/retry", "And Orvane?", "/temp", "/new")
    assert chat_cli(["--out_dir", str(out), "--max_tokens=4", "--knowledge_base", str(knowledge)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count(", 1 document, support") == 3
    assert str(knowledge) in shown.err
    assert "temperature 0.0" in shown.out


def test_the_terminal_takes_the_stage_that_was_trained_on_documents(knowledge, tmp_path, capsys, caplog):
    ask = ["-p", "Torwick?", "--out_dir", str(tmp_path), "--max_tokens=2", "--knowledge_base", str(knowledge)]
    save_stage(tmp_path, "base")
    chat_cli([*ask, "--source", "base"])  # a base model chats when it has documents
    assert "stage base" in caplog.text
    save_stage(tmp_path, "rag")
    save_stage(tmp_path, "sft")
    caplog.clear()
    chat_cli(ask)
    assert "never trained" not in caplog.text
    chat_cli([*ask, "--source", "sft"])
    assert "stage sft" in caplog.text


def test_wrong_flags_with_documents(out, knowledge, tmp_path):
    common = ["-p", "Torwick?", "--out_dir", str(out)]
    with pytest.raises(UsageError, match="does not exist"):
        chat_cli([*common, "--knowledge_base", str(tmp_path / "nothing")])
    with pytest.raises(UsageError, match="a text is continued without documents"):
        chat_cli([*common, "--knowledge_base", str(knowledge), "--mode", "text"])
    with pytest.raises(UsageError, match="top_k 0"):
        chat_cli([*common, "--knowledge_base", str(knowledge), "--documents", "0"])
    with pytest.raises(UsageError, match="psychic"):
        chat_cli([*common, "--knowledge_base", str(knowledge), "--retriever_type", "psychic"])
    (tmp_path / "kb" / "manifest.json").parent.mkdir()
    (tmp_path / "kb" / "manifest.json").write_text("{")
    with pytest.raises(NanochatError, match="manifest"):
        chat_cli([*common, "--knowledge_base", str(tmp_path / "kb")])
