"""The coordinator: what both pools are made of, and the end of it all.

One thread per pool runs the loop. All state is changed under one lock, and nothing is done under it that could wait: no
pickling, no user code; the one thing sent under it is the hand-over (`sending.py`). Who may touch a worker is said by
the state of its slot (`scheduler.py`).

A thread of the user's may be stopped between any two steps by an exception that is not of our making: Ctrl-C, in the
main thread. What it held is given back by `_interrupted`. Others lose nothing by it, because what such a thread sends
is never anything but what it submits itself.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing.process
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from ..._reaper import clean
from ...errors import PoolError, PoolTerminatedError
from .._interrupts import interrupts_deferred
from .._wire.slot_memory import Phase
from .._work import Chunk, Entry, Job, MapJob
from .at_exit import when_exiting
from .deadlines import Due
from .life import Stage
from .pool_state import PoolOptions, PoolState
from .scheduler import Slot, State
from .serial_thread import SerialThread
from .turns import PoolTurns
from .waiter import CAN_CALL_DIRECTLY
from .worker import Worker, WorkerSettings

__all__ = ["ClosedError", "Coordinator", "PoolOptions", "WorkerStats"]

logger = logging.getLogger("portshm")
logger.addHandler(logging.NullHandler())

# One hook for all pools: hooks of `register_at_fork` cannot be removed.
_engines: weakref.WeakSet[Coordinator] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_engines):
        engine.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_STATES = {State.VACANT: "starting", State.LOADING: "busy", State.RUNNING: "busy", State.LEAVING: "retiring"}


class WorkerStats(NamedTuple):
    """One worker, seen without asking it."""

    pid: int | None
    state: str  # "starting", "idle", "busy", "retiring", or "ended" until its death has been dealt with
    tasks_done: int  # elements finished by this slot's processes, the present batch's included
    running: float | None  # seconds since the present element started; None if none is executing
    restarts: int
    shared_bytes: int


class ClosedError(ValueError):
    """Submitted after `close`; what `multiprocessing.Pool` raises then, also where `close` comes in between."""

    def __init__(self) -> None:
        super().__init__("Pool not running")


class Coordinator:
    """The engine under both pools. Owns workers, regions and threads from `start` until the loop's `finish`."""

    def __init__(
        self, options: PoolOptions, settings: WorkerSettings, *, at_exit: Callable[[Coordinator], None]
    ) -> None:
        self._state = state = PoolState(options, settings)
        self._lock = state.lock
        self._life = state.life
        self._scheduler = state.scheduler
        self._loop = state.loop
        self._workers = state.workers
        self._callbacks = SerialThread("portshm-callbacks")
        self._turns = PoolTurns(state, self._callbacks)
        self._at_exit = at_exit  # called with us when the interpreter exits before our end
        self._starting = threading.Lock()
        self.inherited = False  # this is a forked child, where the engine is a dead copy of the parent's
        self._pid = os.getpid()
        _engines.add(self)

    @property
    def max_tasks(self) -> int | None:
        return self._state.options.max_tasks

    # -- for the pools, from any thread

    def start(self) -> None:
        """Start the workers and the loop. The first time only."""
        if self._life.started or self._life.closed:
            return
        with self._starting:
            if self._life.started or self._life.closed:
                return
            try:
                with interrupts_deferred():
                    # What pools before us left behind, if they were killed; it may be the very room that we need.
                    clean()
                    self._turns.open(lambda: when_exiting(functools.partial(self._at_exit, self)))
                self._start_workers()
                with interrupts_deferred():
                    self._loop.start()
            except BaseException as error:
                reason = PoolTerminatedError(f"the pool could not be started: {error!r}")
                self._life.advance(Stage.ENDING, reason, broken=True)
                if self._loop.is_running:  # an interrupt came when the thread was there already
                    self._loop.wake()
                else:
                    self._turns.finish(None)
                raise
            self._life.advance(Stage.RUNNING)
        self._loop.wake()

    def _start_workers(self) -> None:
        with self._lock:
            ids = [worker.id for worker in self._workers]
            if self._state.options.on_demand:
                self._state.starts.hold_back(ids[::-1])
                return
        for id in ids:
            self._turns.launch(id)

    @property
    def start_failed(self) -> bool:
        return self._life.ends_now and not self._life.started

    @property
    def broken(self) -> BaseException | None:
        """Why the pool has ended by itself; None if it has not, or was told to."""
        return self._life.broken

    @property
    def closed(self) -> bool:
        """Whether new calls are refused."""
        return self._life.closed

    def submit(self, entry: Entry) -> None:
        """Queue a call or a chunk; sent from this very thread if a worker is idle. ClosedError after `close`."""
        token = object()
        try:
            with self._lock:
                refused = self._life.closed and self._refuses(entry)
                slot = None if refused else self._scheduler.submit(entry, token)
            if refused:
                self._refuse(entry)
                return
            idle = slot is not None
            while slot is not None:
                self._turns.sender.send(slot, token)
                with self._lock:
                    slot = self._scheduler.submit_more(entry, token)
            if self._scheduler.can_assign:
                self._loop.wake()
            # One for each task, but for the first if a worker that was there has got it.
            if self._state.starts.some_held_back:
                self._start_more((entry.units if isinstance(entry, Chunk) else 1) - idle)
        except BaseException:
            self._interrupted(token)
            raise

    def call(self, call: Job) -> None:
        """Submit a call for which this thread has nothing to do but wait; it has ended, or soon will have."""
        token = object()
        try:
            with self._lock:
                directly = CAN_CALL_DIRECTLY and not self._life.closed and call._options.timeout is None
                slot = self._scheduler.submit(call, token) if directly and self._scheduler.has_idle else None
            if slot is not None:
                self._turns.direct.call(self._workers[slot.id], slot, token)
                return
        except BaseException:
            self._interrupted(token)
            raise
        self.submit(call)

    def _refuses(self, entry: Entry) -> bool:
        # While we are closing chunks may still come: their map began before that.
        return self._life.ends_now or self._life.stage is Stage.ENDED or isinstance(entry, Job)

    def _refuse(self, entry: Entry) -> None:
        if not self._life.ends_now:
            raise ClosedError
        self._state.fail_all([entry])

    def _start_more(self, count: int) -> None:
        for _ in range(count):
            with self._lock:
                id = self._state.starts.more()
            if id is None:
                return
            try:
                self._turns.try_launch(id)
            except BaseException:
                with self._lock:  # the loop does it
                    self._state.deadlines.set((Due.START, id), 0.0)
                self._loop.wake()
                raise

    def _interrupted(self, token: object) -> None:
        """An exception has stopped the thread with this token, wherever it was: what it held is given back."""
        with self._lock:
            let_go = [(self._workers[slot.id], slot.state) for slot in self._scheduler.interrupted(token)]
            for worker, state in let_go:
                # Leaving: nobody can say whether it has got its batch, or whether anybody would hear its answer.
                if state is State.LEAVING and worker.current is not None:
                    worker.current.kill()
        for worker, state in let_go:
            if state is State.CLOSED:
                worker.close_left()
            else:
                self._loop.look_at(worker)
        self._loop.wake()

    def add_job(self, job: MapJob) -> None:
        """Have a map-like job ended, should the pool end before it."""
        with self._lock:
            ended = self._life.stage is Stage.ENDED
            if not ended:
                self._state.jobs[job] = None
        if ended:
            job._abort(self._state.end_error())

    def forget(self, job: MapJob) -> None:
        """The job has ended, in whatever thread: its function is needed no more."""
        if self.inherited:
            return
        self._turns.loader.forget(job)
        with self._lock:
            self._state.jobs.pop(job, None)
            for worker, slot in zip(self._workers, self._scheduler.slots, strict=False):
                process = worker.current
                if process is not None and job._id in process.functions:
                    process.functions.discard(job._id)
                    process.forgotten.append(job._id)
                    if slot.state is State.IDLE:
                        process.forget()
        if self._life.closed:
            self._loop.wake()  # the end may have been waiting for just this job

    def later(self, action: Callable[[], None]) -> None:
        """Run what may be user code on the callback thread; here, in a forked child, which has none."""
        action() if self.inherited else self._callbacks.run(action)

    def close(self) -> None:
        """Take no more; workers leave when everything queued is done."""
        if self.inherited:
            return
        self._life.advance(Stage.CLOSING)
        self._loop.wake()

    def terminate(self, reason: str = "the pool was terminated") -> None:
        """End now: what is not finished fails with PoolTerminatedError. Waits for nothing; `join` does.

        Takes no lock that the caller may hold: this may be a signal handler, or a destructor.
        """
        if self.inherited:
            return
        self._life.advance(Stage.ENDING, PoolTerminatedError(reason))
        self._loop.wake()

    def join(self, *, callbacks: bool = True) -> None:
        """Wait until all workers and the loop have ended, and the `callbacks` that are there have run.

        Returns at once where that would never be: in the pool's own threads, and where this thread has been interrupted
        while it held what the end needs (a signal handler, a destructor). The end comes all the same.
        """
        serial, starter = self._turns.serial, self._turns.starter
        own = self._loop.is_current or serial.is_current or starter.is_current or self._callbacks.is_current
        if self.inherited or own or self._state.is_held_here():
            return
        self._loop.join()
        serial.join(wait=False)
        starter.join()  # what it is just starting it ends itself
        self._callbacks.join(wait=callbacks)

    def stop_reading(self, error: BaseException) -> None:
        """Have maps with a `buffersize` end with what they have read: who waits for the end may take no results."""
        for job in list(self._state.jobs):
            job._stop_reading(error)

    def cancel_queued(self) -> list[Entry]:
        """Take everything out of the queue that has not been sent, nor a worker been started for."""
        with self._lock:
            return self._scheduler.cancel_queue()

    def wake(self) -> None:
        """Have the loop look at the state again."""
        self._loop.wake()

    def stats(self) -> list[WorkerStats]:
        """Each worker's state, read from its memory; costs the worker nothing."""
        now = time.monotonic_ns()
        with self._lock:
            pairs = zip(self._workers, self._scheduler.slots, strict=False)  # none before the start
            return [_stats(worker, slot, now) for worker, slot in pairs]

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory: the slots' and the store's."""
        return self._state.store.bytes + sum(w.memory.mem.size for w in self._workers if not w.memory.mem.closed)

    @property
    def processes(self) -> list[Any]:
        return [current.process for worker in self._workers if (current := worker.current) is not None]

    def after_fork(self) -> None:
        """In a forked child: whoever uses the pool here is told so at once, and nothing of the parent's is touched."""
        self.inherited = True
        for process in self.processes:
            # multiprocessing ends its daemons when a process leaves; these are the parent's.
            multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
        self._lock = threading.RLock()  # another thread may have held it, which is not here
        cause = f"this pool belongs to process {self._pid}; a forked child has to make one of its own"
        self._life.is_anothers(PoolError(cause))


def _stats(worker: Worker, slot: Slot, now: int) -> WorkerStats:
    done, running, closed = worker.tasks_done, None, worker.memory.mem.closed
    if slot.batch is not None and not closed:
        count, phase = worker.memory.progress(slot.batch.id)
        done += count
        started = worker.memory.started[0]
        if phase is not Phase.SENT and started:
            running = max(0.0, (now - started) / 1e9)
    state = _STATES.get(slot.state, slot.state.name.lower())
    size = 0 if closed else worker.memory.mem.size
    return WorkerStats(worker.pid, state, done, running, max(0, worker.starts - 1), size)
