"""Wait for any of many pipes and process sentinels, and be woken. The one place that knows how a platform does that."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import selectors
import sys
import threading
from multiprocessing.connection import wait
from typing import Any, Final

from .._wire.pipe import ask, keep_from_children

__all__ = ["CAN_CALL_DIRECTLY", "MAX_WORKERS", "PipePoller", "Waiter", "WakeUp"]

CAN_CALL_DIRECTLY: Final = sys.platform != "win32"  # whether there are `PipePoller`s

# WaitForMultipleObjects takes 64 handles; each worker has a pipe and a sentinel, and we have one of our own.
MAX_WORKERS: Final = 30 if sys.platform == "win32" else None

if sys.platform == "win32":

    class PipePoller:
        """Never made: a pipe's end here is no descriptor that could be polled together with a process."""

        def __init__(self, pipe: int, sentinel: int) -> None:
            raise NotImplementedError

        def wait(self) -> bool:
            raise NotImplementedError

    class Waiter:
        """Over multiprocessing.connection.wait, which asks for every object anew each time."""

        def __init__(self) -> None:
            self._keys: dict[Any, Any] = {}

        def add(self, obj: Any, key: Any) -> None:
            self._keys[obj] = key

        def remove(self, obj: Any) -> None:
            self._keys.pop(obj, None)

        def wait(self, timeout: float | None) -> list[Any]:
            keys = dict(self._keys)  # another thread may remove some meanwhile
            return [keys[obj] for obj in wait(list(keys), timeout)]

        def close(self) -> None:
            self._keys.clear()

    class WakeUp:
        """Something to wait for that any thread can make ready."""

        def __init__(self) -> None:
            self.waited_for, self._writer = multiprocessing.Pipe(duplex=False)
            self._lock = threading.RLock()  # two threads in send_bytes at once raise (CPython issue 130733)
            self._sent = False

        def send(self) -> None:
            with self._lock:
                if not self._sent:
                    with contextlib.suppress(OSError, ValueError):  # closed, or a handler came within this very send
                        self._writer.send_bytes(b"")
                    self._sent = True  # not before: interrupted between the two, it would never be sent

        def take(self) -> None:
            with self._lock:
                while self.waited_for.poll(0):
                    self.waited_for.recv_bytes()
                self._sent = False

        def is_held_here(self) -> bool:
            return self._lock._is_owned()  # type: ignore[attr-defined,no-any-return]

        def close(self) -> None:
            with self._lock:
                self.waited_for.close()
                self._writer.close()

else:

    class PipePoller:
        """Wait for one pipe and one sentinel, over and over, at the price of a system call."""

        def __init__(self, pipe: int, sentinel: int) -> None:
            self._pipe = pipe
            self._poll = select.poll()
            for descriptor in (pipe, sentinel):
                self._poll.register(descriptor, select.POLLIN)

        def wait(self) -> bool:
            """Whether the pipe is ready, or else only the sentinel."""
            return any(descriptor == self._pipe for descriptor, _ in ask(self._poll) or self._poll.poll())

    class Waiter:
        """Over a selector that persists (epoll, kqueue): a wait costs the same for 2 workers and for 200."""

        def __init__(self) -> None:
            self._selector = selectors.DefaultSelector()
            keep_from_children(self._selector)
            self._known: set[Any] = set()  # what is waited for; asked at every hand-over, so it must cost little

        def add(self, obj: Any, key: Any) -> None:
            """Wait for `obj` (a descriptor, or something with one) too, and say `key` when it is ready."""
            if obj not in self._known:
                with contextlib.suppress(KeyError):  # it is there, and who said so was interrupted before the next line
                    self._selector.register(obj, selectors.EVENT_READ, key)
                self._known.add(obj)

        def remove(self, obj: Any) -> None:
            """Wait for it no longer, if we do. Before it is closed."""
            if obj in self._known:
                self._known.discard(obj)  # first: interrupted here, the next `add` still says what is true
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(obj)

        def wait(self, timeout: float | None) -> list[Any]:
            """The keys of what is ready, after at most `timeout` seconds."""
            return [key.data for key, _ in self._selector.select(timeout)]

        def close(self) -> None:
            self._selector.close()

    class WakeUp:
        """Something to wait for that any thread can make ready.

        Without a flag that says whether a byte is under way: between setting it and sending, an interrupt or another
        thread's turn would lose the wake-up for ever. A full pipe is as good as one byte more.
        """

        def __init__(self) -> None:
            self.waited_for, self._writer = multiprocessing.Pipe(duplex=False)
            for end in (self.waited_for, self._writer):
                keep_from_children(end)
                os.set_blocking(end.fileno(), False)
            self._lock = threading.RLock()  # a number that has been closed may be somebody else's descriptor

        def send(self) -> None:
            with self._lock:
                if not self._writer.closed:
                    with contextlib.suppress(OSError):
                        os.write(self._writer.fileno(), b"\0")

        def take(self) -> None:
            """Be not ready until the next `send`. By the loop, before it looks at anything."""
            with contextlib.suppress(BlockingIOError):
                os.read(self.waited_for.fileno(), 1 << 16)

        def is_held_here(self) -> bool:
            """Whether this thread is within `send`, having been interrupted there."""
            return self._lock._is_owned()  # type: ignore[attr-defined,no-any-return]

        def close(self) -> None:
            with self._lock:
                self.waited_for.close()
                self._writer.close()
