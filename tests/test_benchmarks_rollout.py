"""benchmarks.rollout: every side writes what the plan says."""

import argparse

import pytest

from benchmarks import rollout
from nanochat.rag.multihop_tasks import MemorySearcher
from nanochat.rag.tasks import as_document
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
ARGUMENTS = argparse.Namespace(vocab_size=TOKENIZER.vocab_size, depth=1, width=64, pattern="transformer")


@pytest.fixture
def tool() -> rollout.TimedSearch:
    entities = list(rollout.WORLD.pool("new"))[:20]
    shelf = MemorySearcher(as_document(rollout.WORLD.document(entity)) for entity in entities)
    return rollout.TimedSearch(TOKENIZER, shelf, 1)


def test_rollouts_are_the_planned_ones(tool: rollout.TimedSearch) -> None:
    plans = rollout.make_plans(TOKENIZER, 3, 6)
    found = rollout.roll(rollout.build(ARGUMENTS), TOKENIZER, tool, plans, 2)
    for plan in plans:
        one = next(one for one in found if one.prompt == plan.prompt)
        assert [call.text for call in one.calls] == plan.queries
        assert [i for i, sampled in zip(one.ids, one.sampled) if sampled] == [i for turn in plan.turns for i in turn]
    assert tool.seconds > 0


@pytest.mark.slow  # importing transformers takes longer than all else here
def test_generate_is_measured(tool: rollout.TimedSearch) -> None:
    pytest.importorskip("transformers")
    plans = rollout.make_plans(TOKENIZER, 2, 6)
    assert rollout.measure_generate(ARGUMENTS, TOKENIZER, tool, plans, 1) > 0
