"""What runs user code on the way to a worker or back holds up nobody else, and nobody's end."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portshm import PoolError, TaskTimeoutError
from portshm.pool import Pool, ProcessPoolExecutor
from portshm.pool._engine.serial_thread import SerialThread
from tests.pool.waiting import PATIENCE, until
from tests.tasks import Gated, gated, hang, inc, wait_for

CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class Gate:
    """Holds up what is pickled or unpickled behind it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def open(self) -> None:
        Path(self.path).touch()

    def reached(self) -> bool:
        return Path(self.path + ".started").exists()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


class GatedArgument:
    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __reduce__(self) -> Any:
        return wait_for, (self.gate.path,) if wait_for(self.gate.path) else ()


def check_that_others_go_on(pool: Pool) -> None:
    assert pool.map_async(inc, range(100)).get(PATIENCE) == list(range(1, 101))
    with pytest.raises(TaskTimeoutError):
        pool.apply_async(hang, timeout=0.1).get(PATIENCE)


def test_a_result_whose_unpickling_takes_its_time(gate: Gate) -> None:
    with Pool(2, context=CONTEXT) as pool:
        slow = pool.apply_async(gated, (gate.path,))
        until(gate.reached, "it to be unpickled")
        check_that_others_go_on(pool)
        assert not slow.ready()
        gate.open()
        assert isinstance(slow.get(PATIENCE), int)


def test_an_argument_whose_pickling_takes_its_time(gate: Gate, tmp_path: Path) -> None:
    busy = Gate(tmp_path / "busy")
    with Pool(2, context=CONTEXT) as pool:
        waiting = [pool.apply_async(wait_for, (busy.path,)) for _ in range(2)]
        slow = pool.apply_async(inc, (GatedArgument(gate),))  # by the pool, as nobody is idle
        busy.open()
        for result in waiting:
            result.get(PATIENCE)
        until(gate.reached, "it to be pickled")
        check_that_others_go_on(pool)
        assert not slow.ready()
        gate.open()
        assert slow.get(PATIENCE) > 1


def test_all_results_of_a_map_come_in_their_place_all_the_same(gate: Gate) -> None:
    with Pool(2, context=CONTEXT) as pool:
        results = pool.map_async(some_gated, [(number, gate.path) for number in range(50)], chunksize=1)
        until(gate.reached, "one to be unpickled")
        gate.open()
        found = results.get(PATIENCE)
        assert [number for number, _ in found] == list(range(50))


def some_gated(item: tuple[int, str]) -> tuple[int, object]:
    number, path = item
    return number, Gated(path) if number % 7 == 3 else str(number)


@pytest.mark.parametrize("face", [Pool, ProcessPoolExecutor])
def test_the_end_does_not_wait_for_it(gate: Gate, face: Any) -> None:
    pool = face(2, CONTEXT) if face is ProcessPoolExecutor else face(2, context=CONTEXT)
    if face is Pool:
        slow, end = pool.apply_async(gated, (gate.path,)), pool.terminate
    else:
        slow, end = pool.submit(gated, gate.path), pool.kill_workers
    until(gate.reached, "it to be unpickled")
    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(PATIENCE)
    assert not ending.is_alive(), "it waits"
    with pytest.raises(PoolError):
        slow.get(PATIENCE) if face is Pool else slow.result(PATIENCE)
    gate.open()
    until(lambda: not pool._engine._turns.serial._thread.is_alive(), "what was given up to end, and change nothing")
    with pytest.raises(PoolError):
        slow.get(PATIENCE) if face is Pool else slow.result(PATIENCE)


def test_results_that_nobody_can_take_yet_are_few(gate: Gate) -> None:
    with Pool(2, context=CONTEXT) as pool:
        results = [pool.apply_async(gated, (gate.path,)) for _ in range(100)]
        until(gate.reached, "one to be unpickled")
        until(lambda: {stats.state for stats in pool.stats()} == {"idle"}, "the workers to wait")
        assert pool._engine._turns.serial.left <= 3 * 2 + 2
        gate.open()
        assert all(isinstance(result.get(PATIENCE), int) for result in results)


def test_the_end_waits_for_results_otherwise(gate: Gate) -> None:
    pool = Pool(2, context=CONTEXT)
    slow = pool.apply_async(gated, (gate.path,))
    until(gate.reached, "it to be unpickled")
    pool.close()
    ending = threading.Thread(target=pool.join, daemon=True)
    ending.start()
    ending.join(0.3)
    assert ending.is_alive()
    gate.open()
    ending.join(PATIENCE)
    assert slow.ready()


def test_its_order_and_its_end() -> None:
    done: list[Any] = []
    told = threading.Semaphore(0)
    serial = SerialThread("test", told.release)
    assert serial.left == 0
    for number in range(5):
        serial.run(lambda number=number: number, done.append)  # type: ignore[misc]
    assert all(told.acquire(timeout=PATIENCE) for _ in range(5))
    assert done == list(range(5))
    serial.run(lambda: 1 // 0, done.append, done.append)
    assert told.acquire(timeout=PATIENCE)
    assert isinstance(done.pop(), ZeroDivisionError)
    entered, go_on = threading.Event(), threading.Event()
    serial.run(lambda: (entered.set(), go_on.wait(PATIENCE)), lambda _: done.append("given up"), done.append)
    serial.run(lambda: done.append("never"), done.append, done.append)
    assert entered.wait(PATIENCE)
    assert serial.pause(0) is None, "it is at something"
    error = PoolError("the end")
    serial.drop(error)
    assert done == [*range(5), error, error]
    serial.join(wait=False)
    go_on.set()
    serial.join()
    assert done == [*range(5), error, error], "what was given up changes nothing"


def test_what_there_is_is_done_before_it_finishes() -> None:
    done: list[Any] = []
    serial = SerialThread("test")
    for number in range(100):
        serial.run(lambda number=number: done.append(number))  # type: ignore[misc]
    serial.finish()
    serial.join()
    assert done == list(range(100))


def test_while_it_is_paused_nothing_begins() -> None:
    done: list[Any] = []
    serial = SerialThread("test")
    resume = serial.pause(0)
    assert resume is not None
    serial.run(lambda: done.append(1))
    serial.finish()
    assert serial.left == 1
    assert not done
    resume()
    serial.join()
    assert done == [1]
