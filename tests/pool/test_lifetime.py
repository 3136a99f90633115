"""Who goes when: kills at every stage, the end of the coordinator, Ctrl-C, missing kernel facilities, many pools."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

import portshm
from portshm import PoolError, SharedMem, WorkerCrashed
from portshm.pool import Pool, ProcessPoolExecutor
from tests import tasks
from tests.children import environment, run_python
from tests.pool.waiting import gone, running, until
from tests.tasks import inc, noted

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

MakePool = Callable[..., Pool]
HERE = os.getpid()


def pids(pool: Pool) -> list[int]:
    return [stats.pid for stats in pool.stats() if stats.pid is not None]


def healthy(pool: Pool) -> None:
    assert pool.map_async(inc, range(200)).get(60) == list(range(1, 201))


def settled(pool: Pool, count: int) -> list[int]:
    """The pids when all workers are ready and idle."""
    until(lambda: [stats.state for stats in pool.stats()] == ["idle"] * count, "idle workers")
    return pids(pool)


# -- SIGKILL at every stage


def test_killed_while_idle(make_pool: MakePool) -> None:
    pool = make_pool(3)
    victims = settled(pool, 3)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    healthy(pool)
    until(lambda: len(pids(pool)) == 3, "three new workers")
    assert not set(victims) & set(pids(pool))
    assert [stats.restarts for stats in pool.stats()] == [1, 1, 1]


def test_killed_while_unpickling(make_pool: MakePool, log: str) -> None:
    pool = make_pool(2)
    result = pool.apply_async(tasks.same, (tasks.UnpickledSlowly(log, HERE),))
    until(lambda: noted(log), "the unpickling to begin")
    os.kill(int(noted(log)[0]), signal.SIGKILL)
    with pytest.raises(WorkerCrashed) as caught:
        result.get(60)
    assert caught.value.pid == int(noted(log)[0])
    healthy(pool)


def test_killed_while_running(make_pool: MakePool, log: str) -> None:
    pool = make_pool(3)
    results = [pool.apply_async(tasks.noted_hang, (log,)) for _ in range(3)]
    until(lambda: len(noted(log)) == 3, "three tasks to run")
    for line in noted(log):
        os.kill(int(line), signal.SIGKILL)
    for result in results:
        with pytest.raises(WorkerCrashed) as caught:
            result.get(60)
        assert caught.value.signal == signal.SIGKILL
    healthy(pool)


def test_killed_while_the_result_is_pickled(make_pool: MakePool, log: str) -> None:
    pool = make_pool(2)
    result = pool.apply_async(tasks.make_pickled_slowly, (log, HERE))
    until(lambda: noted(log), "the pickling to begin")
    os.kill(int(noted(log)[0]), signal.SIGKILL)
    with pytest.raises(WorkerCrashed):
        result.get(60)
    healthy(pool)


@pytest.mark.parametrize("large", ["argument", "result"])
def test_killed_with_something_large_on_its_way(make_pool: MakePool, large: str) -> None:
    """At no particular instant of the way, so many times."""
    pool = make_pool(2)
    data = bytes(8_000_000)
    for _ in range(2):
        settled(pool, 2)
        if large == "argument":
            result: Any = pool.apply_async(len, (data,))
        else:
            result = pool.apply_async(tasks.filled, ((7, len(data)),))
        for victim in pids(pool):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        result.wait(60)
        assert result.ready()
        if result.successful():
            assert result.get() in (len(data), bytes([7]) * len(data))
        else:
            with pytest.raises(WorkerCrashed):
                result.get()
    healthy(pool)


def test_killed_while_it_waits_for_room_for_its_result(make_pool: MakePool, log: str) -> None:
    """Stopped in the midst of sending, then killed: the region that it was granted comes back."""
    pool = make_pool(1)
    before = pool.shared_bytes
    for _ in range(3):
        with pytest.raises(WorkerCrashed):
            pool.apply_async(tasks.die_over_large_result, (log,)).get(60)
        healthy(pool)
    assert pool.shared_bytes < before + 3 * (1 << 20), "one region, recycled"


# -- the end of the pool


@pytest.mark.parametrize("task", ["ignore_sigterm", "noted_hang", "stop_self"])
def test_the_end_never_hangs(make_pool: MakePool, log: str, task: str) -> None:
    pool = make_pool(2)
    results = [pool.apply_async(getattr(tasks, task), (log,)) for _ in range(2)]
    until(lambda: len(noted(log)) == 2, "both tasks to run")
    workers = pids(pool)
    with pool:
        pass
    pool.join()
    assert not any(map(running, workers))
    for result in results:
        with pytest.raises(PoolError, match="terminated"):
            result.get(60)


def test_the_end_with_gigabytes_on_their_way(make_pool: MakePool) -> None:
    pool = make_pool(2)
    results = [pool.apply_async(tasks.filled, ((number, 200 << 20),)) for number in range(4)]
    pool.terminate()
    pool.join()
    for result in results:
        assert result.ready()


def test_close_and_join_finish_everything(make_pool: MakePool, log: str) -> None:
    pool = make_pool(2)
    result = pool.map_async(tasks.run, [tasks.Step(log, number) for number in range(300)])
    pool.close()
    pool.join()
    assert result.get(0) == [number * 10 for number in range(300)]
    assert pids(pool) == []
    assert pool.shared_bytes == 0


def test_a_worker_dies_while_the_pool_closes(make_pool: MakePool, log: str) -> None:
    pool = make_pool(2, on_crash="return")
    items = [tasks.Step(log, number, "exit" if number % 20 == 5 else "") for number in range(60)]
    result = pool.map_async(tasks.run, items)
    pool.close()
    pool.join()
    values = result.get(0)
    assert [number for number, value in enumerate(values) if isinstance(value, WorkerCrashed)] == [5, 25, 45]
    assert tasks.counted(log) == dict.fromkeys(range(60), 1)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_pool_that_is_dropped_ends_with_the_standard_warning(context: BaseContext, capfd: Any) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pool = Pool(2, context=context)
        assert pool.apply(inc, (1,)) == 2
        workers = pids(pool)
        del pool
        gc.collect()
    gone(workers)
    messages = [str(warning.message) for warning in seen if warning.category is ResourceWarning]
    assert len(messages) == 1
    assert messages[0].startswith("unclosed running multiprocessing pool <portshm.pool._pool.Pool state=RUN")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("count", [100])
def test_many_pools_leave_nothing(count: int) -> None:
    """What is left would be counted by the fixture around every test; here also in the midst of them."""
    if not hasattr(os, "fork"):
        pytest.skip("100 pools take minutes without fork")
    import multiprocessing

    context = multiprocessing.get_context("fork")
    seen = []
    for number in range(count):
        with Pool(2, context=context) as pool:
            assert pool.apply(inc, (number,)) == number + 1
        del pool
        if sys.platform == "linux":
            seen.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert len(set(seen[5:])) <= 1


def test_silent_logging(context: BaseContext, log: str) -> None:
    program = """
