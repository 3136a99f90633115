"""What workers say, and what they leave when they die.

Everything that comes through a pipe may have been written by a task that went wild, so it is checked against the
slot's state and memory; a worker that does not fit is none of ours, and is killed. Its memory tells how far it was.
"""

from __future__ import annotations

import functools
import logging
import pickle
import time
from typing import Any, Final, NamedTuple

from ...errors import TaskTimeoutError, TransportError, WorkerCrashed
from .._wire.messages import Done, GarbageError, GivenBack, Grant, Need, Ready, Released, StartFailed, released_ids
from .._wire.pipe import PIPE_CLOSED
from .._wire.slot_memory import Phase, Record, RecordError
from .._work import Batch, Element, MapJob
from .deadlines import Due
from .deaths import Death, examine
from .delivery import Claimed, Delivery, fail, rebuild
from .pool_state import PoolState
from .scheduler import Blocked, Slot, State, Why
from .sending import Sender
from .serial_thread import SerialThread
from .worker import ExitReport, Worker, WorkerProcess

__all__ = ["GRACE", "Reaped", "Receiver", "Taken"]

logger = logging.getLogger("portshm")

# Seconds for a process that is to end to do so by itself.
GRACE: Final = 0.2

# Seconds for the other half of a frame: they are written in one piece.
_WHOLE_FRAME: Final = 1.0

# Seconds for which a Ctrl-C that has ended an element holds back what is queued.
_HELD_BACK: Final = 0.1

# What the serial thread may have to do for each worker before workers get no more. A batch to be sent counts too.
_MOST_LEFT: Final = 3

_MOST_NEEDED: Final = 1 << 48

_GARBAGE: Final = "wrote garbage to the pool's pipe"


class Taken(NamedTuple):
    """Results that need the worker no more."""

    batch: Batch
    numbers: memoryview
    entries: list[Claimed]


class Reaped(NamedTuple):
    """A process that has ended, been reaped, and left nothing to be dealt with."""

    worker: Worker
    process: WorkerProcess
    report: ExitReport
    was_idle: bool


