"""The parent's side of one worker: start a process, send to it, stop it, read what it left, reap it.

The worker and its memory outlive its processes: what one was doing can be read after its death, and the next one takes
the same place. Nothing here decides anything: who may call what is said by the state of the worker's slot.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..._backends import Backend
from ..._shared_mem import SharedMem
from ...errors import HeaderError
from .._child.server import ServeArgs, serve
from .._interrupts import interrupts_blocked, interrupts_deferred
from .._wire.messages import Forget, Message, Move, Stop
from .._wire.slot_memory import CAPACITY, SLOT_HEADER, Phase, SlotMemory
from .channel import Channel, open_channel
from .exit_status import describe_exit, oom_kills
from .regions import StoredRegion
from .teardown import try_all

if TYPE_CHECKING:
    from .._wire.pipe import AnyConnection

__all__ = ["ExitReport", "Worker", "WorkerProcess", "WorkerSettings"]

# Seconds that another thread has to note the exit code of a process it has reaped. It takes them all only where
# children are reaped behind our back, as with SIGCHLD ignored.
_NOTED_WITHIN: Final = 0.5

# Frames that are sent in one go to a worker that does not execute anything: a pipe takes some 270.
_FRAMES: Final = 64


class WorkerSettings(NamedTuple):
    """What all workers of a pool have in common."""

    context: BaseContext
    backend: Backend
    initializer: Any
    initargs: tuple[Any, ...]
    name: str  # stands in for "Process" in the process's name


class ExitReport(NamedTuple):
    """What is known of a process that has ended."""

    pid: int | None
    exitcode: int | None
    cause: str
    native_traceback: str


class WorkerProcess:
    """One process of a worker's, from its start until it is reaped, and what has been entrusted to it."""

    def __init__(self, process: BaseProcess, channel: Channel, memory_address: str, kills: int | None) -> None:
        self.process = process
        self.channel = channel
        self.memory_address = memory_address  # where it believes the slot's memory to be
        self.started_at = time.monotonic()
        self.ready = False
        self.stopped = False  # it was asked to leave
        self.note = ""  # what it did wrong, where the exit code does not tell
        self.start_error = ""
        self.regions: list[int] = []  # ids of regions that it holds, as often as they were sent to it
        self.granted: dict[int, StoredRegion] = {}  # regions for its results
        self.functions: set[int] = set()  # maps whose function it has
        self.forgotten: list[int] = []  # of these, the ones that it is still to let go of
        self._oom_kills = kills
        self._pidfd = _open_pidfd(process.pid)

    @property
    def sentinel(self) -> int:
        """Becomes ready when the process has ended.

        A pidfd where there is one (Linux 5.3): the standard library's sentinel is a pipe under fork, which stays
        open for as long as a process that a task has forked.
        """
        return self._pidfd if self._pidfd is not None else self.process.sentinel

    def send(self, message: Message) -> None:
        """Send without waiting; OSError if the process is gone or does not read."""
        self.channel.send(message)

    def ask_back(self, message: Message) -> None:
        """Have it give back what it has not begun; it may be gone."""
        with contextlib.suppress(OSError):
            self.channel.ask_back(message)

    def stop(self) -> None:
        """Ask it to leave when it is done; it may be gone already."""
        self.stopped = True
        with contextlib.suppress(OSError):
            self.send(Stop())

    def forget(self) -> None:
        """Have it let go of functions that are needed no more, now that it executes nothing and so reads."""
        with contextlib.suppress(OSError):
            for _ in range(min(len(self.forgotten), _FRAMES)):
                self.send(Forget(self.forgotten[-1]))
                self.forgotten.pop()

    def terminate(self) -> None:
        """SIGTERM, or TerminateProcess on Windows."""
        with contextlib.suppress(OSError):
            self.process.terminate()

    def kill(self) -> None:
        """SIGKILL: ends processes that ignore SIGTERM or are stopped."""
        with contextlib.suppress(OSError):
            self.process.kill()

    def reap(self) -> tuple[int | None, str]:
        """Wait for its end, which is there or about to come: the exit code, and the cause in words."""
        self.process.join()
        exitcode = _exitcode(self.process)
        now = oom_kills()
        oom = now is not None and self._oom_kills is not None and now > self._oom_kills
        return exitcode, describe_exit(exitcode, oom=oom)

    def close(self) -> None:
        """Close what we have of it; not the process object, of which others may still ask the exit code."""
        pidfd, self._pidfd = self._pidfd, None
        try:
            self.channel.close()
        finally:
            if pidfd is not None:
                os.close(pidfd)


