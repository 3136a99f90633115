"""What a death means, read out of a real slot's memory into which a test has written."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator

import pytest

from portshm import SharedMem
from portshm.pool._engine.deaths import Death, examine
from portshm.pool._wire.slot_memory import CAPACITY, SLOT_HEADER, Entry, Mode, Phase, RecordWriter, SlotMemory
from portshm.pool._work import Batch, Chunk
from tests.pool.engine.scheduling import Map

ID = 7


@pytest.fixture
def memory() -> Iterator[SlotMemory]:
    slot = SlotMemory(SharedMem.create(CAPACITY, header=SLOT_HEADER))
    yield slot
    slot.mem.unlink()
    slot.close()


def batch_of(count: int, mode: Mode = Mode.MAP) -> Batch:
    return Batch(ID, [], Chunk(Map(mode=mode), 0, list(range(count))), deque())


def at_work(memory: SlotMemory, elements: int, finished: int, phase: Phase = Phase.RUNNING) -> None:
    """The memory as a worker leaves it that has finished so many."""
    memory.prepare(ID, elements, b"payload")
    memory.phase[0] = phase
    writer = RecordWriter(memory, elements)
    for number in range(finished):
        writer.add(Entry.VALUE, pickle.dumps(number))


def outcome(death: Death) -> tuple[int, int, bool]:
    return death.finished, death.began, death.unpickling


@pytest.mark.parametrize(
    ("phase", "finished", "expected"),
    [
        (Phase.SENT, 0, (0, 0, False)),
        (Phase.UNPICKLING, 0, (0, 0, True)),
        (Phase.RUNNING, 0, (0, 1, False)),
        (Phase.RUNNING, 2, (2, 3, False)),
        (Phase.RUNNING, 4, (4, 4, False)),
    ],
)
def test_the_memory_tells_how_far_it_was(
    memory: SlotMemory, phase: Phase, finished: int, expected: tuple[int, int, bool]
) -> None:
    at_work(memory, 4, finished, phase)
    death = examine(memory, batch_of(4), loaded=True, cause="SIGKILL (killed)")
    assert outcome(death) == expected
    assert [pickle.loads(entry.data) for entry in death.record.entries] == list(range(finished))
    assert not death.note


def test_a_batch_that_was_given_back_in_part_is_as_long_as_what_was_kept(memory: SlotMemory) -> None:
    at_work(memory, 4, 2)
    assert outcome(examine(memory, batch_of(2), loaded=True)) == (2, 2, False)


def test_a_batch_that_was_not_loaded_has_not_begun(memory: SlotMemory) -> None:
    memory.prepare(ID - 1, 4, b"an older one")
    memory.phase[0] = Phase.RUNNING
    assert outcome(examine(memory, batch_of(4), loaded=False)) == (0, 0, False)


def test_memory_that_was_overwritten_blames_all_that_may_have_run(memory: SlotMemory) -> None:
    at_work(memory, 4, 2)
    memory.batch[0] = 123
    death = examine(memory, batch_of(4), loaded=True, cause="SIGSEGV (segmentation fault)")
    assert outcome(death) == (0, 4, False)
    assert death.note == "SIGSEGV (segmentation fault), and its memory was overwritten"


def test_one_that_did_wrong_has_failed_whatever_it_has_on_record(memory: SlotMemory) -> None:
    at_work(memory, 1, 1)
    death = examine(memory, batch_of(1), loaded=True, note="closed the pool's pipe")
    assert outcome(death) == (0, 1, False)
    assert death.note == "closed the pool's pipe"


def test_among_several_the_one_that_was_executing_is_blamed_for_the_wrong(memory: SlotMemory) -> None:
    at_work(memory, 4, 2)
    assert outcome(examine(memory, batch_of(4), loaded=True, note="wrote garbage")) == (2, 3, False)


def test_a_record_that_cannot_be_read_loses_what_it_held(memory: SlotMemory) -> None:
    at_work(memory, 4, 2)
    memory.record[0] = 1 << 40
    death = examine(memory, batch_of(4), loaded=True)
    assert outcome(death) == (0, 3, False)
    assert "left a record that makes no sense" in death.note


@pytest.mark.parametrize("count", [-1, 5, 1 << 62])
def test_a_count_that_cannot_be_is_cut_to_what_can(memory: SlotMemory, count: int) -> None:
    at_work(memory, 4, 4)
    memory.count[0] = count
    finished, began, _ = outcome(examine(memory, batch_of(4), loaded=True))
    assert 0 <= finished <= began <= 4


def test_the_value_is_kept(memory: SlotMemory) -> None:
    at_work(memory, 1, 0)
    assert examine(memory, batch_of(1, Mode.VALUE), loaded=True).item == b"payload"
    assert examine(memory, batch_of(1), loaded=True).item is None
