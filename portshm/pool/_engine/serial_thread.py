"""A thread for what may run user code on the way: unpickling results, and pickling what was queued.

The coordinator's loop keeps deadlines and sees deaths, and ends the pool: it must not wait for an object's own code.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable

__all__ = ["SerialThread"]

logger = logging.getLogger("portshm")


def _nothing() -> None:
    pass


class SerialThread:
    """Carries out one thing after the other. The thread starts with the first.

    Args:
        told: called in the thread when something has been carried out.
    """

    def __init__(self, told: Callable[[], None]) -> None:
        self._told = told
        self._things: queue.SimpleQueue[tuple[int, Callable[[], None]] | None] = queue.SimpleQueue()
        # What is to be done for each thing that has not been carried out, should it never be.
        self._open: dict[int, Callable[[BaseException], None]] = {}
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._busy = False

    @property
    def left(self) -> int:
        """How many things are still to be carried out."""
        return len(self._open)

    @property
    def ident(self) -> int | None:
        """The thread's; None if it cannot be started any more, because the interpreter exits (3.12)."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="portshm-porter", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return None
            self._thread = thread
        return self._thread.ident

    def run(self, thing: Callable[[], None], dropped: Callable[[BaseException], None]) -> None:
        """Have `thing` carried out, or `dropped` called with an error by `end`. By one thread only."""
        if self.ident is None:
            thing()
            return
        number = next(self._numbers)
        self._open[number] = dropped
        self._things.put((number, thing))

    def end(self, error: BaseException) -> None:
        """Carry out nothing more. Does not wait for what is being carried out, which may never end."""
        for number in list(self._open):
            dropped = self._open.pop(number, None)
            if dropped is not None:
                dropped(error)
        self._told = _nothing  # or who gave it would be kept until the next garbage collection
        self._things.put(None)

    def join(self) -> None:
        """Wait for the thread to end, unless it is busy with something that was given up."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(0 if self._busy else None)

    def _run(self) -> None:
        while (taken := self._things.get()) is not None:
            number, thing = taken
            del taken
            self._busy = True  # before it is looked whether `end` has been here
            dropped = self._open.get(number)
            if dropped is not None:
                try:
                    thing()
                except BaseException as error:
                    logger.exception("what was carried failed")
                    dropped(error)
            self._busy = False
            del thing, dropped  # they may be the last to have a result
            self._open.pop(number, None)
            self._told()
