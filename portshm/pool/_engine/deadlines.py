"""Moments at which something is to be looked at. Pure: no clock; who asks brings the time.

The loop asks for the next moment each time it is about to wait, and whoever sets an earlier one wakes it. So there is
no flag that could be out of date. What is not set costs nothing.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

__all__ = ["Deadlines", "Due", "Moment"]


class Due(enum.Enum):
    """What there may be a deadline for."""

    START = enum.auto()  # a process is to be started
    READY = enum.auto()  # by then it must be ready (start_timeout)
    ELEMENT = enum.auto()  # the element that is executing may have missed its deadline
    OVERDUE = enum.auto()  # the batch has taken longer than batches should
    FRAME = enum.auto()  # by then the other half of a frame must have come
    LEAVE = enum.auto()  # by then a process that has closed its pipe must have ended
    RESUME = enum.auto()  # what a Ctrl-C has held back may be sent


# What, and the id of the worker; 0 where it is nobody's.
Moment: TypeAlias = tuple[Due, int]


class Deadlines:
    """Seconds, of whatever clock the caller has, for each moment. Under the engine's lock."""

    def __init__(self) -> None:
        self._at: dict[Moment, float] = {}

    def set(self, moment: Moment, at: float) -> None:
        """Look at it then, instead of when it was set for before."""
        self._at[moment] = at

    def drop(self, moment: Moment) -> None:
        """Do not, if it was to be."""
        self._at.pop(moment, None)

    def next(self) -> float | None:
        """The earliest; None if there is none."""
        return min(self._at.values(), default=None)

    def due(self, now: float) -> list[Moment]:
        """Those that have come, the earliest first. They are no longer set."""
        moments = sorted((moment for moment, at in self._at.items() if at <= now), key=self._at.__getitem__)
        for moment in moments:
            del self._at[moment]
        return moments
