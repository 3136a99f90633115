"""ProcessPoolExecutor: the `concurrent.futures.Executor` contract over our engine."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, TimeoutError
from concurrent.futures.process import _RemoteTraceback
from multiprocessing.context import BaseContext
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

from .._backends import Backend
from ..errors import WorkerCrashed
from ._engine.coordinator import ClosedError, Coordinator, PoolOptions, WorkerStats
from ._engine.worker import WorkerSettings
from ._feeding import feed
from ._options import check_options, default_processes
from ._pool import end_engine
from ._results import Condition, EndOfResultsError, IMapJob, NoResultError
from ._wire.slot_memory import Mode
from ._work import Chunk, Engine, Job, OnCrash, TaskOptions

__all__ = ["ProcessPoolExecutor"]

T = TypeVar("T")

_AFTER_SHUTDOWN: Final = "cannot schedule new futures after shutdown"


class _CallFuture(Future[Any]):
    """A future that tells whether somebody waits for it with user code."""

    calls_back = False

    def __init__(self) -> None:
        super().__init__()
        self._condition = Condition()

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        self.calls_back = True
        super().add_done_callback(fn)


class _Call(Job):
    """One submitted call, which settles its future."""

    __slots__ = ("_attempts", "_begun", "_call", "_engine", "_options", "future")

    def __init__(self, engine: Engine, call: tuple[Any, tuple[Any, ...], dict[str, Any]], options: TaskOptions) -> None:
        self._options = options
        self._attempts = None
        self._engine = engine
        self._call = call
        self._begun = False
        self.future = _CallFuture()

    def _begin(self) -> bool:
        # Once: what is put back after a crash is running already in its caller's eyes.
        if not self._begun:
            self._begun = self.future.set_running_or_notify_cancel()
        return self._begun

    def _unpicklable(self, value: str, reason: BaseException) -> BaseException:
        return reason

    def _settle(self, ok: bool, value: Any) -> None:
        self._call = None
        if not ok and self._options.on_crash == "return" and isinstance(value, WorkerCrashed):
            ok = True
        if self.future.calls_back:
            # A callback is user code and may take its time, which the loop has not got.
            self._engine.later(lambda: self._finish(ok, value))
        else:
            self._finish(ok, value)

    def _finish(self, ok: bool, value: Any) -> None:
        if not self._begin():
            return  # cancelled before it was sent
        if ok:
            self.future.set_result(value)
        else:
            self.future.set_exception(_with_own_cause(value))


class _ExecutorMap(IMapJob):
    """A map whose queued elements are dropped when nobody asks for their results any more."""

    def _unpicklable(self, value: str, reason: BaseException) -> BaseException:
        return reason

    def _begin(self) -> bool:
        return not self._abandoned

    def _fail(self, index: int, error: BaseException) -> None:
        super()._fail(index, _with_own_cause(error))


def _with_own_cause(error: BaseException) -> BaseException:
    """The standard library has one class for the worker's traceback in its pool, and another in its executor."""
    cause: Any = error.__cause__
    if type(cause) is RemoteTraceback:
        error.__cause__ = _RemoteTraceback(cause.tb)
    return error


