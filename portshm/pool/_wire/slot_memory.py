"""The memory of one slot: what the coordinator and the worker in it tell each other without a message.

`SharedMem` with these header fields, and in its capacity one after the other:

- the value: the batch's payload, and the head, which names its function; written by the coordinator;
- the record: the results, written by the worker, each before the next element starts;
- the trace: the last bytes, where faulthandler writes when the worker gets a fatal signal.

Who may touch it: the coordinator before it sends `Run` and after it has got `Done` or has seen the worker die; the
worker in between. `count` moves only after the result it counts is on record, so whoever reads the memory after a
death finds `count` results, and the element that was executing is the next one. Where results are packed numbers
`count` moves in stretches, and between them the numbers themselves tell: those to come are `_BLANK`.
"""

from __future__ import annotations

import enum
import itertools
import os
import pickle
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from ..._header import PORTSHM_HEADER
from ..._shared_mem import SharedMem

__all__ = [
    "CAPACITY",
    "MAX_ELEMENTS",
    "PAYLOAD_MAX",
    "SLOT_HEADER",
    "TRACE",
    "Entry",
    "Mode",
    "Outcome",
    "Phase",
    "Record",
    "RecordError",
    "RecordWriter",
    "Reference",
    "RemoteError",
    "SlotMemory",
]

SLOT_HEADER: Final = PORTSHM_HEADER.extend(
    "slot",
    batch="q",  # id of the batch in the memory
    phase="q",  # a `Phase`
    elements="q",  # how many elements the batch has
    started="q",  # time.monotonic_ns() when the present element started, as near as is known
    patience="q",  # nanoseconds after which the worker gives back what it has not begun; 0: it executes all
    head="q",  # bytes of the head, which starts on the first cache line after the value
    record="q",  # offset of the record in the value area
    packed="q",  # how many results at most are packed numbers, the rest being entries
    packed_type="q",  # their format, ord("q") or ord("d")
    blank="q",  # the bits of a number that is not there yet
)

# From `batch` to `blank`, which follow one another without gaps.
_CONTROL: Final = struct.Struct("=10q")

# Bytes. Reserved for every worker at the start, so small: containers have 64 MB of /dev/shm by default.
CAPACITY: Final = 512 << 10
TRACE: Final = 8 << 10
PAYLOAD_MAX: Final = 64 << 10  # larger payloads go through a region of the store
ENTRY_MAX: Final = 96  # the entries that name a region or say that there is none: kept free for every element to come
MAX_ELEMENTS: Final = 8192

# Elements that are computed between two looks at the clock, at most, and the nanoseconds that they may have taken.
_STRETCH: Final = 32
_QUICK: Final = 50_000

# Eight bytes that are no number among the results: there is one chance in 2**64 that they are, and then it takes a
# death right after that number for anybody to be wrong.
_BLANK: Final = os.urandom(8)

_HEAD: Final = struct.Struct("<II")  # length, kind
_REFERENCE: Final = struct.Struct("<qqq")  # region id, bytes, kind


class Phase(enum.IntEnum):
    """How far the worker is with the batch; what a death means depends on it."""

    SENT = 0  # not read yet: nothing has happened
    UNPICKLING = 1  # user code may run, but no element
    RUNNING = 2  # element `count` is executing, if there is one


class Mode(enum.IntEnum):
    """How the elements of a batch are called."""

    CALLS = 0  # each with its own function, args and kwargs
    MAP = 1  # func(item)
    STARMAP = 2  # func(*item)
    VALUE = 3  # func(memoryview of the slot's value), one element


class Entry(enum.IntEnum):
    """What an entry of the record holds."""

    VALUE = 0  # the pickled result
    ERROR = 1  # the pickled exception and its traceback's text
    REGION = 2  # a `Reference`: the result lies in a region of the store
    UNPICKLABLE = 3  # the result could not be pickled; its repr, and the error as in ERROR


class RecordError(Exception):
    """The record holds bytes that no worker of ours writes."""


class Outcome(NamedTuple):
    """One entry of the record, as bytes."""

    kind: Entry
    data: bytes


class Record(NamedTuple):
    """Results of one batch, as bytes: those that were packed as numbers, then the entries after them."""

    numbers: memoryview = memoryview(b"")
    entries: Sequence[Outcome] = ()


