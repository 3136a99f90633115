"""The parent's side of one slot: start a process in it, send to it, stop it, read what it left, clean up.

The slot and its memory outlive its processes: what a worker was doing can be read after its death, and the next
process takes the same place. Everything here is done by whoever the coordinator's state says has this worker:
the thread that sends its batch, or the loop. Nothing here decides anything.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from ..._backends import Backend
from ..._shared_mem import SharedMem
from ...errors import HeaderError
from .._child.server import ServeArgs, serve
from .._interrupts import interrupts_blocked, interrupts_deferred
from .._wire.messages import Message, Move, Stop
from .._wire.pipe import PipeEnd, keep_from_children
from .._wire.slot_memory import CAPACITY, SLOT_HEADER, Phase, SlotMemory
from .exit_status import describe_exit, oom_kills
from .regions import StoredRegion

if TYPE_CHECKING:
    from .._wire.pipe import AnyConnection

from .waiter import PipePoller

__all__ = ["ExitReport", "Worker", "WorkerSettings"]

# Seconds that another thread has to note the exit code of a process it has reaped. It takes them all only where
# children are reaped behind our back, as with SIGCHLD ignored.
_NOTED_WITHIN = 0.5


class WorkerSettings(NamedTuple):
    """What all workers of a pool have in common."""

    context: BaseContext
    backend: Backend
    initializer: Any
    initargs: tuple[Any, ...]
    name: str  # stands in for "Process" in the process's name


class ExitReport(NamedTuple):
    """What is known of a process that died."""

    pid: int | None
    exitcode: int | None
    cause: str
    native_traceback: str


class Worker:
    """One slot."""

    def __init__(self, id: int, settings: WorkerSettings, life: AnyConnection) -> None:
        self.id = id
        self._settings = settings
        self._life = life
        self.slot = SlotMemory(self._create_memory())
        self.process: BaseProcess | None = None
        self.pipe: PipeEnd | None = None
        self._pidfd: int | None = None
        self._oom_kills: int | None = None
        self.starts = 0
        self.tasks_done = 0
        # Threads by their identifiers: an interrupted thread must find what it had in hand.
        self.sender: int | None = None  # puts a batch into the memory
        self.reader: int | None = None  # reads from the pipe
        self.died = False  # while somebody was sending, or talking to it
        self.handed_over = 0  # the batch that it certainly has, and whose answer the loop will hear
        self._begin_life()

    def _begin_life(self) -> None:
        """What is true of one process in the slot, and not of the next."""
        self.started_at = time.monotonic()
        self.ready = False
        self.deaf = False  # its pipe is no longer listened to
        self.attached = False  # the loop waits for its pipe; if not, whoever talks to it does
        self._ears: Any = None
        self.stopped = False  # it was asked to leave
        self.timed_out = False  # it was killed for a deadline
        self.loaded = 0  # the batch that was put into the memory last
        self.loaded_at = 0.0
        self.kill_at: float | None = None  # when it is to be killed unless it has ended by itself
        self.note = ""  # what it did wrong, where the exit code does not tell
        self.start_error = ""
        self.regions: list[int] = []  # ids of regions that it holds, as often as they were sent to it
        self.granted: dict[int, StoredRegion] = {}  # regions for its results
        self.functions: set[int] = set()  # maps whose function it has

    def start(self) -> None:
        """Start a process in this slot. Returns before it is ready; OSError and the like if it cannot be started."""
        settings = self._settings
        ours, theirs = multiprocessing.Pipe(duplex=True)
        # Before the fork: the child's copy of our end must go, or it would never see end-of-file.
        keep_from_children(ours)
        self.pipe = PipeEnd(ours)
        self._begin_life()
        self._check_memory()
        self.slot.phase[0] = Phase.SENT
        args = ServeArgs(theirs, self._life, str(self.slot.mem.address), settings.initializer, settings.initargs)
        process = settings.context.Process(target=serve, args=(args,))  # type: ignore[attr-defined]
        process.name = process.name.replace("Process", settings.name)
        process.daemon = True
        self._oom_kills = oom_kills()
        try:
            with interrupts_blocked(tracked=settings.context.get_start_method(allow_none=False) != "fork"):
                process.start()
        except BaseException:
            self.pipe.close()
            self.pipe = None
            raise
        finally:
            theirs.close()
        self.process = process
        self.starts += 1
        self._pidfd = _open_pidfd(process.pid)

    def _create_memory(self) -> SharedMem:
        return SharedMem.create(CAPACITY, backend=self._settings.backend, header=SLOT_HEADER)

    def _check_memory(self) -> None:
        """Have new memory if a wild process has overwritten the header of the old."""
        try:
            self.slot.mem.layout.check(memoryview(self.slot.area.obj))
        except HeaderError:
            self.close()
            self.slot.adopt(self._create_memory())

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    @property
    def sentinel(self) -> int:
        """Becomes ready when the process has ended.

        A pidfd where there is one (Linux 5.3): the standard library's sentinel is a pipe under fork, which stays
        open for as long as a process that a task has forked.
        """
        assert self.process is not None
        return self._pidfd if self._pidfd is not None else self.process.sentinel

    def wait_readable(self) -> bool:
        """Wait until it says something or has ended; whether there is something to be read."""
        assert self.pipe is not None
        if self._ears is None:
            self._ears = PipePoller(self.pipe.fileno(), self.sentinel)
        return self._ears.wait()  # type: ignore[no-any-return]

    def send(self, message: Message) -> None:
        """Send a message; OSError if the process is gone."""
        if self.pipe is None:
            raise BrokenPipeError("no process in this slot")
        self.pipe.send(message)

    def load(self, batch: int, elements: int, payload: bytes | memoryview, head: bytes, patience: int) -> None:
        """Put a batch into the slot's memory, which grows where it must. A `Run` message then hands it over."""
        needed = self.slot.room_needed(elements, len(payload), len(head))
        if needed > self.slot.mem.capacity:
            with interrupts_deferred():
                self.slot.mem.resize(max(needed, 2 * self.slot.mem.capacity))
                self.slot.adopt(self.slot.mem)
            with contextlib.suppress(OSError):  # the process is gone, which `Run` will show
                self.send(Move(str(self.slot.mem.address)))
        self.slot.prepare(batch, elements, payload, head, patience)
        self.loaded, self.loaded_at = batch, time.monotonic()

    def stop(self) -> None:
        """Ask the process to leave when it is done; it may be gone already."""
        self.stopped = True
        with contextlib.suppress(OSError):
            self.send(Stop())

    def terminate(self) -> None:
        """SIGTERM, or TerminateProcess on Windows."""
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.terminate()

    def kill(self) -> None:
        """SIGKILL: ends processes that ignore SIGTERM or are stopped."""
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.kill()

    def reap(self) -> ExitReport:
        """Reap the process, which has ended or is about to, and let go of it. The memory stays."""
        process = self.process
        if process is None:
            return ExitReport(None, None, "never started", "")
        process.join()
        exitcode, pid = _exitcode(process), process.pid
        now = oom_kills()
        oom = now is not None and self._oom_kills is not None and now > self._oom_kills
        trace = ""
        if exitcode != 0:
            trace = self.slot.trace()
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self.process = None  # not closed: who has got it from the pool may still ask for its exit code
        return ExitReport(pid, exitcode, describe_exit(exitcode, oom=oom), trace)

    def close(self) -> None:
        """Give the slot's memory back."""
        self.slot.mem.unlink()
        self.slot.close()


def _exitcode(process: BaseProcess) -> int | None:
    """The exit code of a process that has ended; None if somebody reaped it who does not tell."""
    # Any thread that starts a process, or asks for `active_children`, polls all children of multiprocessing's. If it
    # reaps ours, our own wait fails with ECHILD a moment before that thread has noted the exit code.
    deadline = time.monotonic() + _NOTED_WITHIN
    while (exitcode := process.exitcode) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return exitcode


def _open_pidfd(pid: int | None) -> int | None:
    # ESRCH: a forkserver's child that has been reaped already; ENOSYS, EPERM: old kernels and seccomp filters.
    # The sentinel does then.
    pidfd_open: Callable[[int], int] | None = getattr(os, "pidfd_open", None)
    if pid is None or pidfd_open is None:
        return None
    try:
        return pidfd_open(pid)
    except OSError:
        return None
