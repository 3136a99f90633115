"""Batches follow the pace of what is in them: a slow element does not hold back quick ones for long."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from portshm.pool import Pool
from tests import tasks

from .waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def quick_or_last(item: tuple[str, int, int]) -> int:
    """An element of a millisecond; but number `last` ends only when all the others have."""
    log, number, last = item
    if number == last:
        until(lambda: len(tasks.counted(log)) == 999, "the other elements")
    else:
        time.sleep(0.001)
    tasks.note(log, number)
    return number


def test_a_slow_element_holds_back_none_of_the_quick_ones(make_pool: Callable[..., Pool], log: str) -> None:
    found = make_pool(2).map(quick_or_last, [(log, number, 500) for number in range(1000)])
    assert found == list(range(1000))
    assert tasks.counted(log) == dict.fromkeys(range(1000), 1)


def nap(seconds: float) -> str:
    if seconds:
        time.sleep(seconds)
    return str(os.getpid())


def nap_and_count(seconds: float) -> int:
    """As `nap`; its results are plain numbers, for which the worker looks at the clock more seldom."""
    return int(nap(seconds))


# More slow ones than are computed between two looks at the clock.
SURPRISES = [(nap, [0.0] * 3000 + [0.05] * 8), (nap_and_count, [0.0] * 3000 + [0.011] * 80)]


@pytest.mark.parametrize(("function", "items"), SURPRISES, ids=["texts", "numbers"])
def test_elements_that_turn_out_slow_are_shared(
    make_pool: Callable[..., Pool], function: Callable[[float], object], items: list[float]
) -> None:
    """They are in one batch with thousands of quick ones; what the worker has not begun it gives back."""
    found = make_pool(2).map(function, items)
    assert len(found) == len(items)
    assert len(set(found[3000:])) == 2


@pytest.mark.parametrize(("function", "items"), SURPRISES, ids=["texts", "numbers"])
def test_calls_that_turn_out_slow_are_shared(
    make_pool: Callable[..., Pool], function: Callable[[float], object], items: list[float]
) -> None:
    pool = make_pool(2)
    results = [pool.apply_async(function, (seconds,)) for seconds in items]
    assert len({result.get(60) for result in results[3000:]}) == 2


def test_whole_chunks_are_kept_together_however_slow(make_pool: Callable[..., Pool]) -> None:
    found = make_pool(2).map(nap, [0.03] * 8, chunksize=4)
    assert len(set(found[:4])) == len(set(found[4:])) == 1
