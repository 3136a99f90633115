"""A crash costs one task: exactly the element that was executing fails, and nothing runs twice."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from portshm import TaskTimeoutError, WorkerCrashed
from portshm.pool import Pool, ProcessPoolExecutor
from tests.tasks import (
    DieOnce,
    Step,
    UnpickledSlowly,
    counted,
    die,
    inc,
    note,
    noted,
    run,
    run_args,
    run_die_once,
    same,
    wait_for,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

DEATHS = {
    "exit": (1, "exited with 1"),
    "SIGSEGV": (-signal.SIGSEGV, "SIGSEGV (segmentation fault)"),
    "SIGABRT": (-signal.SIGABRT, "SIGABRT (aborted)"),
    "SIGKILL": (-signal.SIGKILL, "SIGKILL (killed)"),
    "hang": (-signal.SIGKILL, "deadline of 0.3 s passed"),
}
ONCE_EACH = dict.fromkeys(range(100), 1)
RESULTS = [number * 10 for number in range(100)]


def steps(log: str, action: str, at: int = 57, count: int = 100) -> list[Step]:
    return [Step(log, number, action if number == at else "") for number in range(count)]


def deadline_of(action: str) -> float | None:
    return 0.3 if action == "hang" else None


def assert_is_57(error: WorkerCrashed, log: str, action: str) -> None:
    exitcode, cause = DEATHS[action]
    assert error.index == 57
    assert error.item == Step(log, 57, action)
    pids = dict(line.split() for line in noted(log))
    assert error.pid == int(pids["57"])
    assert error.exitcode == exitcode
    assert error.signal == (-exitcode if exitcode < 0 else None)
    assert error.cause == cause
    assert isinstance(error, BrokenProcessPool)
    assert isinstance(error, TaskTimeoutError) is (action == "hang")
    assert isinstance(error, multiprocessing.TimeoutError) is (action == "hang")
    if action in ("SIGSEGV", "SIGABRT"):
        assert "tests/tasks.py" in error.native_traceback.replace("\\", "/"), "faulthandler's text"
    else:
        assert error.native_traceback == ""


@pytest.fixture(params=DEATHS)
def action(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_map_raises_the_crash_after_all_the_others_have_run(
    make_pool: Callable[..., Pool], log: str, action: str
) -> None:
    pool = make_pool(2)
    result = pool.map_async(run, steps(log, action), chunksize=100, timeout=deadline_of(action))
    with pytest.raises(WorkerCrashed) as caught:
        result.get(60)
    assert counted(log) == ONCE_EACH
    assert_is_57(caught.value, log, action)
    pids = [line.split()[1] for line in noted(log)]
    assert str(caught.value.pid) not in [
        pid for line, pid in zip(noted(log), pids, strict=True) if int(line.split()[0]) > 57
    ]
    assert pool.map(inc, range(100)) == list(range(1, 101)), "the pool is as good as before"


@pytest.mark.parametrize("action", ["exit", "hang"])
def test_on_crash_return_puts_the_error_in_its_place(make_pool: Callable[..., Pool], log: str, action: str) -> None:
    pool = make_pool(2, on_crash="return", task_timeout=deadline_of(action))
    results = pool.map_async(run, steps(log, action), chunksize=100).get(60)
    assert counted(log) == ONCE_EACH
    assert results[:57] + results[58:] == RESULTS[:57] + RESULTS[58:]
    assert_is_57(results[57], log, action)


@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
@pytest.mark.parametrize("chunksize", [1, 100])
def test_imap_raises_at_the_element_and_goes_on(
    make_pool: Callable[..., Pool], log: str, method: str, chunksize: int
) -> None:
    results = getattr(make_pool(2), method)(run, steps(log, "exit"), chunksize=chunksize)
    seen: list[Any] = []
    while True:
        try:
            seen.append(results.next(60))
        except StopIteration:
            break
        except WorkerCrashed as error:
            seen.append(error)
    assert counted(log) == ONCE_EACH
    (crash,) = [value for value in seen if isinstance(value, WorkerCrashed)]
    assert_is_57(crash, log, "exit")
    if method == "imap":
        assert seen.index(crash) == 57
        assert [value for value in seen if value is not crash] == RESULTS[:57] + RESULTS[58:]
    else:
        assert sorted(value for value in seen if value is not crash) == RESULTS[:57] + RESULTS[58:]


def test_a_generator_is_fed_across_the_crash(make_pool: Callable[..., Pool], log: str) -> None:
    results = make_pool(2, on_crash="return").imap(run, iter(steps(log, "exit")), chunksize=7, buffersize=20)
    seen = list(results)
    assert counted(log) == ONCE_EACH
    assert_is_57(seen[57], log, "exit")
    assert seen[:57] + seen[58:] == RESULTS[:57] + RESULTS[58:]


def test_starmap_tells_the_arguments(make_pool: Callable[..., Pool], log: str) -> None:
    with pytest.raises(WorkerCrashed) as caught:
        make_pool(2).starmap(run_args, steps(log, "exit", at=3, count=8))
    assert caught.value.item == Step(log, 3, "exit")
    assert caught.value.index == 3
    assert counted(log) == dict.fromkeys(range(8), 1)


def test_several_crashes_raise_the_first_in_order(make_pool: Callable[..., Pool], log: str) -> None:
    items = [Step(log, number, "exit" if number in (20, 57, 90) else "") for number in range(100)]
    with pytest.raises(WorkerCrashed) as caught:
        make_pool(2).map(run, items, chunksize=25)
    assert caught.value.index == 20
    assert counted(log) == ONCE_EACH


@pytest.mark.parametrize("action", ["SIGSEGV", "hang"])
def test_single_calls(make_pool: Callable[..., Pool], action: str) -> None:
    pool = make_pool(2)
    others = [pool.apply_async(inc, (number,)) for number in range(20)]
    crash = pool.apply_async(die, (action,), timeout=deadline_of(action))
    others += [pool.apply_async(inc, (number,)) for number in range(20, 40)]
    with pytest.raises(WorkerCrashed) as caught:
        crash.get(60)
    assert caught.value.index == 0
    assert caught.value.item == ((action,), {})
    assert (caught.value.exitcode, caught.value.cause) == DEATHS[action]
    assert [other.get(60) for other in others] == list(range(1, 41))


def test_callbacks_of_a_crash(make_pool: Callable[..., Pool]) -> None:
    seen: list[BaseException] = []
    result = make_pool(1).apply_async(die, ("exit",), callback=pytest.fail, error_callback=seen.append)
    result.wait(60)
    assert not result.successful()
    assert [type(error) for error in seen] == [WorkerCrashed]


# -- the executor's face


@pytest.fixture
def executor(context: BaseContext) -> Iterator[Callable[..., ProcessPoolExecutor]]:
    made: list[ProcessPoolExecutor] = []

    def make(**options: Any) -> ProcessPoolExecutor:
        made.append(ProcessPoolExecutor(2, context, **options))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()


def test_one_future_fails(executor: Callable[..., ProcessPoolExecutor], log: str, action: str) -> None:
    pool = executor(task_timeout=deadline_of(action))
    futures = [pool.submit(run, step) for step in steps(log, action)]
    done, _ = concurrent.futures.wait(futures, timeout=60)
    assert len(done) == 100
    (failed,) = [number for number, future in enumerate(futures) if future.exception()]
    assert failed == 57
    error = futures[57].exception()
    assert isinstance(error, WorkerCrashed)
    assert error.item == ((Step(log, 57, action),), {})
    assert (error.exitcode, error.cause) == DEATHS[action]
    assert [future.result() for future in futures if not future.exception()] == RESULTS[:57] + RESULTS[58:]
    assert counted(log) == ONCE_EACH
    assert pool.submit(inc, 1).result(60) == 2


def test_executor_map_raises_at_the_element(executor: Callable[..., ProcessPoolExecutor], log: str) -> None:
    pool = executor()
    results = pool.map(run, steps(log, "SIGSEGV"), timeout=60, chunksize=100)
    seen = []
    with pytest.raises(WorkerCrashed) as caught:
        for value in results:
            seen.append(value)
    assert seen == RESULTS[:57]
    assert caught.value.index == 57
    assert list(pool.map(inc, range(100), timeout=60)) == list(range(1, 101))
    assert max(counted(log).values()) == 1


def test_executor_map_returns_the_crash(executor: Callable[..., ProcessPoolExecutor], log: str) -> None:
    seen = list(executor(on_crash="return").map(run, steps(log, "exit"), timeout=60, chunksize=100))
    assert seen[:57] + seen[58:] == RESULTS[:57] + RESULTS[58:]
    assert isinstance(seen[57], WorkerCrashed)
    assert counted(log) == ONCE_EACH


# -- retries


def test_a_retry_runs_the_suspect_alone_in_a_fresh_worker(make_pool: Callable[..., Pool], log: str) -> None:
    pool = make_pool(2, retries=2)
    items = [DieOnce(log, number, 2 if number in (20, 57) else 0) for number in range(100)]
    results = pool.map_async(run_die_once, items, chunksize=50).get(60)
    assert [number for number, _ in results] == list(range(100))
    expected = {number: 3 if number in (20, 57) else 1 for number in range(100)}
    assert counted(log) == expected, "innocents were run once"
    lines = [tuple(map(int, line.split())) for line in noted(log)]
    for suspect in (20, 57):
        for position, (number, pid) in [(at, line) for at, line in enumerate(lines) if line[0] == suspect][1:]:
            assert all(other != pid for _, other in lines[:position]), f"the worker of {number}'s retry was not fresh"


def test_a_suspect_is_convicted_after_its_retries(make_pool: Callable[..., Pool], log: str) -> None:
    pool = make_pool(2, retries=2)
    with pytest.raises(WorkerCrashed) as caught:
        pool.map_async(run, steps(log, "exit"), chunksize=100).get(60)
    assert caught.value.index == 57
    assert counted(log) == {**ONCE_EACH, 57: 3}


def test_retries_of_single_calls(executor: Callable[..., ProcessPoolExecutor], log: str) -> None:
    pool = executor(retries=1)
    good = pool.submit(run_die_once, DieOnce(log, 1, 1))
    bad = pool.submit(run_die_once, DieOnce(log, 2, 5))
    assert good.result(60)[0] == 1
    assert isinstance(bad.exception(60), WorkerCrashed)
    assert counted(log) == {1: 2, 2: 2}


# -- deadlines


def test_one_stuck_element_of_200_costs_one_result(make_pool: Callable[..., Pool], log: str) -> None:
    pool = make_pool(2, on_crash="return")
    results = pool.map_async(run, steps(log, "hang", at=111, count=200), chunksize=50, timeout=0.3).get(60)
    late = results[111]
    assert isinstance(late, TaskTimeoutError)
    assert late.index == 111
    assert [value for value in results if value is not late] == [n * 10 for n in range(200) if n != 111]
    assert counted(log) == dict.fromkeys(range(200), 1)


def test_the_clock_of_an_element_starts_with_it(make_pool: Callable[..., Pool]) -> None:
    # Twenty elements of 0.05 s one after the other take longer than the deadline that each has of its own.
    assert make_pool(1).map(time.sleep, [0.05] * 20, 20, timeout=0.7) == [None] * 20


def test_only_the_late_worker_is_killed(make_pool: Callable[..., Pool], log: str, tmp_path: Any) -> None:
    pool = make_pool(2)
    gate = str(tmp_path / "gate")
    patient = pool.apply_async(wait_for, (gate,))
    with pytest.raises(TaskTimeoutError):
        pool.apply(die, ("hang",), timeout=0.2)
    assert not patient.ready()
    (tmp_path / "gate").touch()
    assert patient.get(60) == int(noted(gate + ".started")[0])


def test_a_deadline_while_the_arguments_are_unpickled(make_pool: Callable[..., Pool], log: str) -> None:
    pool = make_pool(2)
    with pytest.raises(TaskTimeoutError) as caught:
        pool.apply_async(same, (UnpickledSlowly(log, os.getpid()),), timeout=0.3).get(60)
    assert caught.value.pid == int(noted(log)[0])
    assert pool.apply(inc, (1,)) == 2


# -- the error itself


def test_the_error_pickles_and_reads_in_one_glance(make_pool: Callable[..., Pool], log: str) -> None:
    with pytest.raises(WorkerCrashed) as caught:
        make_pool(1).map(run, steps(log, "SIGSEGV", at=2, count=3))
    error = caught.value
    text = str(error)
    assert text.startswith(f"worker {error.pid} crashed on element 2 (Step(")
    assert text.endswith(": SIGSEGV (segmentation fault)")
    assert len(text) < 200
    assert "\n" not in text
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), vars(twin)) == (type(error), text, vars(error))
    assert twin.signal is signal.SIGSEGV


def test_with_the_named_backend(make_pool: Callable[..., Pool], log: str) -> None:
    with pytest.raises(WorkerCrashed) as caught:
        make_pool(2, backend="named").map(run, steps(log, "SIGKILL"), chunksize=100)
    assert (caught.value.index, caught.value.signal) == (57, signal.SIGKILL)
    assert counted(log) == ONCE_EACH


def test_an_exception_ends_its_element_only(make_pool: Callable[..., Pool], log: str) -> None:
    """Unlike the standard library's, whose chunk ends with the first."""
    pool = make_pool(2)
    items = [(log, number, number in (3, 5)) for number in range(10)]
    with pytest.raises(ValueError, match=r"^3$"):
        pool.starmap(note_and_raise, items, chunksize=10)
    assert counted(log) == dict.fromkeys(range(10), 1)
    results = pool.imap(raise_if_odd, range(6), chunksize=6)
    found: list[Any] = []
    for _ in range(6):
        try:
            found.append(next(results))
        except ValueError as error:
            found.append(str(error))
    assert found == [0, "1", 2, "3", 4, "5"]


def note_and_raise(log: str, number: int, fails: bool) -> None:
    note(log, number)
    if fails:
        raise ValueError(number)


def raise_if_odd(number: int) -> int:
    if number % 2:
        raise ValueError(number)
    return number
