"""What the loop does in a turn, and at the end: deaths, moments, starts, leftovers; then giving everything back."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable
from typing import Any, Final

from ...errors import PoolTerminatedError, WorkerStartError
from .._interrupts import interrupts_deferred
from .._wire.messages import TakeBack
from .._wire.pipe import keep_from_children
from .._wire.slot_memory import Phase
from .._work import Batch
from .deadlines import Due
from .direct import DirectCalls
from .life import Stage
from .loading import Loader
from .pool_state import PoolState
from .receiving import GRACE, Reaped, Receiver
from .scheduler import Blocked, Slot, State, Why
from .sending import Sender
from .serial_thread import SerialThread
from .teardown import try_all
from .worker import Worker, WorkerProcess

__all__ = ["PoolTurns"]

logger = logging.getLogger("portshm")

# Seconds for a worker to begin with a batch that has a deadline.
_BEGUN_WITHIN: Final = 5.0

# Seconds after which a process is forked although the serial thread is in user code, which may hold an import lock
# that the child would wait for.
_FORK_ANYWAY: Final = 1.0


class PoolTurns:
    """The loop, but for `open`, `launch` and `try_launch`. Ends with `finish`."""

    def __init__(self, state: PoolState, callbacks: SerialThread) -> None:
        self._state = state
        self._lock = state.lock
        self._callbacks = callbacks
        # For what may run user code in the loop's stead: sending, and results. And starts, which pickle `initargs`.
        self.serial = SerialThread("portshm-serial", self._was_done)
        self.starter = SerialThread("portshm-starter")
        self.loader = Loader(state.scheduler, state.lock, state.store)
        self.sender = Sender(state, self.loader, self.serial)
        self.receiver = Receiver(state, self.serial, self.sender)
        self.direct = DirectCalls(state, self.sender, self.receiver)
        self._life_ends: list[Any] = []
        self._stay_at_exit: Callable[[], object] | None = None

    def open(self, when_exiting: Callable[[], Callable[[], object]]) -> None:
        """Take from the system what the pool needs before it has processes."""
        state = self._state
        state.loop.open(self)
        self._stay_at_exit = when_exiting()
        reader, writer = multiprocessing.Pipe(duplex=False)
        self._life_ends = [reader, writer]
        keep_from_children(writer)
        for slot in state.scheduler.slots:
            state.workers.append(Worker(slot.id, state.settings, reader))

    # -- a turn

    def next_moment(self) -> float | None:
        with self._lock:
            return self._state.deadlines.next()

    def goes_on(self) -> bool:
        state = self._state
        if state.life.ends_now:
            return False
        if not state.life.closed:
            return True
        with self._lock:
            over = self._is_all_done() and not any(worker.current for worker in state.workers)
            over = over and not any(slot.state is State.STARTING for slot in state.scheduler.slots)
            if over:
                state.life.advance(Stage.ENDING, PoolTerminatedError("the pool was closed"))
            return not over

    def turn(self, speaking: list[Worker], silent: list[Worker]) -> None:
        state, scheduler = self._state, self._state.scheduler
        for look, workers in ((self.receiver.look_at, speaking), (self.receiver.ended, silent)):
            for worker in workers:
                reaped = look(worker)
                if reaped is not None:
                    self._after_death(reaped)
        self._keep_time()
        if scheduler.can_assign:
            self.sender.send_leftovers()
        if scheduler.can_recall:
            self._recall()
        if scheduler.backlog.dropped:
            self._count_dropped()
        if state.life.closed:
            self._stop_idle()

    def _keep_time(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = self._state.deadlines.due(now)
        for what, id in due:
            self._when_due[what](self, id, now)

    def _start(self, id: int, now: float) -> None:
        # In a thread of its own: it may take long, and pickle objects of the user's (spawn, forkserver).
        self.starter.run(functools.partial(self._start_apart, id))

    def _start_apart(self, id: int) -> None:
        resume = self.serial.pause(_FORK_ANYWAY)
        try:
            self.try_launch(id)
        finally:
            if resume is not None:
                resume()

    def _not_ready(self, id: int, now: float) -> None:
        worker = self._state.workers[id]
        with self._lock:
            process = worker.current
            if process is not None and not process.ready:
                limit = self._state.options.start_timeout
                process.start_error = f"no answer within {limit:g} s of its start (start_timeout)"
                process.kill()

    def _element_may_be_late(self, id: int, now: float) -> None:
        worker, slot = self._state.workers[id], self._state.scheduler.slots[id]
        with self._lock:
            batch, process = slot.batch, worker.current
            if batch is None or process is None or batch.timeout is None or slot.state is not State.RUNNING:
                return
            # An element that has not begun may do so at once.
            at = min(self._deadline(worker, batch), now + batch.timeout)
            if now < at:
                self._state.deadlines.set((Due.ELEMENT, id), at)
            elif self._state.scheduler.condemn(slot, Why.LATE):
                process.kill()

    def _deadline(self, worker: Worker, batch: Batch) -> float:
        assert batch.timeout is not None
        _, phase = worker.memory.progress(batch.id)
        started = worker.memory.started[0]
        # Its clock starts when the element does. A worker that does not even begin is stopped, or has lost its memory.
        begun = started / 1e9 if phase is not Phase.SENT and started else worker.loaded_at + _BEGUN_WITHIN
        return begun + batch.timeout

    def _batch_is_overdue(self, id: int, now: float) -> None:
        slot = self._state.scheduler.slots[id]
        with self._lock:
            if slot.batch is not None:
                self._state.scheduler.overdue(slot, slot.batch)

    def _frame_is_not_whole(self, id: int, now: float) -> None:
        process = self._state.workers[id].current
        if process is not None and process.channel.partial:
            self.receiver.misused(self._state.workers[id], "wrote half a message to the pool's pipe")

    def _has_not_left(self, id: int, now: float) -> None:
        self.receiver.misused(self._state.workers[id], "closed the pool's pipe")

    def _resume(self, id: int, now: float) -> None:
        with self._lock:
            self._state.scheduler.block(Blocked.INTERRUPTED, False)

    _when_due: Final = {
        Due.START: _start,
        Due.READY: _not_ready,
        Due.ELEMENT: _element_may_be_late,
        Due.OVERDUE: _batch_is_overdue,
        Due.FRAME: _frame_is_not_whole,
        Due.LEAVE: _has_not_left,
        Due.RESUME: _resume,
    }

    def _recall(self) -> None:
        """Have workers give back what they have not begun: others have nothing to do."""
        with self._lock:
            while (slot := self._state.scheduler.recall()) is not None:
                process = self._state.workers[slot.id].current
                if process is not None and slot.batch is not None:
                    process.ask_back(TakeBack(slot.batch.id))

    def _count_dropped(self) -> None:
        """Have jobs that nobody wants any more end without the elements that were not sent."""
        with self._lock:
            dropped = self._state.scheduler.backlog.take_dropped()
        for chunk in dropped:
            chunk.job._drop(len(chunk))

    def _is_all_done(self) -> bool:
        return self._state.all_done and not self.serial.left

    def _stop_idle(self) -> None:
        state = self._state
        with self._lock:
            if not self._is_all_done():
                return
            state.starts.cancel()
            for worker, slot in zip(state.workers, state.scheduler.slots, strict=True):
                if worker.current is not None and state.scheduler.retire(slot):
                    worker.current.stop()

    def _was_done(self) -> None:
        """The serial thread has done something."""
        self.receiver.weigh_results()
        if self._state.life.closed or self._state.scheduler.can_assign:
            self._state.loop.wake()

    # -- starts

    def try_launch(self, id: int) -> None:
        """As `launch`; if the system does not let us, later."""
        state = self._state
        try:
            self.launch(id)
        except Exception as error:
            logger.exception("a worker could not be started")
            with self._lock:
                live = self._others_live(state.scheduler.slots[id])
                failure = state.starts.refused(id, time.monotonic(), error, others_live=live)
            self._break(failure)
            state.loop.wake()

    @interrupts_deferred()
    def launch(self, id: int) -> None:
        """Start a process in this slot, unless it has one or the pool has ended. By any thread."""
        state, token = self._state, object()
        worker, slot = state.workers[id], state.scheduler.slots[id]
        with self._lock:
            if not state.scheduler.hold(slot, token):
                return
        try:
            worker.start()
        finally:
            self._started(worker, slot, token)

    def _started(self, worker: Worker, slot: Slot, token: object) -> None:
        state = self._state
        with self._lock:
            process = worker.current
            state.scheduler.let_go(slot, token, started=process is not None)
            closed = slot.state is State.CLOSED
            if process is not None and not closed:
                state.loop.watch(worker)
                state.deadlines.set((Due.READY, slot.id), process.started_at + state.options.start_timeout)
        if closed:  # meanwhile
            worker.close_left()
        state.loop.wake()

    def _others_live(self, slot: Slot) -> bool:
        return any(
            worker.current is not None and worker.current.ready and worker.id != slot.id
            for worker in self._state.workers
        )

    def _after_death(self, reaped: Reaped) -> None:
        """Start another process?"""
        worker, process, report, was_idle = reaped
        state, failure = self._state, None
        now, slot = time.monotonic(), self._state.scheduler.slots[worker.id]
        with self._lock:
            if state.life.ends_now or (state.life.closed and self._is_all_done()):
                return
            if process.ready:
                state.starts.again(worker.id, now, started_at=process.started_at, was_idle=was_idle)
            else:
                detail = f"the last one: pid {report.pid}, {report.cause}\n{report.native_traceback}"
                live = self._others_live(slot)
                failure = state.starts.failed(
                    worker.id, now, error=process.start_error, detail=detail, others_live=live
                )
        self._break(failure)

    def _break(self, failure: WorkerStartError | None) -> None:
        if failure is not None:
            logger.error("%s", failure)
            self._state.life.advance(Stage.ENDING, failure, broken=True)
            self._state.loop.wake()

    # -- the end

    def finish(self, fault: BaseException | None) -> None:
        """End all processes, fail what is left, give everything back. Waits for no user code; every step is tried."""
        state = self._state
        if fault is not None:
            logger.error("the coordinator failed", exc_info=fault)
        reason = PoolTerminatedError(f"the pool's coordinator failed: {fault!r}")
        state.life.advance(Stage.ENDING, reason, broken=True)
        error = state.end_error()
        with self._lock:
            state.starts.cancel()
            entries = state.scheduler.end()
            jobs = list(state.jobs)  # each stays there until it has ended: `is_held_here` asks for its lock
            held = {slot.id for slot in state.scheduler.slots if slot.holder is not None}
        free = [worker for worker in state.workers if worker.id not in held]
        steps: list[Callable[[], object]] = [
            self._end_processes,
            functools.partial(state.fail_all, entries),
            *(functools.partial(job._abort, state.end_error()) for job in jobs),
            functools.partial(self.serial.drop, error),
            functools.partial(self.starter.drop, error),
            *(worker.close_left for worker in free),
            state.store.close,
            self._close_loop,
            *(end.close for end in self._life_ends),
            self._callbacks.finish,
            *([self._stay_at_exit] if self._stay_at_exit is not None else []),
            functools.partial(state.life.advance, Stage.ENDED),
        ]
        try_all(steps)
        self._stay_at_exit = None

    def _close_loop(self) -> None:
        with self._lock:
            self._state.loop.close()

    def _end_processes(self) -> None:
        """Those that are leaving get a moment to do so before they are terminated, and all before they are killed."""
        alive = [(worker, process) for worker in self._state.workers if (process := worker.current) is not None]
        sentinels = {process.sentinel: process for _, process in alive}
        for process in sentinels.values():
            if not process.stopped:
                process.terminate()
        self._wait_for(sentinels)
        late = [process for process in sentinels.values() if process.stopped]
        for process in late:
            process.terminate()
        if late:
            self._wait_for(sentinels)
        for process in sentinels.values():
            process.kill()

    def _wait_for(self, sentinels: dict[int, WorkerProcess]) -> None:
        deadline = time.monotonic() + GRACE
        while sentinels and (left := deadline - time.monotonic()) > 0:
            for sentinel in multiprocessing.connection.wait(list(sentinels), left):
                del sentinels[sentinel]  # type: ignore[arg-type]
