"""What holds for `multiprocessing.Pool` holds for ours: the same assertions for both."""

from __future__ import annotations

import functools
import gc
import inspect
import multiprocessing
import multiprocessing.pool
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.pool import MaybeEncodingError, RemoteTraceback  # type: ignore[attr-defined]
from typing import Any, NoReturn

import pytest

import portshm.pool

from .waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

CONTEXT = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")


@pytest.fixture(params=[multiprocessing.pool.Pool, portshm.pool.Pool], ids=["theirs", "ours"])
def pool_type(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def make(pool_type: Any) -> Iterator[Callable[..., Any]]:
    pools: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        pools.append(pool_type(*args, context=CONTEXT, **kwargs))
        return pools[-1]

    yield make
    for pool in pools:
        pool.terminate()
        pool.join()
    # The standard library's have their descriptors for as long as somebody has them, and a test item has its fixtures.
    pools.clear()


def square(x: int) -> int:
    return x * x


def squares(count: int) -> list[int]:
    return [x * x for x in range(count)]


def add(x: int, y: int) -> int:
    return x + y


def fail(x: object) -> NoReturn:
    raise KeyError(x)


def function() -> Callable[[], None]:
    return lambda: None


def process() -> tuple[str, int]:
    return multiprocessing.current_process().name, os.getpid()


def numbers(good: int) -> Iterator[int]:
    yield from range(good)
    raise LookupError("in the input")


def test_every_method_takes_what_the_standard_librarys_takes() -> None:
    for name, theirs in inspect.getmembers(multiprocessing.pool.Pool, inspect.isfunction):
        if name == "Process" or (name.startswith("_") and name not in ("__init__", "__enter__", "__exit__")):
            continue
        ours = list(inspect.signature(getattr(portshm.pool.Pool, name)).parameters.values())
        expected = [(parameter.name, parameter.kind) for parameter in inspect.signature(theirs).parameters.values()]
        assert [(parameter.name, parameter.kind) for parameter in ours][: len(expected)] == expected, name
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in ours[len(expected) :]), name


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"processes": 0}, ValueError, "Number of processes must be at least 1"),
        ({"processes": -1}, ValueError, "Number of processes must be at least 1"),
        ({"initializer": 1}, TypeError, "initializer must be a callable"),
        ({"maxtasksperchild": 0}, ValueError, "maxtasksperchild must be a positive int or None"),
        ({"maxtasksperchild": 1.5}, ValueError, "maxtasksperchild must be a positive int or None"),
    ],
)
def test_pools_that_cannot_be_made(pool_type: Any, arguments: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pool_type(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"task_timeout": "2"}, TypeError, "task_timeout must be seconds or None, not '2'"),
        ({"task_timeout": float("nan")}, ValueError, "task_timeout must be positive seconds or None, not nan"),
        ({"retries": 1.5}, TypeError, "integer"),
        ({"start_timeout": None}, TypeError, "start_timeout must be seconds, not None"),
        ({"max_shared_bytes": -1}, ValueError, "max_shared_bytes must be positive or None, not -1"),
    ],
)
@pytest.mark.parametrize("face", [portshm.pool.Pool, portshm.pool.ProcessPoolExecutor])
def test_our_own_arguments(face: Any, arguments: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        face(1, **arguments)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), "2"])
def test_time_limits_that_are_none(make: Callable[..., Any], timeout: Any) -> None:
    pool = make(1)
    if isinstance(pool, multiprocessing.pool.Pool):
        pytest.skip("knows no limits")
    calls = [pool.apply, pool.apply_async]
    maps = [pool.map, pool.map_async, pool.starmap, pool.starmap_async, pool.imap, pool.imap_unordered]
    for call in [lambda f=f: f(abs, (1,), timeout=timeout) for f in calls] + [
        lambda f=f: f(abs, [1], timeout=timeout) for f in maps
    ]:
        with pytest.raises((ValueError, TypeError), match="timeout must be"):
            call()
    assert pool.apply(abs, (-1,), timeout=1e300) == 1


