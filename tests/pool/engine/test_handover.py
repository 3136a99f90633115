"""Two threads and one slot: each batch has one sender, and nobody else touches the slot's memory.

That a sender which comes late changes nothing is a row of the scheduler's table (`test_scheduler.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from portshm.pool import AsyncResult, Pool
from portshm.pool._engine.scheduler import State
from portshm.pool._work import TaskOptions
from tests.pool.waiting import PATIENCE, until
from tests.tasks import inc, wait_for

# The engine is the same whatever the start method is.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class Caller(threading.Thread):
    """A thread that makes one call; `result` is what came of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.result: Any = None

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as error:
            self.result = error

    def outcome(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), "it hangs"
        return self.result


@contextmanager
def one_worker() -> Iterator[tuple[Pool, Any, Any]]:
    """A pool with one worker that is idle, the worker, and the scheduler's slot."""
    with Pool(1, context=CONTEXT) as pool:
        pool.apply_async(inc, (0,)).get(PATIENCE)
        slot = pool._engine._scheduler.slots[0]
        until(lambda: slot.state is State.IDLE, "an idle worker")
        yield pool, pool._engine._workers[0], slot


class Packed:
    """An argument that tells which threads have pickled it, and holds up the first until it may go on."""

    def __init__(self) -> None:
        self.by: list[threading.Thread] = []
        self.may_go_on = threading.Event()

    def __reduce__(self) -> Any:
        self.by.append(threading.current_thread())
        if len(self.by) == 1:
            assert self.may_go_on.wait(PATIENCE)
        return int, ()


@pytest.mark.skipif(os.name != "posix", reason="kills by a signal")
def test_a_slot_is_given_to_nobody_while_its_process_is_buried() -> None:
    with one_worker() as (pool, worker, slot):
        reap, is_found_dead, may_go_on = worker.reap, threading.Event(), threading.Event()

        def held_up() -> Any:
            is_found_dead.set()
            may_go_on.wait(PATIENCE)
            return reap()

        worker.reap = held_up
        os.kill(worker.pid, signal.SIGKILL)
        assert is_found_dead.wait(PATIENCE)
        result = pool.apply_async(inc, (1,))
        given = slot.batch
        may_go_on.set()
        assert given is None, "it would come to the next process"
        assert result.get(PATIENCE) == 2


def test_who_failed_to_send_does_not_send_what_another_thread_was_given() -> None:
    class Unsendable:
        def __reduce__(self) -> Any:
            raise TypeError("not this one")

    packed = Packed()
    with one_worker() as (pool, _, _):
        following = Caller(lambda: pool.apply_async(inc, (packed,)).get(PATIENCE))

        class Call(AsyncResult[int]):
            """One with a callback on the thread that settles it."""

            def _settle(self, ok: bool, value: Any) -> None:
                following.start()
                until(lambda: packed.by, "the other thread to have the slot")

        first = Caller(lambda: pool._engine.submit(Call(inc, (Unsendable(),), {}, pool._engine, TaskOptions())))
        first.start()
        assert first.outcome() is None
        packed.may_go_on.set()
        assert following.outcome() == 1
        assert packed.by == [following]


def test_who_talks_to_a_worker_sends_it_nothing_of_others(tmp_path: Path) -> None:
    """An interrupt of that thread could cost them their element."""
    packed = Packed()
    packed.may_go_on.set()
    go_on = tmp_path / "go on"
    with one_worker() as (pool, _, slot):
        talking = Caller(lambda: pool.apply(wait_for, (str(go_on),)))
        talking.start()
        until(lambda: slot.batch is not None, "the call to be sent")
        other = pool.apply_async(inc, (packed,))
        go_on.touch()
        assert isinstance(talking.outcome(), int)
        assert other.get(PATIENCE) == 1
        assert packed.by == [pool._engine._turns.serial._thread]
