import json
import math

import pytest
import torch

from nanochat import checkpoint
from nanochat.data.batches import Packer
from nanochat.data.corpus import open_corpus
from nanochat.data.text import TextSource
from nanochat.engine.generate import Engine
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import chat, commands
from nanochat.evaluation.chat import choose, evaluate
from nanochat.evaluation.language import bits_per_byte
from nanochat.intervals import share
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.tasks.registry import open_task
from nanochat.tasks.rows import multiple_choice
from nanochat.tasks.task import Mixture
from nanochat.tasks.task import chat as conversation
from nanochat.tokenizer import Tokenizer

GREEDY = Sampling(max_tokens=8, temperature=0.0)
WORLD = "world:seed=0,known=40,new=40"
KNOWN = "world-qa:seed=0,known=40,new=40,split=known,part=heldout"
NEW = "world-qa:seed=0,known=40,new=40,split=new,part=heldout"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(open_corpus(WORLD).documents("train"), 500)


def build(tokenizer, seed=0, sequence_len=128):
    shape = {"depth": 2, "d_model": 32, "n_head": 2, "pattern": "T M2", "sequence_len": sequence_len}
    model = LM.build(ModelConfig(vocab_size=tokenizer.vocab_size, **shape), seed=seed)
    with torch.no_grad():  # an untrained head is nearly blank; this one has opinions
        model.head.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(tokenizer)


class Echo:
    """Asks for what the model says by itself (even problems) or for something else (odd ones)."""

    name, eval_type = "echo", "generative"

    def __init__(self, model, tokenizer, n=13):
        questions = ["Tell me about " + "the old town " * (i % 5) + str(i) for i in range(n)]
        prompts = [tokenizer.render_prompt(conversation(q, "")).ids for q in questions]
        own = [Engine(model, tokenizer).generate_batch([prompt], GREEDY)[0].text for prompt in prompts]
        self.rows = [conversation(q, a if i % 2 == 0 else "no") for i, (q, a) in enumerate(zip(questions, own))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def evaluate(self, row, completion):
        return completion == row["messages"][-1]["content"]


class Quiz:
    """Multiple choice with gold letters as given and questions of different lengths."""

    name, eval_type = "quiz", "categorical"

    def __init__(self, golds="ABCDABCABBA", letters=("A", "B", "C", "D")):
        self.golds, self.letters = golds, list(letters)

    def __len__(self):
        return len(self.golds)

    def __getitem__(self, i):
        choices = [f"thing {i} {letter}" for letter in self.letters]
        return multiple_choice("Which one " + "of these " * (i % 4) + "is it?", self.letters, choices, self.golds[i])

    def evaluate(self, row, completion):
        return completion == row["messages"][-1]["content"]


# ---- generative


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_generative_accuracy_counts_what_the_model_says_alone(model, tokenizer, batch_size):
    task = Echo(model, tokenizer)
    result = evaluate(model, tokenizer, task, batch_size=batch_size, sampling=GREEDY, n_samples=13)
    assert result.accuracy == share(7, 13)
    assert result.abstention is None
    assert result.metrics() == {"echo_accuracy": share(7, 13)}
    assert sum(sample["right"] for sample in result.samples) == 7
    gold = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in task.rows}
    for sample in result.samples:
        assert sample["gold"] == gold[sample["question"]]
        assert not sample["right"] or sample["answer"] == sample["gold"].strip()


def test_problems_are_drawn_by_the_seed_alone(model, tokenizer):
    assert choose(10, 0, 1) == choose(10, 10, 1)
    assert sorted(choose(10, 0, 1)) == list(range(10))
    assert choose(10, 0, 1)[:4] == choose(10, 4, 1)
    assert choose(50, 5, 1) != choose(50, 5, 2)
    task = Echo(model, tokenizer)
    first = evaluate(model, tokenizer, task, max_problems=5, seed=3, sampling=GREEDY)
    assert first.accuracy.n == 5
    again = evaluate(model, tokenizer, task, max_problems=5, seed=3, sampling=GREEDY, batch_size=2)
    assert again.samples == first.samples


def test_abstention_is_right_only_where_it_is_asked_for(model, tokenizer, monkeypatch):
    """A model that always abstains."""

    def logits(hidden):
        out = torch.zeros(*hidden.shape[:-1], tokenizer.vocab_size)
        out[..., tokenizer.special("abstain")] = 1.0
        return out

    monkeypatch.setattr(model, "logits", logits)
    one = Sampling(max_tokens=1, temperature=0.0)
    new = evaluate(model, tokenizer, open_task(NEW), sampling=one)
    assert new.accuracy == new.abstention == share(new.accuracy.n, new.accuracy.n)
    known = evaluate(model, tokenizer, open_task(KNOWN), sampling=one)
    assert known.accuracy == share(0, known.accuracy.n)
    assert known.abstention == share(known.accuracy.n, known.accuracy.n)
    assert set(known.metrics("known")) == {"known_accuracy", "known_abstained"}


