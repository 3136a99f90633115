"""The hostile table: whatever a task does wrong ends in an error of its own, and the pool is as good as before."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import pytest

from portshm import PoolError, TaskTimeoutError, TransportError, WorkerCrashed, WorkerStartError
from portshm.pool import Pool, ProcessPoolExecutor
from portshm.pool._engine import turns as _turns
from portshm.pool._engine.worker import Worker
from tests import tasks
from tests.children import environment
from tests.pool.waiting import gone, running, until
from tests.tasks import inc, noted

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

MakePool = Callable[..., Pool]
HERE = os.getpid()


@pytest.fixture
def pool(make_pool: MakePool) -> Iterator[Pool]:
    """A pool of two workers that has to be healthy after the test."""
    pool = make_pool(2)
    yield pool
    assert pool.map_async(inc, range(200)).get(60) == list(range(1, 201))
    assert [pool.apply_async(inc, (number,)).get(60) for number in range(4)] == [1, 2, 3, 4]


def outcomes(pool: Pool, function: Any, items: list[Any]) -> list[Any]:
    """Each element's result or exception, through `imap`, in order."""
    results = pool.imap(function, items, chunksize=len(items))
    seen: list[Any] = []
    while True:
        try:
            seen.append(results.next(60))
        except StopIteration:
            return seen
        except BaseException as error:
            seen.append(error)


# -- on the way there


