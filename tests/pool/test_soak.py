"""SIGKILLs at random instants: everything ends, everything is right or named, and nothing runs twice.

How long the slow ones are, by the environment: `PORTSHM_SOAK_KILLS` (50,000), `PORTSHM_SOAK_HELD_UP` (5,000 kills),
`PORTSHM_SOAK_THREADS` (600 seconds).
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import random
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portshm import TaskTimeoutError, WorkerCrashed
from portshm.pool import Pool
from tests import tasks
from tests.pool.lines import HoldUps, Lines
from tests.pool.waiting import until
from tests.tasks import SoakItem, counted, soak, soak_payload

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

PER_KILL = 30  # elements for each kill
LARGE = 300_000  # bytes


# What has all of a round executed; each returns the results, with crashes in their elements' places.
WAYS: dict[str, Callable[[Pool, list[SoakItem]], list[Any]]] = {
    "map": lambda pool, items: pool.map_async(soak, items).get(600),
    "one by one": lambda pool, items: list(pool.imap(soak, items)),
    "calls": lambda pool, items: [call.get(600) for call in [pool.apply_async(soak, (item,)) for item in items]],
    "chunks": lambda pool, items: pool.map_async(soak, items, chunksize=7).get(600),
}


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


def run_soak(pool: Pool, log: Path, kills: int, chance: random.Random, way: str = "map") -> tuple[int, int]:
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
    killer.start()
    try:
        results = WAYS[way](pool, items)
    finally:
        killer.over.set()
        killer.join()
    lost = 0
    for index, (item, value) in enumerate(zip(items, results, strict=True)):
        if isinstance(value, WorkerCrashed):
            lost += 1
            single = way == "calls"  # a call's item is its arguments
            assert value.index == (0 if single else index)
            assert value.item == (((item,), {}) if single else item)
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


# -- many more, in rounds

PER_ROUND = 100  # kills


def setting(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def allow(seconds: float) -> None:
    """Give the test that much time, instead of what the watchdog of all tests has."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def run_rounds(
    log: str, kills: int, per_round: int, before_round: Callable[[int], object] = lambda number: None
) -> None:
    """So many kills under fork, each round by another way."""
    chance = random.Random(kills)
    done = lost = 0
    began = time.monotonic()
    for number, way in enumerate(itertools.cycle(WAYS)):
        if done >= kills:
            break
        before_round(number)
        round_log = Path(f"{log}-{number}")
        with Pool(3, context=multiprocessing.get_context("fork"), on_crash="return") as pool:
            more, cost = run_soak(pool, round_log, min(per_round, kills - done), chance, way)
        assert more, "no kill fell into a whole round"
        done, lost = done + more, lost + cost
        round_log.unlink()
    print(f"{done} kills cost {lost} elements in {time.monotonic() - began:.0f} s; none ran twice, none was wrong")


def run_held_up(log: str, kills: int, per_round: int) -> None:
    """The same with threads of the parent's held up for 3 ms before random lines of the pool's."""
    chance = random.Random(kills)
    hold_ups = HoldUps(300, chance)

    def choose(number: int) -> None:
        """Everybody, or one thread of those that have been seen, and that one often."""
        victims = sorted(hold_ups.threads)
        hold_ups.victim = chance.choice(victims) if victims and number % 5 else None
        hold_ups.one_in = 300 if hold_ups.victim is None else 30

    with Lines(hold_ups):
        run_rounds(log, kills, per_round, choose)
    print(f"held up {hold_ups.count} times: {', '.join(sorted(hold_ups.threads))}")
    assert hold_ups.count > kills


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


@needs_fork
def test_some_kills_by_every_way(log: str) -> None:
    run_rounds(log, 80, 20)


@needs_fork
@pytest.mark.slow
def test_fifty_thousand_kills(log: str) -> None:
    kills = setting("PORTSHM_SOAK_KILLS", 50_000)
    allow(600 + kills)
    run_rounds(log, kills, PER_ROUND)


@needs_fork
def test_some_kills_while_everybody_is_held_up(log: str) -> None:
    run_held_up(log, 80, 20)


@needs_fork
@pytest.mark.slow
def test_five_thousand_kills_while_everybody_is_held_up(log: str) -> None:
    kills = setting("PORTSHM_SOAK_HELD_UP", 5_000)
    allow(600 + kills)
    run_held_up(log, kills, PER_ROUND)


# -- many threads on one pool

THREADS = 8


def use(pool: Pool, log: str, name: int, over: threading.Event) -> int:
    """One thread's calls of every kind until it is over; how many elements there were."""
    chance = random.Random(name)
    numbers = itertools.count()
    done = 0
    for turn in numbers:
        if over.is_set():
            return done
        path = f"{log}-{name}-{turn}"
        steps = [tasks.Step(path, number) for number in range(chance.choice((1, 2, 10, 100)))]
        values = [number * 10 for number in range(len(steps))]
        way = chance.randrange(8)
        if way == 0:
            assert [pool.apply(tasks.run, (step,)) for step in steps[:10]] == values[:10]
        elif way == 1:
            calls = [pool.apply_async(tasks.run, (step,)) for step in steps]
            assert [call.get(60) for call in calls] == values
        elif way == 2:
            assert pool.map(tasks.run, steps, chunksize=chance.choice((None, 1, 7))) == values
        elif way == 3:
            assert list(pool.imap(tasks.run, iter(steps), chunksize=chance.choice((1, 5)))) == values
        elif way == 4:
            assert sorted(pool.imap_unordered(tasks.run, steps, buffersize=chance.choice((None, 3)))) == values
        elif way == 5:
            with pytest.raises(ValueError):
                pool.map(tasks.fail, steps)
        elif way == 6:
            called = threading.Event()
            assert pool.apply_async(tasks.run, (steps[0],), callback=lambda _, event=called: event.set()).get(60) == 0
            assert called.wait(60)
        elif turn % 5 == 0:
            with pytest.raises(TaskTimeoutError):
                pool.apply_async(tasks.hang, timeout=0.02).get(60)
        else:
            with pytest.raises(WorkerCrashed):
                pool.apply_async(tasks.run, (tasks.Step(path, 0, "SIGKILL"),)).get(60)
        runs = counted(path)
        assert set(runs.values()) <= {1}, "an element ran twice"
        done += len(runs)
        Path(path).unlink(missing_ok=True)
    raise AssertionError("numbers end")


def run_threads(log: str, seconds: float) -> None:
    over = threading.Event()
    found: list[Any] = []

    def run(name: int) -> None:
        try:
            found.append(use(pool, log, name, over))
        except BaseException as error:
            found.append(error)
            over.set()

    with Pool(4, context=multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")) as pool:
        threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in range(THREADS)]
        for thread in threads:
            thread.start()
        over.wait(seconds)
        over.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a call hangs"
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    print(f"{sum(found)} elements in {seconds:g} s")
    assert all(found)


def test_eight_threads_on_one_pool(log: str) -> None:
    run_threads(log, 3.0)


@pytest.mark.slow
@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this build has the interpreter's lock")
def test_eight_threads_on_one_pool_for_ten_minutes(log: str) -> None:
    seconds = setting("PORTSHM_SOAK_THREADS", 600)
    allow(600 + seconds)
    run_threads(log, seconds)
