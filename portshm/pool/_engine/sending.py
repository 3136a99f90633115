"""From LOADING to RUNNING: load a batch and hand it over, or give it back.

By whoever holds the slot: the loop, its serial thread, or a thread that submits. Loading may take its time and run user
code. The hand-over is one step under the engine's lock: the slot is RUNNING, then the `Run` frame is written. That is
sound only because the frame is tiny and writing never waits.
"""

from __future__ import annotations

from collections.abc import Iterable

from .._wire.messages import Run
from .._work import Batch
from .backlog import PATIENCE
from .deadlines import Due
from .delivery import fail
from .loading import Loader, NoRoomError, UnsendableError
from .pool_state import PoolState
from .scheduler import Slot, State, Why
from .serial_thread import SerialThread
from .worker import Worker, WorkerProcess

__all__ = ["Sender"]


class Sender:
    """Any thread, for the slots that it holds."""

    def __init__(self, state: PoolState, loader: Loader, serial: SerialThread) -> None:
        self._lock = state.lock
        self._scheduler = state.scheduler
        self._workers = state.workers
        self._deadlines = state.deadlines
        self._loop = state.loop
        self._loader = loader
        self._serial = serial

    def send_leftovers(self) -> None:
        """Give idle workers what is queued. By the loop, and so by the serial thread what may run user code."""
        while True:
            token = object()
            with self._lock:
                slot = self._scheduler.assign(token)
            if slot is None:
                return
            self.pass_on(slot, token)

    def pass_on(self, slot: Slot, token: object) -> None:
        """Have a slot that the loop holds sent: here, or by the serial thread if user code may run."""
        batch = slot.batch
        if batch is None or self._loader.is_plain(batch):
            self.send(slot, token)
        else:
            self._serial.run(lambda: self.send(slot, token), dropped=lambda _: self.let_go(slot, token))

    def send(self, slot: Slot, token: object, *, direct: bool = False) -> bool:
        """Load the slot's batch and hand it over; whether that came about. What cannot be sent ends here.

        The holder lets go of the slot, unless it is a direct call and the batch is handed over.
        """
        worker, batch = self._workers[slot.id], slot.batch
        process = worker.current
        if batch is None or process is None:  # the pool has ended meanwhile
            self.let_go(slot, token)
            return False
        try:
            run = self._loader.load(worker, process, slot, batch)
        except UnsendableError as error:
            failed = [(batch.element(position), reason) for position, reason in error.failed.items()]
            if self._give_back(slot, token, batch, error.failed):
                for element, reason in failed:
                    fail(element, reason)
            return False
        except NoRoomError:
            with self._lock:
                self._scheduler.no_room(slot, token)
                state = slot.state
            self._after(worker, state)
            return False
        return self._hand_over(slot, token, batch, run, direct=direct)

    def _hand_over(self, slot: Slot, token: object, batch: Batch, run: Run, *, direct: bool) -> bool:
        """The only way from LOADING to RUNNING."""
        worker = self._workers[slot.id]
        with self._lock:
            process = worker.current
            handed = process is not None and slot.batch is batch and self._scheduler.handed_over(slot, token)
            if handed:
                assert process is not None
                self._write(slot, worker, process, run)
                self._set_deadlines(slot, batch, worker.loaded_at)
            if not (handed and direct):
                self._scheduler.let_go(slot, token)
                self._loop.listen(worker)
            state = slot.state
            waited_for = batch.timeout is not None or (len(batch) > 1 and self._scheduler.has_idle)
        if waited_for:
            self._loop.wake()  # there is a new deadline
        if state not in (State.LOADING, State.RUNNING):
            self._after(worker, state)
        return handed

    def _write(self, slot: Slot, worker: Worker, process: WorkerProcess, run: Run) -> None:
        try:
            worker.send_run(process, run)
        except BlockingIOError:  # it has not read for some hundred frames
            if self._scheduler.condemn(slot, Why.MISUSED):
                process.note = "left the pool's pipe unread"
                process.kill()
        except OSError:
            pass  # the process is gone, which the loop will notice

    def _set_deadlines(self, slot: Slot, batch: Batch, now: float) -> None:
        if batch.timeout is not None:
            self._deadlines.set((Due.ELEMENT, slot.id), now + batch.timeout)
        if len(batch) > 1 and batch.patience:
            self._deadlines.set((Due.OVERDUE, slot.id), now + PATIENCE)

    def let_go(self, slot: Slot, token: object) -> None:
        """The holder needs the slot no more."""
        with self._lock:
            self._scheduler.let_go(slot, token)
            state = slot.state
        self._after(self._workers[slot.id], state)

    def _give_back(self, slot: Slot, token: object, batch: Batch, failed: Iterable[int]) -> bool:
        """Whether the batch was still the slot's, and so what has failed ours to tell of."""
        with self._lock:
            mine = slot.batch is batch
            self._scheduler.unsendable(slot, token, failed)
            state = slot.state
        self._after(self._workers[slot.id], state)
        return mine

    def _after(self, worker: Worker, state: State) -> None:
        """What was put off for as long as the slot had a holder; `state` as it was when that let go."""
        if state is State.CLOSED:
            worker.close_left()  # what the end of the pool has left to us
        else:  # an ended process is to be reaped, and what went back to the queue is for others, or for this one again
            self._loop.look_at(worker)