import multiprocessing, sys
from portshm import WorkerCrashed, WorkerStartError
from portshm.pool import Pool
from tests import tasks
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with Pool(2, context=context) as pool:
        for kind in ("exit", "SIGSEGV", "SIGKILL"):
            try:
                pool.apply(tasks.die, (kind,))
            except WorkerCrashed:
                print(kind, flush=True)
        pool.apply_async(tasks.inc, (1,), callback=lambda value: 1 / 0).wait()
    with Pool(2, initializer=tasks.start_badly, initargs=(sys.argv[2], "raise"), context=context) as pool:
        try:
            pool.apply(tasks.inc, (1,))
        except WorkerStartError:
            print("start")
"""
    done = run_python("import warnings; warnings.simplefilter('ignore')\n" + program, context.get_start_method(), log)
    assert done.stdout.split() == ["exit", "SIGSEGV", "SIGKILL", "start"]
    assert done.stderr == ""


def test_what_is_logged(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="portshm"):
        with pytest.raises(WorkerCrashed) as caught:
            make_pool(1).apply(tasks.die, ("exit",))
        until(lambda: any(str(caught.value.pid) in text for text in caplog.messages), "a line about the worker")


# -- the coordinator's own end

COORDINATOR = """
import multiprocessing, os, sys, time
from portshm.pool import Pool
from tests import tasks
from tests.pool.waiting import until
if __name__ == "__main__":
    method, busy, log = sys.argv[1:]
    context = multiprocessing.get_context(method)
    pools = [Pool(2, context=context, backend="file"), Pool(2, context=context, backend="file")]
    until(lambda: all(stats.state == "idle" for pool in pools for stats in pool.stats()), "the workers")
    if busy == "busy":
        for pool in pools:
            for _ in range(2):
                pool.apply_async(tasks.noted_hang, (log,))
        until(lambda: len(tasks.noted(log)) == 4, "the tasks")
    sibling = 0
    if hasattr(os, "fork"):
        sibling = os.fork()
        if sibling == 0:
            time.sleep(600)
    addresses = [worker.memory.mem.address for pool in pools for worker in pool._engine._workers]
    print(sibling, *[stats.pid for pool in pools for stats in pool.stats()])
    print(*addresses, flush=True)
    time.sleep(600)
