"""Moments: set, dropped, asked for; with times that nobody measured."""

from __future__ import annotations

from portshm.pool._engine.deadlines import Deadlines, Due


def test_none_is_none() -> None:
    deadlines = Deadlines()
    assert deadlines.next() is None
    assert deadlines.due(1e9) == []
    deadlines.drop((Due.ELEMENT, 1))


def test_the_earliest_is_next_and_what_is_due_comes_in_its_order() -> None:
    deadlines = Deadlines()
    deadlines.set((Due.ELEMENT, 1), 3.0)
    deadlines.set((Due.READY, 1), 1.0)
    deadlines.set((Due.ELEMENT, 2), 2.0)
    assert deadlines.next() == 1.0
    assert deadlines.due(0.9) == []
    assert deadlines.due(2.0) == [(Due.READY, 1), (Due.ELEMENT, 2)]
    assert deadlines.due(2.0) == [], "each is told once"
    assert deadlines.next() == 3.0


def test_the_last_that_was_set_counts() -> None:
    deadlines = Deadlines()
    deadlines.set((Due.ELEMENT, 1), 1.0)
    deadlines.set((Due.ELEMENT, 1), 5.0)
    assert deadlines.next() == 5.0
    deadlines.drop((Due.ELEMENT, 1))
    assert deadlines.next() is None
