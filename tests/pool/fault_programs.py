"""Programs about the engine's faults, for `test_engine_faults.py`: each ends by itself, or its watchdog says where not.

A pool that hangs would take the test's process along, and a signal's handler is for the main thread of a program. One
alone, with each combination of arguments after the other:

    python -m tests.pool.fault_programs 40 tasks_meet map submit
    python -m tests.pool.fault_programs 40 end_beside_user_code function,map,idle argument,map,queued
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import itertools
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from portshm import PoolError, PoolTerminatedError, SharedMem, TaskTimeoutError, TransportError
from portshm._region import PREFIX
from portshm.pool import Pool, ProcessPoolExecutor
from tests import fault_tasks, tasks
from tests.pool.lines import HoldUps, Line, Lines, Stop
from tests.pool.waiting import until
from tests.tasks import counted, gated, hang, inc, noted, same, wait_for

PATIENCE = 10.0  # seconds
HERE = os.getpid()
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")

T = TypeVar("T")

# One call of each kind, of one element: its result.
CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "apply": lambda pool, function, item: pool.apply(function, (item,)),
    "apply_async": lambda pool, function, item: pool.apply_async(function, (item,)).get(PATIENCE),
    "map": lambda pool, function, item: pool.map(function, [item])[0],
    "starmap": lambda pool, function, item: pool.starmap_async(function, [(item,)]).get(PATIENCE)[0],
    "imap": lambda pool, function, item: pool.imap(function, [item]).next(PATIENCE),
    "imap_unordered": lambda pool, function, item: pool.imap_unordered(function, [item]).next(PATIENCE),
    "submit": lambda executor, function, item: executor.submit(function, item).result(PATIENCE),
    "executor.map": lambda executor, function, item: next(executor.map(function, [item], timeout=PATIENCE)),
}


def make_face(call: str, processes: int = 2, **options: Any) -> Any:
    if call in ("submit", "executor.map"):
        return ProcessPoolExecutor(processes, CONTEXT, **options)
    return Pool(processes, context=CONTEXT, **options)


def end(face: Any) -> None:
    if isinstance(face, Pool):
        face.terminate()
    else:
        face.terminate_workers()


def settled(face: Any) -> list[int]:
    """The pids of the workers when all are idle."""
    if not isinstance(face, Pool):
        face.submit(inc, 1).result(PATIENCE)
    until(lambda: {stats.state for stats in face.stats()} == {"idle"}, "idle workers", PATIENCE)
    return [stats.pid for stats in face.stats()]


def refused(error: BaseException) -> bool:
    """Whether it says that the pool takes no more calls."""
    return type(error) in (ValueError, RuntimeError) and str(error) in (
        "Pool not running",
        "cannot schedule new futures after shutdown",
    )


def told_of_the_end(error: Any) -> bool:
    return isinstance(error, PoolTerminatedError)


class Asking(threading.Thread):
    """A call in a thread of its own, and what it came to."""

    def __init__(self, call: Callable[[], Any], name: str = "asking") -> None:
        super().__init__(name=name, daemon=True)
        self._call = call
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._call()
        except BaseException as error:
            self.outcome = error

    def ended(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), "it hangs"
        return self.outcome


def entries() -> set[str]:
    """What there is of shared memory on this machine."""
    return {
        f"{folder}/{entry}"
        for folder in {tempfile.gettempdir(), "/dev/shm"}
        if os.path.isdir(folder)
        for entry in os.listdir(folder)
        if entry.startswith(PREFIX)
    }


@contextlib.contextmanager
def folder() -> Iterator[str]:
    path, owner = tempfile.mkdtemp(), os.getpid()
    try:
        yield path + os.sep
    finally:
        if os.getpid() == owner:  # a forked child that leaves in order comes by here as well
            shutil.rmtree(path)


# -- the end, while somebody calls


def end_while_threads_call(call: str, rounds: str) -> None:
    chance = random.Random(call)
    for _ in range(int(rounds)):
        face = make_face(call)
        settled(face)

        def use(face: Any = face) -> None:
            while CALLS[call](face, inc, 1) == 2:
                pass

        users = [Asking(use) for _ in range(2)]
        time.sleep(chance.random() * 0.003)
        end(face)
        for user in users:
            error = user.ended()
            assert told_of_the_end(error) or refused(error), repr(error)


def end_while_threads_wait(call: str) -> None:
    with folder() as path:
        face = make_face(call)
        users = [Asking(lambda: CALLS[call](face, tasks.noted_hang, path + "log")) for _ in range(4)]
        until(lambda: len(noted(path + "log")) == 2, "tasks to run")
        end(face)
        for user in users:
            error = user.ended()
            # A future that was still queued may be told so in the way of futures.
            assert told_of_the_end(error), repr(error)


def end_beside_user_code(where: str, call: str, queued: str) -> None:
    """`terminate` returns though an object's code does not, and who waits is told."""
    with folder() as path:
        gate, first = path + "gate", path + "first"
        face = make_face(call)
        settled(face)
        occupied = []
        if queued == "queued":
            for number in range(2):
                occupied.append(Asking(lambda n=number: CALLS[call](face, wait_for, f"{first}{n}")))
            until(lambda: all(noted(f"{first}{number}.started") for number in range(2)), "both workers to be busy")
        if where == "function":
            user = Asking(lambda: CALLS[call](face, fault_tasks.WaitsWhenPickled(gate), 1))
        elif where == "argument":
            user = Asking(lambda: CALLS[call](face, same, fault_tasks.WaitsWhenPickled(gate)))
        else:
            user = Asking(lambda: CALLS[call](face, gated, gate))
        for number in range(len(occupied)):
            Path(f"{first}{number}").touch()
        until(lambda: str(HERE) in noted(gate + ".started"), "user code to run here", PATIENCE)
        Asking(lambda: end(face)).ended()
        Path(gate).touch()
        outcome = user.ended()
        # Who unpickles his own result has it by then.
        assert told_of_the_end(outcome) or (where == "result" and outcome == HERE), repr(outcome)


