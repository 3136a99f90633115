"""A slot's memory: what the worker records is what the coordinator reads, and nonsense is refused."""

from __future__ import annotations

import math
import pickle
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from portshm import SharedMem
from portshm.pool._wire.slot_memory import (
    CAPACITY,
    NOTHING,
    SLOT_HEADER,
    TRACE,
    Entry,
    Outcome,
    Phase,
    RecordError,
    RecordWriter,
    Reference,
    RemoteError,
    SlotMemory,
    safe_repr,
)  # fmt: skip
from tests.fakes import HeapRegion


@pytest.fixture
def slot() -> SlotMemory:
    return SlotMemory(SharedMem(HeapRegion.published(CAPACITY, SLOT_HEADER), SLOT_HEADER))


def begin(slot: SlotMemory, elements: int, payload: bytes = b"", head: bytes = b"") -> RecordWriter:
    """As the coordinator does, and then the worker."""
    slot.prepare(7, elements, payload, head)
    slot.phase[0] = Phase.RUNNING
    return RecordWriter(slot, elements)


def record(slot: SlotMemory, values: list[Any]) -> list[Any]:
    """Through the record as the server writes it: packed for as long as that goes, then one by one."""
    writer = begin(slot, len(values))
    outcomes = iter(values)
    while writer.done < len(values):
        value = next(outcomes)
        if type(value) in (int, float) and writer.done == 0:
            value = writer.run_packed(itself, outcomes, value, math.inf)
            if value is NOTHING:
                break
        writer.add(Entry.VALUE, pickle.dumps(value))
    return read(slot, len(values))


def itself(value: Any) -> Any:
    return value


def read(slot: SlotMemory, elements: int) -> list[Any]:
    count, phase = slot.progress(7)
    assert phase is Phase.RUNNING
    numbers, entries = slot.outcomes(count, elements)
    assert all(kind is Entry.VALUE for kind, _ in entries)
    return [*numbers, *(pickle.loads(data) for _, data in entries)]


MIXTURES: dict[str, list[Any]] = {
    "ints": list(range(-500, 500)),
    "floats": [0.5, -0.0, 1e308, math.inf, 5e-324],
    "one int": [1],
    "bounds": [2**63 - 1, -(2**63)],
    "too large at once": [2**63, 1, 2],
    "too large later": [1, 2, -(2**63) - 1, 3],
    "bools among ints": [1, True, 0, False],
    "bools": [True, False],
    "ints then floats": [1, 2, 3.0, 4],
    "floats then ints": [1.0, 2, 3.0],
    "ints then text": [1, 2, "three", 4, None],
    "text then ints": ["a", 1, 2],
    "text": ["a" * size for size in range(200)],
    "none": [None] * 10,
}


@pytest.mark.parametrize("name", MIXTURES)
def test_results_come_back_as_they_are(slot: SlotMemory, name: str) -> None:
    values = MIXTURES[name]
    found = record(slot, values)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]
    assert [math.copysign(1, v) for v in found if type(v) is float] == [
        math.copysign(1, v) for v in values if type(v) is float
    ]


def test_nan_is_nan(slot: SlotMemory) -> None:
    (found,) = record(slot, [math.nan])
    assert math.isnan(found)


@pytest.mark.parametrize("dead_after", range(6))
def test_what_is_on_record_at_any_instant(slot: SlotMemory, dead_after: int) -> None:
    """A worker that dies in the element after these: packed, then a text, then an int."""
    values = [10, 11, 12, "x", 14, 15]

    class Death(BaseException):
        pass

    def computed() -> Iterator[Any]:
        yield from values[1:dead_after]
        raise Death

    writer = begin(slot, len(values))
    outcomes = computed()
    with pytest.raises(Death):
        if dead_after == 0:
            raise Death
        value = writer.run_packed(itself, outcomes, values[0], math.inf)
        while True:
            writer.add(Entry.VALUE, pickle.dumps(value))
            value = next(outcomes)
    assert slot.progress(7) == (dead_after, Phase.RUNNING)
    assert read(slot, len(values)) == values[:dead_after]


