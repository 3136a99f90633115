"""What the parts of one pool's engine share. Changed under the one lock, unless it says otherwise."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import NamedTuple

from ...errors import PoolTerminatedError
from .._work import Chunk, Element, Entry, MapJob
from .deadlines import Deadlines
from .delivery import fail
from .life import Life
from .loop import Loop
from .regions import RegionStore
from .scheduler import Scheduler
from .starts import Starts
from .worker import Worker, WorkerSettings

__all__ = ["PoolOptions", "PoolState"]


class PoolOptions(NamedTuple):
    """What one pool is made with, besides its workers' settings."""

    processes: int
    max_tasks: int | None = None
    start_timeout: float = 60.0
    max_shared_bytes: int | None = None
    on_demand: bool = False


class PoolState:
    """Of one pool, from its making on. Nothing is taken from the system before the start."""

    def __init__(self, options: PoolOptions, settings: WorkerSettings) -> None:
        self.options = options
        self.settings = settings
        # Reentrant, because a garbage collection or a signal handler under it may call us.
        self.lock = threading.RLock()
        self.life = Life()  # needs no lock
        self.scheduler = Scheduler(options.processes, options.max_tasks)
        self.deadlines = Deadlines()
        self.starts = Starts(self.deadlines)
        self.store = RegionStore(settings.backend, options.max_shared_bytes)  # has a lock of its own
        self.loop = Loop()
        self.workers: list[Worker] = []
        self.jobs: dict[MapJob, None] = {}  # that have not ended

    @property
    def all_done(self) -> bool:
        """Whether nothing is queued, executing or to be delivered; but what the serial thread has."""
        return self.scheduler.idle and not self.jobs

    def is_held_here(self) -> bool:
        """Whether this thread has one of the locks that the end needs, having been interrupted while it did."""
        return any(self._held())

    def _held(self) -> Iterator[bool]:
        # `_is_owned` is what threading.Condition asks of its lock, on every Python.
        for lock in (self.lock, self.store.lock, *(job._lock for job in list(self.jobs))):
            yield lock._is_owned()  # type: ignore[attr-defined]
        yield self.loop.is_woken_here

    def end_error(self) -> BaseException:
        """Why the pool has ended; each its own, because whoever raises it adds to its traceback."""
        return copy.copy(self.life.error or PoolTerminatedError("the pool has ended"))

    def fail_all(self, entries: list[Entry]) -> None:
        """The pool has ended without these."""
        for entry in entries:
            if isinstance(entry, Chunk):
                entry.job._abort(self.end_error())
            else:
                fail(Element(entry, 0, None), self.end_error())
