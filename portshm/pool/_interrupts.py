"""Ctrl-C and hang-ups: deferred while something is noted down, blocked around a start, told apart from errors.

Both sides use it: the parent around what must not be half done, the worker for its own end.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

__all__ = ["interrupts_blocked", "interrupts_deferred", "is_interrupt", "killed_at_hangup", "unblock_interrupts"]


@contextlib.contextmanager
def interrupts_blocked(*, tracked: bool) -> Iterator[None]:
    """Have a Ctrl-C wait, here and in a child started meanwhile, which would print a traceback before it has a handler.

    The child inherits the mask and calls `unblock_interrupts`. Not so under forkserver, whose children are not ours.
    `tracked`: the start method is one that starts the standard library's resource tracker, if there is none yet.
    """
    if sys.platform == "win32":
        yield
        return
    if tracked:
        from multiprocessing import resource_tracker  # not on Windows

        resource_tracker.ensure_running()  # now, because its start unblocks interrupts (CPython 3.8 to 3.13)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Have a Ctrl-C wait for the end of the block, or of the function that this decorates; for short ones.

    For what takes something from the system and notes it down: an exception between the two would lose it for good.
    Blocking the signal would not do: another thread gets it then, and the main thread runs the handler all the same.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # nobody raises anything here
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda signum, frame: came.append((signum, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[-1])


def is_interrupt(error: BaseException) -> bool:
    """Whether it came to the main thread from outside, rather than from the user code that was running there.

    A KeyboardInterrupt, or whatever a signal handler of the program's has raised: an alarm's exception, SystemExit at
    SIGTERM. A KeyboardInterrupt that user code raises itself cannot be told apart, and to take no heed of a Ctrl-C
    would be worse.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    return isinstance(error, KeyboardInterrupt) or _came_through(error, _handlers())


def _handlers() -> set[CodeType]:
    """The code of all signal handlers that are written in Python."""
    codes = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        handler = getattr(handler, "__func__", handler)
        if not isinstance(handler, FunctionType):
            handler = vars(type(handler)).get("__call__")
        if isinstance(handler, FunctionType):
            codes.add(handler.__code__)
    return codes


def _came_through(error: BaseException, codes: set[CodeType]) -> bool:
    """Whether one of these was executing when it was raised."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def killed_at_hangup(descriptor: int) -> int | None:
    """Have the kernel kill this process when the last writer of a pipe is gone; a descriptor to be kept, or None.

    Linux only. A thread that waits for the pipe's end needs the interpreter, which a task may hold for minutes in some
    C code, and a process that is stopped runs no thread. PR_SET_PDEATHSIG would be about the thread that forked us
    (prctl(2)), which may end earlier than its process.
    """
    if sys.platform != "linux":
        return None
    import fcntl

    try:
        # An open of its own: whom to tell is a property of the open file (fcntl(2), F_SETOWN), and all workers inherit
        # the same one.
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no /proc
        return None
    try:
        fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(own, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    except OSError:
        os.close(own)
        return None
    return own


def unblock_interrupts() -> None:
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