"""


REMOVERS = {
    "clean": "import portshm; print(len(portshm.clean()))",
    "pool": """
from portshm.pool import Pool
from tests.tasks import inc
with Pool(1) as pool:
    print(pool.apply(inc, (3,)))
""",
}


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary folder for programs with a forkserver: a socket's path has 104 bytes at most (macOS)."""
    path = Path(tempfile.mkdtemp(prefix="t", dir="/tmp" if os.path.isdir("/tmp") else None))
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize(("busy", "remover"), [("idle", "clean"), ("busy", "pool"), ("busy", "clean")])
def test_sigkill_of_the_coordinator(start_method: str, busy: str, remover: str, short_path: Path) -> None:
    # In a folder of its own, or pools of other tests that run at the same time would take the evidence away.
    log, env = str(short_path / "log"), {**environment(), "TMPDIR": str(short_path)}
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", COORDINATOR, start_method, busy, log],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdout is not None
    assert program.stderr is not None
    try:
        sibling, *workers = map(int, program.stdout.readline().split())
        addresses = program.stdout.readline().split()
        assert len(workers) == len(addresses) == 4
        assert all(map(running, workers))
        program.kill()
        took = gone(workers, patience=10.0)
        print(f"{start_method}, {busy}: no worker left after {took:.3f} s")
        program.wait()
        for address in addresses:
            assert str(short_path) in address
            with SharedMem.attach(address, readonly=True, header=None) as mem:
                assert (b"noted_hang" in mem.value_copy()) is (busy == "busy")
        command = [sys.executable, "-m", "portshm", "inspect", addresses[0]]
        shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        assert "count" in shown
        if sibling and sys.version_info < (3, 13):
            # There a mapping has a descriptor of its own, which a forked child keeps, and with it the owner's lock
            # (portshm/_backends/_posix.py): the workers leave all the same, but the regions wait for the sibling.
            os.kill(sibling, signal.SIGKILL)
            gone([sibling])
            sibling = 0
        assert not sibling or running(sibling), "a forked sibling that lives on holds nothing up"
        command = [sys.executable, "-W", "ignore", "-c", REMOVERS[remover]]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stdout == "4\n"
        for address in addresses:
            with pytest.raises(FileNotFoundError):
                SharedMem.attach(address)
        if sibling:
            os.kill(sibling, signal.SIGKILL)
            gone([sibling])
        assert program.stderr.read() == done.stderr == ""
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
        program.stderr.close()


