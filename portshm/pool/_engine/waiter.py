"""Wait for any of many pipes and process sentinels. The one place that knows how a platform does that."""

from __future__ import annotations

import contextlib
import select
import selectors
import sys
from multiprocessing.connection import wait
from typing import Any, Final

from .._wire.pipe import ask, keep_from_children

__all__ = ["CAN_CALL_DIRECTLY", "MAX_WORKERS", "PipePoller", "Waiter"]

CAN_CALL_DIRECTLY: Final = sys.platform != "win32"  # whether there are `PipePoller`

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
            return [self._keys[obj] for obj in wait(list(self._keys), timeout)]

        def close(self) -> None:
            self._keys.clear()

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

        def add(self, obj: Any, key: Any) -> None:
            """Wait for `obj` (a descriptor, or something with one) too, and say `key` when it is ready."""
            self._selector.register(obj, selectors.EVENT_READ, key)

        def remove(self, obj: Any) -> None:
            """Wait for it no longer, if we do. Before it is closed."""
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(obj)

        def wait(self, timeout: float | None) -> list[Any]:
            """The keys of what is ready, after at most `timeout` seconds."""
            return [key.data for key, _ in self._selector.select(timeout)]

        def close(self) -> None:
            self._selector.close()
