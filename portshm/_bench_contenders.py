"""Who takes part in the bench's pool rows, each brought to the same three calls.

The ones that are not of the standard library take part when they are installed. Each is used as its own manual does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ._bench import OURS, Setting
from ._bench_tasks import call, nap
from .pool import Pool

__all__ = ["CONTENDERS", "AnyPool", "Contender", "Function", "installed", "leave_if_stuck", "quiet_start"]

Function = Callable[[Any], Any]

# Long enough for every worker to be given one of the first tasks.
_NAP: Final = 0.05

_END_SECONDS: Final = 5.0


class AnyPool(Protocol):
    """One contender's pool. `map` is for all; the other two for those that have such a call."""

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None) -> list[Any]: ...
    def submit(self, function: Function, items: Iterable[Any]) -> list[Any]:
        """One asynchronous call per item, then all their results."""

    def apply(self, function: Function, item: Any) -> Any:
        """One call, waited for."""


@dataclass(frozen=True)
class Contender:
    """One way to call functions in other processes.

    Args:
        name: its column.
        module: what has to be installed.
        start: a context manager around its pool; `started` is what to use.
        calls: what it has of `AnyPool`.
        long_name: what its column stands for, without a version.
    """

    name: str
    module: str
    start: Callable[[Setting], AbstractContextManager[AnyPool]]
    calls: frozenset[str] = frozenset({"map", "submit", "apply"})
    long_name: str | None = None

    @contextlib.contextmanager
    def started(self, setting: Setting) -> Iterator[AnyPool]:
        """Its pool, with workers that have all done something."""
        with contextlib.ExitStack() as stack:
            with quiet_start():
                pool = stack.enter_context(self.start(setting))
                pool.map(nap, [_NAP] * setting.workers, 1)
            yield pool

    def __str__(self) -> str:
        if self.long_name is not None:
            return f"{self.name}: {self.long_name}"
        return f"{self.name} {importlib.metadata.version(self.name)}"


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Processes started here hear no Ctrl-C, and no warning is given of the forks.

    A worker's own traceback for Ctrl-C would be a screenful; this process hears it and ends them all. That a signal is
    ignored or blocked is inherited, however a process is started. Both, because the standard library unblocks it in
    passing, and one that is only ignored would be lost to this process: what is blocked comes when we are done.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    _mask_interrupt("SIG_BLOCK")
    try:
        with warnings.catch_warnings():
            # From 3.12 on Python warns of a fork in a process with threads. The pools of the other contenders have
            # some, idle and holding nothing.
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            yield
    finally:
        signal.signal(signal.SIGINT, before)
        _mask_interrupt("SIG_UNBLOCK")


def _mask_interrupt(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(getattr(signal, how), {signal.SIGINT})


# -- portshm and multiprocessing.Pool, which have the same methods


class _PoolLike:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None) -> list[Any]:
        return self._pool.map(function, items, chunksize)  # type: ignore[no-any-return]

    def submit(self, function: Function, items: Iterable[Any]) -> list[Any]:
        results = [self._pool.apply_async(function, (item,)) for item in items]
        return [result.get() for result in results]

    def apply(self, function: Function, item: Any) -> Any:
        return self._pool.apply(function, (item,))


@contextlib.contextmanager
def _portshm(setting: Setting) -> Iterator[AnyPool]:
    with Pool(setting.workers, context=multiprocessing.get_context(setting.start_method)) as pool:
        yield _PoolLike(pool)


@contextlib.contextmanager
def _multiprocessing(setting: Setting) -> Iterator[AnyPool]:
    pool = multiprocessing.get_context(setting.start_method).Pool(setting.workers)
    try:
        yield _PoolLike(pool)
    finally:
        # Interrupted in the middle of large tasks, it may wait for its own thread, which writes to a pipe that nobody
        # reads any more.
        if _ended(pool.terminate):
            pool.join()


_stuck: list[Callable[[], object]] = []


def _ended(end: Callable[[], object]) -> bool:
    """Call `end`, and wait for it for some seconds only: a contender that hangs shall not be the bench that hangs."""
    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(_END_SECONDS)
    if ending.is_alive():
        _stuck.append(end)
    return not ending.is_alive()


def leave_if_stuck(status: int, message: str = "") -> None:
    """End this process at once if a contender could not be ended: at exit the interpreter waits for its threads."""
    if not _stuck:
        return
    for child in multiprocessing.active_children():
        child.kill()
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# -- executors


class _ExecutorLike:
    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None) -> list[Any]:
        return list(self._executor.map(function, items, chunksize=1 if chunksize is None else chunksize))

    def submit(self, function: Function, items: Iterable[Any]) -> list[Any]:
        futures = [self._executor.submit(function, item) for item in items]
        return [future.result() for future in futures]

    def apply(self, function: Function, item: Any) -> Any:
        return self._executor.submit(function, item).result()


@contextlib.contextmanager
def _executor(executor: Any) -> Iterator[AnyPool]:
    try:
        yield _ExecutorLike(executor)
    finally:
        # An interrupt may have left one of its Python-level locks taken, which its thread then waits for.
        _ended(functools.partial(executor.shutdown, wait=True, cancel_futures=True))