def end_beside_an_input_that_waits() -> None:
    go_on = threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        go_on.wait()

    pool = make_face("imap")
    results = pool.imap(inc, numbers())
    assert results.next(PATIENCE) == 2
    Asking(pool.terminate).ended()
    error = Asking(lambda: results.next()).ended()
    assert told_of_the_end(error), repr(error)
    go_on.set()


def end_beside_a_callback_that_waits() -> None:
    go_on, began = threading.Event(), threading.Event()

    def callback(_: object) -> None:
        began.set()
        go_on.wait()

    pool = make_face("apply_async")
    pool.apply_async(inc, (1,), callback=callback)
    assert began.wait(PATIENCE)
    Asking(pool.terminate).ended()
    go_on.set()


def nothing_is_written_to_who_comes_after(call: str, most: str) -> None:
    """A thread is about to send as the pool ends; its descriptor is then a file of the program's."""
    chance = random.Random(call)

    def trial(line: Line | None, seen: set[Line]) -> None:
        face = make_face(call)
        settled(face)
        stop = Stop(line, 1, 0.1) if line is not None else None

        def come_to(line: Line) -> None:
            if line.thread == "caller":
                seen.add(line)
                if stop is not None:
                    stop(line)

        with Lines(come_to), contextlib.ExitStack() as files:
            user = Asking(lambda: CALLS[call](face, inc, 1), "caller")
            if stop is not None:
                until(lambda: stop.reached.is_set() or not user.is_alive(), "the line", PATIENCE)
            ending = Asking(lambda: end(face))
            ending.join(0.1)
            opened = [files.enter_context(tempfile.TemporaryFile(buffering=0)) for _ in range(30)]
            if stop is not None:
                stop.let_go()
            ending.ended()
            outcome = user.ended()
            assert outcome == 2 or told_of_the_end(outcome) or refused(outcome), repr(outcome)
            assert not any(os.fstat(file.fileno()).st_size for file in opened), line

    lines: set[Line] = set()
    trial(None, lines)
    trial(None, lines)
    for line in chance.sample(sorted(lines), min(int(most), len(lines))):
        trial(line, set())


# -- teardown


