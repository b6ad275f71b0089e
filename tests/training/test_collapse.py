"""What is a collapse, and what is bad luck."""

import math
import random

import pytest

from nanochat.training.collapse import Detector

HEALTHY = {"reward": 0.5, "format": 0.95, "entropy": 0.6, "truncated": 0.02}


def run(detector: Detector, rounds: int, **changes: float) -> list[str]:
    return [found for _ in range(rounds) if (found := detector.update({**HEALTHY, **changes}))]


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_progress_are_none(seed: int) -> None:
    """A run that learns: the reward rises to 1, entropy falls to nearly nothing; 16 prompts are a noisy mean."""
    draws, detector = random.Random(seed), Detector()
    for i in range(200):
        share = i / 200
        reward = min(1.0, max(0.0, 0.2 + 0.8 * share + draws.gauss(0, 0.07)))
        entropy = 0.8 * math.exp(-6 * share)
        assert not detector.update({**HEALTHY, "reward": reward, "entropy": entropy}), i


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": 0.1}, "the reward fell from 0.500"),
        ({"format": 0.1, "truncated": 0.9}, "well-formed answers fell from 0.95 to 0.10; 90% of the answers"),
        ({"entropy": 4.0, "format": 0.2}, "the entropy rose"),
        ({"entropy": 0.001}, "the entropy vanished"),
        ({"truncated": 0.8}, "80% of the answers run into the limit"),
    ],
)
def test_a_change_that_lasts_is_one(changes: dict[str, float], said: str) -> None:
    detector = Detector()
    assert run(detector, 10) == []
    assert run(detector, 2, **changes) == []  # patience
    assert said in run(detector, 8, **changes)[-1]


def test_a_sign_alone_is_none_while_the_reward_rises() -> None:
    detector = Detector()
    run(detector, 10)
    assert run(detector, 20, reward=0.9, entropy=0.001) == []


def test_lost_from_the_first_round_on() -> None:
    detector = Detector()
    found = [detector.update({**HEALTHY, "reward": reward}) for reward in (0.5, 0.45, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0)]
    assert any(found)


def test_numbers_that_are_none_are_one_at_once() -> None:
    assert "not finite" in Detector().update({**HEALTHY, "entropy": math.nan})


def test_harder_problems_begin_anew_and_a_checkpoint_remembers() -> None:
    detector = Detector()
    run(detector, 10)
    again = Detector()
    again.load_state_dict(detector.state_dict())
    assert run(again, 8, reward=0.1) != []
    detector.forget()
    assert run(detector, 20, reward=0.1) == []
