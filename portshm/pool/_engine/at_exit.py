"""What has to happen when the interpreter exits, in an order that leaves it something to work with."""

from __future__ import annotations

import atexit
import multiprocessing.util
import weakref
from collections.abc import Callable

__all__ = ["when_exiting"]


def when_exiting(call: Callable[[], None]) -> Callable[[], None]:
    """Have `call` called when the interpreter exits. Returns what takes that back."""
    # The last to register is the first to be called, and we must be called before `weakref.finalize` takes the
    # memory away from workers that are still busy. It registers itself when the first finalizer is made: now.
    weakref.finalize(call, _nothing).detach()
    atexit.register(call)
    # Children of multiprocessing leave without atexit (before 3.13), but call these. The priority is the stdlib's.
    finalizer = multiprocessing.util.Finalize(None, call, exitpriority=15)

    def forget() -> None:
        atexit.unregister(call)
        finalizer.cancel()

    return forget


def _nothing() -> None:
    pass
