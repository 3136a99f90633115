"""Pool: `multiprocessing.pool.Pool`'s signature over our engine."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .._backends import Backend
from ._engine.coordinator import Coordinator, PoolOptions, WorkerStats
from ._engine.worker import WorkerSettings
from ._feeding import feed, submission
from ._options import check_options, default_processes, task_options
from ._results import AsyncResult, IMapIterator, IMapJob, IMapUnorderedJob, MapResult
from ._wire.slot_memory import Mode
from ._work import Chunk, OnCrash

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Pool", "end_engine"]

T = TypeVar("T")

# One for all calls without: less to make, to pickle, and for the garbage collector to look at. Nobody changes it.
_NO_KEYWORDS: Final[dict[str, Any]] = {}

_INIT, _RUN, _CLOSE, _TERMINATE = "INIT", "RUN", "CLOSE", "TERMINATE"


class Pool:
    """A drop-in for `multiprocessing.Pool` in which a crash costs one task.

    Args:
        processes: number of workers; the number of usable processors if None.
        initializer: called with `initargs` in each worker before its first task. Where it raises or does not
            return, the pool is broken and everything fails with `WorkerStartError`.
        maxtasksperchild: tasks (chunks, for maps) after which a worker is replaced.
        context: a multiprocessing context; the default start method if None.
        backend: where the shared memory is: ``"auto"``, ``"file"`` or ``"named"``.
        task_timeout: seconds that one element may take, from its own start; then its worker is killed and it fails
            with `TaskTimeoutError`. None for no limit.
        retries: how often an element that killed its worker, or missed its deadline, is run again, alone in a fresh
            worker.
        on_crash: ``"raise"`` a `WorkerCrashed`, or ``"return"`` it in the element's place.
        start_timeout: seconds a worker may take to be ready for work.
        max_shared_bytes: bound on the bytes of large arguments and results in shared memory, besides a few results for
            each worker on their way; None for none. Arguments wait for room; results that the caller keeps are copied
            out where they would take more than half.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: BaseContext | None = None,
        *,
        backend: Backend = "auto",
        task_timeout: float | None = None,
        retries: int = 0,
        on_crash: OnCrash = "raise",
        start_timeout: float = 60.0,
        max_shared_bytes: int | None = None,
    ) -> None:
        self._state = _INIT
        self._ctx = context or multiprocessing.get_context()
        self._processes = default_processes() if processes is None else processes
        self._options = check_options(
            self._processes, initializer, task_timeout=task_timeout, retries=retries, on_crash=on_crash,
            start_timeout=start_timeout, max_shared_bytes=max_shared_bytes,
        )  # fmt: skip
        if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0):
            raise ValueError("maxtasksperchild must be a positive int or None")
        self._engine = Coordinator(
            PoolOptions(self._processes, maxtasksperchild, start_timeout, max_shared_bytes),
            WorkerSettings(self._ctx, backend, initializer, tuple(initargs), "PoolWorker"),
            at_exit=end_engine,
        )
        self._engine.start()
        self._state = _RUN

    # -- single calls

    def apply(
        self, func: Callable[..., T], args: Iterable[Any] = (), kwds: dict[str, Any] | None = None,
        *, timeout: float | None = None,
    ) -> T:  # fmt: skip
        """Call ``func(*args, **kwds)`` in a worker and return its result. `timeout` as the pool's `task_timeout`."""
        result = self._single(func, args, kwds, None, None, timeout)
        self._engine.call(result)
        return result.get()

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: dict[str, Any] | None = None,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncResult[T]:
        """`apply` that returns at once. Callbacks run on a thread of their own."""
        result = self._single(func, args, kwds, callback, error_callback, timeout)
        self._engine.submit(result)
        return result

    def _single(
        self, func: Callable[..., T], args: Iterable[Any], kwds: dict[str, Any] | None,
        callback: Any, error_callback: Any, timeout: float | None,
    ) -> AsyncResult[T]:  # fmt: skip
        if self._state != _RUN:
            raise ValueError("Pool not running")
        options = self._options if timeout is None else task_options(self._options, timeout)
        return AsyncResult(
            func, args if type(args) is tuple else tuple(args), _NO_KEYWORDS if kwds is None else kwds, self._engine,
            options, callback, error_callback, self,
        )  # fmt: skip

    # -- maps

    def map(
        self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int | None = None,
        *, timeout: float | None = None,
    ) -> list[T]:  # fmt: skip
        """The results of ``func(item)`` for each item, in order. `timeout` (seconds) is per element."""
        return self._map(func, iterable, Mode.MAP, chunksize, timeout=timeout).get()

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> MapResult:
        """`map` that returns at once."""
        return self._map(func, iterable, Mode.MAP, chunksize, callback, error_callback, timeout)

    def starmap(
        self, func: Callable[..., T], iterable: Iterable[Iterable[Any]], chunksize: int | None = None,
        *, timeout: float | None = None,
    ) -> list[T]:  # fmt: skip
        """The results of ``func(*item)`` for each item, in order. `timeout` (seconds) is per element."""
        return self._map(func, iterable, Mode.STARMAP, chunksize, timeout=timeout).get()

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> MapResult:
        """`starmap` that returns at once."""
        return self._map(func, iterable, Mode.STARMAP, chunksize, callback, error_callback, timeout)

    def imap(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1,
        *, timeout: float | None = None, buffersize: int | None = None,
    ) -> IMapIterator:  # fmt: skip
        """Results one by one, in order. At most `buffersize` items are read ahead of the result asked for."""
        return self._imap(IMapJob, func, iterable, Mode.MAP, chunksize, timeout, buffersize)

    def imap_unordered(
        self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1,
        *, timeout: float | None = None, buffersize: int | None = None,
    ) -> IMapIterator:  # fmt: skip
        """Results one by one, as they come."""
        return self._imap(IMapUnorderedJob, func, iterable, Mode.MAP, chunksize, timeout, buffersize)

    def imap_values(
        self, func: Callable[[memoryview], Any], buffers: Iterable[Any],
        *, timeout: float | None = None, buffersize: int | None = None,
    ) -> IMapIterator:  # fmt: skip
        """``func(memoryview)`` for the bytes of each buffer, put into the worker's own memory as its value.

        What Go's fuzzer does with its inputs: the value stays in the slot when the worker dies, and
        `WorkerCrashed.item` is read back from there. The view is the function's only until it returns.
        """
        return self._imap(IMapJob, func, buffers, Mode.VALUE, 1, timeout, buffersize)

    def _map(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        mode: Mode,
        chunksize: int | None,
        callback: Any = None,
        error_callback: Any = None,
        timeout: float | None = None,
    ) -> MapResult:
        self._check_running()
        # A range is what its slices are, and needs no list.
        items: Sequence[Any] = iterable if type(iterable) is range else list(iterable)
        if chunksize is not None and chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        options = task_options(self._options, timeout)
        result = MapResult(func, mode, self._engine, options, len(items), callback, error_callback, self)
        if items:
            with submission(self._engine, result):
                self._engine.submit(Chunk(result, 0, items, self._unit(len(items), chunksize)))
        return result

    def _unit(self, length: int, chunksize: int | None) -> int:
        if chunksize is not None:
            return chunksize
        if self._engine.max_tasks is None:
            return 1  # cut as the elements' pace suggests
        # maxtasksperchild counts chunks, so they have to be the standard library's.
        return -(-length // (self._processes * 4))

    def _imap(
        self,
        kind: type[IMapJob],
        func: Callable[..., Any],
        iterable: Iterable[Any],
        mode: Mode,
        chunksize: int,
        timeout: float | None,
        buffersize: int | None,
    ) -> IMapIterator:
        self._check_running()
        if chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        if buffersize is not None and buffersize < 1:
            raise ValueError(f"buffersize must be 1+ or None, not {buffersize!r}")
        job = kind(func, mode, self._engine, task_options(self._options, timeout), buffersize)
        results = IMapIterator(job, self)
        feed(self._engine, job, iterable, chunksize)
        return results

    # -- the pool itself

    def close(self) -> None:
        """Take no more tasks; the workers leave when all are done."""
        if self._state == _RUN:
            self._state = _CLOSE
            self._engine.close()

    def terminate(self) -> None:
        """End at once: workers are terminated, and killed if that does not help; what is unfinished fails."""
        self._state = _TERMINATE
        self._engine.terminate()
        self._engine.join(callbacks=False)

    def join(self) -> None:
        """Wait for the workers to leave, after `close` or `terminate`."""
        if self._state == _RUN:
            raise ValueError("Pool is still running")
        if self._state not in (_CLOSE, _TERMINATE):
            raise ValueError("In unknown state")
        self._engine.join()

    def stats(self) -> list[WorkerStats]:
        """Each worker's pid, state, tasks done, running time and restarts, read from its memory without a message."""
        return self._engine.stats()

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that the pool has at present."""
        return self._engine.shared_bytes

    @property
    def _pool(self) -> list[BaseProcess]:
        """The workers' processes at this moment: what programs read of the standard library's pool to find pids."""
        return self._engine.processes

    def _check_running(self) -> None:
        if self._state != _RUN:
            raise ValueError("Pool not running")

    def __enter__(self) -> Self:
        self._check_running()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        self.terminate()

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __repr__(self) -> str:
        cls = type(self)
        return f"<{cls.__module__}.{cls.__qualname__} state={self._state} pool_size={self._processes}>"

    def __del__(self) -> None:
        engine: Coordinator | None = getattr(self, "_engine", None)
        if engine is None or engine.inherited:
            return
        if self._state == _RUN:
            warnings.warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self, stacklevel=1)
        if self._state in (_INIT, _RUN):  # an interrupt may have come before anybody had it
            engine.terminate()


def end_engine(engine: Coordinator) -> None:
    """For finalizers: end it, unless it is the parent process's."""
    if not engine.inherited:
        engine.terminate()
        engine.join()