class Reference(NamedTuple):
    """Where a result that was too large for the record is: a payload in a region of the store."""

    region: int
    size: int
    kind: Entry  # what it would have been in the record

    def pack(self) -> bytes:
        return _REFERENCE.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Reference:
        if len(data) != _REFERENCE.size:
            raise RecordError(f"a reference of {len(data)} bytes")
        region, size, kind = _REFERENCE.unpack(data)
        if kind not in _ENTRIES:
            raise RecordError(f"a reference to an entry of kind {kind}")
        return cls(region, size, _ENTRIES[kind])


def aligned(size: int) -> int:
    """Up to the next cache line."""
    return -(-size // 64) * 64


class SlotMemory:
    """A slot's memory with quick access to its fields. Both sides have one."""

    def __init__(self, mem: SharedMem) -> None:
        self.adopt(mem)

    def adopt(self, mem: SharedMem) -> None:
        self.mem = mem
        self.count = mem.cell("count")
        self.batch = mem.cell("batch")
        self.phase = mem.cell("phase")
        self.elements = mem.cell("elements")
        self.started = mem.cell("started")
        self.patience = mem.cell("patience")
        self.head = mem.cell("head")
        self._sequence = mem.cell("sequence")
        self._value_len = mem.cell("value_len")
        self.record = mem.cell("record")
        self.packed = mem.cell("packed")
        self.packed_type = mem.cell("packed_type")
        self.blank = mem.cell("blank")
        self.area = mem.area()
        fields = mem.layout.fields
        everything = memoryview(self.area.obj)
        self._control = everything[fields["batch"].offset : fields["batch"].offset + _CONTROL.size]
        self.record_end = mem.capacity - TRACE

    def close(self) -> None:
        """Give up the memory and every view of it. What is read from the fields afterwards is zero."""
        nothing = memoryview(bytes(8))
        for name, value in vars(self).items():
            if isinstance(value, memoryview):
                setattr(self, name, nothing.cast("q") if value.format == "q" else nothing)
        self.mem.close()

    # -- coordinator's side

    def prepare(
        self, batch: int, elements: int, payload: bytes | memoryview, head: bytes = b"", patience: int = 0
    ) -> None:
        """Put a batch into the memory, which the coordinator owns at this moment."""
        at = aligned(len(payload))
        self.count[0] = 0
        # One store for all of them: the worker reads none before it is told to.
        self._control[:] = _CONTROL.pack(
            batch, Phase.SENT, elements, 0, patience, len(head), at + aligned(len(head)), 0, 0, 0
        )
        # What `set_value` does, for bytes that are known to fit: `load` has seen to that.
        # A task may have scribbled over it, so the number may be any.
        sequence = (self._sequence[0] + 1 & 0x7FFF_FFFF_FFFF_FFFF) | 1
        self._sequence[0] = sequence
        self.area[: len(payload)] = payload
        self._value_len[0] = len(payload)
        self._sequence[0] = sequence + 1
        if head:
            self.area[at : at + len(head)] = head

    def room_needed(self, elements: int, payload: int, head: int) -> int:
        """Capacity that a batch asks for."""
        return aligned(payload) + aligned(head) + (ENTRY_MAX + 8) * elements + TRACE + ENTRY_MAX

    def progress(self, batch: int) -> tuple[int, Phase]:
        """How many elements of the batch are on record, and the phase, whatever the worker left there."""
        phase = self.phase[0]  # read once: who wrote it may still be writing
        if self.batch[0] != batch or phase not in (Phase.UNPICKLING, Phase.RUNNING):
            return 0, Phase.SENT
        return self._finished(), Phase(phase)

    def tells_of(self, batch: int) -> bool:
        """Whether the memory still says which batch it has, and how far that is; a task may have overwritten it."""
        return self.batch[0] == batch and self.phase[0] in _PHASES

    def _finished(self) -> int:
        elements, start = self.elements[0], self.record[0]
        count = max(0, min(self.count[0], elements))
        if self.packed[0] > count and start % 8 == 0 and 0 <= start <= self.record_end - 8 * elements:
            numbers = self.area[start : start + 8 * elements].cast("q")
            blank = self.blank[0]
            while count < elements and numbers[count] != blank:
                count += 1
        return count

    def outcomes(self, count: int, elements: int) -> Record:
        """The first `count` results, copied out of the memory, which may then have the next batch.

        Everything read here was written by the worker and is checked before it is used: RecordError if it makes
        no sense.
        """
        start, end = self.record[0], self.record_end
        packed = min(count, self.packed[0])
        numbers = memoryview(b"")
        if packed > 0:
            code = {ord("q"): "q", ord("d"): "d"}.get(self.packed_type[0])
            if code is None or start % 8 or not 0 <= start <= end - 8 * elements:
                raise RecordError(f"packed results of type {self.packed_type[0]} at {start}")
            numbers = memoryview(bytes(self.area[start : start + 8 * packed])).cast(code)  # type: ignore[call-overload]
            start += 8 * elements
        entries = []
        for _ in range(count - len(numbers)):
            if not 0 <= start <= end - _HEAD.size:
                raise RecordError(f"an entry at {start}, beyond the record")
            length, kind = _HEAD.unpack_from(self.area, start)
            start += _HEAD.size
            if kind not in _ENTRIES or start + length > end:
                raise RecordError(f"an entry of kind {kind} with {length} bytes")
            entries.append(Outcome(_ENTRIES[kind], bytes(self.area[start : start + length])))
            start += length
        return Record(numbers, entries)

    def trace(self) -> str:
        """What faulthandler wrote, or an empty text; cleared by reading."""
        area = self.area[self.record_end : self.record_end + TRACE]
        text = bytes(area).rstrip(b"\0")
        area[: len(text)] = bytes(len(text))
        return text.decode("utf-8", "replace")


_ENTRIES: Final = {int(kind): kind for kind in Entry}
_PHASES: Final = frozenset(int(phase) for phase in Phase)


class RecordWriter:
    """The worker's side of the record: results of one batch, in order, each published by `count`."""

    def __init__(self, slot: SlotMemory, elements: int) -> None:
        self._slot = slot
        self._area = slot.area
        self._count = slot.count
        self._elements = elements
        self._at: int = slot.record[0]
        self.done = 0

    def run_packed(self, call: Callable[[Any], Any], items: Iterator[Any], first: Any, until: float) -> Any:
        """Compute results and record them as plain numbers, for as long as all have the type of the first one.

        Eight bytes and one store per result instead of a pickle. Returns the first result that is something else,
        which is not on record yet, or `NOTHING` after the last element, or the first ones after `until`
        (time.monotonic_ns). What `call` raises comes out, with the results before it on record.
        """
        kind = type(first)
        code = "q" if kind is int else "d"
        start = self._at
        cells = self._area[start : start + 8 * self._elements].cast(code)  # type: ignore[call-overload]
        self._at += 8 * self._elements
        count, packed, started, now = self._count, self._slot.packed, self._slot.started, time.monotonic_ns
        cells.cast("B")[:] = _BLANK * self._elements
        try:
            cells[0] = first
        except ValueError:  # an int of more than 64 bits
            self._at = start
            return first
        self._slot.packed_type[0] = ord(code)
        (self._slot.blank[0],) = struct.unpack("=q", _BLANK)
        packed[0] = self._elements  # an upper bound while we are at it
        count[0] = done = 1
        started[0] = moment = now()
        stretch = 1
        try:
            while done < self._elements and moment < until:
                for item in itertools.islice(items, stretch):
                    value = call(item)  # not in a `map`, which would take a StopIteration of the function's for its end
                    if type(value) is not kind:
                        return value
                    try:
                        cells[done] = value
                    except ValueError:
                        return value
                    done += 1
                # These cost as much as an element: so as seldom as nobody misses them.
                count[0] = done
                last, moment = moment, now()
                started[0] = moment
                stretch = min(2 * stretch, _STRETCH) if moment - last < _QUICK else 1
        finally:
            count[0] = packed[0] = self.done = done
        return NOTHING

    def add(self, kind: Entry, data: bytes) -> None:
        """Record and publish one result's entry."""
        end = self._at + _HEAD.size + len(data)
        self._area[self._at : end] = _HEAD.pack(len(data), kind) + data
        self._at = end
        self.done += 1
        self._count[0] = self.done

    def fits(self, length: int) -> bool:
        """Whether an entry of `length` bytes leaves room for one of the smallest kind for every element after it."""
        left = self._elements - self.done - 1
        return self._at + _HEAD.size + length <= self._slot.record_end - ENTRY_MAX * left


# What `run_packed` returns when there is nothing left for it to do.
NOTHING: Final = object()


class RemoteError(NamedTuple):
    """An exception on its way: the pickle of it, if it has one, beside what can be said without it."""

    pickled: bytes | None
    text: str  # repr of the exception
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> RemoteError:
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        try:
            pickled = pickle.dumps(error, 5)
        except BaseException:
            pickled = None
        return cls(pickled, safe_repr(error), trace)


def safe_repr(obj: Any) -> str:
    """repr() is the object's own code: it may raise, and it may be huge."""
    try:
        return repr(obj)[:2000]
    except BaseException as error:
        return f"<{type(obj).__name__} whose repr raised {type(error).__name__}>"
