"""The life of a pool only moves forward, whoever moves it."""

from __future__ import annotations

import itertools

import pytest

from portshm.pool._engine.life import Life, Stage


@pytest.mark.parametrize("order", list(itertools.permutations([Stage.RUNNING, Stage.CLOSING, Stage.ENDING])))
def test_it_is_in_the_latest_stage_that_was_reached(order: tuple[Stage, ...]) -> None:
    life = Life()
    assert life.stage is Stage.NEW
    for step, stage in enumerate(order, 1):
        life.advance(stage)
        assert life.stage is max(order[:step])
        assert life.closed is (max(order[:step]) >= Stage.CLOSING)
        assert life.started is (Stage.RUNNING in order[:step])
        assert life.ends_now is (Stage.ENDING in order[:step])


def test_the_first_reason_remains() -> None:
    life, first, second = Life(), ValueError("first"), ValueError("second")
    assert life.error is None
    life.advance(Stage.ENDING, first)
    life.advance(Stage.ENDING, second, broken=True)
    assert life.error is first
    assert life.broken is None


def test_broken_is_what_ended_by_itself() -> None:
    life, error = Life(), ValueError("broken")
    life.advance(Stage.ENDING, error, broken=True)
    life.advance(Stage.ENDING, ValueError("terminated"))
    assert life.broken is error
