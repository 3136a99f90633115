"""The coordinator: waits on pipes and sentinels, feeds the scheduler, carries out its decisions.

One thread per pool runs the loop. All state is changed under one lock, and nothing is done under it that could
wait: no send, no pickling, no user code. Whoever is handed a slot with a batch by the scheduler sends it, be it the
loop or the thread that submitted, or the porter (`_porter.py`), which does for the loop what may run user code:
meanwhile `Worker.sender` is that thread, and the slot's memory is its alone.
A death that is noticed then is dealt with when the sender is done. The worker may have answered, and another thread
have the slot, before the sender is back from the system call: so it takes back only marks that are still its own.

A thread of the user's may be stopped between any two steps by an exception that is not of our making: Ctrl-C, in the
main thread. What it leaves half done is put in order by `_interrupted`. Others lose nothing by it, because what such a
thread sends is never anything but what it submits itself.

Sinks of results (`_results.py`) are settled by the loop without the lock.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple

from ..._reaper import clean
from ...errors import PoolTerminatedError, TaskTimeoutError, TransportError, WorkerCrashed, WorkerStartError
from .._interrupts import interrupts_deferred
from .._results import MapJob
from .._wire.messages import Done, Forget, GarbageError, Grant, Need, Ready, Released, StartFailed
from .._wire.pipe import PIPE_CLOSED, keep_from_children
from .._wire.slot_memory import Mode, Phase, Record, RecordError
from .at_exit import when_exiting
from .delivery import Delivery, fail, rebuild, settle
from .regions import RegionStore
from .scheduler import Batch, Chunk, Job, Scheduler, Slot, State
from .sending import Loader, NoRoomError, UnsendableError
from .serial_thread import SerialThread
from .starts import Starts
from .waiter import CAN_CALL_DIRECTLY, Waiter
from .worker import ExitReport, Worker, WorkerSettings

__all__ = ["ClosedError", "Coordinator", "WorkerStats"]

logger = logging.getLogger("portshm")
logger.addHandler(logging.NullHandler())

# Seconds between SIGTERM and SIGKILL, for processes that have something to do at their end.
_GRACE: Final = 0.2

# Seconds for a worker to begin with a batch that has a deadline.
_BEGUN_WITHIN: Final = 5.0

# Seconds; a selector takes no more than some weeks, and a deadline may be any number.
_LONGEST_WAIT: Final = 3600.0

# What the porter may have to do for each worker before workers get no more. A batch to be sent counts too.
_MOST_CARRIED: Final = 3

_WAKE: Final = "wake"


class WorkerStats(NamedTuple):
    """One worker, seen without asking it."""

    pid: int | None
    state: str  # "starting", "idle", "busy", "retiring", or "ended" until its death has been dealt with
    tasks_done: int  # elements finished by this slot's processes, the present batch's included
    running: float | None  # seconds since the present element started; None if none is executing
    restarts: int
    shared_bytes: int


class ClosedError(Exception):
    """Submitted after `close`."""


class Coordinator:
    """The engine under both faces."""

    @interrupts_deferred()
    def __init__(
        self,
        processes: int,
        settings: WorkerSettings,
        *,
        max_tasks: int | None = None,
        start_timeout: float = 60.0,
        max_shared_bytes: int | None = None,
        on_demand: bool = False,
        at_exit: Callable[[Coordinator], None],
    ) -> None:
        self.max_tasks = max_tasks
        self._pid = os.getpid()
        self._scheduler = Scheduler(processes, max_tasks)
        # Reentrant, because a garbage collection under it may end our own pool, whose destructor closes us.
        self._lock = threading.RLock()
        self._store = RegionStore(settings.backend, max_shared_bytes)
        self._loader = Loader(self._scheduler, self._lock, self._store)
        self._delivery = Delivery(self._store)
        self._porter = SerialThread(self._carried)
        self._start_timeout = start_timeout
        self._waiter = Waiter()
        self._wake_reader, self._wake_writer = multiprocessing.Pipe(duplex=False)
        life_reader, self._life_writer = multiprocessing.Pipe(duplex=False)
        self._life_reader = life_reader
        for end in (self._wake_reader, self._wake_writer, self._life_writer):
            keep_from_children(end)
        self._waiter.add(self._wake_reader, _WAKE)
        self._awake = False
        self._jobs: set[MapJob] = set()
        self._forgotten: list[int] = []  # ids of jobs that have ended, whose function workers may still have
        self._callbacks: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._callback_thread: threading.Thread | None = None
        self._starts = Starts(self._launch, self._break)
        self._deferred: list[Worker] = []  # died while somebody was sending to them
        self._starved = False  # a batch went back to the queue for want of room in the store
        self._ending = False  # one of: closing, terminating, broken
        self._terminating = False
        self._running = False  # the loop
        self._stillborn = False  # it is not to run any more: the start has failed
        self._timed = True  # there may be a deadline to be kept
        self._reason = "the pool was terminated"
        self.broken: BaseException | None = None
        self._settings = settings
        self._workers: list[Worker] = []
        self._on_demand = on_demand
        self._at_exit = at_exit  # called with us when the interpreter exits before our end
        self._stay_at_exit: Callable[[], object] | None = None  # takes that back
        self._thread = threading.Thread(target=self._run, name="portshm-coordinator", daemon=True)
        self._started = False
        self.start_failed = False

    # -- for the faces, from any thread

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child, where the engine is a dead copy of the parent's."""
        return self._pid != os.getpid()

    def start(self) -> None:
        """Start the workers and the loop. The first time only."""
        with self._lock:
            if self._started:
                return
            self._started = True
            try:
                with interrupts_deferred():
                    # What pools before us left behind, if they were killed; it may be the very room that we need.
                    clean()
                    self._stay_at_exit = when_exiting(functools.partial(self._at_exit, self))
                    for slot in self._scheduler.slots:
                        self._workers.append(Worker(slot.id, self._settings, self._life_reader))
            except BaseException:
                self._terminating = self.start_failed = True
                self._release()
                raise
        try:
            if self._on_demand:
                self._starts.hold_back(self._workers[::-1])
            else:
                for worker in self._workers:
                    self._launch(worker)
            with interrupts_deferred():
                self._thread.start()
        except BaseException:
            self._terminating = self._ending = self.start_failed = True
            with self._lock:  # an interrupt may have come when the thread was there already
                self._stillborn = not self._running
            if self._stillborn:
                self._end_processes()
                self._release()
            else:
                self.wake()
            raise

    @property
    def closing(self) -> bool:
        return self._scheduler.closing or self._terminating

    def submit(self, entry: Job | Chunk) -> None:
        """Queue a call or a chunk; sent from this very thread if a worker is idle. ClosedError after `close`."""
        try:
            with self._lock:
                # While we are closing chunks may still come: their map began before that.
                refused = self._ending and (self._ends_now or isinstance(entry, Job))
                slot = None if refused else self._scheduler.submit(entry)
                if slot is not None:
                    self._workers[slot.id].sender = threading.get_ident()
            idle = slot is not None
            while slot is not None:
                self._send(slot)
                with self._lock:
                    slot = None if self._starved else self._scheduler.submit_more(entry)
                    if slot is not None:
                        self._workers[slot.id].sender = threading.get_ident()
            if self._scheduler.can_assign and not self._starved:
                self.wake()
            # One for each task, but for the first if a worker that was there has got it.
            if self._starts.some_held_back and not refused and (more := entry.units - idle) > 0:
                self._starts.more(more)
                self._timed = True
                self.wake()  # it has a deadline, and on Windows the loop waits for those only that it knew of
        except BaseException:
            self._interrupted()
            raise
        if refused:
            if not self._ends_now:
                raise ClosedError
            self._settle_all([entry], self._end_error())

    def call(self, call: Job) -> None:
        """Submit a call for which this thread has nothing to do but wait; it has ended, or soon will have.

        If a worker is idle, this thread talks to it directly: with the loop between them there would be a change of
        thread more on the way back, which costs as much as the way to the worker and back.
        """
        try:
            with self._lock:
                talk = CAN_CALL_DIRECTLY and not self._ending and self._scheduler.has_idle and call.timeout is None
                slot = self._scheduler.submit(call) if talk else None
                if slot is not None:
                    worker = self._workers[slot.id]
                    worker.sender = threading.get_ident()
                    talk = worker.reader is None
                    if talk:
                        worker.reader = worker.sender
            if slot is not None and talk:
                self._talk(worker, slot)
            elif slot is not None:
                self._send(slot)
        except BaseException:
            self._interrupted()
            raise
        if slot is None and not talk:
            self.submit(call)

    def _talk(self, worker: Worker, slot: Slot) -> None:
        """Send the slot's batch and take the answer, in this thread, which is `worker.reader`."""
        batch = slot.batch
        self._detach(worker)
        self._send(slot, attach=False)
        while slot.batch is batch and not worker.deaf and worker.wait_readable():
            self._take(worker)
        with self._lock:
            worker.reader = None
            self._defer_death(worker)
        if slot.batch is not None:  # the loop's again; an idle one stays detached for the next call
            self._attach(worker)
        if slot.batch is not None or self._deferred or self._scheduler.can_assign:
            self.wake()

    def _interrupted(self) -> None:
        """Put in order what this thread was doing when an exception stopped it, wherever that was.

        What it was submitting nobody has got a result of. If nobody can say whether a worker has got its batch, or
        whether somebody will hear its answer, the worker is killed; its death puts that in order.
        """
        me = threading.get_ident()
        with self._lock:
            for worker, slot in zip(self._workers, self._scheduler.slots, strict=True):
                busy = {worker.sender, worker.reader} - {None}
                lost = slot.batch is not None and slot.batch.id != worker.handed_over
                if me not in busy and (busy or not lost):
                    continue
                worker.sender = None if worker.sender == me else worker.sender
                worker.reader = None if worker.reader == me else worker.reader
                if worker.pipe is not None:
                    self._waiter.remove(worker.pipe)
                    worker.attached = False
                if self._defer_death(worker):
                    continue
                if lost or slot.batch is None:
                    worker.kill()
                else:
                    self._attach(worker)
            self._scheduler.repair()
        if self._scheduler.waiting:  # for one of these, which we may have been about to start
            self._starts.leave_to_the_loop()
        self._timed = True
        self._awake = False  # it may be set, and nothing sent
        self.wake()

    def _defer_death(self, worker: Worker) -> bool:
        """Leave a death that was noticed while the memory or the pipe was this thread's to the loop; under the lock."""
        died, worker.died = worker.died, False
        if died:
            self._deferred.append(worker)
        return died

    def _attach(self, worker: Worker) -> None:
        with self._lock:
            if not worker.attached and not worker.deaf and worker.pipe is not None:
                self._waiter.add(worker.pipe, (worker, True))
                worker.attached = True

    def _detach(self, worker: Worker) -> None:
        with self._lock:
            if worker.attached:
                self._waiter.remove(worker.pipe)
                worker.attached = False

    def add_job(self, job: MapJob) -> None:
        """Have a map-like job ended, should the pool end before it."""
        with self._lock:
            self._jobs.add(job)

    def forget(self, job: MapJob) -> None:
        """The job has ended, in whatever thread: its function is needed no more."""
        with job.packing:
            packed, job.packed_function = job.packed_function, None
        with self._lock:
            self._jobs.discard(job)
            self._forgotten.append(job.id)
        if packed is not None and packed.stored is not None:
            self._store.release(packed.stored.id)
        if not self._in_loop():
            self.wake()  # besides, the end may have been waiting for just this job

    def later(self, action: Callable[[], None]) -> None:
        with self._lock:
            if self._callbacks is None:
                self._callbacks = queue.SimpleQueue()
                thread = threading.Thread(
                    target=_run_callbacks, args=(self._callbacks,), name="portshm-callbacks", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is exiting (3.12): here, then
                    self._callbacks = None
                else:
                    self._callback_thread = thread
            callbacks = self._callbacks
        if callbacks is not None:
            callbacks.put(action)
        else:
            action()

    def close(self) -> None:
        """Take no more; workers leave when everything queued is done."""
        with self._lock:
            self._scheduler.closing = self._ending = True
            started = self._started
            if not started:
                self._started = self._terminating = True
                self._release()
        if started:
            self.wake()

    def terminate(self, reason: str = "the pool was terminated") -> None:
        """End now: what is not finished fails with PoolError. Does not wait; `join` does."""
        if self.inherited:
            return
        self._reason = reason
        self.close()
        self._terminating = True
        self.wake()

    def join(self) -> None:
        """Wait until all workers and the loop have ended."""
        if self.inherited:
            return
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        self._porter.join()
        if self._callback_thread is not None and threading.current_thread() is not self._callback_thread:
            self._callback_thread.join()

    def stop_reading(self, error: BaseException) -> None:
        """Have maps with a `buffersize` end with what they have read: who waits for the end may take no results."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.stop_reading(error)

    def cancel_queued(self) -> list[Job | Chunk]:
        """Take everything out of the queue that has not been sent, nor a worker been started for."""
        with self._lock:
            starting = sum(
                worker.process is not None and slot.state is State.STARTING
                for worker, slot in zip(self._workers, self._scheduler.slots, strict=False)
            )
            return self._scheduler.cancel_queue(keep=starting)

    def wake(self) -> None:
        """Have the loop look at the state again."""
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):
                self._wake_writer.send_bytes(b"")

    def stats(self) -> list[WorkerStats]:
        """Each worker's state, read from its memory; costs the worker nothing."""
        now = time.monotonic_ns()
        found = []
        with self._lock:
            for worker, slot in zip(self._workers, self._scheduler.slots, strict=False):  # none before the start
                done, running = worker.tasks_done, None
                if slot.batch is not None and not worker.slot.mem.closed:
                    count, phase = worker.slot.progress(slot.batch.id)
                    done += count
                    started = worker.slot.started[0]
                    if phase is not Phase.SENT and started:
                        running = max(0.0, (now - started) / 1e9)
                found.append(
                    WorkerStats(
                        worker.pid,
                        slot.state.name.lower(),
                        done,
                        running,
                        max(0, worker.starts - 1),
                        0 if worker.slot.mem.closed else worker.slot.mem.size,
                    )
                )
        return found

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory: the slots' and the store's."""
        return self._store.bytes + sum(w.slot.mem.size for w in self._workers if not w.slot.mem.closed)

    @property
    def pids(self) -> list[int]:
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    @property
    def processes(self) -> list[Any]:
        return [process for worker in self._workers if (process := worker.process) is not None]

    # -- the loop

    def _run(self) -> None:
        with self._lock:
            if self._stillborn:
                return
            self._running = True
        try:
            while not (self._ending and self._over()):
                self._turn()
        except BaseException as error:  # a fault of ours: nobody may be left waiting
            logger.exception("the coordinator failed")
            with self._lock:
                self.broken = self.broken or PoolTerminatedError(f"the pool's coordinator failed: {error!r}")
        finally:
            self._finish()

    def _turn(self) -> None:
        ready = self._waiter.wait(self._wait_time() if self._timed else None)
        died = []
        for key in ready:
            if key is _WAKE:
                self._awake = False
                with contextlib.suppress(OSError):
                    self._wake_reader.recv_bytes()
            else:
                worker, is_pipe = key
                if is_pipe:
                    self._read(worker)
                else:
                    died.append(worker)
        for worker in died:
            self._died(worker)
        if self._deferred:
            with self._lock:
                deferred, self._deferred = self._deferred, []
            for worker in deferred:
                self._detach(worker)
                self._buried(worker, worker.reap())
        if self._timed:
            self._keep_time()
        if self._scheduler.can_assign:
            self._send_leftovers()
        if self._scheduler.dropped:
            self._count_dropped()
        if self._forgotten:
            self._tell_forgotten()
        if self._scheduler.closing:
            self._stop_idle()

    @property
    def _ends_now(self) -> bool:
        return self._terminating or self.broken is not None

    def _over(self) -> bool:
        if self._ends_now:
            return True
        with self._lock:
            return self._scheduler.closing and self._all_done() and not any(w.process for w in self._workers)

    def _all_done(self) -> bool:
        return self._scheduler.idle and not self._jobs and not self._porter.left

    def _wait_time(self) -> float | None:
        """Until the next deadline; the wait ends earlier for anything that happens."""
        moments = self._starts.moments
        now = time.monotonic()
        for worker, slot in zip(self._workers, self._scheduler.slots, strict=True):
            if worker.process is not None and slot.state is State.STARTING:
                moments.append(worker.started_at + self._start_timeout)
            if worker.kill_at is not None:
                moments.append(worker.kill_at)
            batch = slot.batch
            if batch is not None and batch.job.timeout is not None and not worker.timed_out:
                # No later than that, because an element that has not begun may do so at once.
                moments.append(min(self._deadline(worker, batch, now), now + batch.job.timeout))
        if not moments:
            self._timed = False
            return None
        return min(max(0.0, min(moments) - now), _LONGEST_WAIT)

    def _deadline(self, worker: Worker, batch: Batch, now: float) -> float:
        assert batch.job.timeout is not None
        if worker.loaded != batch.id:
            return now + batch.job.timeout  # somebody is about to load it
        _, phase = worker.slot.progress(batch.id)
        started = worker.slot.started[0]
        # Its clock starts when the element does. A worker that does not even begin is stopped, or has lost its memory.
        begun = started / 1e9 if phase is not Phase.SENT and started else worker.loaded_at + _BEGUN_WITHIN
        return begun + batch.job.timeout

    def _keep_time(self) -> None:
        self._starts.those_due()
        now = time.monotonic()
        for worker, slot in zip(self._workers, self._scheduler.slots, strict=True):
            starting = worker.process is not None and slot.state is State.STARTING and not worker.start_error
            if starting and now >= worker.started_at + self._start_timeout:
                worker.start_error = f"no answer within {self._start_timeout:g} s of its start (start_timeout)"
                worker.kill()
            if worker.kill_at is not None and now >= worker.kill_at:
                worker.kill_at = None
                worker.note = "closed the pool's pipe"
                worker.kill()
            batch = slot.batch
            if batch is None or batch.job.timeout is None or worker.timed_out or worker.sender is not None:
                continue
            if now >= self._deadline(worker, batch, now):
                worker.timed_out = True
                worker.kill()

    def _send_leftovers(self) -> None:
        """Give idle workers what is left in the queue."""
        while True:
            with self._lock:
                if self._starved or self._congested or not self._scheduler.waiting:
                    return
                slot = self._scheduler.assign_idle()
                if slot is None:
                    return
                self._workers[slot.id].sender = threading.get_ident()
            self._pass_on(slot)

    def _count_dropped(self) -> None:
        """Have jobs that nobody wants any more end without the elements that were not sent."""
        with self._lock:
            dropped, self._scheduler.dropped = self._scheduler.dropped, []
        for chunk in dropped:
            assert isinstance(chunk.job, MapJob)
            chunk.job.drop(len(chunk))

    def _tell_forgotten(self) -> None:
        """Have workers let go of functions. By the loop only: any other thread might find the pipe closed under it."""
        with self._lock:
            forgotten, self._forgotten = self._forgotten, []
        for worker in self._workers:
            for id in worker.functions.intersection(forgotten):
                worker.functions.discard(id)
                with contextlib.suppress(OSError):
                    worker.send(Forget(id))

    def _stop_idle(self) -> None:
        with self._lock:
            if not self._all_done():
                return
            leaving = [w for w in self._workers if w.ready and not w.stopped]
        self._starts.cancel()
        for worker in leaving:
            worker.stop()

    # -- messages

    def _read(self, worker: Worker) -> None:
        """Read and take what the worker says, unless somebody is talking to it."""
        with self._lock:
            if worker.pipe is None or worker.reader is not None:
                return
            worker.reader = threading.get_ident()
        self._take(worker)
        worker.reader = None

    def _take(self, worker: Worker) -> None:
        assert worker.pipe is not None
        try:
            messages = worker.pipe.receive()
        except GarbageError:
            self._misused(worker, "wrote garbage to the pool's pipe")
            return
        except (EOFError, OSError):
            # The process is about to end, or a task has closed the pipe. Without one it is no worker any more.
            self._turn_away(worker)
            worker.kill_at = time.monotonic() + _GRACE
            self._timed = True
            return
        for message in messages:
            if worker.deaf:
                return
            if isinstance(message, Done):
                self._on_done(worker, message)
            elif isinstance(message, Need):
                self._on_need(worker, message)
            elif isinstance(message, Ready):
                self._on_ready(worker)
            elif isinstance(message, Released):
                self._take_back(worker, message.ids)
            elif isinstance(message, StartFailed):
                worker.start_error = message.text

    def _turn_away(self, worker: Worker) -> None:
        """Listen to it no longer."""
        self._detach(worker)
        worker.deaf = True

    def _misused(self, worker: Worker, note: str) -> None:
        """A task has done something to the worker that makes it none of ours. Its memory tells how far it was."""
        worker.note = note
        self._turn_away(worker)
        worker.kill()

    def _on_ready(self, worker: Worker) -> None:
        with self._lock:
            worker.ready = True
            self._starts.ready()
            slot = self._scheduler.slots[worker.id]
            got = self._scheduler.ready(slot)
            worker.sender = threading.get_ident() if got else None
        if got:
            self._pass_on(slot)

    def _on_done(self, worker: Worker, done: Done) -> None:
        slot = self._scheduler.slots[worker.id]
        batch = slot.batch
        if batch is None or batch.id != done.batch:
            self._misused(worker, "wrote garbage to the pool's pipe")
            return
        if done.finished < 0:
            self._on_unreadable(worker, slot)
            return
        try:
            if not 0 < done.finished <= len(batch):
                raise RecordError(f"{done.finished} of {len(batch)} elements finished")
            record = worker.slot.outcomes(done.finished, len(batch))
        except RecordError as error:
            self._misused(worker, f"left a record that makes no sense: {error}")
            return
        self._take_back(worker, done.released)
        with self._lock:
            worker.tasks_done += done.finished
            more = self._in_loop() and not self._congested
            got = self._scheduler.done(slot, done.finished, done.elapsed / 1e9, more=more)
            worker.sender = threading.get_ident() if got else None
            self._starved = False
        # The worker first: what is delivered may wake threads that then want the interpreter.
        if got:
            self._pass_on(slot)
        elif slot.state is State.RETIRING:
            worker.stop()
        self._deliver(worker, batch, record)

    def _deliver(self, worker: Worker, batch: Batch, record: Record) -> None:
        """Settle the first elements of a batch; in the loop only if that runs no user code."""
        entries = self._delivery.claim(worker, record.entries)
        if not self._in_loop():
            self._delivery.deliver(batch, record.numbers, self._delivery.results(entries))
            return
        job = batch.job
        carried = isinstance(job, MapJob) and job.carried  # then all that follows, or two threads would be at it
        results = None if carried else self._delivery.plain_results(entries)
        if results is not None:
            self._delivery.deliver(batch, record.numbers, results)
            return
        if isinstance(job, MapJob):
            job.carried = True
        count = len(record.numbers) + len(entries)

        def unpickle() -> None:
            self._delivery.deliver(batch, record.numbers, self._delivery.results(entries))

        def drop(error: BaseException) -> None:
            for position in range(count):
                owner, index, _ = batch.owner(position)
                fail(owner, index, error)

        self._porter.run(unpickle, drop)

    def _carried(self) -> None:
        if self._ending or self._scheduler.can_assign:
            self.wake()

    @property
    def _congested(self) -> bool:
        """Whether the porter has so much to do that more results would only pile up."""
        return self._porter.left > _MOST_CARRIED * len(self._workers)

    def _on_unreadable(self, worker: Worker, slot: Slot) -> None:
        try:
            _, entries = worker.slot.outcomes(1, 1)
            reason: BaseException = rebuild(pickle.loads(entries[0].data))
        except Exception as problem:
            reason = problem
        assert slot.batch is not None
        if isinstance(slot.batch.job, MapJob):
            worker.functions.discard(slot.batch.job.id)  # it may not have come as far as that
        with self._lock:
            verdict = self._scheduler.unreadable(slot)
            got = self._scheduler.free(slot, more=self._in_loop())
            worker.sender = threading.get_ident() if got else None
        if verdict.culprit is not None:
            job, index, _ = verdict.culprit
            error = TransportError(f"the worker could not unpickle what it was to call: {reason!r}")
            error.__cause__ = reason
            fail(job, index, error)
        if got:
            self._pass_on(slot)

    def _on_need(self, worker: Worker, need: Need) -> None:
        try:
            stored = self._store.acquire(need.size, force=True)
        except Exception as error:
            grant = Grant(0, 0, str(error))
        else:
            worker.granted[stored.id] = stored
            grant = Grant(stored.id, stored.size, stored.address)
        with contextlib.suppress(OSError):
            worker.send(grant)

    def _take_back(self, worker: Worker, ids: str) -> None:
        """The worker has let go of regions that were sent to it."""
        for text in ids.split(","):
            if text.isdecimal() and (id := int(text)) in worker.regions:
                worker.regions.remove(id)
                self._store.release(id)
                self._starved = False

    # -- deaths

    def _died(self, worker: Worker) -> None:
        """The process has ended. First what it still said, then what it left."""
        if worker.process is None:
            return
        with self._lock:
            # Now, and not when it is buried: another thread could be given the slot until then, and what it sends would
            # come to the next process.
            self._scheduler.ended(self._scheduler.slots[worker.id])
        while not worker.deaf and worker.reader is None and worker.pipe is not None:
            if not worker.pipe.connection.poll(0):
                break
            self._read(worker)
        self._waiter.remove(worker.sentinel)
        self._detach(worker)
        with self._lock:
            if worker.sender is not None or worker.reader is not None:
                worker.died = True
                return
        self._buried(worker, worker.reap())

    def _buried(self, worker: Worker, report: ExitReport) -> None:
        slot = self._scheduler.slots[worker.id]
        batch = slot.batch
        if report.exitcode == PIPE_CLOSED:
            worker.note = "closed the pool's pipe"
        finished, phase = 0, Phase.SENT
        record = Record()
        item: Any = None
        lost: list[tuple[Job, int, Any]] = []
        if batch is not None:
            finished, phase = worker.slot.progress(batch.id)
            finished = min(finished, len(batch))
            spoilt = worker.loaded == batch.id and not worker.slot.tells_of(batch.id)
            if spoilt:
                worker.note = worker.note or f"{report.cause}, and its memory was overwritten"
            if worker.note and len(batch) == 1:
                finished, phase = 0, Phase.RUNNING  # it has done that, whatever it has put on record
            elif spoilt:  # any of them may have run, and none must run twice
                finished, phase = len(batch), Phase.RUNNING
                lost = [batch.owner(position) for position in range(finished)]
            if batch.mode is Mode.VALUE:
                with contextlib.suppress(Exception):
                    item = worker.slot.mem.value_copy()
            try:
                record = Record() if lost else worker.slot.outcomes(finished, len(batch))
            except RecordError as error:
                worker.note = f"left a record that makes no sense: {error}"
                lost = [batch.owner(position) for position in range(finished)]
        with self._lock:
            verdict = self._scheduler.died(slot, finished, phase)
            worker.tasks_done += finished
            self._starved = False
        if batch is not None:
            self._deliver(worker, batch, record)
        for id in [*worker.regions, *worker.granted]:
            self._store.release(id)
        for job, index, arguments in [*lost, *filter(None, [verdict.culprit])]:
            fail(job, index, self._crash(worker, report, job, index, item if item is not None else arguments))
        logger.info("worker %s ended: %s", report.pid, report.cause)
        if not self._ends_now and not (self._scheduler.closing and self._all_done()):
            if worker.ready:
                self._starts.again(worker, was_idle=batch is None and not worker.stopped)
            else:
                self._starts.failed(worker, report)
            self._timed = True

    def _crash(self, worker: Worker, report: ExitReport, job: Job, index: int, item: Any) -> WorkerCrashed:
        if worker.timed_out:
            cause = f"deadline of {job.timeout:g} s passed"
            return TaskTimeoutError(index, item, report.pid, report.exitcode, cause, report.native_traceback)
        cause = worker.note or report.cause
        return WorkerCrashed(index, item, report.pid, report.exitcode, cause, report.native_traceback)

    @interrupts_deferred()
    def _launch(self, worker: Worker) -> None:
        worker.start()
        try:
            self._attach(worker)
            self._waiter.add(worker.sentinel, (worker, False))
            self._timed = True
        except BaseException:
            for obj in (worker.pipe, worker.sentinel):
                self._waiter.remove(obj)
            worker.kill()
            worker.reap()
            raise

    def _break(self, error: WorkerStartError) -> None:
        logger.error("%s", error)
        with self._lock:
            self.broken = error
            self._ending = True

    # -- sending

    def _in_loop(self) -> bool:
        return threading.get_ident() == self._thread.ident

    def _pass_on(self, slot: Slot) -> None:
        """Have the batch that this thread was given sent: by the porter, if it is the loop and user code may run."""
        batch = slot.batch
        assert batch is not None
        if not self._in_loop() or self._loader.is_plain(batch) or (porter := self._porter.ident) is None:
            self._send(slot)
            return
        with self._lock:
            self._workers[slot.id].sender = porter
        self._porter.run(lambda: self._send(slot), lambda error: None)  # at the end the slot's batch is seen to

    def _send(self, slot: Slot, *, attach: bool = True) -> None:
        """Pickle and send the batch of a slot that this thread was given. What cannot be sent ends here."""
        worker, batch, me = self._workers[slot.id], slot.batch, threading.get_ident()
        if batch is None:
            return  # the pool has ended meanwhile
        if attach and not worker.attached:
            self._attach(worker)
        sent = self._try_send(worker, slot, batch)
        with self._lock:
            if attach and slot.batch is batch:
                worker.handed_over = batch.id
            if worker.sender == me:
                worker.sender = None
                self._defer_death(worker)
        if sent and batch.job.timeout is not None:
            self._timed = True
            self.wake()
        elif self._deferred or not sent:  # what went back to the queue is for another worker, or for this one again
            self.wake()

    def _try_send(self, worker: Worker, slot: Slot, batch: Batch) -> bool:
        """Send the batch, if it can be sent; else deal with it, and make the slot idle, or another thread's."""
        try:
            message = self._loader.load(worker, slot, batch)
        except UnsendableError as error:
            self._give_back(slot, error.failed)
            for position, reason in error.failed.items():
                job, index, _ = batch.owner(position)
                fail(job, index, reason)
            return False
        except NoRoomError:
            self._give_back(slot, ())
            return False
        with contextlib.suppress(OSError):  # the process is gone, which the loop will notice
            worker.send(message)
        return True

    def _give_back(self, slot: Slot, failed: Collection[int]) -> None:
        """The slot's batch cannot be sent: `failed` positions of it never, the others not now."""
        with self._lock:
            if slot.batch is None:
                return  # the pool has ended meanwhile
            self._scheduler.unsendable(slot, failed)
            if not failed:
                self._starved = any(other.batch is not None for other in self._scheduler.slots)
            self._scheduler.free(slot, more=False)

    # -- the end

    def _end_error(self) -> BaseException:
        return self.broken if self.broken is not None else PoolTerminatedError(self._reason)

    def _finish(self) -> None:
        """End all processes, fail what is left, give everything back. The last thing that happens."""
        with self._lock:
            self._terminating = self._ending = True
        self._starts.end()
        self._end_processes()
        error = self._end_error()
        with self._lock:
            entries = self._scheduler.drop_queue()
            for slot in self._scheduler.slots:
                if slot.batch is not None:
                    entries += slot.batch.rest(0)
                    slot.batch = None
            jobs, self._jobs = self._jobs, set()
        self._settle_all(entries, error)
        for job in jobs:
            job.abort(error)
        self._release()

    def _release(self) -> None:
        """Give everything back to the system, and let go of what refers to us."""
        self._starts.end()
        self._porter.end(self._end_error())
        for worker in self._workers:
            worker.close()
        self._store.close()
        self._waiter.close()
        self._close_pipes()
        if self._callbacks is not None:
            self._callbacks.put(None)
        stay, self._stay_at_exit = self._stay_at_exit, None
        if stay is not None:
            stay()

    def _end_processes(self) -> None:
        alive = [worker for worker in self._workers if worker.process is not None]
        for worker in alive:
            worker.terminate()
        deadline = time.monotonic() + _GRACE
        sentinels = {worker.sentinel: worker for worker in alive}
        while sentinels and (left := deadline - time.monotonic()) > 0:
            for sentinel in multiprocessing.connection.wait(list(sentinels), left):
                del sentinels[sentinel]  # type: ignore[arg-type]
        for worker in sentinels.values():
            worker.kill()
        for worker in alive:
            worker.reap()

    def _close_pipes(self) -> None:
        for end in (self._wake_reader, self._wake_writer, self._life_reader, self._life_writer):
            end.close()

    def _settle_all(self, entries: list[Job | Chunk], error: BaseException) -> None:
        for entry in entries:
            if isinstance(entry, Chunk):
                assert isinstance(entry.job, MapJob)
                entry.job.abort(error)
            else:
                settle(entry, False, error)


def _run_callbacks(actions: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (action := actions.get()) is not None:
        try:
            action()
        except BaseException:
            logger.exception("a callback failed")
