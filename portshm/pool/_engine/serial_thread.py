"""A thread for what may run user code: unpickling results, pickling what was queued, callbacks.

The coordinator's loop keeps deadlines, sees deaths and ends the pool: it must not wait for an object's own code.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["SerialThread"]

logger = logging.getLogger("portshm")


class _Action(NamedTuple):
    compute: Callable[[], Any]
    then: Callable[[Any], object]
    dropped: Callable[[BaseException], object]


def _nothing(*_: Any) -> None:
    pass


class SerialThread:
    """Does one thing after the other, in a thread that starts with the first. Daemon; ends with `finish` or `drop`.

    Args:
        name: the thread's.
        told: called in the thread when something has been done.
    """

    def __init__(self, name: str, told: Callable[[], object] = _nothing) -> None:
        self._name = name
        self._told = told
        self._numbers: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        # What is still to be done. Whoever takes a number out has to see to it: the thread, or `drop`.
        self._open: dict[int, _Action] = {}
        self._next = itertools.count()
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._idle = threading.Lock()  # not held: nothing is being done
        self._over = False

    @property
    def left(self) -> int:
        """How many things are still to be done."""
        return len(self._open)

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def run(
        self,
        compute: Callable[[], Any],
        then: Callable[[Any], object] = _nothing,
        dropped: Callable[[BaseException], object] = _nothing,
    ) -> None:
        """Have `compute` called, and `then` with what it returns; or `dropped` with what it raises or `drop` has.

        Exactly one of the two, also where `drop` comes while `compute` is at work: what that returns is nobody's then.
        """
        number = next(self._next)
        self._open[number] = _Action(compute, then, dropped)
        with self._starting:
            started = not self._over and self._start()
            if started:
                self._numbers.put(number)
        if not started:
            self._do(number)

    def pause(self, timeout: float) -> Callable[[], None] | None:
        """Keep the thread from beginning anything until what is returned is called; None if it stays at something."""
        return self._idle.release if self._idle.acquire(timeout=timeout) else None

    def finish(self) -> None:
        """Do what there is, and end. What comes later is done where it comes from."""
        self._end()

    def drop(self, error: BaseException) -> None:
        """Begin nothing more, and end. Does not wait for what is being done, which may never end."""
        self._told = _nothing  # or who gave it would be kept until the next garbage collection
        for number in list(self._open):
            action = self._open.pop(number, None)
            if action is not None:
                action.dropped(error)
        self._end()

    def _end(self) -> None:
        with self._starting:
            self._over = True
            self._numbers.put(None)

    def join(self, *, wait: bool = True) -> None:
        """Wait for the thread to end. If not `wait`: only if it has nothing to do any more."""
        thread = self._thread
        if thread is None or self.is_current or (not wait and (self._open or self._idle.locked())):
            return
        thread.join()

    def _start(self) -> bool:
        """Whether there is a thread. There is none any more as the interpreter exits (3.12)."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        while (number := self._numbers.get()) is not None:
            with self._idle:
                self._do(number)
            self._told()

    def _do(self, number: int) -> None:
        action = self._open.get(number)
        if action is None:
            return  # dropped
        try:
            result = action.compute()
            if self._open.pop(number, None) is not None:
                action.then(result)
        except BaseException as error:
            logger.exception("%s: an action failed", self._name)
            if self._open.pop(number, None) is not None:
                action.dropped(error)
