"""What holds for `concurrent.futures.ProcessPoolExecutor` holds for ours: the same assertions for both."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, NoReturn

import pytest

import portshm.pool
from tests.children import environment

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

CONTEXT = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")

BOTH = pytest.mark.parametrize(
    "executor_type", [concurrent.futures.ProcessPoolExecutor, portshm.pool.ProcessPoolExecutor], ids=["theirs", "ours"]
)


@pytest.fixture(
    params=[concurrent.futures.ProcessPoolExecutor, portshm.pool.ProcessPoolExecutor], ids=["theirs", "ours"]
)
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    with request.param(1, CONTEXT) as executor:
        yield executor


@pytest.fixture
def ours() -> Iterator[portshm.pool.ProcessPoolExecutor]:
    with portshm.pool.ProcessPoolExecutor(1, CONTEXT) as executor:
        yield executor


def square(x: int) -> int:
    return x * x


def fail(x: object) -> NoReturn:
    raise KeyError(x)


def fail_with(kind: type[BaseException]) -> NoReturn:
    raise kind


def opened(gate: str) -> str:
    """Return when there is such a file."""
    pause = threading.Event()
    while not os.path.exists(gate):
        pause.wait(0.005)
    return "open"


def touch(path: str) -> None:
    Path(path).touch()


def test_every_method_takes_what_the_standard_librarys_takes() -> None:
    for name, theirs in inspect.getmembers(concurrent.futures.ProcessPoolExecutor, inspect.isfunction):
        if name.startswith("_") and name != "__init__":
            continue
        ours = inspect.signature(getattr(portshm.pool.ProcessPoolExecutor, name)).parameters
        for position, parameter in enumerate(inspect.signature(theirs).parameters.values()):
            assert ours[parameter.name].kind is parameter.kind, name
            if parameter.kind is not parameter.KEYWORD_ONLY:
                assert list(ours)[position] == parameter.name, name


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": -1}, ValueError, "max_workers must be greater than 0"),
        ({"initializer": 1}, TypeError, "initializer must be a callable"),
        ({"max_tasks_per_child": 1.5}, TypeError, "max_tasks_per_child must be an integer"),
        ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be >= 1"),
        ({"max_tasks_per_child": 1, "mp_context": CONTEXT}, ValueError, "max_tasks_per_child is incompatible with"),
    ],
)
def test_executors_that_cannot_be_made(executor_type: Any, arguments: dict[str, Any], error: Any, words: str) -> None:
    theirs = executor_type is concurrent.futures.ProcessPoolExecutor
    if theirs and "max_tasks_per_child" in arguments and sys.version_info < (3, 11):
        pytest.skip("came with Python 3.11; ours has it on every version")
    if "mp_context" in arguments and CONTEXT.get_start_method() != "fork":
        pytest.skip("only for fork")
    with pytest.raises(error, match=words):
        executor_type(**arguments)


def test_after_shutdown(executor: Any) -> None:
    assert executor.submit(square, 2).result() == 4
    executor.shutdown()
    for call in (lambda: executor.submit(square, 2), lambda: executor.map(square, [1])):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            call()
    executor.shutdown()


def test_submit_takes_any_keyword(executor: Any) -> None:
    assert executor.submit(dict, self=1, fn=2).result() == {"self": 1, "fn": 2}
    with pytest.raises(TypeError):
        executor.submit(fn=square)


def test_an_exception_has_the_workers_traceback_as_its_cause(executor: Any) -> None:
    for call in (lambda: executor.submit(fail, 1).result(), lambda: next(executor.map(fail, [1]))):
        with pytest.raises(KeyError) as info:
            call()
        assert type(info.value.__cause__) is _RemoteTraceback
        assert "raise KeyError(x)" in str(info.value.__cause__)


def test_map_ends_with_the_first_exception(executor: Any) -> None:
    results = executor.map(pow, [2, 0, 3], [2, -1, 2])
    assert next(results) == 4
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize(("kind", "arrives"), [(StopIteration, RuntimeError), (multiprocessing.TimeoutError,) * 2])
def test_what_a_task_raises_is_not_taken_for_the_maps_own(executor: Any, kind: Any, arrives: Any) -> None:
    with pytest.raises(arrives):
        list(executor.map(fail_with, [kind]))


def test_chunksizes_that_are_none(executor: Any) -> None:
    with pytest.raises(ValueError, match=r"chunksize must be >= 1\."):
        executor.map(square, [1], chunksize=0)


def test_timeouts(executor: Any, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    future = executor.submit(opened, gate)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=0.01)
    results = executor.map(square, [1], timeout=0.01)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    touch(gate)
    assert future.result() == "open"


def test_cancelling(executor: Any, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    running = executor.submit(opened, gate)
    waiting = [executor.submit(square, number) for number in range(20)]
    assert waiting[-1].cancel()
    assert waiting[-1].cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        waiting[-1].result()
    touch(gate)
    assert running.result() == "open"
    assert not running.cancel()
    assert [future.result() for future in waiting[:-1]] == [number * number for number in range(19)]


def test_shutdown_that_cancels(executor: Any, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    running = executor.submit(opened, gate)
    waiting = [executor.submit(square, number) for number in range(20)]
    executor.shutdown(wait=False, cancel_futures=True)
    touch(gate)
    assert running.result() == "open"
    assert waiting[-1].cancelled()
    assert all(future.cancelled() or future.result(60) == number * number for number, future in enumerate(waiting))
    executor.shutdown()


def test_shutdown_that_cancels_after_a_crash(ours: portshm.pool.ProcessPoolExecutor, tmp_path: Path) -> None:
    """What the crash put back into the queue is running in its callers' eyes, and cannot be cancelled any more."""
    for _ in range(50):
        ours.submit(square, 1).result()  # the pace is known: calls travel together
    gate = str(tmp_path / "gate")
    running = ours.submit(opened, gate)
    dying = ours.submit(os._exit, 1)
    waiting = [ours.submit(square, number) for number in range(40)]
    touch(gate)
    assert running.result(60) == "open"
    assert isinstance(dying.exception(60), BrokenProcessPool)
    ours.shutdown(cancel_futures=True)
    assert all(future.done() for future in waiting)
    assert all(future.cancelled() or future.result() == number * number for number, future in enumerate(waiting))