def teardown_with_a_step_that_fails(step: str, backend: str) -> None:
    """Every other step is done all the same, and what failed is logged."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("portshm").addHandler(handler)
    before = entries()
    pool = make_face("apply", 3, backend=backend)
    settled(pool)
    waiting = Asking(lambda: pool.apply(hang))
    until(lambda: "busy" in [stats.state for stats in pool.stats()], "a busy worker")
    owner, name = {
        "unlink": (SharedMem, "unlink"), "close": (SharedMem, "close"), "join": (BaseProcess, "join"),
    }[step]  # fmt: skip
    work = getattr(owner, name)
    failed: list[Any] = []

    def fail_once(self: Any, *args: Any) -> Any:
        if not failed:
            failed.append(self)
            raise OSError(errno.EIO, "on purpose")
        return work(self, *args)

    setattr(owner, name, fail_once)
    Asking(pool.terminate).ended()
    setattr(owner, name, work)
    assert told_of_the_end(waiting.ended()), repr(waiting.outcome)
    assert failed
    assert any(record.levelno >= logging.WARNING for record in records), "it is told of"
    if step != "join":  # the one that failed is all that may be left
        bare = str(failed[0].address).rpartition("/")[2].partition("?")[0]
        left = {entry for entry in entries() - before if os.path.basename(entry).partition(".")[0] not in bare}
        assert not left, left
        failed[0].unlink()
        failed[0].close()
    assert not entries() - before, entries() - before


# -- deadlines


def a_deadline_set_at_every_line() -> None:
    """It is kept, wherever the pool's own threads are as it is set: after a deadline that was none any more."""
    here = threading.current_thread().name

    def trial(line: Line | None, seen: set[Line]) -> None:
        settled(pool)
        stop = Stop(line, 1, 0.1) if line is not None else None
        over = False

        def come_to(line: Line) -> None:
            if line.thread != here and not over:
                seen.add(line)
                if stop is not None:
                    stop(line)

        with Lines(come_to):
            assert pool.apply_async(inc, (1,), timeout=60).get(PATIENCE) == 2
            # Until it has come there, or to rest.
            (stop.reached if stop is not None else threading.Event()).wait(0.02)
            over = True
            late = pool.apply_async(hang, timeout=0.01)
            if stop is not None:
                stop.let_go()
            try:
                late.get(3.0)
            except TaskTimeoutError:
                pass
            except multiprocessing.TimeoutError:
                raise AssertionError(f"the deadline was lost at {line}") from None

    lines: set[Line] = set()
    with Lines(lambda line: None):  # so that the pool's threads are seen by those that follow
        pool = make_face("apply_async", 1)
        settled(pool)
    trial(None, lines)
    trial(None, lines)
    for line in sorted(lines):
        trial(line, set())
    pool.terminate()


def deadlines_beside_a_late_error(call: str) -> None:
    """An argument cannot be unpickled, and its exception not at once either; others' deadlines are kept meanwhile."""
    with folder() as path:
        face = make_face(call, task_timeout=60.0)
        pool = make_face("apply") if call in ("submit", "executor.map") else face
        settled(face)
        user = Asking(lambda: CALLS[call](face, same, fault_tasks.UnreadableWithLateError(path + "gate")))
        until(lambda: str(HERE) in noted(path + "gate.started"), "the exception to be unpickled here")
        if face is pool:
            deadline = Asking(lambda: face.apply_async(hang, timeout=0.2).get(PATIENCE))
            assert isinstance(deadline.ended(), TaskTimeoutError), repr(deadline.outcome)
        Asking(lambda: CALLS[call](face, inc, 1)).ended()
        Path(path + "gate").touch()
        error = user.ended()
        assert isinstance(error, (TransportError, PoolError)), repr(error)
        end(face)
        end(pool)


MODULE = """
import threading
from tests.pool import fault_programs

def work(item):
    return item

fault_programs.importing(work)
"""


def deadlines_beside_an_import(call: str) -> None:
    """A module's body submits what it defines, and waits: its name is looked up behind the lock of its import."""
    with folder() as path:
        Path(path + "portshm_busy_module.py").write_text(MODULE)
        sys.path.insert(0, path)
        face = make_face(call, task_timeout=None)
        settled(face)
        occupied = [Asking(lambda n=n: CALLS[call](face, wait_for, f"{path}{n}")) for n in range(2)]
        until(lambda: all(noted(f"{path}{n}.started") for n in range(2)), "both workers to be busy")
        go_on = threading.Event()
        submitted: list[Any] = []

        def importing(work: Any) -> None:
            submitted.append(Asking(lambda: CALLS[call](face, work, 1)))
            go_on.wait()

        globals()["importing"] = importing
        user = Asking(lambda: importlib.import_module("portshm_busy_module"))
        until(lambda: submitted, "the module's body")
        if isinstance(face, Pool):  # the second worker's; the first one's next is the module's
            late = face.apply_async(hang, timeout=0.2)
        Path(path + "0").touch()
        occupied[0].ended()
        Path(path + "1").touch()
        occupied[1].ended()
        if isinstance(face, Pool):
            error = Asking(lambda: late.get(PATIENCE)).ended()
            assert isinstance(error, TaskTimeoutError), repr(error)
        Asking(lambda: end(face)).ended()
        go_on.set()
        user.ended()
        submitted[0].ended()


