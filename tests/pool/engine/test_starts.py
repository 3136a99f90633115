"""When processes are started, and when no more; without any process or clock."""

from __future__ import annotations

import pytest

from portshm import WorkerStartError
from portshm.pool._engine.deadlines import Deadlines, Due
from portshm.pool._engine.starts import Starts

NOW = 1000.0


class Trial:
    """Starts at a moment that does not move, of worker 1."""

    def __init__(self) -> None:
        self.deadlines = Deadlines()
        self.starts = Starts(self.deadlines)

    def failed(self, error: str = "", *, others_live: bool = False) -> WorkerStartError | None:
        return self.starts.failed(1, NOW, error=error, detail="how it died", others_live=others_live)

    def refused(self, *, others_live: bool = False) -> WorkerStartError | None:
        return self.starts.refused(1, NOW, OSError("no more processes"), others_live=others_live)

    def in_seconds(self) -> float | None:
        """When it will be started; None if it will not."""
        moment = self.deadlines.next()
        if moment is None:
            return None
        assert self.deadlines.due(moment) == [(Due.START, 1)]
        return moment - NOW


@pytest.fixture
def trial() -> Trial:
    return Trial()


def test_before_any_was_ready_five_failures_are_enough(trial: Trial) -> None:
    for _ in range(4):
        assert trial.failed() is None
        assert trial.in_seconds() == 0.0
    error = trial.failed()
    assert error is not None
    assert (error.reason, error.detail) == ("5 workers in a row died before they were ready", "how it died")
    assert trial.in_seconds() is None


def test_later_failures_are_waited_for_ever_longer(trial: Trial) -> None:
    trial.starts.ready()
    distances = []
    for _ in range(19):
        assert trial.failed() is None
        distances.append(trial.in_seconds())
    assert distances[:3] == pytest.approx([0.02, 0.04, 0.08])
    assert distances[6:] == [1.0] * 13
    assert trial.failed() is not None


def test_failing_starts_never_end_workers_that_are_well(trial: Trial) -> None:
    trial.starts.ready()
    for _ in range(1000):
        assert trial.failed(others_live=True) is None
        assert trial.refused(others_live=True) is None
        assert trial.in_seconds() is not None


def test_one_that_is_ready_makes_up_for_all_failures(trial: Trial) -> None:
    for _ in range(10):
        for _ in range(4):
            assert trial.failed() is None
        trial.starts.ready()


def test_an_initializer_that_fails_is_not_tried_again(trial: Trial) -> None:
    trial.starts.ready()
    error = trial.failed("Traceback", others_live=True)
    assert error is not None
    assert (error.reason, error.detail) == ("the workers' initializer failed", "Traceback")
    assert trial.in_seconds() is None


@pytest.mark.parametrize(("was_idle", "age", "wait"), [(False, 0.0, 0.0), (True, 0.1, 0.5), (True, 1.0, 0.0)])
def test_only_one_that_died_idle_just_after_its_start_is_replaced_later(
    trial: Trial, was_idle: bool, age: float, wait: float
) -> None:
    trial.starts.again(1, NOW, started_at=NOW - age, was_idle=was_idle)
    assert trial.in_seconds() == wait


def test_where_the_system_starts_none_it_is_tried_again_a_few_times(trial: Trial) -> None:
    for _ in range(4):
        assert trial.refused() is None
        assert trial.in_seconds() == 0.5
    error = trial.refused()
    assert error is not None
    assert error.reason == "workers cannot be started"
    assert "no more processes" in error.detail


def test_on_demand(trial: Trial) -> None:
    trial.starts.hold_back([1, 2, 3])
    assert [trial.starts.more(), trial.starts.more()] == [3, 2]
    assert trial.starts.some_held_back
    assert trial.starts.more() == 1
    assert not trial.starts.some_held_back
    assert trial.starts.more() is None


def test_what_is_cancelled_is_not_started(trial: Trial) -> None:
    trial.starts.hold_back([2])
    trial.starts.again(1, NOW, started_at=0.0, was_idle=False)
    trial.starts.cancel()
    assert trial.in_seconds() is None
    assert trial.starts.more() is None