def test_states_and_their_errors(make: Callable[..., Any]) -> None:
    pool = make(1)
    assert "state=RUN pool_size=1>" in repr(pool)
    with pytest.raises(ValueError, match="Pool is still running"):
        pool.join()
    pool.close()
    assert "state=CLOSE" in repr(pool)
    pool.join()
    calls: list[Callable[[], Any]] = [
        lambda: pool.apply(square, (1,)),
        lambda: pool.apply_async(square, (1,)),
        lambda: pool.map(square, [1]),
        lambda: pool.map_async(square, [1]),
        lambda: pool.starmap(add, [(1, 2)]),
        lambda: pool.starmap_async(add, [(1, 2)]),
        lambda: pool.imap(square, [1]),
        lambda: pool.imap_unordered(square, [1]),
        pool.__enter__,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Pool not running"):
            call()
    pool.close()
    pool.terminate()
    assert "state=TERMINATE" in repr(pool)
    pool.join()


def test_a_pool_does_not_travel(make: Callable[..., Any]) -> None:
    with pytest.raises(NotImplementedError, match="pool objects cannot be passed between processes or pickled"):
        pickle.dumps(make(1))


def test_chunksizes_that_are_none(make: Callable[..., Any]) -> None:
    pool = make(1)
    for call in (pool.imap, pool.imap_unordered):
        with pytest.raises(ValueError, match=r"Chunksize must be 1\+, not 0"):
            call(square, [1], chunksize=0)


def test_workers_names_and_daemon_flag(make: Callable[..., Any]) -> None:
    pool = make(2)
    name, pid = pool.apply(process)
    assert "PoolWorker-" in name
    assert {worker.pid for worker in pool._pool} >= {pid}
    assert all("PoolWorker-" in worker.name and worker.daemon for worker in pool._pool)


def test_an_exception_has_the_workers_traceback_as_its_cause(make: Callable[..., Any]) -> None:
    pool = make(1)
    for call in (lambda: pool.apply(fail, (1,)), lambda: pool.map(fail, [1]), lambda: next(pool.imap(fail, [1]))):
        with pytest.raises(KeyError) as info:
            call()
        assert info.value.args == (1,)
        assert type(info.value.__cause__) is RemoteTraceback
        assert "raise KeyError(x)" in str(info.value.__cause__)


def test_results_that_cannot_be_pickled(make: Callable[..., Any]) -> None:
    with pytest.raises(MaybeEncodingError) as info:
        make(1).apply(function)
    error: Any = info.value
    assert "<function function.<locals>.<lambda> at" in error.value
    assert "function.<locals>.<lambda>" in error.exc
    assert str(error) == f"Error sending result: '{error.value}'. Reason: '{error.exc}'"
    assert repr(error) == f"<MaybeEncodingError: {error}>"


def test_waiting_for_a_result(make: Callable[..., Any], tmp_path: Any) -> None:
    pool = make(1)
    result = pool.apply_async(opened, (str(tmp_path / "gate"),))
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    assert result.wait(0.01) is None
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0.01)
    iterator = pool.imap(square, [3])
    with pytest.raises(multiprocessing.TimeoutError):
        iterator.next(timeout=0.01)
    (tmp_path / "gate").touch()
    assert result.get() == "open"
    assert result.ready()
    assert result.successful()
    assert iterator.next(timeout=60) == 9
    with pytest.raises(StopIteration):
        iterator.next()


def opened(gate: str) -> str:
    """Return when there is such a file."""
    pause = threading.Event()
    while not os.path.exists(gate):
        pause.wait(0.005)
    return "open"


def test_callbacks_have_run_when_the_wait_ends(make: Callable[..., Any]) -> None:
    pool = make(2)
    good: list[Any] = []
    bad: list[Any] = []
    callbacks = {"callback": good.append, "error_callback": bad.append}
    pool.apply_async(square, (2,), **callbacks).wait()
    pool.map_async(square, [1, 2, 3], **callbacks).wait()
    pool.starmap_async(add, [(1, 2)], **callbacks).wait()
    assert pool.map_async(square, [], **callbacks).get() == []
    pool.apply_async(square, (0,)).wait()
    assert (good, bad) == ([4, [1, 4, 9], [3]], [])
    result = pool.apply_async(fail, ("x",), **callbacks)
    with pytest.raises(KeyError):
        result.get()
    pool.map_async(fail, [1], **callbacks).wait()
    assert [type(error) for error in bad] == [KeyError, KeyError]
    assert len(good) == 3


def test_an_exception_of_the_input_comes_in_its_place(make: Callable[..., Any]) -> None:
    pool = make(1)
    with pytest.raises(LookupError, match="in the input"):
        pool.map(square, numbers(3))
    for chunksize, delivered in ((1, 3), (2, 2)):
        iterator = pool.imap(square, numbers(3), chunksize)
        assert [next(iterator) for _ in range(delivered)] == [0, 1, 4][:delivered]
        with pytest.raises(LookupError, match="in the input"):
            next(iterator)
    assert pool.apply(square, (3,)) == 9


def test_an_input_that_ends_after_its_last_result_does_not_hold_up_the_end(make: Callable[..., Any]) -> None:
    pool = make(1)
    last = threading.Event()

    def one_then_wait() -> Iterator[int]:
        yield 3
        last.wait()

    iterator = pool.imap(square, one_then_wait())
    assert next(iterator) == 9
    pool.close()
    threading.Timer(0.05, last.set).start()
    pool.join()
    assert list(iterator) == []