# -- who settles


def maps_settled_by_several_threads(rounds: str) -> None:
    """Half of the elements end where they are pickled, half where their results come, in the midst of each other."""
    sys.setswitchinterval(1e-6)
    chance = random.Random("settled")
    hold_ups = HoldUps(400, chance, 0.0003)

    def come_to(line: Line) -> None:
        if line.file == "_results.py":
            hold_ups(line)

    with Lines(come_to, instructions=True):
        pool = make_face("map", 3)
        settled(pool)
        for _ in range(int(rounds)):
            items = [fault_tasks.Maybe(number % 2 == 0, number) for number in range(60)]
            results = [pool.map_async(fault_tasks.number_of, items, chunksize=1) for _ in range(2)]
            for result in results:
                result.wait(PATIENCE)
                assert result.ready(), "an element was not counted"
        pool.terminate()


# -- forks


def a_forked_child_calls(call: str, rounds: str, leaves: str) -> None:
    """It gets an error, the parent's calls what they asked for, and nothing runs twice."""
    with folder() as path:
        log = path + "log"
        face = make_face(call)
        settled(face)
        numbers = itertools.count()
        for _ in range(int(rounds)):
            over = threading.Event()

            def use(over: threading.Event = over) -> int:
                done = 0
                while not over.is_set() or not done:
                    number = next(numbers)
                    assert CALLS[call](face, fault_tasks.noted_ten_times, (log, number)) == number * 10
                    done += 1
                return done

            user = Asking(use)
            pid = os.fork()
            if pid == 0:
                _child_of_fork(call, face, log, leaves)
            _, status = os.waitpid(pid, 0)
            over.set()
            done = user.ended()
            assert isinstance(done, int), repr(done)
            assert os.waitstatus_to_exitcode(status) == 0, f"the child: {os.waitstatus_to_exitcode(status)}"
        ran = counted(log)
        assert ran.pop(-1, 0) == 0, "the child's call ran in the parent's worker"
        assert set(ran.values()) == {1}, [number for number, count in ran.items() if count > 1]
        end(face)


def _child_of_fork(call: str, face: Any, log: str, leaves: str) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(5)
    if leaves == "at once":
        try:
            CALLS[call](face, fault_tasks.noted_ten_times, (log, -1))
        except (multiprocessing.TimeoutError, TimeoutError):
            os._exit(3)
        except Exception:
            os._exit(0)
        os._exit(4)
    sys.stderr.close()
    sys.exit(0)


# -- tasks that have to do with each other


def tasks_meet(call: str) -> None:
    """Two workers, and tasks that wait for their neighbour, after many that were quick: no two are in one message."""
    with folder() as path:
        face = make_face(call)
        assert _several(call, face, fault_tasks.meet, [("", number) for number in range(2000)]) == list(range(2000))
        results = Asking(lambda: _several(call, face, fault_tasks.meet, [(path, number) for number in range(40)]))
        assert sorted(results.ended()) == list(range(40))
        end(face)


def one_is_slow(call: str, at: str) -> None:
    """All others are done while it runs."""
    with folder() as path:
        log, gate = path + "log", path + "gate"
        face = make_face(call)
        _several(call, face, fault_tasks.noted_or_slow, [(path + "quick", number, "") for number in range(3000)])
        items = [(log, number, gate if number == int(at) else "") for number in range(200)]
        user = Asking(lambda: _several(call, face, fault_tasks.noted_or_slow, items))
        try:
            until(lambda: len(noted(log)) == 199, "those beside the slow one", PATIENCE / 2)
        finally:
            Path(gate).touch()
        assert sorted(user.ended()) == list(range(200))
        end(face)


