"""The child's side of a slot: serve batches until the pipe closes.

What a task does wrong must fail that task and nothing else, so everything that runs user code is guarded, and
everything that cannot be guarded (a fault, an exit) leaves the memory in a state that tells what was going on.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..._backends import fill_region, private_view
from ..._payload import WORTH_A_MAPPING, Payload, Place, pack_small, read_payload, unpack, unpack_batch
from ..._region import RegionAddress
from ..._shared_mem import SharedMem
from ...errors import HeaderError, RegionFullError
from .._interrupts import killed_at_hangup, unblock_interrupts
from .._wire.messages import Done, Forget, Grant, Message, Move, Need, Ready, Released, Run, StartFailed, Stop
from .._wire.pipe import PIPE_CLOSED, PipeEnd, keep_from_children
from .._wire.slot_memory import (
    NOTHING,
    SLOT_HEADER,
    Entry,
    Mode,
    Phase,
    RecordWriter,
    Reference,
    RemoteError,
    SlotMemory,
    aligned,
    safe_repr,
)

if TYPE_CHECKING:
    from .._wire.pipe import AnyConnection

__all__ = ["ServeArgs", "serve"]

# A worker that noticed its coordinator's death leaves with this; nobody is there to read it.
_ORPHANED: Final = 70

# A worker whose memory has no proper header leaves with this, and the next one gets new memory.
_MEMORY_SPOILT: Final = 72

_NUMBERS: Final = frozenset((int, float))

# Arguments that lie in mappings of their own at the same time: a mapping has a descriptor (before CPython 3.13).
_MOST_MAPPINGS: Final = 256


class ServeArgs(NamedTuple):
    """What a child gets at its start, by inheritance or pickled, as its start method has it."""

    connection: AnyConnection
    life: AnyConnection  # never written to: end-of-file says that the coordinator is gone
    recall: AnyConnection  # the coordinator asks here for what has not begun
    memory: str
    initializer: Callable[..., Any] | None
    initargs: tuple[Any, ...]


def serve(args: ServeArgs) -> None:
    """Entry point of a worker process."""
    _drop_inherited_output()
    pipe = PipeEnd(args.connection)
    # Processes that tasks fork must not keep this end open when the worker is gone.
    keep_from_children(args.connection)
    keep_from_children(args.life)
    # Children of daemons are refused by multiprocessing; a worker may have some (pools inside pools). `_config` is
    # where Process keeps the flag, 3.3 to 3.15. The parent's side still sees a daemon and ends it at its exit.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    _ignore_interrupts()
    killed_at_hangup(args.life.fileno())  # first, for the thread sees what happened before
    threading.Thread(target=_leave_with_parent, args=(args.life,), name="portshm-watch", daemon=True).start()
    try:
        try:
            mem = SharedMem.attach(args.memory, header=SLOT_HEADER)
        except HeaderError:
            # Under fork a task has all slots' memory mapped, and one that runs wild may overwrite it before we attach.
            os._exit(_MEMORY_SPOILT)
        trace = _trace_faults(mem, None)
        if args.initializer is not None:
            args.initializer(*args.initargs)
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(StartFailed(traceback.format_exc()[-32_000:]))
        return
    server = _Server(pipe, mem, trace)
    del mem
    try:
        pipe.send(Ready(os.getpid()))
        server.run()
    except (EOFError, OSError):
        if not pipe.is_open():
            os._exit(PIPE_CLOSED)
        return  # the coordinator is gone


def _drop_inherited_output() -> None:
    # A fork copies what the parent has printed and not yet written, and this process would write it once more at its
    # end. multiprocessing flushes before it forks, but we fork in a thread, and another may print meanwhile.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            descriptor = stream.fileno()
            kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            try:
                stream.flush()
            finally:
                os.dup2(kept, descriptor)
                os.close(kept)
                os.close(nowhere)


def _ignore_interrupts() -> None:
    # Ctrl-C goes to the whole process group. The parent decides what becomes of the workers. A handler rather
    # than SIG_IGN, which programs started by tasks would inherit.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _ignore_interrupt)
        unblock_interrupts()  # the parent has blocked them for as long as there was no handler


def _ignore_interrupt(signum: int, frame: FrameType | None) -> None:
    pass


def _leave_with_parent(life: AnyConnection) -> None:
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(_ORPHANED)


def _trace_faults(mem: SharedMem, old: int | None) -> int | None:
    """Have faulthandler write into the last bytes of the slot, where it outlives us; the descriptor it writes to.

    Only a file has a place for it: a named segment cannot be written to.
    """
    if mem.path is None:
        return None
    try:
        descriptor = os.open(mem.path, os.O_WRONLY)
        os.lseek(descriptor, mem.layout.size + SlotMemory(mem).record_end, os.SEEK_SET)
        faulthandler.enable(descriptor)
        if old is not None:
            os.close(old)
    except (OSError, RuntimeError):
        return None
    return descriptor


class _Server:
    def __init__(self, pipe: PipeEnd, mem: SharedMem, trace: int | None) -> None:
        self._pipe = pipe
        self._slot = SlotMemory(mem)
        self._trace = trace  # descriptor that faulthandler writes to
        self._inbox: list[Message] = []
        self._functions: dict[int, Callable[..., Any]] = {}
        # Ids of regions whose last view has died here. Filled by finalizers, in whatever thread.
        self._released: deque[int] = deque()
        self._mappings: weakref.WeakSet[Any] = weakref.WeakSet()  # under arguments that are still there
        self._executing = False  # an element, which an interrupt ends
        if signal.getsignal(signal.SIGINT) is _ignore_interrupt:  # the initializer has not set another handler
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Ctrl-C: a KeyboardInterrupt of the element that is executing, and of nothing else.

        So whoever waits for it in the parent, as many do after they have caught their own, need not wait long.
        """
        # Not where `run_packed` itself is at work, whose books would be wrong. What it calls are quick things.
        if self._executing and frame is not None and frame.f_code is not RecordWriter.run_packed.__code__:
            self._executing = False
            raise KeyboardInterrupt

    def run(self) -> None:
        while True:
            message = self._next()
            if isinstance(message, Run):
                self._batch(message)
            elif isinstance(message, Forget):
                self._functions.pop(message.function, None)
            elif isinstance(message, Move):
                self._move(message.address)
            elif isinstance(message, Stop):
                return

    def _next(self) -> Message:
        while not self._inbox:
            if self._released:
                self._pipe.send(Released(self._take_released()))
            self._pipe.ask()
            self._inbox += self._pipe.receive()
        return self._inbox.pop(0)

    def _move(self, address: str) -> None:
        old = self._slot.mem
        self._slot.adopt(SharedMem.attach(address, header=SLOT_HEADER))
        old.close()
        self._trace = _trace_faults(self._slot.mem, self._trace)

    # -- one batch

    def _batch(self, run: Run) -> None:
        slot = self._slot
        began = time.monotonic_ns()
        slot.started[0] = began
        slot.phase[0] = Phase.UNPICKLING
        elements = finished = slot.elements[0]
        try:
            call, items = self._load(run)
        except BaseException as error:
            self._record(RecordWriter(slot, 1), Entry.ERROR, _dump(RemoteError.of(error)))
            finished = -1
        else:
            slot.started[0] = time.monotonic_ns()
            slot.phase[0] = Phase.RUNNING
            began = time.monotonic_ns()
            finished = self._execute(call, items, elements)
            del items  # so that views nobody kept are gone before we say so
        elapsed = time.monotonic_ns() - began
        self._pipe.send(Done(run.batch, finished, elapsed, 0, self._take_released()))

    def _load(self, run: Run) -> tuple[Callable[[Any], Any], Iterator[Any]]:
        """What to call with each of the items, and the items."""
        slot = self._slot
        if run.mode == Mode.VALUE:
            return self._function(), iter([slot.mem.value_ref()])
        if run.region:
            items = unpack_batch(self._payload(run.region, run.address))
        else:
            items = unpack_batch(Payload(slot.mem.value_ref(), [], []))
        if run.mode == Mode.CALLS:
            return _call, iter(items)
        function = self._function()
        return function if run.mode == Mode.MAP else lambda args: function(*args), iter(items)

    def _function(self) -> Callable[..., Any]:
        """The function of a map, which crosses once: later batches only name it."""
        slot = self._slot
        at = aligned(slot.mem.header.value_len)
        id, pickled, region, address = pickle.loads(slot.area[at : at + slot.head[0]])
        if region:
            self._functions[id] = unpack(self._payload(region, address))
        elif pickled is not None:
            self._functions[id] = pickle.loads(pickled)
        return self._functions[id]

    def _payload(self, id: int, address: str) -> Payload:
        """What lies in a region, as private views that live for as long as user code wants."""
        return read_payload(self._private_view(id, address), self._visit)

    def _visit(self, place: Place) -> memoryview:
        return self._private_view(place.region, place.address, place.offset, place.length)

    def _private_view(self, id: int, address: str, start: int = 0, length: int | None = None) -> memoryview:
        whole = private_view(RegionAddress.parse(address))
        view = whole[start:] if length is None else whole[start : start + length]
        if view.nbytes < WORTH_A_MAPPING or len(self._mappings) >= _MOST_MAPPINGS:
            view = memoryview(bytearray(view))  # user code may keep it, and many of them
        if isinstance(view.obj, bytearray):
            self._released.append(id)
        else:
            self._mappings.add(view.obj)
            if id:
                weakref.finalize(view.obj, self._released.append, id).atexit = False
        return view

    def _take_released(self) -> str:
        taken = []
        while self._released:
            taken.append(str(self._released.popleft()))
        return ",".join(taken)

    def _execute(self, call: Callable[[Any], Any], items: Iterator[Any], elements: int) -> int:
        """Compute and record the results; how many. Fewer than there are if we were told to give back the rest."""
        slot, now = self._slot, time.monotonic_ns
        writer = RecordWriter(slot, elements)
        moment = began = now()
        patience = slot.patience[0]
        until = began + patience if patience else math.inf
        while writer.done < elements and moment < until:
            try:
                entry = self._next_entry(writer, call, items, until)
            except KeyboardInterrupt as error:  # it came when the element had just ended with another error
                entry = Entry.ERROR, _dump(RemoteError.of(error))
            if entry is not None and writer.done < elements:
                self._record(writer, *entry)
            slot.started[0] = moment = now()
        return writer.done

    def _next_entry(
        self, writer: RecordWriter, call: Callable[[Any], Any], items: Iterator[Any], until: float
    ) -> tuple[Entry, bytes | Payload] | None:
        """Compute the next result; None if it and others after it have gone on record as plain numbers."""
        try:
            item = next(items)
            self._executing = True
            value = call(item)
            if not writer.done and type(value) in _NUMBERS:
                value = writer.run_packed(call, items, value, until)
            self._executing = False
            return None if value is NOTHING else self._encode(value)
        except BaseException as error:
            self._executing = False
            return Entry.ERROR, _dump(RemoteError.of(error))

    def _encode(self, value: Any) -> tuple[Entry, bytes | Payload]:
        try:
            return Entry.VALUE, pack_small(value)
        except BaseException as error:
            return Entry.UNPICKLABLE, _dump((safe_repr(value), RemoteError.of(error)))

    def _record(self, writer: RecordWriter, kind: Entry, data: bytes | Payload) -> None:
        """Put one result on record; in a region, if it is large or has buffers of its own."""
        if not self._pipe.is_open():
            os._exit(PIPE_CLOSED)
        if isinstance(data, Payload) or not writer.fits(len(data)):
            try:
                kind, data = self._spill(kind, data)
            except OSError as error:
                kind, data = Entry.ERROR, _dump(RemoteError.of(error))
                if not writer.fits(len(data)):
                    data = _dump(RemoteError(None, "no room", ""))
        writer.add(kind, data)

    def _spill(self, kind: Entry, data: bytes | Payload) -> tuple[Entry, bytes]:
        payload = data if isinstance(data, Payload) else Payload(data, [], [])
        size = payload.size
        self._pipe.send(Need(size))
        waiting = []
        while not isinstance(message := self._next(), Grant):
            waiting.append(message)
        self._inbox[:0] = waiting
        if not message.region:
            raise RegionFullError(errno.ENOSPC, message.address, "shared memory")
        fill_region(RegionAddress.parse(message.address), payload.pieces())
        return Entry.REGION, Reference(message.region, size, kind).pack()


def _call(call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Any:
    function, args, kwargs = call
    return function(*args, **kwargs)


def _dump(obj: Any) -> bytes:
    return pickle.dumps(obj, 5)
