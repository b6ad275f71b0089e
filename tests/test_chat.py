"""Loading a run and the Python API, on a tiny model with random weights."""

import json

import pytest
import torch
from tiny_run import GREEDY, TOKENIZER, save_stage

import nanochat
from nanochat import checkpoint
from nanochat.chat import load, make_sampling, trained_on_retrieval, trained_to_search
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.rag.grounded import GroundedAnswer, GroundedChat


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


# ---- from documents


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


def test_a_model_that_searches_on_its_own_is_asked_otherwise(knowledge, tmp_path, caplog):
    save_stage(tmp_path, "refrag")
    load("refrag", out_dir=tmp_path).with_knowledge(knowledge)
    assert "was trained to search on its own (stage refrag)" in caplog.text
    assert "with_search" in caplog.text


def test_a_model_that_searches_on_its_own(chat, knowledge, tmp_path, caplog):
    searching = chat.with_search(knowledge, max_hops=1, top_k=1)
    assert caplog.text.count("was never trained to search (stage sft)") == 1
    text, streamed = drain(searching.stream_chat("Who founded Torwick?", max_tokens=8))
    assert text == streamed.text == searching.chat("Who founded Torwick?", max_tokens=8).text
    assert len(streamed.hops) <= 1
    with pytest.raises(UsageError, match="unknown option 'hops' of with_search; there is mode, max_hops"):
        chat.with_search(knowledge, hops=3)
    save_stage(tmp_path, "refrag")
    caplog.clear()
    load("refrag", out_dir=tmp_path).with_search(knowledge)
    assert "never trained" not in caplog.text


def test_a_search_brings_as_many_documents_as_the_model_learnt_with(knowledge, tmp_path):
    save_stage(tmp_path, "refrag")
    model = load("refrag", out_dir=tmp_path)
    assert model.with_search(knowledge).top_k == 2
    (model.path.parent / "config.json").write_text('{"top_k": 1}')
    assert model.with_search(knowledge).top_k == 1
    assert model.with_search(knowledge, top_k=3).top_k == 3
    (model.path.parent / "config.json").write_text("[]")
    assert model.with_search(knowledge).top_k == 2


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


@pytest.mark.parametrize(
    ("stage", "documents", "searches"),
    [("base", 0, 0), ("sft", 0, 0), ("rag", 1, 0), ("refrag_sft", 1, 1), ("refrag", 1, 1), ("rl", 0, 0)],
)
def test_what_a_stage_was_trained_for(stage, documents, searches):
    meta = {"stage": stage}
    assert (trained_on_retrieval(meta), trained_to_search(meta)) == (bool(documents), bool(searches))
