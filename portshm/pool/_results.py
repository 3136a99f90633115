"""What the pools hand out: results of calls and maps, and iterators over results.

The engine ends them, in its loop, its serial thread or the calling thread; any thread may wait for them. No user code
runs here on the loop's thread: a result with a callback is ended by the callback thread.
"""

from __future__ import annotations

import _thread
import collections
import itertools
import logging
import multiprocessing
import operator
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]
from typing import Any, Generic, TypeVar

from ..errors import WorkerCrashed
from ._wire.slot_memory import Mode
from ._work import Engine, Job, MapJob, TaskOptions

__all__ = [
    "AsyncResult",
    "Condition",
    "EndOfResultsError",
    "IMapIterator",
    "IMapJob",
    "IMapUnorderedJob",
    "MapResult",
    "NoResultError",
    "Outcome",
]

T = TypeVar("T")

logger = logging.getLogger("portshm")

# Held for two assignments: without it a waiter that comes as the result does may be missed, unless the interpreter's
# lock orders what two threads see. One for all results: each is waited for once or twice, and there may be a million.
_ending = _thread.allocate_lock()


class Outcome(Generic[T]):
    """What callers wait for: ready, or not yet. Ended once, by whoever the elements belong to at that moment."""

    __slots__ = (
        "__weakref__", "_callback", "_engine", "_error_callback", "_keeps", "_ok", "_ready", "_value", "_waiters",
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        callback: Callable[[T], object] | None,
        error_callback: Callable[[BaseException], object] | None,
        keeps: object,
    ) -> None:
        self._engine = engine
        self._callback = callback
        self._error_callback = error_callback
        self._keeps = keeps  # the pool, which must not be collected, and so ended, before this has ended
        self._ready = False
        self._waiters: list[_thread.LockType] | None = None

    def ready(self) -> bool:
        """Whether the call has ended, one way or the other."""
        return self._ready

    def successful(self) -> bool:
        """Whether it ended without an exception. ValueError if it has not ended."""
        if not self._ready:
            raise ValueError(f"{self!r} not ready")
        return self._ok

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most `timeout` seconds."""
        if self._ready:
            return
        # A lock of the waiter's own, made only if there is something to wait for.
        lock = _thread.allocate_lock()
        lock.acquire()
        with _ending:
            if self._ready:
                return
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(lock)
        lock.acquire(timeout=-1 if timeout is None else min(max(timeout, 0.0), threading.TIMEOUT_MAX))

    def get(self, timeout: float | None = None) -> T:
        """The result, or the exception that the call raised.

        Raises:
            multiprocessing.TimeoutError: after `timeout` seconds without either.
            WorkerCrashed: the worker died over this call.
        """
        if not self._ready:
            self.wait(timeout)
            if not self._ready:
                raise multiprocessing.TimeoutError
        if self._ok:
            return self._value  # type: ignore[no-any-return]
        try:
            raise self._value
        finally:
            self = None  # type: ignore[assignment]  # the traceback refers to this frame, and must not keep us

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'ready' if self._ready else 'pending'} at {id(self):#x}>"

    def _end(self, ok: bool, value: Any) -> None:
        if self._callback is None and self._error_callback is None:
            self._finish(ok, value)
        else:
            self._engine.later(lambda: self._call_back(ok, value))

    def _call_back(self, ok: bool, value: Any) -> None:
        # Before anybody is told that the result is there, as in the standard library.
        callback = self._callback if ok else self._error_callback
        if callback is not None:
            try:
                callback(value)
            except BaseException as error:
                logger.exception("callback %r raised", callback)
                if ok:
                    ok, value = False, error
        self._finish(ok, value)

    def _finish(self, ok: bool, value: Any) -> None:
        self._ok = ok
        self._value = value
        self._keeps = None
        with _ending:
            self._ready = True
            waiters, self._waiters = self._waiters, None
        if waiters is not None:
            for lock in waiters:
                try:
                    lock.release()
                except RuntimeError:
                    pass  # that waiter has given up


class AsyncResult(Job, Outcome[T]):
    """Result of a single call: `multiprocessing.pool.AsyncResult`."""

    __slots__ = ("_attempts", "_call", "_options")

    _cancellable = False

    def __init__(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        engine: Engine,
        options: TaskOptions,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        keeps: object = None,
    ) -> None:
        # Not through Outcome.__init__: this is the one object that every single call has to make.
        self._options = options
        self._attempts = None
        self._call = function, args, kwargs
        self._engine = engine
        self._callback = callback
        self._error_callback = error_callback
        self._keeps = keeps
        self._ready = False
        self._waiters = None

    def _unpicklable(self, value: str, reason: BaseException) -> BaseException:
        return _encoding_error(value, reason)

    def _settle(self, ok: bool, value: Any) -> None:
        if not ok and self._options.on_crash == "return" and isinstance(value, WorkerCrashed):
            ok = True
        self._call = None  # the result may live long; what it was computed from need not
        if self._callback is None and self._error_callback is None:
            self._finish(ok, value)
        else:
            self._end(ok, value)


class Condition(threading.Condition):
    """One whose `with` takes and gives back the lock in C.

    The standard library's does so in Python: an interrupt (Ctrl-C) that comes as `__enter__` returns, or as `__exit__`
    begins, leaves the lock taken for ever, and whoever has a result to tell waits for it.
    """

    __enter__ = property(operator.attrgetter("_lock.__enter__"))
    __exit__ = property(operator.attrgetter("_lock.__exit__"))


class MapResult(MapJob, Outcome[list[Any]]):
    """Result of a whole map: `multiprocessing.pool.MapResult`.

    `get` has the results in the order of the input, or raises the exception of the first element that raised one. It
    waits until *all* elements have ended, as the standard library does.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mode: Mode,
        engine: Engine,
        options: TaskOptions,
        length: int,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        keeps: object = None,
    ) -> None:
        if length == 0:  # as in the standard library
            callback = error_callback = None
        MapJob.__init__(self, function, mode, engine, options)
        Outcome.__init__(self, engine, callback, error_callback, keeps)
        self._values: list[Any] = [None] * length
        self._left = length
        self._error: BaseException | None = None
        self._error_index = -1
        if length == 0:
            self._end_all()

    def _begin(self) -> bool:
        return self._left > 0  # an interrupted `map_async` has aborted it

    def _drop(self, count: int) -> None:
        pass

    def _unpicklable(self, value: str, reason: BaseException) -> BaseException:
        return _encoding_error(value, reason)

    def _deliver(self, start: int, values: list[Any]) -> None:
        with self._lock:
            if not self._left:
                return  # aborted
            self._values[start : start + len(values)] = values
            ended = self._count(len(values))
        if ended:
            self._end_all()

    def _fail(self, index: int, error: BaseException) -> None:
        with self._lock:
            if not self._left:
                return
            if self._options.on_crash == "return" and isinstance(error, WorkerCrashed):
                self._values[index] = error
            elif self._error is None or index < self._error_index:
                self._error, self._error_index = error, index
            ended = self._count(1)
        if ended:
            self._end_all()

    def _abort(self, error: BaseException) -> None:
        with self._lock:
            if not self._left:
                return
            self._left = 0
            self._error = error
        self._end_all()

    def _count(self, ended: int) -> bool:
        self._left -= ended
        return self._left == 0

    def _end_all(self) -> None:
        """By the one thread that has counted the last of them."""
        values, self._values = self._values, []
        if self._error is not None:
            self._end(False, self._error)
        else:
            self._end(True, values)
        self._engine.forget(self)