@pytest.mark.parametrize("kind", [int, float])
def test_a_packed_result_is_on_record_before_the_next_element_starts(slot: SlotMemory, kind: type) -> None:
    """Also between two stretches, where a kill leaves no time to count."""
    seen = []

    def call(item: int) -> Any:
        seen.append(slot.progress(7))
        found.append(list(slot.outcomes(seen[-1][0], 500).numbers))
        return kind(-item)

    found: list[Any] = []
    writer = begin(slot, 500)
    assert writer.run_packed(call, iter(range(1, 500)), kind(0), math.inf) is NOTHING
    assert seen == [(done, Phase.RUNNING) for done in range(1, 500)]
    assert found == [[-item for item in range(done)] for done in range(1, 500)]
    assert writer.done == 500


def test_packed_results_end_when_the_time_is_up(slot: SlotMemory) -> None:
    writer = begin(slot, 500)
    assert writer.run_packed(itself, iter(range(1, 500)), 0, 0.0) is NOTHING
    assert 1 <= writer.done < 500
    assert read(slot, 500) == list(range(writer.done))


def test_an_exception_among_packed_results(slot: SlotMemory) -> None:
    def computed() -> Iterator[int]:
        yield 2
        raise ValueError

    writer = begin(slot, 5)
    with pytest.raises(ValueError):
        writer.run_packed(itself, computed(), 1, math.inf)
    assert writer.done == 2
    writer.add(Entry.ERROR, b"error")
    numbers, entries = slot.outcomes(3, 5)
    assert list(numbers) == [1, 2]
    assert entries == [Outcome(Entry.ERROR, b"error")]


def test_room_is_kept_for_every_element_to_come(slot: SlotMemory) -> None:
    elements = 1000
    writer = begin(slot, elements)
    small = Reference(1, 2, Entry.VALUE).pack()
    large = bytes(5000)
    fitted = 0
    for _ in range(elements):
        if writer.fits(len(large)):
            fitted += 1
            writer.add(Entry.VALUE, large)
        else:
            assert writer.fits(len(small)), "a reference fits always"
            writer.add(Entry.REGION, small)
    assert 0 < fitted < elements
    _, entries = slot.outcomes(elements, elements)
    assert [entry.kind for entry in entries].count(Entry.VALUE) == fitted
    assert slot.trace() == "", "the last bytes are not the record's"