STUCK = """
import multiprocessing, sys, time
from portshm.pool import Pool
from tests import tasks
from tests.pool.waiting import until
if __name__ == "__main__":
    method, task, log = sys.argv[1:]
    pool = Pool(2, context=multiprocessing.get_context(method), backend="file")
    for _ in range(2):
        pool.apply_async(getattr(tasks, task), (log,))
    until(lambda: len(tasks.noted(log)) == 2, "the tasks")
    print(*[stats.pid for stats in pool.stats()], flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker needs its interpreter to notice")
@pytest.mark.parametrize("task", ["hang_in_c", "stop_self"])
def test_sigkill_of_the_coordinator_of_workers_that_are_stuck(start_method: str, task: str, short_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", STUCK, start_method, task, str(short_path / "log")],
        env={**environment(), "TMPDIR": str(short_path)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with program:
        assert program.stdout is not None
        try:
            workers = [int(pid) for pid in program.stdout.readline().split()]
            assert len(workers) == 2
            assert all(map(running, workers))
        finally:
            program.kill()
        gone(workers, patience=10.0)


INTERRUPTED = """
import multiprocessing, sys
from portshm.pool import Pool, ProcessPoolExecutor
from tests import tasks
from tests.pool.waiting import until
if __name__ == "__main__":
    method, face, log = sys.argv[1:]
    context = multiprocessing.get_context(method)
    if face == "Pool":
        with Pool(2, context=context) as pool:
            done = [pool.apply_async(tasks.inc, (number,)) for number in range(3)]
            print([result.get() for result in done], flush=True)
            hung = pool.map_async(tasks.noted_hang, [log] * 4, chunksize=1)
            until(lambda: len(tasks.noted(log)) == 2, "the tasks")
            try:
                print("hung", flush=True)
                hung.get()
            except KeyboardInterrupt:
                print([result.get() for result in done], flush=True)
                raise
    else:
        def work(pool):
            done = [pool.submit(tasks.inc, number) for number in range(3)]
            print([future.result() for future in done], flush=True)
            hung = [pool.submit(tasks.noted_hang, log) for _ in range(2)]
            until(lambda: len(tasks.noted(log)) == 2, "the tasks")
            try:
                print("hung", flush=True)
                hung[0].result()
            except KeyboardInterrupt:
                print([future.result() for future in done], flush=True)
                raise
        if face == "executor":
            with ProcessPoolExecutor(2, context) as pool:
                work(pool)
        else:
            work(ProcessPoolExecutor(2, context))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
@pytest.mark.parametrize("face", ["Pool", "executor", "executor at exit"])
def test_ctrl_c(start_method: str, face: str, log: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED, start_method, face, log],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert program.stdout is not None
    try:
        first = program.stdout.readline()
        assert program.stdout.readline() == "hung\n"
        until(lambda: len(noted(log)) == 2, "two tasks to hang")
        workers = [int(line) for line in noted(log)]
        os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=60)
        took = gone(workers, patience=10.0)
        print(f"{start_method}, {face}: gone {took:.3f} s after the program")
        assert out == first, "finished results are still there after the interrupt"
        assert err.count("Traceback (most recent call last)") == 1
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert program.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    finally:
        program.kill()
        program.communicate()


