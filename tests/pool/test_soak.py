"""SIGKILLs at random instants over one long map: it ends, everything is right or named, and nothing runs twice."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from portshm import WorkerCrashed
from portshm.pool import Pool
from tests.pool.waiting import until
from tests.tasks import SoakItem, counted, soak, soak_payload

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

PER_KILL = 30  # elements for each kill
LARGE = 300_000  # bytes


class Killer(threading.Thread):
    """Kills a random worker of the pool each time that a random number of elements more has been started."""

    def __init__(self, pool: Pool, log: Path, kills: int, chance: random.Random) -> None:
        super().__init__(name="killer", daemon=True)
        self.pool = pool
        self.log = log
        self.kills = kills
        self.chance = chance
        self.done = 0
        self.over = threading.Event()

    def run(self) -> None:
        goal = 0
        while self.done < self.kills and not self.over.is_set():
            goal += self.chance.randrange(PER_KILL)
            while self.progress() < goal and not self.over.is_set():
                self.over.wait(0.0005)
            self.over.wait(self.chance.random() * 0.002)
            pids = [stats.pid for stats in self.pool.stats() if stats.pid is not None]
            if pids:
                # The pool may have reaped it since: a pid is not used again as quickly as that.
                try:
                    os.kill(self.chance.choice(pids), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.done += 1

    def progress(self) -> int:
        try:
            return self.log.stat().st_size // 6  # digits and newline, near enough
        except FileNotFoundError:
            return 0


def run_soak(pool: Pool, log: Path, kills: int, chance: random.Random) -> tuple[int, int]:
    """How many kills there were, and how many elements they cost."""
    count = kills * PER_KILL
    items = [
        SoakItem(
            str(log),
            number,
            soak_payload(number, chance.choice((0, 8, 100, LARGE)) if number % 5 == 0 else 8),
            chance.choice((0, 8, 100, LARGE)) if number % 7 == 0 else 8,
        )
        for number in range(100_000, 100_000 + count)
    ]
    killer = Killer(pool, log, kills, chance)
    result = pool.map_async(soak, items)
    killer.start()
    try:
        result.wait(1700)
        assert result.ready()
        results = result.get(0)
    finally:
        killer.over.set()
        killer.join()
    lost = 0
    for index, (item, value) in enumerate(zip(items, results, strict=True)):
        if isinstance(value, WorkerCrashed):
            lost += 1
            assert value.index == index
            assert value.item == item
            assert value.signal == signal.SIGKILL
        else:
            assert value == (item.number, soak_payload(item.number, item.answer))
    started = counted(log)
    assert max(started.values()) == 1, "an element ran twice"
    assert lost <= killer.done
    assert len(started) >= count - lost
    return killer.done, lost


def check(make_pool: Callable[..., Pool], log: str, kills: int, seed: str) -> None:
    pool = make_pool(3, on_crash="return")
    done, lost = run_soak(pool, Path(log), kills, random.Random(seed))
    print(f"{seed}: {done} kills cost {lost} of {kills * PER_KILL} elements")
    assert done >= kills // 2, "most of the kills fell into the map"
    assert pool.map_async(abs, range(-100, 0)).get(60) == list(range(100, 0, -1))
    until(lambda: sum(stats.pid is not None for stats in pool.stats()) == 3, "all workers to be back")


def test_some_kills(make_pool: Callable[..., Pool], log: str, start_method: str) -> None:
    check(make_pool, log, 40 if start_method == "fork" else 20, start_method)


@pytest.mark.slow
def test_a_thousand_kills(make_pool: Callable[..., Pool], log: str, start_method: str) -> None:
    check(make_pool, log, 1000, start_method)