class EndOfResultsError(Exception):
    """Not StopIteration, which a task may raise as well."""


class NoResultError(Exception):
    """Within the time. Not TimeoutError, which a task may raise as well."""


class IMapIterator:
    """Iterator over the results of a map: `multiprocessing.pool.IMapIterator`.

    An element that failed raises at its place, and `next()` goes on with the one after it. When the iterator is
    dropped, no more of the input is read.
    """

    def __init__(self, job: IMapJob, keeps: object = None) -> None:
        self._job = job
        job._read_by(self)
        self._keeps = keeps  # the pool, which must not be collected, and so ended, while results are taken

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next result. `multiprocessing.TimeoutError` if there is none within `timeout` seconds."""
        try:
            return self._job._take_next(timeout)
        except EndOfResultsError:
            raise StopIteration from None
        except NoResultError:
            raise multiprocessing.TimeoutError from None


class IMapJob(MapJob):
    """The results of a map that are taken one by one, in the order of the input unless a subclass says otherwise."""

    def __init__(
        self,
        function: Callable[..., Any],
        mode: Mode,
        engine: Engine,
        options: TaskOptions,
        buffersize: int | None = None,
    ) -> None:
        super().__init__(function, mode, engine, options)
        self._changed = Condition(self._lock)
        self._ready: collections.deque[tuple[bool, Any]] = collections.deque()
        self._ahead: dict[int, tuple[bool, Any]] = {}  # what has ended before its turn
        self._next = 0  # the index whose turn it is
        self._done = 0  # elements that have ended
        self._length: int | None = None  # known when the input has ended
        self._aborted: BaseException | None = None
        self._abandoned = False
        self._reader: weakref.ref[Any] | None = None
        self._stopped: BaseException | None = None  # what is raised in the place of input that was not read
        self._buffersize = buffersize
        # A token for each element that may be read ahead. A SimpleQueue, because tokens are also put back by a
        # destructor, which may run inside any other lock's critical section.
        self._room: queue.SimpleQueue[object] | None = None
        if buffersize is not None:
            self._room = queue.SimpleQueue()
            for _ in range(buffersize):
                self._room.put(None)

    # -- for the user's iterator

    def _take_next(self, timeout: float | None) -> Any:
        """The next result, or the exception in its place. `EndOfResultsError`, `NoResultError`: there is neither."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._ready:
                if self._aborted is not None:
                    error, self._aborted = self._aborted, None
                    self._length = self._done = 0
                    raise error
                if self._length is not None and self._done >= self._length:
                    raise EndOfResultsError
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise NoResultError
                self._changed.wait(left)
            ok, value = self._ready.popleft()
        if self._room is not None:
            self._room.put(None)
        if ok:
            return value
        raise value

    def _read_by(self, reader: object) -> None:
        """Read no more of the input when `reader` is gone.

        A weak reference whose callback is in C, for an interrupt that comes in a destructor is lost, and so is what the
        destructor had to do.
        """
        self._reader = weakref.ref(reader, None if self._room is None else self._room.put)

    def _abandon(self) -> None:
        """Nobody will ask for results any more."""
        self._abandoned = True
        if self._room is not None:
            self._room.put(None)

    # -- for the feeder

    def _wait_for_room(self) -> bool:
        """Block until one more element may be read from the input; False when nobody wants any."""
        if self._room is not None:
            self._room.get()
        unread = self._abandoned or (self._reader is not None and self._reader() is None)
        return self._aborted is None and self._length is None and self._stopped is None and not unread

    def _stop_reading(self, error: BaseException) -> None:
        if self._room is not None:
            self._stopped = error
            self._room.put(None)

    def _input_ended(self, length: int, error: BaseException | None = None) -> None:
        """The input has `length` elements; `error` is what its iterator raised at the end."""
        if error is not None:
            self._put(length, [(False, error)])
            length += 1
        with self._changed:
            if self._length is None:
                self._length = length
            self._changed.notify_all()
        self._end_if_done()

    # -- for the coordinator

    def _unpicklable(self, value: str, reason: BaseException) -> BaseException:
        return _encoding_error(value, reason)

    def _deliver(self, start: int, values: list[Any]) -> None:
        outcomes = [(True, value) for value in values]
        values.clear()  # or the user's thread might find itself not to be the last one that has them
        self._put(start, outcomes)
        self._end_if_done()

    def _fail(self, index: int, error: BaseException) -> None:
        self._put(index, [(self._options.on_crash == "return" and isinstance(error, WorkerCrashed), error)])
        self._end_if_done()

    def _drop(self, count: int) -> None:
        with self._changed:
            self._done += count
        self._end_if_done()

    def _abort(self, error: BaseException) -> None:
        with self._changed:
            if self._length is None or self._done < self._length:
                self._aborted = error
            self._changed.notify_all()
        if self._room is not None:
            self._room.put(None)  # the feeder looks up, and stops
        self._engine.forget(self)

    def _put(self, start: int, outcomes: list[tuple[bool, Any]]) -> None:
        with self._changed:
            self._add(start, outcomes)
            self._done += len(outcomes)
            outcomes.clear()
            self._changed.notify_all()

    def _add(self, start: int, outcomes: list[tuple[bool, Any]]) -> None:
        if start == self._next:
            self._ready.extend(outcomes)
            self._next += len(outcomes)
        else:
            self._ahead.update(zip(itertools.count(start), outcomes, strict=False))
        while self._ahead and self._next in self._ahead:
            self._ready.append(self._ahead.pop(self._next))
            self._next += 1

    def _end_if_done(self) -> None:
        with self._changed:
            ended = self._length is not None and self._done >= self._length
        if ended:
            self._engine.forget(self)


class IMapUnorderedJob(IMapJob):
    """The results in the order in which they come."""

    def _add(self, start: int, outcomes: list[tuple[bool, Any]]) -> None:
        self._ready.extend(outcomes)


def _encoding_error(value: str, reason: BaseException) -> BaseException:
    """The standard library's error for a result that cannot be pickled, made of the worker's words."""
    error = MaybeEncodingError(reason, value)
    error.value = value
    error.__cause__ = reason.__cause__
    return error  # type: ignore[no-any-return]
