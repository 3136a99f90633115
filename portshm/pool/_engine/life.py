"""The life of a pool: one value that only moves forward, and the error that says why it ended."""

from __future__ import annotations

import enum

__all__ = ["Life", "Stage"]


class Stage(enum.IntEnum):
    NEW = 0
    RUNNING = 1
    CLOSING = 2  # takes no new calls; ends when all is done
    ENDING = 3  # ends now
    ENDED = 4


class Life:
    """Moved by any thread, a signal handler or a destructor, so without a lock.

    Each step is one `dict.setdefault`, which is atomic. Two threads, or one that was interrupted between reading and
    storing, cannot move it back; of two reasons the first remains.
    """

    __slots__ = ("_reached", "closed")

    def __init__(self) -> None:
        # Each stage that was reached, with the error that says why, and whether that was nobody's wish.
        self._reached: dict[Stage, tuple[BaseException | None, bool]] = {Stage.NEW: (None, False)}
        self.closed = False  # CLOSING or later; what every submission asks first

    @property
    def stage(self) -> Stage:
        return max(list(self._reached))

    @property
    def started(self) -> bool:
        return Stage.RUNNING in self._reached

    @property
    def ends_now(self) -> bool:
        return Stage.ENDING in self._reached

    @property
    def error(self) -> BaseException | None:
        """Why it is ENDING; what everything unfinished fails with."""
        return self._reached.get(Stage.ENDING, (None, False))[0]

    @property
    def broken(self) -> BaseException | None:
        """The same, if it ended by itself and not because it was told to."""
        error, broken = self._reached.get(Stage.ENDING, (None, False))
        return error if broken else None

    def advance(self, stage: Stage, error: BaseException | None = None, *, broken: bool = False) -> None:
        """Be in this stage, or a later one."""
        self._reached.setdefault(stage, (error, broken))
        if stage >= Stage.CLOSING:
            self.closed = True

    def is_anothers(self, error: BaseException) -> None:
        """This is a forked child, for which the pool has ended with the fork; nobody else has this object."""
        self._reached[Stage.ENDING] = error, True
        self.closed = True