CAUGHT = """
import multiprocessing, sys
from portshm.pool import ProcessPoolExecutor
from tests import tasks
from tests.pool.waiting import until
if __name__ == "__main__":
    method, log = sys.argv[1:]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as executor:
        hung = [executor.submit(tasks.noted_hang, log) for _ in range(2)]
        until(lambda: len(tasks.noted(log)) == 2, "the tasks")
        try:
            print("hung", flush=True)
            hung[0].result()
        except KeyboardInterrupt:
            print("caught", flush=True)
        print(executor.submit(tasks.inc, 1).result())
    print(*[type(future.exception()).__name__ for future in hung])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_ctrl_c_that_the_program_catches(start_method: str, log: str) -> None:
    """What is executing is interrupted too, quietly, and the workers go on with what follows."""
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CAUGHT, start_method, log],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "hung\n"
        workers = [int(line) for line in noted(log)]
        os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=60)
        assert out.split() == ["caught", "2", "KeyboardInterrupt", "KeyboardInterrupt"]
        assert err == ""
        gone(workers)
    finally:
        program.kill()
        program.communicate()


# -- what the system may not have

WITHOUT = """
import multiprocessing, sys
from portshm.pool import Pool, ProcessPoolExecutor
from tests import tasks
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    try:
        multiprocessing.Lock()
    except OSError:
        print("no semaphores")
    with Pool(2, context=context) as pool:
        print(pool.map(tasks.inc, range(5)), sum(map(len, pool.map(tasks.filled, [(1, 100_000)] * 5))))
        print(pool._engine._workers[0].memory.mem.address.name.rpartition("/")[0])
    with ProcessPoolExecutor(2, context) as pool:
        print(list(pool.map(tasks.inc, range(5))))
"""

NO_SEMAPHORES = """
import _multiprocessing
class SemLock(_multiprocessing.SemLock):
    def __new__(cls, *args):
        raise OSError(38, "Function not implemented")
_multiprocessing.SemLock = SemLock
"""


def test_without_semaphores(start_method: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_SEMAPHORES)
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, start_method],
        env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:2] == ["no semaphores", "[1, 2, 3, 4, 5] 500000"]
    assert lines[3] == "[1, 2, 3, 4, 5]"


@pytest.mark.skipif(sys.platform != "linux", reason="mounts another /dev/shm")
@pytest.mark.parametrize("options", ["ro", "absent"])
def test_without_shared_memory(start_method: str, options: str, tmp_path: Path) -> None:
    if options == "absent":
        script = 'mount -t tmpfs none /dev && exec "$@"'
    else:
        script = f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"'
    found = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs none /dev/shm"], capture_output=True, check=False
    )
    if found.returncode:
        pytest.skip(f"no user and mount namespaces: {found.stderr!r}")
    (tmp_path / "sitecustomize.py").write_text(NO_SEMAPHORES)
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", sys.executable, "-W", "ignore", "-c", WITHOUT, start_method],
        env={**env, "TMPDIR": str(tmp_path)}, stdin=subprocess.PIPE, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.stderr == ""
    expected = ["no semaphores", "[1, 2, 3, 4, 5] 500000", str(tmp_path), "[1, 2, 3, 4, 5]"]
    assert done.stdout.splitlines() == expected


# -- many users


def test_threads_share_a_pool(make_pool: MakePool, request: pytest.FixtureRequest) -> None:
    rounds = 2000 if request.config.getoption("--slow") else 400
    pool = make_pool(2)
    wrong: list[object] = []

    def work(thread: int) -> None:
        for number in range(rounds):
            x = thread * 1_000_000 + number
            if number % 50 == 0:
                if pool.map(inc, range(x, x + 20)) != list(range(x + 1, x + 21)):
                    wrong.append(x)
            elif pool.apply(tasks.add, (x, 1), {"times": 2}) != 2 * (x + 1):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(stats.tasks_done for stats in pool.stats()) == 8 * (rounds - rounds // 50 + 20 * (rounds // 50))


def test_pools_in_workers(make_pool: MakePool) -> None:
    assert make_pool(2).map(tasks.nested_map, [[1, 2], [3], []]) == [[2, 3], [4], []]


def test_a_worker_with_a_pool_is_killed(make_pool: MakePool, log: str) -> None:
    """Its pool's workers go with it: nobody is left to reap them but the system."""
    pool = make_pool(1)
    result = pool.apply_async(tasks.nested_hang, (log,))
    until(lambda: len(noted(log)) == 2, "the inner workers")
    os.kill(pids(pool)[0], signal.SIGKILL)
    with pytest.raises(WorkerCrashed):
        result.get(60)
    gone([int(line) for line in noted(log)])
    portshm.clean()