def test_a_map_that_nobody_looks_at_is_executed(executor: Any, tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(5)]
    executor.map(touch, paths)
    executor.shutdown()
    assert all(map(os.path.exists, paths))


def test_a_map_that_nobody_wants_any_more_does_not_hold_up_the_shutdown(executor: Any) -> None:
    results = executor.map(fail, range(10))
    with pytest.raises(KeyError):
        next(results)
    executor.shutdown()


@BOTH
def test_futures_of_an_executor_that_was_dropped_are_finished(executor_type: Any) -> None:
    futures = [executor_type(1, CONTEXT).submit(square, 3) for _ in range(2)]
    gc.collect()
    assert [future.result(60) for future in futures] == [9, 9]


def test_a_callback_that_raises_does_no_harm(executor: Any, caplog: pytest.LogCaptureFixture) -> None:
    called = threading.Event()

    def callback(future: concurrent.futures.Future[int]) -> NoReturn:
        called.set()
        raise ValueError("in the callback")

    future = executor.submit(square, 2)
    future.add_done_callback(callback)
    assert future.result() == 4
    assert called.wait(60)
    assert executor.submit(square, 3).result() == 9
    caplog.clear()  # what it logged has the future and the future the executor


SCRIPT = """
import sys, time
from {module} import ProcessPoolExecutor

def task(number):
    print(number, flush=True)

if __name__ == "__main__":
    executor = ProcessPoolExecutor(1)
    for number in range(3):
        executor.submit(task, number)
"""


@pytest.mark.parametrize("module", ["concurrent.futures", "portshm.pool"])
def test_pending_work_is_finished_at_the_interpreters_exit(module: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(module=module))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["0", "1", "2"], "")


def test_the_default_context_with_max_tasks_is_spawn() -> None:
    with portshm.pool.ProcessPoolExecutor(1, max_tasks_per_child=3) as executor:
        assert executor._mp_context.get_start_method() == "spawn"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_are_started_when_there_is_work_for_them(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform has no start method {method}")
    with portshm.pool.ProcessPoolExecutor(4, multiprocessing.get_context(method)) as executor:
        assert not executor._processes
        for number in range(3):
            assert executor.submit(square, number).result() == number * number
            assert len(executor._processes) == 1


def test_a_bounded_map_that_nobody_reads_does_not_hold_up_the_shutdown(
    ours: portshm.pool.ProcessPoolExecutor,
) -> None:
    results = ours.map(square, iter(range(1000)), buffersize=4)
    assert next(results) == 0
    ours.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        list(results)


def test_a_bounded_map_that_was_never_read_and_dropped(ours: portshm.pool.ProcessPoolExecutor) -> None:
    ours.map(square, iter(range(1000)), buffersize=4)
    gc.collect()
    assert ours.submit(square, 5).result() == 25


def test_the_queued_elements_of_a_map_are_cancelled(ours: portshm.pool.ProcessPoolExecutor, tmp_path: Path) -> None:
    gates = [str(tmp_path / "gate")] * 8
    results = ours.map(opened, gates)
    while not any(stats.state == "busy" for stats in ours.stats()):
        pass
    ours.shutdown(wait=False, cancel_futures=True)
    touch(gates[0])
    assert next(results) == "open"
    with pytest.raises(concurrent.futures.CancelledError):
        list(results)


def test_asyncio(executor: Any) -> None:
    async def gather() -> list[Any]:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(executor, square, number) for number in range(20)]
        calls.append(loop.run_in_executor(executor, fail, "on purpose"))
        return await asyncio.gather(*calls, return_exceptions=True)

    *squares, error = asyncio.run(gather())
    assert squares == [number * number for number in range(20)]
    assert isinstance(error, KeyError)
