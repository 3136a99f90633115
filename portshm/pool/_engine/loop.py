"""The loop: one thread per pool that waits for pipes, sentinels, moments and wake-ups, and has them dealt with.

It must keep deadlines and see deaths whatever tasks and their objects do, so it never waits for user code.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from .waiter import Waiter, WakeUp

if TYPE_CHECKING:
    from .worker import Worker

__all__ = ["Loop", "Turns"]

# Seconds; a selector takes no more than some weeks, and a deadline may be any number.
_LONGEST_WAIT: Final = 3600.0

_WAKE: Final = object()


class Turns(Protocol):
    """What the loop has done; all in its thread."""

    def next_moment(self) -> float | None:
        """When something is to be done even if nothing happens, by time.monotonic()."""

    def goes_on(self) -> bool:
        """Whether there is to be another turn."""

    def turn(self, speaking: list[Worker], silent: list[Worker]) -> None:
        """Deal with what has happened.

        `speaking` workers have something to read, or somebody has let go of them; of `silent` ones the process has
        ended. What a process has said comes first.
        """

    def finish(self, fault: BaseException | None) -> None:
        """The last thing that happens, also after a fault of ours."""


class Loop:
    """The thread, what it waits for, and what wakes it. Ends when `turn` says so; `finish` closes it."""

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="portshm-coordinator", daemon=True)
        self._turns: Turns | None = None
        self._waiter: Waiter | None = None
        self._wake: WakeUp | None = None
        self._let_go: deque[Worker] = deque()

    def open(self, turns: Turns) -> None:
        """Have what is waited with."""
        self._turns = turns
        self._waiter, self._wake = Waiter(), WakeUp()
        self._waiter.add(self._wake.waited_for, _WAKE)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.ident is not None

    @property
    def is_current(self) -> bool:
        return threading.get_ident() == self._thread.ident

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    # -- from any thread

    def wake(self) -> None:
        """Have the loop look at the state again."""
        wake = self._wake
        if wake is not None and not self.is_current:
            wake.send()

    def look_at(self, worker: Worker) -> None:
        """Whoever held it has let go: the loop reads from it again, or reaps it."""
        self._let_go.append(worker)
        self.wake()

    @property
    def is_woken_here(self) -> bool:
        """Whether this thread is within `wake`, having been interrupted there."""
        return self._wake is not None and self._wake.is_held_here()

    # -- under the engine's lock

    def listen(self, worker: Worker) -> None:
        """Wait for what the worker says."""
        process = worker.current
        if self._waiter is not None and process is not None and not process.channel.disconnected:
            self._waiter.add(process.channel.connection, (worker, False))

    def watch(self, worker: Worker) -> None:
        """Wait for the end of the worker's process, and for what it says."""
        if self._waiter is not None and worker.current is not None:
            self._waiter.add(worker.current.sentinel, (worker, True))
            self.listen(worker)

    def ignore(self, worker: Worker) -> None:
        """Wait no longer for what the worker says."""
        if self._waiter is not None and worker.current is not None:
            self._waiter.remove(worker.current.channel.connection)

    def unwatch(self, worker: Worker) -> None:
        """Wait no longer for anything of the worker's."""
        if self._waiter is not None and worker.current is not None:
            self._waiter.remove(worker.current.sentinel)
            self.ignore(worker)

    def close(self) -> None:
        """Wait for nothing any more. Under the lock too: somebody may be about to say what to wait for."""
        waiter, wake = self._waiter, self._wake
        self._waiter = self._turns = None
        try:
            if waiter is not None:
                waiter.close()
        finally:
            if wake is not None:
                wake.close()

    # -- the thread

    def _run(self) -> None:
        turns, fault = self._turns, None
        assert turns is not None
        try:
            while turns.goes_on():
                self._turn(turns)
        except BaseException as error:  # a fault of ours: nobody may be left waiting
            fault = error
        finally:
            turns.finish(fault)

    def _turn(self, turns: Turns) -> None:
        assert self._waiter is not None
        assert self._wake is not None
        moment = turns.next_moment()
        timeout = None if moment is None else min(max(0.0, moment - time.monotonic()), _LONGEST_WAIT)
        speaking: list[Worker] = []
        silent: list[Worker] = []
        for key in self._waiter.wait(timeout):
            if key is _WAKE:
                self._wake.take()
            else:
                worker, has_ended = key
                (silent if has_ended else speaking).append(worker)
        while self._let_go:
            speaking.append(self._let_go.popleft())
        turns.turn(speaking, silent)
