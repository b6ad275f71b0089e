"""Rewards: what each part says, how they are put together, and what a reward that breaks leads to."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.rag.citations import Answer, Sentence
from nanochat.rag.rewards import REWARDS, Rewards, Sample, read_weights
from nanochat.retrieval.document import Document

DOCUMENTS = tuple(Document(name, f"text of {name}", name) for name in "abcd")
GOLD = {"answers": ["Torwick"], "sentence": "She was born in Torwick.", "gold_documents": ["a", "c"], "hops": 2}


def said(text: str, *cited: int, abstained: bool = False, invalid: tuple[str, ...] = ()) -> Answer:
    return Answer((Sentence(text, cited),) if text else (), abstained, invalid)


def sample(**changes: object) -> Sample:
    """A perfect answer, but for the changes."""
    perfect = Sample(
        "multihop 7, sample 1", GOLD, "…", said("She was born in Torwick.", 1, 3), True, DOCUMENTS,
        ("first", "second"), n_tokens=20, max_tokens=100, max_calls=3,
    )  # fmt: skip
    return replace(perfect, **changes)  # type: ignore[arg-type]


ABSENT = {"answers": ["I do not know."], "abstain": True, "gold_documents": [], "hops": 1}
WRONG = {"right": False, "answer": said("He was born in Brimholt.", 1)}


@pytest.mark.parametrize(
    ("name", "changes", "value"),
    [
        ("answer", {}, 1.0),
        ("answer", WRONG, 0.0),
        ("f1", {}, 1.0),
        ("f1", {"right": False, "answer": said("Torwick or Brimholt")}, 0.5),
        ("f1", {"right": False, "answer": said("I do not know.", abstained=True)}, 0.0),
        ("relevance", {}, 1.0),
        ("relevance", {"documents": DOCUMENTS[:2]}, 0.5),
        ("relevance", {"documents": ()}, 0.0),
        ("relevance", {"conversation": ABSENT, "calls": ("x",)}, 1.0),
        ("relevance", {"conversation": ABSENT, "calls": ()}, 0.0),
        ("efficiency", {}, 1 - 0.5 * 0.2),
        ("efficiency", {"calls": ("1", "2", "3")}, 1 - 0.5 * 0.2 - 0.5 / 3),
        ("efficiency", WRONG, 0.0),
        ("efficiency", {"calls": ("1",) * 9, "n_tokens": 500}, 0.0),
        ("citation", {}, 1.0),
        ("citation", {"answer": said("…", 1, 2)}, 0.5),
        ("citation", {"answer": said("…", 1, 3, invalid=("9",))}, 0.8),
        ("citation", {"answer": said("…")}, 0.0),
        ("citation", WRONG, 0.0),
        ("honesty", {}, 1.0),
        ("honesty", WRONG, 0.0),
        ("honesty", {"right": False, "answer": said("I do not know.", abstained=True)}, 0.5),
        ("format", {}, 1.0),
        ("format", {"finish_reason": "length"}, 0.0),
        ("format", {"failed_calls": 1}, 0.0),
        ("format", {"forged": 1}, 0.0),
        ("format", {"answer": said("…", 1, invalid=("x",))}, 0.0),
        ("format", {"answer": said("")}, 0.0),
    ],
)
def test_parts(name: str, changes: dict[str, object], value: float) -> None:
    assert REWARDS[name](sample(**changes)) == pytest.approx(value)


@given(
    right=st.booleans(), n_documents=st.integers(0, 4), n_calls=st.integers(0, 9), n_tokens=st.integers(0, 300),
    cited=st.lists(st.integers(1, 4), max_size=4), ended=st.sampled_from(["stop", "length", "calls", "error"]),
    abstained=st.booleans(), absent=st.booleans(),
)  # fmt: skip
def test_every_part_and_the_total_are_bounded(
    right: bool, n_documents: int, n_calls: int, n_tokens: int, cited: list[int], ended: str, abstained: bool,
    absent: bool,
) -> None:  # fmt: skip
    documents = DOCUMENTS[:n_documents]
    one = sample(
        right=right, documents=documents, calls=("q",) * n_calls, n_tokens=n_tokens, finish_reason=ended,
        answer=said("Torwick", *(n for n in cited if n <= n_documents), abstained=abstained),
        conversation=ABSENT if absent else GOLD,
    )  # fmt: skip
    score = Rewards(dict.fromkeys(REWARDS, 1.0)).score([one])[0]
    assert all(0 <= value <= 1 for value in (score.total, *score.parts.values()))


def test_default_weights_and_the_gate() -> None:
    good, bad = Rewards().score([sample(), sample(finish_reason="length")])
    assert good.total == pytest.approx(0.6 + 0.3 + 0.1 * 0.9)
    assert good.parts == {"answer": 1.0, "relevance": 1.0, "efficiency": pytest.approx(0.9), "format": 1.0}
    assert bad.total == 0.0
    assert bad.parts["answer"] == 1.0  # what happened is still told


def test_own_rewards_and_reward_models() -> None:
    class Judge:
        def score(self, samples):
            return [len(one.calls) / 10 for one in samples]

    rewards = Rewards({"answer": 1.0, "short": 2.0, "judge": 1.0}, (), {"short": lambda s: -0.5, "judge": Judge()})
    assert rewards.score([sample()])[0].total == pytest.approx((1 - 1 + 0.2) / 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.5, -2, "high", None])
def test_a_value_that_is_none_names_the_sample(value: object) -> None:
    rewards = Rewards({"mine": 1.0}, (), {"mine": lambda one: value})  # type: ignore[dict-item,return-value]
    with pytest.raises(NanochatError, match=r"the reward mine gave .* for multihop 7, sample 1"):
        rewards.score([sample()])


def test_a_reward_that_raises_names_the_sample() -> None:
    def broken(one: Sample) -> float:
        raise KeyError("gold")

    with pytest.raises(NanochatError, match=r"the reward mine failed on multihop 7, sample 1: KeyError\('gold'\)"):
        Rewards({"mine": 1.0}, (), {"mine": broken}).score([sample()])

    class Short:
        def score(self, samples):
            return []

    with pytest.raises(NanochatError, match="0 values for 1 samples"):
        Rewards({"judge": 1.0}, (), {"judge": Short()}).score([sample()])


@pytest.mark.parametrize("weights", [{}, {"answer": 0.0}, {"answer": -1.0, "f1": 2.0}, {"answer": math.inf}])
def test_weights_that_are_none(weights: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="reward weights"):
        Rewards(weights)


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="unknown reward 'anwser'"):
        Rewards({"anwser": 1.0})
    with pytest.raises(UsageError, match="unknown reward 'shape'"):
        Rewards(gates=("shape",))


def test_weights_as_text() -> None:
    assert read_weights("answer=0.6, relevance=.3") == {"answer": 0.6, "relevance": 0.3}
    assert read_weights("") == {}
    with pytest.raises(UsageError, match=r"--reward_weights answer: .*'answer' is not that"):
        read_weights("answer")


def test_a_reward_model_may_be_empty_as_a_collection():
    class Judge(list):
        def score(self, samples):
            return [0.5 for _ in samples]

    rewards = Rewards({"judge": 1.0}, (), {"judge": Judge()})
    assert rewards.column("judge", [sample(), sample()]) == [0.5, 0.5]