def test_a_prompt_that_does_not_fit_is_cut_and_counted(tokenizer, caplog):
    small = build(tokenizer, sequence_len=32)
    task = Quiz("AB")
    result = evaluate(small, tokenizer, task)
    assert result.n_cut == result.accuracy.n == 2
    assert "2 of 2 prompts did not fit" in caplog.text
    assert evaluate(small, tokenizer, Echo(small, tokenizer, 2), sampling=GREEDY).accuracy.n == 2


# ---- categorical


def best_letter(model, tokenizer, row):
    """The oracle: a whole forward pass of one problem, logits of the letters' tokens."""
    ids = tokenizer.render_prompt(row).ids
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids])))[0, -1]
    return max(row["letters"], key=lambda letter: float(logits[tokenizer.encode(letter)[0]]))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_categorical_answers_are_the_likeliest_letters(model, tokenizer, batch_size):
    task = Quiz()
    result = evaluate(model, tokenizer, task, batch_size=batch_size, n_samples=len(task), controls=True)
    expected = {i: best_letter(model, tokenizer, task[i]) for i in range(len(task))}
    assert result.accuracy == share(sum(expected[i] == task.golds[i] for i in expected), len(task))
    order = choose(len(task), 0, 0)
    assert [sample["answer"] for sample in result.samples] == [expected[i] for i in order]


def test_controls(model, tokenizer):
    task = Quiz()
    controls = evaluate(model, tokenizer, task, controls=True, seed=5).controls
    assert controls["always_first"] == share(4, 11)
    assert controls["chance"].value == pytest.approx(0.25)
    untrained = LM.build(model.config, seed=5).eval()
    right = sum(best_letter(untrained, tokenizer, task[i]) == task.golds[i] for i in range(len(task)))
    assert controls["random_weights"] == share(right, 11)
    assert evaluate(model, tokenizer, task).controls == {}


def test_equal_logits_go_to_the_first_letter(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "logits", lambda hidden: torch.zeros(*hidden.shape[:-1], tokenizer.vocab_size))
    result = evaluate(model, tokenizer, Quiz())
    assert result.accuracy == share(4, 11)
    assert {sample["answer"] for sample in result.samples} == {"A"}