@pytest.mark.parametrize(("payload", "head"), [(b"", b""), (b"x" * 65, b""), (b"x", b"h" * 63), (b"x" * 64, b"h" * 64)])
def test_value_and_head(slot: SlotMemory, payload: bytes, head: bytes) -> None:
    begin(slot, 3, payload, head).add(Entry.VALUE, b"first")
    assert slot.mem.value_copy() == payload
    at = -(-len(payload) // 64) * 64
    assert slot.area[at : at + slot.head[0]] == head
    assert slot.outcomes(1, 3)[1] == [Outcome(Entry.VALUE, b"first")]
    assert slot.mem.stable_copy() == payload, "for those who look on"


def test_progress_of_another_batch_is_none(slot: SlotMemory) -> None:
    begin(slot, 3).add(Entry.VALUE, b"")
    assert slot.progress(7) == (1, Phase.RUNNING)
    assert slot.progress(8) == (0, Phase.SENT)
    slot.prepare(8, 3, b"")
    assert slot.progress(8) == (0, Phase.SENT)
    slot.phase[0] = Phase.UNPICKLING
    assert slot.progress(8) == (0, Phase.UNPICKLING)


@pytest.mark.parametrize("count", [-1, -(2**63), 4, 2**63 - 1])
@pytest.mark.parametrize("phase", [-1, 3, 2**62])
def test_progress_is_bounded_whatever_is_there(slot: SlotMemory, count: int, phase: int) -> None:
    begin(slot, 3)
    slot.count[0] = count
    assert 0 <= slot.progress(7)[0] <= 3
    slot.phase[0] = phase
    assert slot.progress(7) == (0, Phase.SENT)


def test_a_reference(slot: SlotMemory) -> None:
    reference = Reference(3, 1 << 40, Entry.UNPICKLABLE)
    assert Reference.unpack(reference.pack()) == reference
    for data in (b"", bytes(8), bytes(25), struct.pack("<qqq", 1, 2, 9)):
        with pytest.raises(RecordError):
            Reference.unpack(data)


@pytest.mark.parametrize("record_at", [-1, -8, CAPACITY - TRACE - 4, CAPACITY, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("packed", [0, 5])
def test_a_record_that_lies_elsewhere_is_refused(slot: SlotMemory, record_at: int, packed: int) -> None:
    record(slot, [1, 2, 3, 4, 5])
    slot.record[0] = record_at
    slot.packed[0] = packed
    with pytest.raises(RecordError):
        slot.outcomes(5, 5)


@pytest.mark.parametrize("code", [0, ord("Q"), ord("b"), -1, 2**62])
def test_packed_results_of_no_type_are_refused(slot: SlotMemory, code: int) -> None:
    record(slot, [1, 2, 3])
    slot.packed_type[0] = code
    with pytest.raises(RecordError):
        slot.outcomes(3, 3)


@pytest.mark.parametrize("head", [(0xFFFF_FFFF, 0), (CAPACITY, 0), (3, 99), (0, 4), (0, 0xFFFF_FFFF)])
def test_an_entry_that_makes_no_sense_is_refused(slot: SlotMemory, head: tuple[int, int]) -> None:
    begin(slot, 1).add(Entry.VALUE, b"abc")
    struct.pack_into("<II", slot.area, slot.record[0], *head)
    with pytest.raises(RecordError):
        slot.outcomes(1, 1)


def test_random_bytes_are_read_or_refused(slot: SlotMemory) -> None:
    chance = random.Random(3)
    begin(slot, 10)
    refused = 0
    for _ in range(300):
        slot.area[:4096] = chance.randbytes(4096)
        for cell in (slot.count, slot.record, slot.packed, slot.packed_type):
            cell[0] = chance.choice((0, 1, 8, 64, ord("q"), chance.randrange(-(2**63), 2**63)))
        count, _ = slot.progress(7)
        try:
            numbers, entries = slot.outcomes(count, 10)
        except RecordError:
            refused += 1
        else:
            assert len(numbers) + len(entries) == count
    assert refused


def test_the_trace_is_read_once(slot: SlotMemory) -> None:
    text = b"Fatal Python error: Segmentation fault\n\xff"
    slot.area[slot.record_end : slot.record_end + len(text)] = text
    assert slot.trace() == text.decode("utf-8", "replace")
    assert slot.trace() == ""


def test_a_closed_slot_reads_as_nothing(slot: SlotMemory) -> None:
    begin(slot, 3).add(Entry.VALUE, b"")
    slot.close()
    assert slot.mem.closed
    assert slot.progress(7) == (0, Phase.SENT)
    assert slot.started[0] == 0


class BadRepr:
    def __repr__(self) -> str:
        raise LookupError


def test_safe_repr() -> None:
    assert safe_repr(1) == "1"
    assert safe_repr(BadRepr()) == "<BadRepr whose repr raised LookupError>"
    assert len(safe_repr("x" * 100_000)) == 2000


def test_a_remote_error_has_its_traceback_and_its_pickle_where_it_has_one() -> None:
    try:
        raise ValueError("here")
    except ValueError as error:
        remote = RemoteError.of(error)
    assert remote.pickled is not None
    assert pickle.loads(remote.pickled).args == ("here",)
    assert remote.text == "ValueError('here')"
    assert "test_a_remote_error" in remote.traceback
    assert RemoteError.of(ValueError(lambda: None)).pickled is None