def _futures(setting: Setting) -> AbstractContextManager[AnyPool]:
    return _executor(ProcessPoolExecutor(setting.workers, multiprocessing.get_context(setting.start_method)))


@contextlib.contextmanager
def _loky(setting: Setting) -> Iterator[AnyPool]:
    # It starts workers in its own way, whatever the start method. Its shutdown has no cancel_futures.
    executor = importlib.import_module("loky").ProcessPoolExecutor(setting.workers)
    try:
        yield _ExecutorLike(executor)
    finally:
        executor.shutdown(wait=True, kill_workers=True)


# -- the rest


class _Joblib:
    def __init__(self, joblib: Any, workers: int) -> None:
        self._joblib = joblib
        self._workers = workers

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None) -> list[Any]:
        # A Parallel of its own each time: one that is kept recognises arrays that it has copied before, and copies
        # none from the second round on. The workers are kept either way.
        parallel = self._joblib.Parallel(n_jobs=self._workers, batch_size="auto" if chunksize is None else chunksize)
        task = self._joblib.delayed(function)
        return parallel(task(item) for item in items)  # type: ignore[no-any-return]

    def submit(self, function: Function, items: Iterable[Any]) -> list[Any]:
        raise NotImplementedError

    def apply(self, function: Function, item: Any) -> Any:
        raise NotImplementedError


@contextlib.contextmanager
def _joblib(setting: Setting) -> Iterator[AnyPool]:
    joblib = importlib.import_module("joblib")
    loky = importlib.import_module("joblib.externals.loky")
    try:
        yield _Joblib(joblib, setting.workers)
    finally:
        # Left alone, its workers would stay for five minutes, and take processors from the next row.
        loky.get_reusable_executor().shutdown(wait=True, kill_workers=True)


class _Pebble:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None) -> list[Any]:
        return list(self._pool.map(function, items, chunksize=1 if chunksize is None else chunksize).result())

    def submit(self, function: Function, items: Iterable[Any]) -> list[Any]:
        futures = [self._pool.schedule(function, (item,)) for item in items]
        return [future.result() for future in futures]

    def apply(self, function: Function, item: Any) -> Any:
        return self._pool.schedule(function, (item,)).result()


@contextlib.contextmanager
def _pebble(setting: Setting) -> Iterator[AnyPool]:
    context = multiprocessing.get_context(setting.start_method)
    pool = importlib.import_module("pebble").ProcessPool(max_workers=setting.workers, context=context)
    try:
        yield _Pebble(pool)
    finally:
        pool.stop()
        pool.join()


class _Mpire:
    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None) -> list[Any]:
        # It makes one array of the arrays that come back, unless told not to.
        return self._pool.map(  # type: ignore[no-any-return]
            function, items, chunk_size=chunksize, concatenate_numpy_output=False
        )

    def submit(self, function: Function, items: Iterable[Any]) -> list[Any]:
        results = [self._pool.apply_async(function, (item,)) for item in items]
        return [result.get() for result in results]

    def apply(self, function: Function, item: Any) -> Any:
        return self._pool.apply(function, (item,))


@contextlib.contextmanager
def _mpire(setting: Setting) -> Iterator[AnyPool]:
    pool = importlib.import_module("mpire").WorkerPool(
        n_jobs=setting.workers, start_method=setting.start_method, keep_alive=True
    )
    try:
        yield _Mpire(pool)
    finally:
        pool.terminate()


class _Ray:
    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._call = ray.remote(call)

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None) -> list[Any]:
        return self.submit(function, items)

    def submit(self, function: Function, items: Iterable[Any]) -> list[Any]:
        stored = self._ray.put(function)  # once for all, as its manual advises for large arguments
        return self._ray.get([self._call.remote(stored, item) for item in items])  # type: ignore[no-any-return]

    def apply(self, function: Function, item: Any) -> Any:
        return self._ray.get(self._call.remote(function, item))


@contextlib.contextmanager
def _ray(setting: Setting) -> Iterator[AnyPool]:
    ray = importlib.import_module("ray")
    try:
        ray.init(num_cpus=setting.workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield _Ray(ray)
    finally:
        ray.shutdown()


CONTENDERS: Final[tuple[Contender, ...]] = (
    Contender(OURS, "portshm", _portshm, long_name="portshm.Pool"),
    Contender("mp.Pool", "multiprocessing", _multiprocessing, long_name="multiprocessing.Pool"),
    Contender("futures", "concurrent.futures", _futures, long_name="concurrent.futures.ProcessPoolExecutor"),
    Contender("joblib", "joblib", _joblib, frozenset({"map"})),
    Contender("loky", "loky", _loky),
    Contender("pebble", "pebble", _pebble),
    Contender("mpire", "mpire", _mpire),
    Contender("ray", "ray", _ray),
)


def installed(setting: Setting) -> list[Contender]:
    """Those that can take part here, of the ones asked for."""
    asked = setting.contenders
    return [
        contender
        for contender in CONTENDERS
        if (contender.name == OURS or asked is None or contender.name in asked)
        and importlib.util.find_spec(contender.module) is not None
    ]