def test_real_task_from_a_file(model, tokenizer, tmp_path):
    rows = [
        {"question": f"Which is {i}?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "2"}
        for i in range(6)
    ]
    path = tmp_path / "arc.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = open_task(f"arc:path={path}")
    result = evaluate(model, tokenizer, task, batch_size=4, controls=True)
    assert result.accuracy.value == sum(best_letter(model, tokenizer, task[i]) == "2" for i in range(6)) / 6
    assert result.controls["always_first"] == share(0, 6)
    assert result.controls["chance"].value == 0.5


# ---- what cannot be evaluated


def test_answers_that_begin_alike_are_an_error(model, tokenizer):
    with pytest.raises(NanochatError, match="quiz: the answers A, A do not begin with different tokens"):
        evaluate(model, tokenizer, Quiz("A", letters=("A", "A")))


def test_tasks_without_a_judge_fail_before_the_model_runs(model, tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "generative", None)
    mixture = Mixture([open_task(KNOWN), open_task(NEW)])
    with pytest.raises(UsageError, match="one by one"):
        evaluate(model, tokenizer, mixture)


def test_no_problems_is_an_error(model, tokenizer):
    with pytest.raises(NanochatError, match="quiz: there are no problems"):
        evaluate(model, tokenizer, Quiz(""))


def test_ranks_share_the_problems(model, tokenizer, monkeypatch):
    """What two ranks find apart is, put together, what one rank finds."""
    task, numbers = Quiz(), choose(11, 0, 0)
    whole = chat.judge(model, tokenizer, task, numbers, 4, GREEDY, False)
    parts = []
    monkeypatch.setattr(chat, "gather", lambda items: items)
    monkeypatch.setattr(chat.runtime, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(chat.runtime, "rank", lambda rank=rank: rank)
        parts.append(chat.judge(model, tokenizer, task, numbers, 4, GREEDY, False))
    assert [len(part) for part in parts] == [6, 5]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert [j.number for j in whole] == numbers


# ---- the commands


@pytest.fixture(scope="module")
def out_dir(model, tokenizer, tmp_path_factory):
    """A run with a base and an SFT checkpoint."""
    out = tmp_path_factory.mktemp("out")
    tokenizer.save(out / "demo" / "tokenizer")
    for stage in ("base", "sft"):
        meta = {"stage": stage, "model_config": model.config.to_dict(), "tokenizer_hash": tokenizer.hash, "metrics": {}}
        checkpoint.save(out / "demo" / stage, 7, {"model": model.state_dict()}, meta)
    return out


def test_base_eval(out_dir, model, tokenizer, capsys):
    arguments = ["--out_dir", str(out_dir), "--data", WORLD, "--max_tokens", "6", "--eval_tokens", "999"]
    commands.base_eval(["--run", "demo", *arguments])
    record = json.loads((out_dir / "demo" / "base_eval_base.json").read_text())
    bpb, nats = record["metrics"]["val_bpb"], record["metrics"]["val_nats_per_token"]
    packer = Packer(TextSource(open_corpus(WORLD), tokenizer, "val"), 128, pad_id=tokenizer.bos, n_lanes=1, epochs=1)
    losses = bits_per_byte(model, [packer.batch(8)], tokenizer)
    assert bpb["value"] == pytest.approx(losses.bits_per_byte, rel=1e-5)
    assert nats["value"] == pytest.approx(losses.nats_per_token, rel=1e-5)
    assert bpb["n"] == nats["n"] == record["rows"] == math.ceil(999 / 128)
    assert bpb["low"] < bpb["value"] < bpb["high"]
    assert (record["tokens"], record["bytes"]) == (losses.tokens, losses.n_bytes)
    assert (record["kind"], record["stage"], record["step"]) == ("base_eval", "base", 7)
    first = next(iter(open_corpus(WORLD).documents("val")))
    assert len(record["samples"]) == 4
    assert first.startswith(" ".join(record["samples"][0]["prompt"].split()))
    assert "val_bpb" in capsys.readouterr().out


def test_base_eval_continues_given_prompts(out_dir, model, tokenizer):
    settings = commands.BaseEvalSettings(
        out_dir=str(out_dir), source="sft", data=WORLD, eval_tokens=100, prompts=("The town", ""), max_tokens=5
    )
    commands.evaluate_base(settings)
    record = json.loads((out_dir / "demo" / "base_eval_sft.json").read_text())
    prompts = [tokenizer.encode(prompt, bos=True) for prompt in ("The town", "")]
    own = Engine(model, tokenizer).generate_batch(prompts, Sampling(max_tokens=5, temperature=0.0))
    assert [sample["text"] for sample in record["samples"]] == [completion.text for completion in own]


def test_chat_eval(out_dir, capsys):
    tasks = ["--tasks", KNOWN, NEW, KNOWN]
    commands.chat_eval(["--out_dir", str(out_dir), *tasks, "--max_tokens", "4", "--max_problems", "6"])
    record = json.loads((out_dir / "demo" / "chat_eval_sft.json").read_text())
    metrics = record["metrics"]
    assert metrics["world-qa-known-heldout-1hop_accuracy"]["n"] == 6
    assert metrics["world-qa-new-heldout-1hop_abstained"]["n"] == 6
    assert len(metrics) == 6  # the repeated task is named by its spec
    assert [task["spec"].endswith("draw=0") for task in record["tasks"]] == [True] * 3
    assert len(record["samples"]) == 15
    assert {"question", "answer", "gold", "right", "task"} == set(record["samples"][0])
    assert "world-qa-known-heldout-1hop_accuracy" in capsys.readouterr().out


def test_world_tasks_are_drawn_by_the_seed():
    assert commands.drawn("world-qa:known=9", 4) == "world-qa:known=9,draw=4"
    assert commands.drawn("world-qa:known=9,draw=2", 4) == "world-qa:known=9,draw=2"
    assert commands.drawn("arc:path=x", 4) == "arc:path=x"


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("chat_eval", ["--tasks", "word-qa"], "unknown task 'word-qa'"),
        ("chat_eval", ["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        ("chat_eval", ["--max_tokens=0"], "--max_tokens 0"),
        ("chat_eval", ["--temperature=-1"], "--temperature -1"),
        ("chat_eval", ["--task", KNOWN], "did you mean --tasks"),
        ("chat_eval", ["--tasks"], "--tasks: name at least one"),
        ("base_eval", ["--data", "nowhere/at/all"], "no such file or directory"),
        ("base_eval", ["--eval_tokens=0"], "--eval_tokens 0"),
    ],
)
def test_wrong_calls(out_dir, command, arguments, message):
    with pytest.raises(UsageError) as error:
        getattr(commands, command)(["--out_dir", str(out_dir), *arguments])
    assert message in str(error.value)


def test_no_such_stage_lists_what_there_is(out_dir):
    with pytest.raises(NanochatError, match=r"there is: .*demo"):
        commands.chat_eval(["--out_dir", str(out_dir), "--source", "mid", "--tasks", KNOWN])