def test_an_argument_that_cannot_be_pickled(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        pool.apply_async(inc, (tasks.CannotPickle(),)).get(60)
    seen = outcomes(pool, tasks.same, [0, 1, tasks.CannotPickle(), 3])
    assert isinstance(seen.pop(2), RuntimeError)
    assert seen == [0, 1, 3]


def test_a_callable_that_cannot_be_pickled(pool: Pool) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pool.apply_async(lambda: None).get(60)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pool.map_async(lambda item: None, range(50)).get(60)
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        pool.map_async(tasks.CannotPickle(), range(50)).get(60)


def test_an_argument_that_cannot_be_unpickled(pool: Pool) -> None:
    with pytest.raises(TransportError, match="this cannot be unpickled") as caught:
        pool.apply_async(inc, (tasks.CannotUnpickle(),)).get(60)
    assert isinstance(caught.value.__cause__, RuntimeError)
    seen = outcomes(pool, tasks.same, [0, 1, tasks.CannotUnpickle(), 3])
    assert isinstance(seen.pop(2), TransportError)
    assert seen == [0, 1, 3]


def test_a_callable_that_cannot_be_unpickled(pool: Pool) -> None:
    with pytest.raises(TransportError, match="this cannot be unpickled"):
        pool.apply_async(tasks.CannotUnpickle()).get(60)
    with pytest.raises(TransportError, match="this cannot be unpickled"):
        pool.map_async(tasks.CannotUnpickle(), range(20)).get(60)


def test_an_argument_that_kills_the_worker_while_being_unpickled(pool: Pool) -> None:
    bad = tasks.KillsWhenUnpickled(HERE)
    with pytest.raises(WorkerCrashed) as caught:
        pool.apply_async(tasks.same, (bad,)).get(60)
    assert caught.value.exitcode == 9
    seen = outcomes(pool, tasks.same, [0, 1, bad, 3])
    crash = seen.pop(2)
    assert isinstance(crash, WorkerCrashed)
    assert crash.index == 2
    assert seen == [0, 1, 3]


def test_a_callable_that_kills_the_worker_while_being_unpickled(pool: Pool) -> None:
    with pytest.raises(WorkerCrashed):
        pool.apply_async(tasks.KillsWhenUnpickled(HERE)).get(60)
    with pytest.raises(WorkerCrashed):
        pool.map_async(tasks.KillsWhenUnpickled(HERE), range(3)).get(60)


# -- on the way back


def test_a_result_that_cannot_be_pickled(pool: Pool) -> None:
    with pytest.raises(MaybeEncodingError) as caught:
        pool.apply_async(tasks.make_cannot_pickle, (0,)).get(60)
    assert "this cannot be pickled" in caught.value.exc
    with pytest.raises(MaybeEncodingError):
        pool.map_async(tasks.make_cannot_pickle, range(5)).get(60)


def test_a_result_that_cannot_be_unpickled(pool: Pool) -> None:
    with pytest.raises(TransportError, match="this cannot be unpickled"):
        pool.apply_async(tasks.make_cannot_unpickle, (0,)).get(60)
    with pytest.raises(TransportError):
        pool.map_async(tasks.make_cannot_unpickle, range(5)).get(60)


def test_a_result_that_kills_the_worker_while_being_pickled(pool: Pool) -> None:
    with pytest.raises(WorkerCrashed) as caught:
        pool.apply_async(tasks.make_kills_when_pickled, (HERE,)).get(60)
    assert caught.value.exitcode == 9
    with pytest.raises(WorkerCrashed):
        pool.map_async(tasks.make_kills_when_pickled, [HERE] * 3).get(60)


def test_an_exception_that_cannot_be_rebuilt(pool: Pool) -> None:
    with pytest.raises(TransportError, match="NeedsTwoArguments"):
        pool.apply_async(tasks.raise_unbuildable, (0,)).get(60)


def test_an_exception_that_cannot_be_pickled(pool: Pool) -> None:
    with pytest.raises(TransportError, match="HoldsLock") as caught:
        pool.apply_async(tasks.raise_unpicklable, (0,)).get(60)
    assert "raise_unpicklable" in str(caught.value.__cause__), "the worker's traceback is told all the same"


def test_exceptions_that_are_none_of_a_tasks_business(pool: Pool) -> None:
    for kind in (SystemExit, KeyboardInterrupt, GeneratorExit, tasks.Odd, StopIteration, EOFError):
        with pytest.raises(kind) as caught:
            pool.apply_async(tasks.raise_kind, (kind,)).get(60)
        assert "raise_kind" in str(caught.value.__cause__)
        with pytest.raises(kind) as caught:
            pool.map_async(tasks.raise_it, [kind(1), kind(2)], chunksize=2).get(60)
        assert caught.value.args == (1,)


def test_stop_iteration_does_not_end_its_chunk(pool: Pool, log: str) -> None:
    # For builtins' map(), which is in the worker's loop, it is the end.
    items = [(log, number, 3 <= number < 6) for number in range(50)]
    with pytest.raises(StopIteration) as caught:
        pool.starmap_async(tasks.note_and_stop, items, chunksize=50).get(60)
    assert caught.value.args == (3,)
    assert tasks.counted(log) == dict.fromkeys(range(50), 1)


def test_a_callback_that_raises(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    def callback(value: int) -> None:
        raise kind(value)

    kind: type[BaseException] = ValueError

    with caplog.at_level(logging.CRITICAL, logger="portshm"):
        result = pool.apply_async(inc, (1,), callback=callback)
        with pytest.raises(kind):
            result.get(60)
        kind = SystemExit
        mapped = pool.map_async(inc, range(3), callback=callback)
        with pytest.raises(kind):
            mapped.get(60)


def test_a_future_s_callback_that_raises(context: BaseContext, caplog: pytest.LogCaptureFixture) -> None:
    called = threading.Event()

    def callback(future: Any) -> None:
        called.set()
        raise ValueError("in the callback")

    gate_log = caplog.at_level(logging.CRITICAL, logger="concurrent.futures")
    with gate_log, ProcessPoolExecutor(1, context) as executor:
        future = executor.submit(inc, 1)
        future.add_done_callback(callback)
        assert future.result(60) == 2
        assert called.wait(60)
        assert executor.submit(inc, 2).result(60) == 3


# -- what the worker has


def test_a_task_that_closes_every_descriptor(pool: Pool) -> None:
    with pytest.raises(WorkerCrashed) as caught:
        pool.apply_async(tasks.close_everything, (0,)).get(60)
    assert caught.value.cause == "closed the pool's pipe"
    with pytest.raises(WorkerCrashed):
        pool.apply_async(tasks.close_everything_and_hang).get(60)
    with pytest.raises(WorkerCrashed):
        pool.apply_async(tasks.close_everything_and_count).get(60)


def test_the_closer_in_a_chunk_is_told_from_its_neighbours(pool: Pool) -> None:
    items = ["close" if number == 7 else "" for number in range(20)]
    seen = outcomes(pool, tasks.close_everything_if, items)
    crash = seen.pop(7)
    assert isinstance(crash, WorkerCrashed)
    assert crash.index == 7
    assert seen == [""] * 19


def test_a_task_that_writes_garbage_to_the_pipe(pool: Pool) -> None:
    for kind in ("noise", "text", "flood", "half", "stale", "length", "kind"):
        with pytest.raises(WorkerCrashed) as caught:
            pool.apply_async(tasks.write_garbage, (kind,)).get(60)
        assert caught.value.cause == "wrote garbage to the pool's pipe", kind


def test_a_task_that_scribbles_over_its_memory(pool: Pool) -> None:
    with pytest.raises(PoolError):
        pool.apply_async(tasks.scribble, (b"\xff",)).get(60)


def test_a_task_that_overwrites_its_memory_and_dies(pool: Pool, log: str) -> None:
    with pytest.raises(WorkerCrashed) as caught:
        pool.apply_async(tasks.wipe_if, (log, 1, 1, "exit")).get(60)
    assert caught.value.cause == "exited with 1, and its memory was overwritten"
    assert noted(log) == ["1"], "it ran once, though the memory does not say so any more"


def test_an_element_that_overwrites_its_memory_and_dies_runs_nothing_twice(pool: Pool, log: str) -> None:
    results = pool.starmap_async(tasks.wipe_if, [(log, number, 7, "exit") for number in range(20)], chunksize=20)
    with pytest.raises(WorkerCrashed):
        results.get(60)
    assert set(tasks.counted(log).values()) == {1}


def test_a_task_that_overwrites_its_memory_and_hangs(pool: Pool, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_turns, "_BEGUN_WITHIN", 0.1)
    with pytest.raises(TaskTimeoutError):
        pool.apply_async(tasks.wipe_if, (log, 1, 1, "hang"), timeout=0.2).get(60)
    assert noted(log) == ["1"]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this platform cannot stop a process")
def test_an_idle_worker_that_is_stopped_keeps_no_element_with_a_deadline(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_turns, "_BEGUN_WITHIN", 0.2)
    pool = make_pool(2, task_timeout=2.0)
    until(lambda: [stats.state for stats in pool.stats()] == ["idle", "idle"], "idle workers")
    stopped = pool.stats()[0].pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    assert pool.map_async(inc, range(50)).get(60) == list(range(1, 51))


def test_after_a_fault_of_the_coordinator_nobody_waits(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(2)

    def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(pool._engine._turns, "turn", fail)
    pool._engine.wake()
    pool._engine._loop._thread.join(60)
    for _ in range(2):
        with pytest.raises(PoolError, match="a fault of ours"):
            pool.apply_async(inc, (1,)).get(60)


def test_memory_that_is_spoilt_before_its_worker_has_attached(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Worker._check_memory

    def spoil_at_first(worker: Worker) -> None:
        check(worker)
        if worker.starts == 0:  # as a task of another worker might under fork, just then
            worker.memory.mem.layout.store(memoryview(worker.memory.area.obj), "magic", b"\xff" * 8)

    monkeypatch.setattr(Worker, "_check_memory", spoil_at_first)
    pool = make_pool(2)
    assert pool.map_async(inc, range(200)).get(60) == list(range(1, 201))
    until(lambda: [stats.restarts for stats in pool.stats()] == [1, 1], "a second process in each slot")


def test_a_task_that_starts_a_program_and_one_that_has_a_pool(pool: Pool) -> None:
    assert pool.apply_async(tasks.start_child, (0,)).get(60) == 7
    assert pool.apply_async(tasks.nested_map, ([1, 2, 3],)).get(60) == [2, 3, 4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.parametrize("task", [tasks.fork_and_die, tasks.clone_and_die])
def test_a_grandchild_that_holds_what_it_inherited(make_pool: MakePool, log: str, task: Any) -> None:
    pool = make_pool(2)
    try:
        with pytest.raises(WorkerCrashed) as caught:
            pool.apply_async(task, (log,)).get(60)
        assert caught.value.exitcode == 3
        (grandchild,) = map(int, noted(log))
        assert running(grandchild)
        assert pool.map_async(inc, range(100)).get(60) == list(range(1, 101))
    finally:
        for line in noted(log):
            os.kill(int(line), signal.SIGKILL)
            gone([int(line)])


QUOTA = """
import multiprocessing, os, sys
from portshm import PortShmError
from portshm.pool import Pool
from tests.tasks import filled, inc
if __name__ == "__main__":
    size = 3 << 20
    with Pool(2, context=multiprocessing.get_context(sys.argv[1]), backend=sys.argv[2]) as pool:
        for attempt in range(2):
            try:
                result = pool.apply_async(filled, ((1, 64 << 20),)).get(60)
                print("length", len(result), result == bytes([1]) * (64 << 20))
            except OSError as error:
                print(type(error).__name__, error.errno, isinstance(error, PortShmError))
            del result
            print(pool.map_async(inc, range(100)).get(60) == list(range(1, 101)))
            print(len(pool.apply_async(filled, ((2, 1 << 20),)).get(60)))
"""


def in_small_memory(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a program where /dev/shm and the temporary folder together have 24 megabytes."""
    script = (
        "mount -t tmpfs -o size=16m none /dev/shm && mkdir -p /dev/shm/tmp && "
        "mount -t tmpfs -o size=8m none /dev/shm/tmp && "
        'TMPDIR=/dev/shm/tmp exec "$@"'
    )
    found = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"no user and mount namespaces: {found.stderr!r}")
    return subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", sys.executable, "-c", code, *args],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small /dev/shm")
@pytest.mark.parametrize("backend", ["auto", "named"])
def test_a_result_that_fills_the_quota(start_method: str, backend: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(QUOTA.replace("del result", "result = None"))
    done = in_small_memory(
        f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')", start_method, backend
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["RegionFullError 28 True", "True", str(1 << 20)] * 2


# -- inputs


def broken_items(count: int) -> Iterator[int]:
    yield from range(count)
    raise LookupError("the input broke")


def test_an_iterable_that_raises_midway(pool: Pool) -> None:
    with pytest.raises(LookupError):
        pool.map_async(inc, broken_items(10))
    for method in (pool.imap, pool.imap_unordered):
        results = method(inc, broken_items(10), chunksize=3)
        seen = []
        with pytest.raises(LookupError):
            while True:
                seen.append(results.next(60))
        rest = list(results)
        assert sorted(seen + rest) == list(range(1, 10)), "the chunks that were complete"


# -- initializers


@pytest.mark.parametrize("how", ["raise", "exit", "SIGSEGV"])
def test_an_initializer_that_fails(make_pool: MakePool, log: str, how: str) -> None:
    pool = make_pool(2, initializer=tasks.start_badly, initargs=(log, how))
    with pytest.raises(WorkerStartError) as caught:
        pool.apply_async(inc, (1,)).get(60)
    if how == "raise":
        assert "no database" in caught.value.detail
        assert "start_badly" in caught.value.detail, "the traceback"
    else:
        assert {"exit": "exited with 1", "SIGSEGV": "SIGSEGV"}[how] in caught.value.detail
    with pytest.raises(WorkerStartError):
        pool.map_async(inc, range(10)).get(60)
    with pytest.raises(WorkerStartError):
        next(pool.imap(inc, range(10)))
    pool.terminate()
    assert 1 <= len(noted(log)) <= 8, "starts are limited"


def test_an_initializer_that_hangs(make_pool: MakePool, log: str) -> None:
    pool = make_pool(2, initializer=tasks.start_badly, initargs=(log, "hang"), start_timeout=1.5)
    with pytest.raises(WorkerStartError, match="start_timeout"):
        pool.apply_async(inc, (1,)).get(60)
    pool.terminate()
    assert len(noted(log)) <= 2
    assert not any(running(int(pid)) for pid in noted(log))


def test_an_executor_whose_initializer_fails(context: BaseContext, log: str) -> None:
    with ProcessPoolExecutor(2, context, tasks.start_badly, (log, "raise")) as executor:
        future = executor.submit(inc, 1)
        error = future.exception(60)
        assert isinstance(error, WorkerStartError)
        assert "no database" in error.detail
        with pytest.raises(WorkerStartError):
            executor.submit(inc, 2)
    assert len(noted(log)) <= 2


def test_workers_that_are_killed_while_they_start_are_replaced(pool: Pool) -> None:
    """A pool that has worked before does not give up as soon as one whose initializer never did."""
    assert pool.apply_async(inc, (1,)).get(60) == 2
    for _ in range(8):
        victim = until(lambda: next(filter(None, (stats.pid for stats in pool.stats())), None), "a worker")
        os.kill(victim, signal.SIGKILL)
        until(lambda victim=victim: victim not in [stats.pid for stats in pool.stats()], "the death to be noticed")