class ProcessPoolExecutor(Executor):
    """A drop-in for `concurrent.futures.ProcessPoolExecutor` in which a crash costs one future.

    The arguments are the standard library's, and `Pool`'s for the keywords after them. Where the standard library's
    executor breaks as a whole (a worker died, something could not be unpickled), here one future fails, with a
    `BrokenProcessPool` all the same.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        backend: Backend = "auto",
        task_timeout: float | None = None,
        retries: int = 0,
        on_crash: OnCrash = "raise",
        start_timeout: float = 60.0,
        max_shared_bytes: int | None = None,
    ) -> None:
        self._max_workers = default_processes() if max_workers is None else max_workers
        if self._max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        self._options = check_options(
            self._max_workers, initializer, task_timeout=task_timeout, retries=retries, on_crash=on_crash,
            start_timeout=start_timeout, max_shared_bytes=max_shared_bytes,
        )  # fmt: skip
        if max_tasks_per_child is not None and not isinstance(max_tasks_per_child, int):
            raise TypeError("max_tasks_per_child must be an integer")
        if max_tasks_per_child is not None and max_tasks_per_child <= 0:
            raise ValueError("max_tasks_per_child must be >= 1")
        if mp_context is None:
            mp_context = multiprocessing.get_context("spawn" if max_tasks_per_child is not None else None)
        elif max_tasks_per_child is not None and mp_context.get_start_method(allow_none=False) == "fork":
            raise ValueError("max_tasks_per_child is incompatible with the 'fork' multiprocessing start method")
        self._mp_context = mp_context
        # As the standard library's: what forks must do so before the engine's thread is there.
        on_demand = mp_context.get_start_method(allow_none=False) != "fork"
        self._make_engine = functools.partial(
            Coordinator,
            PoolOptions(self._max_workers, max_tasks_per_child, start_timeout, max_shared_bytes, on_demand),
            WorkerSettings(mp_context, backend, initializer, tuple(initargs), "Process"),
            # Pending work is finished then, as with the standard library's executor.
            at_exit=_finish_engine,
        )
        self._engine = self._make_engine()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        self._start()
        call = _Call(self._engine, (fn, args, kwargs), self._options)
        try:
            self._engine.submit(call)
        except ClosedError:
            raise RuntimeError(_AFTER_SHUTDOWN) from None
        return call.future

    def _start(self) -> None:
        if self._engine.broken is not None:
            raise copy.copy(self._engine.broken)  # each its own, with a traceback of its own
        if self._engine.closed:
            raise RuntimeError(_AFTER_SHUTDOWN)
        try:
            self._engine.start()
        except KeyboardInterrupt:
            if self._engine.start_failed:  # and so nothing was submitted to it
                self._engine = self._make_engine()
            raise

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """As `Executor.map`; `timeout` is for the whole, in seconds from this call.

        The function crosses to each worker once, not once per chunk. With `buffersize` the input is read no further
        ahead than that (as in CPython 3.14).
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        self._start()
        job = _ExecutorMap(fn, Mode.STARMAP, self._engine, self._options, buffersize)
        arguments = zip(*iterables, strict=False)
        results = _results(job, timeout)
        feed(self._engine, job, arguments if buffersize is not None else list(arguments), chunksize)
        return results

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; free the workers when all is done. `wait`: return after that."""
        _close(self._engine)
        if cancel_futures:
            for entry in self._engine.cancel_queued():
                if isinstance(entry, _Call):
                    entry.future.cancel()
                    entry._begin()  # tells those who wait for it
                elif isinstance(entry, Chunk):
                    for index in range(entry.start, entry.start + len(entry)):
                        entry.job._fail(index, CancelledError())
            self._engine.wake()
        if wait:
            self._engine.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:
            # Ctrl-C reaches the standard library's workers too, and ends what they do. Ours leave that to us.
            self.terminate_workers()
        self.shutdown()

    def stats(self) -> list[WorkerStats]:
        """As `Pool.stats`."""
        return self._engine.stats()

    @property
    def shared_bytes(self) -> int:
        """As `Pool.shared_bytes`."""
        return self._engine.shared_bytes

    def kill_workers(self) -> None:
        """End at once; what is unfinished fails (as in CPython 3.14)."""
        self.terminate_workers()

    def terminate_workers(self) -> None:
        """End at once; what is unfinished fails (as in CPython 3.14)."""
        end_engine(self._engine)

    # What programs read of the standard library's executor, though its names say that they should not.

    @property
    def _processes(self) -> dict[int | None, BaseProcess]:
        """The workers' processes at this moment, by pid. Starting and stopping them is not yours."""
        return {process.pid: process for process in self._engine.processes}

    @property
    def _broken(self) -> str | Literal[False]:
        return False if self._engine.broken is None else str(self._engine.broken)

    def __del__(self) -> None:
        # Its workers leave when what was submitted is done; whoever has a future gets his result.
        engine = getattr(self, "_engine", None)
        if engine is not None and not engine.inherited:
            engine.close()


def _finish_engine(engine: Coordinator) -> None:
    if engine.inherited:
        return
    if getattr(sys, "last_type", None) is KeyboardInterrupt:  # what ended the program
        engine.terminate()
    else:
        _close(engine)
    engine.join()


def _close(engine: Coordinator) -> None:
    engine.close()
    engine.stop_reading(RuntimeError(_AFTER_SHUTDOWN))


def _results(job: _ExecutorMap, timeout: float | None) -> Iterator[Any]:
    deadline = None if timeout is None else time.monotonic() + timeout

    def iterate() -> Iterator[Any]:
        try:
            while True:
                try:
                    # Not by way of a variable, which would keep the result for as long as the caller has not asked on.
                    yield job._take_next(None if deadline is None else max(0.0, deadline - time.monotonic()))
                except EndOfResultsError:
                    return
                except NoResultError:
                    raise TimeoutError from None
        finally:
            job._abandon()

    results = iterate()
    job._read_by(results)  # one that was never asked for anything does not come to its `finally`
    return results