class Receiver:
    """The loop; but `take_done` and `deliver_here` also the thread of a direct call, for the slot that it holds."""

    def __init__(self, state: PoolState, serial: SerialThread, sender: Sender) -> None:
        self._lock = state.lock
        self._scheduler = state.scheduler
        self._workers = state.workers
        self._store = state.store
        self._deadlines = state.deadlines
        self._starts = state.starts
        self._loop = state.loop
        self._delivery = Delivery(state.store)
        self._serial = serial
        self._sender = sender

    # -- from the pipe

    def look_at(self, worker: Worker) -> Reaped | None:
        """It has something to say, or somebody has let go of it."""
        slot = self._scheduler.slots[worker.id]
        with self._lock:
            ended = self._scheduler.may_be_reaped(slot)
        if ended and worker.current is not None:
            return self._reap(worker)
        self._read(worker)
        return None

    def _read(self, worker: Worker) -> bool:
        """Take what it says; whether it has said anything."""
        slot = self._scheduler.slots[worker.id]
        with self._lock:
            process = worker.current
            # What a direct call waits for is not ours to read; nor what the end of the pool has left to a holder.
            if process is None or process.channel.disconnected or self._scheduler.is_read_elsewhere(slot):
                return False
            try:
                messages = process.channel.receive()
                problem: type[Exception] | None = None
            except (GarbageError, EOFError, OSError) as error:
                messages, problem = [], type(error)  # the error itself would keep this frame, and the frame the error
            if slot.state is not State.ENDED:
                self._loop.listen(worker)
                if process.channel.partial:
                    self._deadlines.set((Due.FRAME, worker.id), time.monotonic() + _WHOLE_FRAME)
                else:
                    self._deadlines.drop((Due.FRAME, worker.id))
        if problem is GarbageError:
            self.misused(worker, _GARBAGE)
        elif problem is not None:
            self._closed_its_pipe(worker, process)
        for message in messages:
            if process.channel.disconnected:
                break
            try:
                self._take(worker, process, slot, message)
            except GarbageError:
                self.misused(worker, _GARBAGE)
        return bool(messages)

    def _take(self, worker: Worker, process: WorkerProcess, slot: Slot, message: Any) -> None:
        """GarbageError if nothing of ours says that at this moment."""
        if isinstance(message, Done):
            taken = self.take_done(worker, message)
            if taken is not None:
                # The worker first: what is delivered may wake threads that then want the interpreter.
                self._next(slot)
                self._deliver(taken)
        elif isinstance(message, Need):
            self._on_need(process, slot, message)
        elif isinstance(message, Released):
            self._release(process, released_ids(message.ids))
        elif isinstance(message, GivenBack):
            self._on_given_back(slot, message)
        elif isinstance(message, Ready):
            self._on_ready(worker, process, slot)
        elif isinstance(message, StartFailed) and not process.ready:
            process.start_error = message.text
        else:
            raise GarbageError

    def _next(self, slot: Slot) -> None:
        """Give a slot that has become idle its next batch."""
        token = object()
        with self._lock:
            assigned = self._scheduler.assign_to(slot, token)
        if assigned:
            self._sender.pass_on(slot, token)

    def _on_ready(self, worker: Worker, process: WorkerProcess, slot: Slot) -> None:
        with self._lock:
            if process.ready or not (self._scheduler.ready(slot) or slot.state is State.ENDED):
                raise GarbageError
            process.ready = True
            self._deadlines.drop((Due.READY, worker.id))
            self._starts.ready()
        self._next(slot)

    def _on_need(self, process: WorkerProcess, slot: Slot, need: Need) -> None:
        batch = slot.batch
        if batch is None or not 0 < need.size < _MOST_NEEDED or len(process.granted) >= len(batch):
            raise GarbageError
        try:
            stored = self._store.acquire(need.size, force=True)
        except Exception as error:
            grant = Grant(0, 0, str(error))
        else:
            process.granted[stored.id] = stored
            grant = Grant(stored.id, stored.size, stored.address)
        with self._lock:
            try:
                process.send(grant)
            except BlockingIOError:
                raise GarbageError from None
            except OSError:
                pass  # the process is gone, which the loop will notice

    def _on_given_back(self, slot: Slot, given: GivenBack) -> None:
        with self._lock:
            batch = slot.batch
            if batch is None or given.batch < batch.id:
                return  # late: the batch is over
            if given.batch != batch.id or not 0 <= given.kept <= len(batch) or not batch.patience:
                raise GarbageError
            self._scheduler.given_back(slot, given.kept)

    def _release(self, process: WorkerProcess, ids: list[int]) -> None:
        """The worker has let go of regions that were sent to it."""
        for id in ids:
            if id in process.regions:
                process.regions.remove(id)
                self._store.release(id)
                with self._lock:
                    self._scheduler.block(Blocked.NO_ROOM, False)

    def misused(self, worker: Worker, note: str) -> None:
        """A task has done something to the worker that makes it none of ours. Its memory tells how far it was."""
        with self._lock:
            process = worker.current
            if process is None:
                return
            process.note = process.note or note
            process.channel.disconnected = True
            self._loop.ignore(worker)
            self._scheduler.condemn(self._scheduler.slots[worker.id], Why.MISUSED)
            process.kill()

    def _closed_its_pipe(self, worker: Worker, process: WorkerProcess) -> None:
        # It is about to end, or a task has closed the pipe. Without one it is no worker any more.
        with self._lock:
            self._loop.ignore(worker)
            process.channel.disconnected = True
            self._scheduler.condemn(self._scheduler.slots[worker.id], Why.DISCONNECTED)
            self._deadlines.set((Due.LEAVE, worker.id), time.monotonic() + GRACE)

    # -- results

    def take_done(self, worker: Worker, done: Done) -> Taken | None:
        """The batch is over: its results, and the slot is idle. None if nothing is to be delivered now."""
        slot, process = self._scheduler.slots[worker.id], worker.current
        batch = slot.batch
        if batch is None or process is None or batch.id != done.batch:
            self.misused(worker, _GARBAGE)
            return None
        try:
            ids = released_ids(done.released)
            if done.finished == -1:
                self._on_unreadable(worker, slot, process)
                return None
            record = self._record(worker, batch, done.finished)
        except GarbageError:
            self.misused(worker, _GARBAGE)
            return None
        except RecordError as error:
            self.misused(worker, f"left a record that makes no sense: {error}")
            return None
        entries = self._delivery.claim(process, record.entries)
        self._release(process, ids)
        with self._lock:
            if slot.batch is not batch:
                return None  # the pool has ended meanwhile, and failed what was in it
            worker.tasks_done += done.finished
            self._forget_moments(worker)
            self._scheduler.done(slot, done.finished, max(0, done.elapsed) / 1e9)
            if done.interrupted:
                self._scheduler.block(Blocked.INTERRUPTED)
                self._deadlines.set((Due.RESUME, 0), time.monotonic() + _HELD_BACK)
            process.forget()
            if slot.why is Why.RETIRING:
                process.stop()
        return Taken(batch, record.numbers, entries)

    def _record(self, worker: Worker, batch: Batch, finished: int) -> Record:
        count, _ = worker.memory.progress(batch.id)
        if not 0 <= finished <= len(batch) or finished != min(count, len(batch)) or (not finished and len(batch)):
            raise RecordError(f"{finished} of {len(batch)} elements finished, {count} on record")
        return worker.memory.outcomes(finished, len(batch))

    def _forget_moments(self, worker: Worker) -> None:
        self._deadlines.drop((Due.ELEMENT, worker.id))
        self._deadlines.drop((Due.OVERDUE, worker.id))

    def deliver_here(self, taken: Taken) -> None:
        """Settle a direct call, in the thread that waits for it."""
        self._delivery.deliver(taken.batch, taken.numbers, self._delivery.results(taken.entries))

    def _deliver(self, taken: Taken) -> None:
        """Settle the first elements of a batch; in the loop only if that runs no user code."""
        batch, numbers, entries = taken
        job = batch.job
        apart = isinstance(job, MapJob) and job._apart  # then all that follows, or two threads would be at it
        results = None if apart else self._delivery.plain_results(entries)
        if results is not None:
            self._delivery.deliver(batch, numbers, results)
            return
        if isinstance(job, MapJob):
            job._apart = True
        count = len(numbers) + len(entries)

        def drop(error: BaseException) -> None:
            for position in range(count):
                fail(batch.element(position), error)

        self._serial.run(
            lambda: self._delivery.results(entries),
            then=lambda results: self._delivery.deliver(batch, numbers, results),
            dropped=drop,
        )
        self.weigh_results()

    def weigh_results(self) -> None:
        """Hold workers back while results pile up before the serial thread; also called by that."""
        with self._lock:
            piled_up = self._serial.left > _MOST_LEFT * len(self._workers)
            self._scheduler.block(Blocked.CONGESTED, piled_up)

    def _on_unreadable(self, worker: Worker, slot: Slot, process: WorkerProcess) -> None:
        """Nothing of the batch ran: it could not be unpickled. RecordError if the memory says something else."""
        _, entries = worker.memory.outcomes(1, 1)
        if not entries or (slot.batch is not None and worker.memory.progress(slot.batch.id)[1] is Phase.RUNNING):
            raise RecordError("elements of what could not be unpickled")
        reason, job = entries[0].data, slot.batch.job if slot.batch is not None else None
        if isinstance(job, MapJob):
            process.functions.discard(job._id)  # it may not have come as far as that
        with self._lock:
            self._forget_moments(worker)
            convicted = self._scheduler.unreadable(slot) if slot.batch is not None else []
        for element in convicted:  # what the reason is rebuilt from may be user code
            end = functools.partial(fail, element)
            self._serial.run(functools.partial(_unreadable, reason), then=end, dropped=end)
        self._next(slot)

    # -- the end of a process

    def ended(self, worker: Worker) -> Reaped | None:
        """The process has ended. First what it still said, then what it left; not while somebody holds it."""
        slot = self._scheduler.slots[worker.id]
        with self._lock:
            if worker.current is None:
                return None
            # Now, and not when it is reaped: another thread could be given the slot until then, and what it sends
            # would come to the next process.
            self._scheduler.ended(slot)
            self._loop.unwatch(worker)
            free = self._scheduler.may_be_reaped(slot)
        return self._reap(worker) if free else None

    def _reap(self, worker: Worker) -> Reaped | None:
        slot, process = self._scheduler.slots[worker.id], worker.current
        assert process is not None
        while self._read(worker):
            pass
        batch, why = slot.batch, slot.why
        report = worker.reap()
        if report.exitcode == PIPE_CLOSED:
            process.note = process.note or "closed the pool's pipe"
        death = None
        if batch is not None:
            death = examine(
                worker.memory, batch, loaded=worker.loaded == batch.id, note=process.note, cause=report.cause
            )
        with self._lock:
            if slot.batch is not batch:
                return None  # the pool has ended meanwhile
            for due in (Due.ELEMENT, Due.OVERDUE, Due.READY, Due.FRAME, Due.LEAVE):
                self._deadlines.drop((due, worker.id))
            convicted = self._scheduler.died(slot, death)
            worker.tasks_done += death.finished if death is not None else 0
        if batch is not None and death is not None and death.finished:
            self._deliver(Taken(batch, death.record.numbers, self._delivery.claim(process, death.record.entries)))
        for id in [*process.regions, *process.granted]:
            self._store.release(id)
        for element in convicted:
            assert death is not None
            fail(element, _crash(element, report, death, late=why is Why.LATE))
        logger.info("worker %s ended: %s", report.pid, report.cause)
        return Reaped(worker, process, report, was_idle=batch is None and why is None)


def _unreadable(data: bytes) -> BaseException:
    try:
        reason: BaseException = rebuild(pickle.loads(data))
    except Exception as problem:
        reason = problem
    error = TransportError(f"the worker could not unpickle what it was to call: {reason!r}")
    error.__cause__ = reason
    return error


def _crash(element: Element, report: ExitReport, death: Death, *, late: bool) -> WorkerCrashed:
    item = death.item if death.item is not None else element.item
    if late:
        cause = f"deadline of {element.job._options.timeout:g} s passed"
        return TaskTimeoutError(element.index, item, report.pid, report.exitcode, cause, report.native_traceback)
    cause = death.note or report.cause
    return WorkerCrashed(element.index, item, report.pid, report.exitcode, cause, report.native_traceback)
