"""The curriculum of reinforcement learning: what opens the next level, and what is drawn."""

import pytest

from nanochat.errors import UsageError
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.training.course import Course

LEVELS = [Arithmetic(n=5, digits=d) for d in (1, 2, 3)]


def levels_drawn(course: Course, number: int = 0, n: int = 200) -> dict[int, int]:
    drawn = [problem.level for problem in course.draw(number, n)]
    return {level: drawn.count(level) for level in (1, 2, 3)}


def test_success_opens_levels_one_by_one() -> None:
    course = Course(LEVELS, by="success", rise_at=0.5)
    assert levels_drawn(course) == {1: 200, 2: 0, 3: 0}
    assert not course.update({1: 0.4}, 0.0)
    assert not any(course.update({1: 0.45}, 0.9) for _ in range(50))  # never good enough
    rounds = next(i for i in range(50) if course.update({1: 1.0}, 0.0))
    assert course.level == 2
    assert rounds < 3
    assert not course.update({1: 1.0}, 0.0)  # only the highest open level counts
    counts = levels_drawn(course)
    assert 60 < counts[1] < 140
    assert counts[1] + counts[2] == 200
    while course.level == 2:
        course.update({1: 0.0, 2: 1.0}, 0.0)
    assert min(levels_drawn(course).values()) > 20
    assert not course.update({3: 1.0}, 1.0)  # there is no fourth


def test_progress_opens_levels_at_their_share() -> None:
    course = Course(LEVELS, by="progress")
    opened = [share / 100 for share in range(101) if course.update({1: 0.0}, share / 100)]
    assert opened == [pytest.approx(0.34), pytest.approx(0.67)]


def test_none_opens_all() -> None:
    assert min(levels_drawn(Course(LEVELS, by="none")).values()) > 30


def test_learnable_draws_what_is_solved_sometimes() -> None:
    course = Course(LEVELS, by="learnable")
    assert min(levels_drawn(course).values()) > 30  # nothing is known yet
    for _ in range(50):
        assert not course.update({1: 1.0, 2: 0.5}, 0.0)  # the third was not drawn: as before
    counts = levels_drawn(course, n=2000)
    assert 20 < counts[1] < 140  # 2 of 52
    assert abs(counts[2] - counts[3]) < 200
    again = Course(LEVELS, by="learnable")
    again.load_state_dict(course.state_dict())
    assert levels_drawn(again, 1) == levels_drawn(course, 1)


def test_tasks_are_gone_through_in_order_and_begin_again() -> None:
    course = Course(LEVELS[:1])
    assert [problem.number for problem in course.draw(0, 7)] == [0, 1, 2, 3, 4, 0, 1]
    state = course.state_dict()
    expected = [p.name for p in course.draw(1, 4)]
    again = Course(LEVELS[:1])
    again.load_state_dict(state)
    assert [p.name for p in again.draw(1, 4)] == expected
    with pytest.raises(UsageError, match="1 levels, this run's 3"):
        Course(LEVELS).load_state_dict(state)


@pytest.mark.parametrize("options", [{"by": "luck"}, {"rise_at": 0.0}, {"rise_at": 1.1}])
def test_wrong_options(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Course(LEVELS, **options)  # type: ignore[arg-type]
