"""REFRAG training: both stages over worlds and over a knowledge base, and what is refused before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from policies import evaluations, rounds
from tiny import COMMON, copy_run

from nanochat import checkpoint
from nanochat.engine.tools import Request
from nanochat.errors import UsageError
from nanochat.rag.dataset import DatasetSettings, prepare
from nanochat.rag.multihop_tasks import MultiHopWorld
from nanochat.rag.traces import read_traces
from nanochat.tasks.task import Curriculum
from nanochat.tokenizer import Tokenizer
from nanochat.training import refrag
from nanochat.training.course import Course
from nanochat.training.refrag import Levels, RefragSettings, make_levels, search_tools, traces_course, train_refrag

BYTES = Tokenizer([bytes([i]) for i in range(256)])
SEARCH = {
    "source": "base", "sequence_len": 512, "n_prompts": 2, "n_samples": 3, "max_tokens": 24, "device_batch_size": 6,
    "eval_prompts": 2, "num_iterations": 2, "warm_start_steps": 3, "contexts": "entities=60,per_world=4", "top_k": 1,
}  # fmt: skip


def settings(root: Path, **options: Any) -> RefragSettings:
    return RefragSettings(**{**COMMON, "out_dir": str(root), **SEARCH, **options})


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return copy_run(finished, tmp_path, "tokenizer", "base")


def test_both_stages_over_worlds(root: Path) -> None:
    metrics = train_refrag(settings(root, curriculum="none"))
    assert metrics["final"] == 1.0
    assert {record["step"] for record in rounds(root, "refrag")} == {1, 2}
    assert {"reward_answer", "reward_relevance", "reward_efficiency", "reward_format"} <= set(rounds(root, "refrag")[0])
    assert {f"val_accuracy_{n}hop" for n in (1, 2, 3)} <= set(evaluations(root, "refrag")[0])
    shown = read_traces(root / "tiny" / "refrag" / "traces.jsonl")
    assert len(shown) == 6
    assert all(trace.question and trace.reward is not None for trace in shown)
    begun = checkpoint.latest(root / "tiny" / "refrag_sft")
    ended = checkpoint.latest(root / "tiny" / "refrag")
    assert begun is not None
    assert ended is not None
    assert checkpoint.read_meta(ended)["source"] == checkpoint.read_meta(begun)["checksum"]
    again = train_refrag(settings(root, curriculum="none"))  # nothing is left to do
    assert again == metrics


def test_one_stage_alone(root: Path) -> None:
    train_refrag(settings(root, use_rewards=False))
    assert not (root / "tiny" / "refrag").exists()
    metrics = train_refrag(settings(root, warm_start_steps=0, source="refrag_sft", max_hops=1))
    assert metrics["rounds"] >= 2
    assert "val_accuracy_1hop" not in evaluations(root, "refrag")[0]  # with one level it is val_accuracy


def test_each_prompt_is_searched_in_its_own_world(tmp_path: Path) -> None:
    levels = make_levels(settings(tmp_path, absent=0.0), BYTES, 512)
    problems = Course(list(levels.train.values()), by="none").draw(0, 12)
    (tool,) = search_tools(BYTES, 1, problems)
    queries = [problem.conversation["messages"][1]["content"][0]["text"] for problem in problems]
    results = tool.run([Request(query, prompt=i) for i, query in enumerate(queries)])
    assert [r.value.documents[0].id for r in results] == [p.conversation["gold_documents"][0] for p in problems]
    assert len({problem.task.searcher(problem.number) for problem in problems}) > 2


def test_own_rewards_count(root: Path) -> None:
    options = {"warm_start_steps": 0, "reward_weights": "mine=1", "reward_gates": ()}
    train_refrag(settings(root, **options), {"mine": lambda sample: 0.25})
    assert {record["reward_mine"] for record in rounds(root, "refrag")} == {0.25}


def test_a_knowledge_base_with_its_questions(root: Path) -> None:
    made = DatasetSettings(
        output=str(root / "rag"), retriever_type="simple", known=10, new=60, train=60, validation=4, test=4
    )
    base = prepare(made)
    options = {"contexts": "", "knowledge_base": str(base), "max_hops": 2}
    metrics = train_refrag(settings(root, **options))
    assert metrics["final"] == 1.0
    levels = make_levels(settings(root, **options), BYTES, 512)
    assert set(levels.train) == {"1hop", "2hop"}
    ids = [{tuple(q.question for q in task.questions) for task in part.values()} for part in levels]
    assert not ids[0] & ids[1]
    lines = [json.loads(line) for line in (root / "rag" / "train.jsonl").read_text().splitlines()]
    lines[5] |= {"answer": "x", "gold": ["nowhere"]}
    other = root / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UsageError, match=r"1 gold documents are not in .*nowhere"):
        train_refrag(settings(root, **options, questions=str(other)))
    other.write_text(json.dumps({**lines[0], "gold": [], "answers": []}))
    with pytest.raises(UsageError, match="too few"):
        train_refrag(settings(root, **options, questions=str(other)))


def test_traces_grow_longer() -> None:
    levels = [MultiHopWorld((hops,), n=40, absent=0.0) for hops in (1, 2, 3)]
    course = traces_course(levels, 120)
    assert isinstance(course, Curriculum)
    hops = [course[i]["hops"] for i in range(120)]
    assert set(hops[:12]) == {1}
    assert set(hops[12:24]) == {1, 2}
    assert set(hops[24:]) == {1, 2, 3}  # four fifths: whoever sees three hops late stops after two
    assert traces_course(levels[:1], 5) is levels[0]


def test_few_traces_of_many_hops() -> None:
    levels = [MultiHopWorld((hops,), n=400, absent=0.0) for hops in (1, 2, 3)]
    course = traces_course(levels, 1000, [1.0, 1.0, 0.05])
    hops = [course[i]["hops"] for i in range(200, 1000)]
    assert 8 <= hops.count(3) <= 35  # 20 of 820
    assert abs(hops.count(1) - hops.count(2)) < 120


def test_the_mix_goes_by_hops() -> None:
    """And not by the place of a level: a knowledge base may have none of one hop."""
    two, three = (MultiHopWorld((hops,), n=4) for hops in (2, 3))
    levels = Levels({"2hop": two, "3hop": three}, {"2hop": two, "3hop": three})
    assert levels.weights(()) == [1.0, 1.0]
    assert levels.weights((1.0, 0.5, 0.25)) == [0.5, 0.25]
    with pytest.raises(UsageError, match="--warm_start_mix leaves no question: the levels are 2hop, 3hop"):
        levels.weights((1.0, 0.0, 0.0))


def test_validation_sees_other_worlds(tmp_path: Path) -> None:
    levels = make_levels(settings(tmp_path, contexts="entities=60,seed=3,n=50"), BYTES, 512)
    names = [
        {document.title for task in part.values() for i in (0, 20, 40) for document in task.world(i)[1].documents}
        for part in levels
    ]
    texts = [{task[i]["messages"][0]["content"] for task in part.values() for i in range(40)} for part in levels]
    assert len(texts[0] & texts[1]) < 3
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": ""}, "one of the two"),
        ({"knowledge_base": "kb"}, "one of the two"),
        ({"contexts": "dokuments=3"}, "dokuments"),
        ({"max_hops": 0}, "--max_hops 0"),
        ({"top_k": 0}, "--top_k 0"),
        ({"absent": 1.0}, "--absent 1.0"),
        ({"warm_start_steps": -1}, "--warm_start_steps -1"),
        ({"warm_start_mix": (1.0, 1.0)}, "--warm_start_mix 1 1: give 3"),
        ({"warm_start_mix": (1.0, 1.0, -1.0)}, "--warm_start_mix"),
        ({"warm_start_mix": (0.0, 0.0, 0.0)}, "--warm_start_mix"),
        ({"warm_start_steps": 0, "use_rewards": False}, "nothing to do"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(tmp_path, **options).check()


def test_results_leave_room_for_the_answer(tmp_path: Path) -> None:
    given = settings(tmp_path, max_hops=3)
    assert 3 * given.result_tokens(1024) <= 768
    assert refrag.world_options("") == {}