def test_after_an_exception_an_iterator_goes_on(make: Callable[..., Any]) -> None:
    iterator = make(1).imap(inverse, [1, 0, 2])
    assert next(iterator) == 1
    with pytest.raises(ZeroDivisionError):
        next(iterator)
    assert next(iterator) == 0.5


def inverse(x: int) -> float:
    return 1 / x


def test_workers_are_replaced_after_maxtasksperchild(make: Callable[..., Any]) -> None:
    pool = make(1, maxtasksperchild=2)
    pids = [pool.apply(process)[1] for _ in range(6)]
    assert [len(set(pids[start : start + 2])) for start in (0, 2, 4)] == [1, 1, 1]
    assert len(set(pids)) == 3


def test_a_dropped_pool_is_ended_with_a_warning(pool_type: Any) -> None:
    pools = [pool_type(1, context=CONTEXT)]
    gone = weakref.ref(pools[0])
    workers = list(pools[0]._pool)
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool <.*Pool state=RUN pool_size=1>"):
        drop(pools)
    assert gone() is None
    # Not `join` and then `is_alive`: the pool's own thread may be reaping the process, and until that has noted the
    # exit code, waitpid's ECHILD makes multiprocessing take it for alive.
    for worker in workers:
        until(lambda worker=worker: not worker.is_alive(), f"the end of {worker}")


def drop(pools: list[Any]) -> None:
    pools.clear()
    gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed running:ResourceWarning")
@pytest.mark.parametrize(
    "call",
    [
        lambda pool: pool.map_async(square, range(4)).get,
        lambda pool: pool.starmap_async(pow, [(0, 2), (1, 2), (2, 2), (3, 2)]).get,
        lambda pool: pool.apply_async(squares, (4,)).get,
        lambda pool: functools.partial(list, pool.imap(square, range(4))),
    ],
    ids=["map_async", "starmap_async", "apply_async", "imap"],
)
def test_a_pool_is_not_dropped_before_its_results(pool_type: Any, call: Callable[[Any], Callable[[], Any]]) -> None:
    pool = pool_type(1, context=CONTEXT)
    left = weakref.ref(pool)
    get = call(pool)
    del pool
    gc.collect()
    assert get() == [0, 1, 4, 9]
    del get
    pool = left()
    if pool is not None:
        pool.terminate()
        pool.join()


def test_arguments_and_results_are_not_kept(make: Callable[..., Any]) -> None:
    pool = make(1)
    thing = Thing()
    gone = weakref.ref(thing)
    result = pool.apply_async(weigh, (thing,))
    assert result.get(60) == 1
    del thing
    pool.apply(square, (1,))  # nobody is still about to let go of the one before
    gc.collect()
    assert gone() is None


class Thing:
    """Can be referred to weakly."""


def weigh(thing: Thing) -> int:
    return isinstance(thing, Thing)


class _FailingContext:
    """Of its processes the third cannot be started."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(CONTEXT, name)

    def Process(self, *args: Any, **kwargs: Any) -> Any:
        process = CONTEXT.Process(*args, **kwargs)
        self.made.append(process)
        if len(self.made) == 3:

            def start() -> NoReturn:
                raise OSError("no more processes")

            process.start = start  # type: ignore[method-assign]
        return process


def test_a_pool_whose_processes_cannot_be_started_leaves_none(pool_type: Any) -> None:
    context = _FailingContext()
    with pytest.raises(OSError, match="no more processes"):
        pool_type(4, context=context)
    assert len(context.made) == 3
    assert not any(process.is_alive() for process in context.made[:2])


def nothing(thing: Thing) -> None:
    pass


@pytest.mark.skipif(CONTEXT.get_start_method() != "fork", reason="needs nothing to be pickled")
@pytest.mark.parametrize("end", ["terminate", "close", "shutdown"])
def test_what_a_pool_was_made_with_goes_with_it(end: str) -> None:
    """At once, not at the next garbage collection: it may be a queue, with semaphores."""
    thing = Thing()
    alive = weakref.ref(thing)
    gc.collect()
    gc.disable()
    try:
        if end == "shutdown":
            executor = portshm.pool.ProcessPoolExecutor(1, CONTEXT, nothing, (thing,))
            assert executor.submit(abs, -1).result() == 1
            executor.shutdown()
            del executor
        else:
            pool = portshm.pool.Pool(1, nothing, (thing,), context=CONTEXT)
            assert pool.map(complex, [1, 2]) == [1, 2]  # by way of the porter
            pool.close() if end == "close" else pool.terminate()
            pool.join()
            del pool
        del thing
        assert alive() is None
    finally:
        gc.enable()
