"""When processes are started: at the beginning or on demand, again after a death, and when no more.

Pure: who calls brings the time, and starts what is due by the deadlines. What a dead process leaves is dealt with
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...errors import WorkerStartError
from .deadlines import Deadlines, Due

__all__ = ["Starts"]

# Starts that fail one after the other, over the whole pool, before we stop trying: where no worker has ever been
# ready, and where one has, so that it is not the initializer. The latter are made at growing distances.
_MAX_FAILURES: Final = 5
_MAX_LATER_FAILURES: Final = 20

# Seconds between starts that the system refuses (EAGAIN, ENOMEM).
_AGAIN_AFTER: Final = 0.5

# A process that died idle within this many seconds of its start is replaced only after as long again.
_QUICK_DEATH: Final = 0.5


class Starts:
    """The starts of one pool, by the workers' ids. Under the engine's lock."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._failures = 0
        self._proven = False  # a worker has been ready
        self._due: set[int] = set()
        self._held_back: list[int] = []  # without a process until there is work for one

    # -- on demand

    def hold_back(self, ids: Iterable[int]) -> None:
        """Start these as there is work for them, the last one first."""
        self._held_back = list(ids)

    @property
    def some_held_back(self) -> bool:
        return bool(self._held_back)

    def more(self) -> int | None:
        """One of those held back, which is to be started now."""
        return self._held_back.pop() if self._held_back else None

    # -- after a start

    def ready(self) -> None:
        """A worker is ready for work: so it can be done."""
        self._proven = True
        self._failures = 0

    def failed(self, id: int, now: float, *, error: str, detail: str, others_live: bool) -> WorkerStartError | None:
        """It died before it was ready; the error with which to give up, if trying on makes no sense.

        Args:
            error: what it said of its initializer.
            detail: how it died.
            others_live: there are workers that are ready, so the pool can do its work.
        """
        self._failures += 1
        if error:
            return WorkerStartError("the workers' initializer failed", error)
        if not others_live and self._failures >= (_MAX_LATER_FAILURES if self._proven else _MAX_FAILURES):
            return WorkerStartError(f"{self._failures} workers in a row died before they were ready", detail)
        self._set(id, now + (min(1.0, 0.01 * 2 ** min(self._failures, 10)) if self._proven else 0.0))
        return None

    def refused(self, id: int, now: float, error: Exception, *, others_live: bool) -> WorkerStartError | None:
        """The system did not let us start it; as `failed`."""
        self._failures += 1
        if not others_live and self._failures >= (_MAX_LATER_FAILURES if self._proven else _MAX_FAILURES):
            return WorkerStartError("workers cannot be started", repr(error))
        self._set(id, now + _AGAIN_AFTER)
        return None

    def again(self, id: int, now: float, *, started_at: float, was_idle: bool) -> None:
        """It died later than that: start another process, but not at once where that may go on and on."""
        quick = was_idle and now - started_at < _QUICK_DEATH
        self._set(id, now + _QUICK_DEATH if quick else now)

    def _set(self, id: int, at: float) -> None:
        self._due.add(id)
        self._deadlines.set((Due.START, id), at)

    def cancel(self) -> None:
        """Start none of those that are due or held back: there is nothing to do for them any more."""
        self._held_back = []
        for id in self._due:
            self._deadlines.drop((Due.START, id))
        self._due.clear()