def _several(call: str, face: Any, function: Any, items: list[tuple[Any, ...]]) -> list[Any]:
    """One call of each kind, of several elements, of which each is a task of its own."""
    if call == "apply_async":
        results = [face.apply_async(function, item) for item in items]
        return [result.get(PATIENCE) for result in results]
    if call == "submit":
        futures = [face.submit(function, *item) for item in items]
        return [future.result(PATIENCE) for future in futures]
    if call == "starmap":
        return face.starmap_async(function, items, chunksize=1).get(PATIENCE)  # type: ignore[no-any-return]
    spread = fault_tasks.Spread(function)
    if call == "map":
        return face.map_async(spread, items, chunksize=1).get(PATIENCE)  # type: ignore[no-any-return]
    if call == "executor.map":
        return list(face.map(spread, items, timeout=PATIENCE))
    results = getattr(face, call)(spread, items)
    return [results.next(PATIENCE) for _ in items]


# -- signals


def terminate_in_a_handler(name: str, call: str, rounds: str) -> None:
    """While the main thread submits; the handler comes back, and the call is told."""
    chance = random.Random(call)
    for _ in range(int(rounds)):
        face = make_face(call)
        settled(face)
        came = []

        def handle(signum: int, frame: Any, face: Any = face, came: list[int] = came) -> None:
            end(face)
            came.append(signum)

        signum = getattr(signal, name)
        signal.signal(signum, handle)
        timer = threading.Timer(chance.random() * 0.004, os.kill, (os.getpid(), signum))
        timer.start()
        error: BaseException | None = None
        while error is None:
            try:
                SUBMISSIONS[call](face)
            except BaseException as problem:
                error = problem
        assert told_of_the_end(error) or refused(error), repr(error)
        timer.join()
        assert came
        if isinstance(face, Pool):
            face.join()


SUBMISSIONS: dict[str, Callable[[Any], Any]] = {
    "apply": lambda pool: pool.apply(inc, (1,)),
    "apply_async": lambda pool: pool.apply_async(inc, (1,)),
    "map": lambda pool: pool.map_async(inc, range(10)),
    "imap": lambda pool: pool.imap(inc, [1, 2, 3]),
    "submit": lambda executor: executor.submit(inc, 1),
    "executor.map": lambda executor: executor.map(inc, [1, 2, 3]),
}


def terminate_at_every_line(call: str, most: str) -> None:
    """As a handler, or a destructor, that runs before any line of the pool's in the thread that submits."""
    chance = random.Random(call)

    def trial(line: Line | None, seen: set[Line]) -> None:
        face = make_face(call)
        settled(face)
        here = threading.current_thread().name
        ended = []

        def come_to(now: Line) -> None:
            if now.thread == here:
                seen.add(now)
                if now == line and not ended:
                    ended.append(now)
                    end(face)

        outcome: Any = None
        try:
            with Lines(come_to):
                outcome = CALLS[call](face, inc, 1)
        except BaseException as error:
            outcome = error
        assert outcome == 2 or told_of_the_end(outcome) or refused(outcome), (line, outcome)
        end(face)

    lines: set[Line] = set()
    trial(None, lines)
    trial(None, lines)
    for line in chance.sample(sorted(lines), min(int(most), len(lines))):
        trial(line, set())


def collected_in_every_thread(most: str) -> None:
    """An object whose `__del__` ends the pool, collected before some line in one of the pool's own threads."""
    here = threading.current_thread().name
    chance = random.Random("collected")

    def trial(line: Line | None, seen: set[Line]) -> None:
        pool = make_face("imap")
        holder = [fault_tasks.EndsPool(pool)]

        def come_to(now: Line) -> None:
            if now.thread != here:
                seen.add(now)
                if now == line:
                    holder.clear()

        with Lines(come_to):
            settled(pool)
            outcomes: list[Any] = []
            try:
                called = threading.Event()
                results = pool.imap(fault_tasks.number_of, (fault_tasks.Maybe(False, n) for n in range(5)))
                outcomes.append(pool.apply_async(inc, (1,), callback=lambda _: called.set()).get(PATIENCE))
                outcomes += [results.next(PATIENCE) for _ in range(5)]
                assert outcomes == [2, 0, 1, 2, 3, 4], outcomes
            except BaseException as error:
                if not (told_of_the_end(error) or refused(error)):
                    raise AssertionError(f"at {line}") from error
            if line is None:
                holder.clear()
            Asking(pool.terminate).ended()

    lines: set[Line] = set()
    trial(None, lines)
    trial(None, lines)
    threads: dict[str, list[Line]] = {}
    for line in sorted(lines):
        threads.setdefault(line.thread, []).append(line)
    assert len(threads) >= 2, threads.keys()
    for found in threads.values():
        for line in chance.sample(found, min(int(most), len(found))):
            trial(line, set())