class Worker:
    """One slot's memory, and the process in it, if there is one."""

    def __init__(self, id: int, settings: WorkerSettings, life: AnyConnection) -> None:
        self.id = id
        self._settings = settings
        self._life = life
        self.memory = SlotMemory(self._create_memory())
        self._address = str(self.memory.mem.address)
        self.current: WorkerProcess | None = None
        self.starts = 0
        self.tasks_done = 0
        self.loaded = 0  # the batch that was put into the memory last
        self.loaded_at = 0.0

    def start(self) -> WorkerProcess:
        """Start a process. Returns before it is ready; OSError and the like if it cannot be started."""
        settings = self._settings
        self._check_memory()
        self.memory.phase[0] = Phase.SENT
        channel, theirs, recall = open_channel()
        try:
            args = ServeArgs(theirs, self._life, recall, self._address, settings.initializer, settings.initargs)
            process = settings.context.Process(target=serve, args=(args,))  # type: ignore[attr-defined]
            process.name = process.name.replace("Process", settings.name)
            process.daemon = True
            kills = oom_kills()
            with interrupts_blocked(tracked=settings.context.get_start_method(allow_none=False) != "fork"):
                process.start()
        except BaseException:
            channel.close()
            raise
        finally:
            theirs.close()
            recall.close()
        self.current = WorkerProcess(process, channel, self._address, kills)
        self.starts += 1
        return self.current

    def _create_memory(self) -> SharedMem:
        return SharedMem.create(CAPACITY, backend=self._settings.backend, header=SLOT_HEADER)

    def _check_memory(self) -> None:
        """Have new memory if a wild process has overwritten the header of the old."""
        try:
            self.memory.mem.layout.check(memoryview(self.memory.area.obj))
        except HeaderError:
            self.close()
            self._adopt(self._create_memory())

    def _adopt(self, mem: SharedMem) -> None:
        self.memory.adopt(mem)
        self._address = str(mem.address)

    @property
    def pid(self) -> int | None:
        current = self.current
        return current.process.pid if current is not None else None

    def load(self, batch: int, elements: int, payload: bytes | memoryview, head: bytes, patience: int) -> None:
        """Put a batch into the slot's memory, which grows where it must. A `Run` message then hands it over."""
        needed = self.memory.room_needed(elements, len(payload), len(head))
        if needed > self.memory.mem.capacity:
            with interrupts_deferred():
                self.memory.mem.resize(max(needed, 2 * self.memory.mem.capacity))
                self._adopt(self.memory.mem)
        self.memory.prepare(batch, elements, payload, head, patience)
        self.loaded, self.loaded_at = batch, time.monotonic()

    def send_run(self, process: WorkerProcess, run: Message) -> None:
        """Hand the memory over, after what the process has to know of it first. OSError as in `send`."""
        if process.memory_address != self._address:  # derived, not remembered: who grew it may have been interrupted
            process.send(Move(self._address))
            process.memory_address = self._address
        process.send(run)

    def reap(self) -> ExitReport:
        """Reap the process, which has ended or is about to, and let go of it. The memory stays."""
        current = self.current
        if current is None:
            return ExitReport(None, None, "never started", "")
        exitcode, cause = current.reap()
        trace = self.memory.trace() if exitcode != 0 else ""
        self.current = None
        current.close()
        return ExitReport(current.process.pid, exitcode, cause, trace)

    def close_left(self) -> None:
        """The pool has ended and nobody holds the slot: let go of the process, and give the memory back."""
        current, self.current = self.current, None
        of_process = [] if current is None else [current.process.join, current.close]
        try_all([*of_process, self.memory.mem.unlink, self.memory.close])

    def close(self) -> None:
        """Give the slot's memory back."""
        try:
            self.memory.mem.unlink()
        finally:
            self.memory.close()


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
