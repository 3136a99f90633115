"""When processes are started: at the beginning or on demand, again after a death, and when no more.

What a dead process leaves is dealt with before; here nobody looks at batches. `launch` starts the process of a worker,
or raises; `give_up` is told when trying on makes no sense.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from ...errors import WorkerStartError
from .worker import ExitReport, Worker

__all__ = ["Starts"]

logger = logging.getLogger("portshm")

# Starts that fail one after the other, over the whole pool, before we stop trying: where no worker has ever been
# ready, and where one has, so that it is not the initializer. The latter are made at growing distances.
_MAX_FAILURES: Final = 5
_MAX_LATER_FAILURES: Final = 20

# A process that died idle within this many seconds of its start is replaced only after as long again.
_QUICK_DEATH: Final = 0.5


def _nothing(_: object) -> None:
    pass


class Starts:
    """The starts of one pool. By the coordinator's loop, but for `more` and `leave_to_the_loop`: by any thread."""

    def __init__(self, launch: Callable[[Worker], None], give_up: Callable[[WorkerStartError], None]) -> None:
        self._launch = launch
        self._give_up = give_up
        self._failures = 0
        self._proven = False  # a worker has been ready
        self._due: dict[Worker, float] = {}  # time.monotonic() when it is to be started
        self._held_back: list[Worker] = []  # without a process until there is work for one
        self._lock = threading.Lock()  # held by whoever starts one of those

    # -- on demand

    def hold_back(self, workers: Iterable[Worker]) -> None:
        """Start these as there is work for them, the last one first."""
        self._held_back = list(workers)

    @property
    def some_held_back(self) -> bool:
        return bool(self._held_back)

    def more(self, count: int) -> None:
        """Start so many of those held back, if there are as many."""
        for _ in range(count):
            with self._lock:
                if not self._held_back:
                    return
                worker = self._held_back[-1]
                if worker.process is None:
                    self.now(worker)
                self._held_back.pop()  # not before: it would be lost with an interrupt

    def leave_to_the_loop(self) -> None:
        """Have all that are held back started by the loop: the thread that was at it has been interrupted."""
        with self._lock:
            self._due.update((worker, 0.0) for worker in self._held_back if worker.process is None)
            self._held_back = []

    def end(self) -> None:
        """Start no more; whoever was at it has done so."""
        with self._lock:
            self._held_back = []
        self._due.clear()
        self._launch = self._give_up = _nothing  # or who gave them would be kept until the next garbage collection

    # -- after a death

    def ready(self) -> None:
        """A worker is ready for work: so it can be done."""
        self._proven = True
        self._failures = 0

    def failed(self, worker: Worker, report: ExitReport) -> None:
        """It died before it was ready."""
        self._failures += 1
        if worker.start_error:
            self._give_up(WorkerStartError("the workers' initializer failed", worker.start_error))
        elif self._failures >= (_MAX_LATER_FAILURES if self._proven else _MAX_FAILURES):
            detail = f"the last one: pid {report.pid}, {report.cause}\n{report.native_traceback}"
            self._give_up(WorkerStartError(f"{self._failures} workers in a row died before they were ready", detail))
        elif self._proven:
            self._due[worker] = time.monotonic() + min(1.0, 0.01 * 2**self._failures)
        else:
            self.now(worker)

    def again(self, worker: Worker, *, was_idle: bool) -> None:
        """It died later than that: start another process, but not at once where that may go on and on."""
        if was_idle and time.monotonic() - worker.started_at < _QUICK_DEATH:
            self._due[worker] = time.monotonic() + _QUICK_DEATH
        else:
            self.now(worker)

    def now(self, worker: Worker) -> None:
        """Start it; if the system does not let us, later."""
        try:
            self._launch(worker)
        except Exception as error:
            logger.exception("a worker could not be started")
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                self._give_up(WorkerStartError("workers cannot be started", repr(error)))
            else:
                self._due[worker] = time.monotonic() + _QUICK_DEATH

    # -- in time

    @property
    def moments(self) -> list[float]:
        """When `those_due` will have something to do, by time.monotonic()."""
        return list(self._due.values())

    def those_due(self) -> None:
        """Start those whose time has come."""
        now = time.monotonic()
        for worker, moment in list(self._due.items()):
            if now >= moment:
                del self._due[worker]
                self.now(worker)

    def cancel(self) -> None:
        """Start none of those that are due: there is nothing to do for them any more."""
        self._due.clear()