def interrupted_at_every_line_of(method: str, work: str) -> None:
    """Ctrl-C in the midst of an end, which is asked for again then."""
    from tests.pool.test_interrupt import PACKAGE, without_interrupts

    raised = True
    at = 0
    while raised:
        face = make_face("submit" if method in ("shutdown", "terminate_workers") else "apply")
        settled(face)
        if work == "busy":
            SUBMISSIONS["submit" if isinstance(face, ProcessPoolExecutor) else "apply_async"](face)
        left = at
        raised = False

        def come_to(line: Line) -> None:
            nonlocal left, raised
            if line.thread != "MainThread" or line.number in without_interrupts(os.path.join(PACKAGE, line.file)):
                return
            left -= 1
            if left == -1:
                raised = True
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt), Lines(come_to):
            getattr(face, method)()
        Asking(lambda face=face: end(face)).ended()
        at += 1
    assert at > 3


class Alarm(Exception):
    pass


def what_a_handler_raises_comes_out(kind: str, call: str, where: str) -> None:
    """Of the call in which the main thread was, and is nobody's result."""
    error_type = {"SystemExit": SystemExit, "Alarm": Alarm}[kind]
    armed = False

    def handle(signum: int, frame: Any) -> None:
        if armed:
            raise error_type("from the handler")

    signal.signal(signal.SIGALRM, handle)
    face = make_face("submit" if call in ("submit", "executor.map") else "apply")
    settled(face)
    begin = {
        "apply": lambda function, item: face.apply(function, (item,)),
        "apply_async": lambda function, item: face.apply_async(function, (item,)),
        "map_async": lambda function, item: face.map_async(function, [item]),
        "map": lambda function, item: face.map(function, [item]),
        "starmap": lambda function, item: face.starmap_async(function, [(item,)]),
        "imap": lambda function, item: face.imap(function, [item]),
        "imap_unordered": lambda function, item: face.imap_unordered(function, [item]),
        "get": lambda function, item: face.apply_async(function, (item,)).get(PATIENCE),
        "submit": lambda function, item: face.submit(function, item),
        "executor.map": lambda function, item: face.map(function, [item]),
    }[call]
    armed = True
    returned: Any = None
    try:
        if where == "pickling":
            returned = begin(same, fault_tasks.SignalsWhenPickled())
        elif where == "function":
            returned = begin(fault_tasks.SignalsWhenPickled(), 1)
        else:
            returned = begin(fault_tasks.make_signals_when_unpickled, None)
    except error_type as error:
        came = error
    else:
        armed = False
        raise AssertionError(f"it was swallowed: {returned!r}")
    armed = False
    assert came.args == ("from the handler",)
    assert type(came.__cause__).__name__ != "RemoteTraceback"
    # As good as before, and whoever came next is not told of it.
    one = "submit" if isinstance(face, ProcessPoolExecutor) else "apply"
    assert [CALLS[one](face, inc, number) for number in range(4)] == [1, 2, 3, 4]
    end(face)


def interrupted_futures(log: str) -> None:
    """Twenty tasks by asyncio, of which two run; the test sends Ctrl-C to all processes."""
    import asyncio

    async def work() -> None:
        loop = asyncio.get_running_loop()
        with ProcessPoolExecutor(2, CONTEXT) as executor:
            futures = [loop.run_in_executor(executor, fault_tasks.noted_sleep, log, 0.5) for _ in range(20)]
            await asyncio.gather(*futures)

    asyncio.run(work())


if __name__ == "__main__":
    import faulthandler
    import warnings

    warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
    watchdog, program, *combinations = sys.argv[1:]
    # Under its own name, by which its functions are pickled.
    from tests.pool import fault_programs

    for combination in combinations or [""]:
        print(f"{program}({combination})", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(float(watchdog), exit=True)
        getattr(fault_programs, program)(*filter(None, combination.split(",")))
    # And the interpreter's exit is to come to its end, too.
    gc.collect()