def test_what_is_submitted_at_once_wakes_all_who_are_idle(make_pool: MakePool, log: str) -> None:
    pool = make_pool(3)
    settled(pool, 3)
    pool.map_async(tasks.noted_hang, [log] * 3)
    until(lambda: len(noted(log)) == 3, "the three workers to have one each")
    pool.terminate()


# -- stats


def test_stats_rise_within_one_long_chunk(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1)
    gate = tmp_path / "gate"
    result = pool.map_async(tasks.counted_wait, [(str(gate), number) for number in range(20)], chunksize=20)
    until(lambda: noted(f"{gate}.started"), "element 10")
    (stats,) = until(lambda: [s for s in pool.stats() if s.tasks_done == 10], "ten elements on record")
    assert stats.state == "busy"
    assert stats.pid == int(noted(f"{gate}.started")[0])
    assert stats.running is not None
    until(lambda: (pool.stats()[0].running or 0) > stats.running, "its time to rise")
    assert stats.restarts == 0
    assert stats.shared_bytes > 0
    gate.touch()
    assert result.get(60) == list(range(20))
    (stats,) = until(lambda: [s for s in pool.stats() if s.state == "idle"], "the worker to be idle")
    assert (stats.tasks_done, stats.running) == (20, None)


# -- arrays


@pytest.fixture
def numpy() -> Any:
    return pytest.importorskip("numpy")


@pytest.mark.parametrize("size", [10, 1_000_000])
@pytest.mark.parametrize("backend", ["auto", "named"])
def test_what_a_task_does_to_its_argument_is_its_own_affair(
    make_pool: MakePool, numpy: Any, size: int, backend: str
) -> None:
    pool = make_pool(2, backend=backend)
    array = numpy.zeros(size)
    for _ in range(3):
        assert (pool.apply(tasks.add_in_place, (array,)) == 1).all()
    for result in pool.map(tasks.add_in_place, [array] * 4):
        assert (result == 1).all()
    assert not array.any()


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_retry_sees_the_argument_as_it_was(make_pool: MakePool, numpy: Any, log: str, size: int) -> None:
    pool = make_pool(2, retries=3)
    array = numpy.zeros(size)
    assert pool.apply(tasks.add_and_die_twice, (log, array)) == float(size)
    assert len(noted(log)) == 3
    assert not array.any()


def test_views_that_a_task_keeps_stay_valid(make_pool: MakePool, numpy: Any) -> None:
    pool = make_pool(1)
    for number in range(5):
        pool.apply(tasks.keep, (numpy.full(50_000, float(number)),))
    for number in range(300):
        assert pool.apply(tasks.total, (numpy.full(50_000, 7.0 + number),)) == 50_000 * (7.0 + number)
    assert pool.apply(tasks.kept_sums) == [50_000.0 * number for number in range(5)]


def test_results_outlive_the_pool(make_pool: MakePool, numpy: Any) -> None:
    pool = make_pool(2)
    arrays = pool.map(tasks.ones, [100_000] * 5)
    pool.terminate()
    gc.collect()
    for array in arrays:
        assert array.sum() == 100_000
        array += 1
        assert array.sum() == 200_000


def test_the_executor_s_shutdown_leaves_results(context: BaseContext, numpy: Any) -> None:
    with ProcessPoolExecutor(2, context) as executor:
        futures = [executor.submit(tasks.ones, 100_000) for _ in range(3)]
    assert [future.result(60).sum() for future in futures] == [100_000] * 3


def make_iterator() -> Iterator[int]:
    yield from range(10)


def test_an_iterator_outlives_the_pool_s_name(context: BaseContext) -> None:
    with Pool(2, context=context) as pool:
        results = pool.imap(inc, make_iterator())
        assert next(results) == 1
        assert [results.next(60) for _ in range(9)] == list(range(2, 11))
