"""Every exception portshm raises on its own account.

::

    PortShmError
      RegionError                  the memory itself
        RegionExistsError          also FileExistsError     somebody else has that name
        RegionNotFoundError        also FileNotFoundError   nobody has that name (any more)
        RegionRefusedError         also PermissionError     a link, not ours, or open to others
        RegionFullError            also OSError             no room; errno is ENOSPC
        RegionSizeError            also ValueError          a size no region can have
        RegionNameError            also ValueError          not a name, address or folder we accept
        RegionClosedError          also ValueError          used after close()
      HeaderError                  also ValueError          bytes that are not the header we expect
        NotReadyError              the creator has not published yet; the only one worth retrying
      TornValueError               also ValueError          no complete value to be had
      ValueTooLargeError           also ValueError          more bytes than the capacity
      LockTimeoutError             also TimeoutError        somebody else holds the lock
      LockNotHeldError             also RuntimeError        a live view of memory asked for outside the lock
      PoolError
        TransportError             also BrokenProcessPool   one task could not be carried over
        WorkerCrashed              also BrokenProcessPool   a worker died; fails one task
          TaskTimeoutError         also multiprocessing.TimeoutError
        WorkerStartError           also BrokenProcessPool   workers die before their first answer
        PoolTerminatedError        also BrokenProcessPool   the pool ended before this was finished

A class exists because a caller would treat it differently. Each derives from the built-in that a caller of
the standard library would catch, and each survives pickling: the fields are the constructor's arguments and
``__str__`` builds the sentence.
"""

from __future__ import annotations

import multiprocessing
import signal as _signal
from concurrent.futures.process import BrokenProcessPool
from typing import Any

__all__ = [
    "HeaderError",
    "LockNotHeldError",
    "LockTimeoutError",
    "NotReadyError",
    "PoolError",
    "PoolTerminatedError",
    "PortShmError",
    "RegionClosedError",
    "RegionError",
    "RegionExistsError",
    "RegionFullError",
    "RegionNameError",
    "RegionNotFoundError",
    "RegionRefusedError",
    "RegionSizeError",
    "TaskTimeoutError",
    "TornValueError",
    "TransportError",
    "ValueTooLargeError",
    "WorkerCrashed",
    "WorkerStartError",
]


class PortShmError(Exception):
    """Base of everything in this module."""


class RegionError(PortShmError):
    """Something about a region: its name, size, place or lifetime."""


# The ones below that are OSErrors take OSError's own arguments: (errno, sentence, filename).


class RegionExistsError(RegionError, FileExistsError):
    """Creation is always exclusive, and this name is taken."""


class RegionNotFoundError(RegionError, FileNotFoundError):
    """There is no region at this address (any more)."""


class RegionRefusedError(RegionError, PermissionError):
    """There is something at this address, but not a region that this user may trust."""


class RegionFullError(RegionError, OSError):
    """The space could not be reserved; ``errno`` is ENOSPC and ``filename`` the mount.

    Raised at creation, so that it is never a SIGBUS later (CPython issue 114390).
    """


class RegionSizeError(RegionError, ValueError):
    """A capacity below one byte or beyond what the platform can map."""


class RegionNameError(RegionError, ValueError):
    """A name, address or folder that cannot be one."""


class RegionClosedError(RegionError, ValueError):
    """Used after ``close()``. Views taken before are still valid."""


class HeaderError(PortShmError, ValueError):
    """A header field holds what it must not hold, or was about to.

    ``field``, ``found`` and ``expected`` say which, what, and what would have been right. When it is raised by
    a store, nothing was written.
    """

    def __init__(self, field: str, found: object, expected: str) -> None:
        super().__init__(field, found, expected)
        self.field = field
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        return f"header field {self.field!r}: found {self.found!r}, expected {self.expected}"


class NotReadyError(HeaderError):
    """The region exists, but its creator has not published the header yet. Retrying makes sense."""


class TornValueError(PortShmError, ValueError):
    """No complete value could be read: a writer is busy, or died while it was writing."""


class ValueTooLargeError(PortShmError, ValueError):
    """The value does not fit; nothing was touched. ``resize(length)`` makes room."""

    def __init__(self, length: int, capacity: int) -> None:
        super().__init__(length, capacity)
        self.length = length
        self.capacity = capacity

    def __str__(self) -> str:
        return f"value of {self.length} bytes, capacity is {self.capacity} bytes; resize({self.length}) makes room"


class LockTimeoutError(PortShmError, TimeoutError):
    """The lock was not to be had within ``timeout`` seconds."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__(path, timeout)
        self.path = path
        self.timeout = timeout

    def __str__(self) -> str:
        return f"lock {self.path} is held by another process or thread; waited {self.timeout:g} s"


class LockNotHeldError(PortShmError, RuntimeError):
    """`header` and `value_ref()` stay live after the call, so they are to be had inside the ``with`` block only."""


class PoolError(PortShmError):
    """The pool's machinery failed, as opposed to the task."""


class TransportError(PoolError, BrokenProcessPool):
    """One task's arguments or result could not be carried to the other side; ``__cause__`` has the original.

    The standard library's executor breaks as a whole here, hence the second base; ours stays usable.
    """


class WorkerCrashed(PoolError, BrokenProcessPool):
    """The worker process died while it was executing this element, and only this element fails.

    Args:
        index: position of the element in its ``map``, across chunks; 0 for single calls.
        item: what the element was called with: the item of a ``map``, the argument tuple of a ``starmap``, and
            ``(args, kwargs)`` of a single call.
        pid: process id of the worker that died.
        exitcode: as ``multiprocessing.Process.exitcode``: negative for a signal.
        cause: in words.
        native_traceback: what faulthandler wrote when the worker got a fatal signal, or ``""``.
    """

    def __init__(
        self,
        index: int,
        item: Any,
        pid: int | None,
        exitcode: int | None,
        cause: str,
        native_traceback: str = "",
    ) -> None:
        super().__init__(index, item, pid, exitcode, cause, native_traceback)
        self.index = index
        self.item = item
        self.pid = pid
        self.exitcode = exitcode
        self.cause = cause
        self.native_traceback = native_traceback

    @property
    def signal(self) -> int | None:
        """The signal that ended the worker (a ``signal.Signals`` where the number has a name), or None."""
        if self.exitcode is None or self.exitcode >= 0:
            return None
        try:
            return _signal.Signals(-self.exitcode)
        except ValueError:
            return -self.exitcode

    def __str__(self) -> str:
        return f"worker {self.pid} crashed on element {self.index} ({_brief(self.item)}): {self.cause}"


class TaskTimeoutError(WorkerCrashed, multiprocessing.TimeoutError):
    """The element ran past its deadline, and its worker was killed for it."""


class WorkerStartError(PoolError, BrokenProcessPool):
    """Workers die, or give no sign, before their first answer; the pool has given up starting more.

    ``detail`` is the initializer's traceback where there is one, else what is known of the death.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}\n{self.detail}".rstrip()


class PoolTerminatedError(PoolError, BrokenProcessPool):
    """The pool was ended, by `terminate()` and the like, before this was finished; it may have run or not."""


def _brief(item: Any, limit: int = 80) -> str:
    # An item's repr is the user's code: it may raise, and it may be a gigabyte.
    try:
        text = repr(item) if not isinstance(item, (bytes, bytearray)) else repr(bytes(item[:limit]))
    except Exception as error:
        return f"<{type(item).__name__} whose repr raised {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
