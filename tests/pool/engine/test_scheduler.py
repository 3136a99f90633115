"""The scheduler's table: events in, decisions out, with no process anywhere."""

from __future__ import annotations

import pytest

from portshm.pool._engine.deaths import Death
from portshm.pool._engine.scheduler import Blocked, Slot, State, Why
from portshm.pool._wire.slot_memory import MAX_ELEMENTS, Mode, Phase
from portshm.pool._work import Batch, Chunk, Element, MapJob
from tests.pool.engine.scheduling import Call, Driven, Map


def ready(slots: int = 1, max_tasks: int | None = None) -> Driven:
    """A scheduler whose workers have all started and wait."""
    scheduler = Driven(slots, max_tasks)
    for slot in scheduler.slots:
        assert not scheduler.begin(slot)
    return scheduler


def start(scheduler: Driven, job: MapJob, count: int, unit: int = 1) -> Slot:
    """Submit a map of `count` elements whose items are their numbers; the slot that got the first batch."""
    slot = scheduler.put(Chunk(job, 0, list(range(count)), unit))
    assert slot is not None
    return slot


def indices(batch: Batch | None) -> list[int]:
    assert batch is not None
    if batch.chunk is None:
        return [call.number for call in batch.calls if isinstance(call, Call)]
    assert batch.chunk.items == list(range(batch.chunk.start, batch.chunk.start + len(batch)))
    return batch.chunk.items


def drain(scheduler: Driven, slot: Slot) -> list[list[int]]:
    """All batches of the slot until nothing is left."""
    found = []
    while slot.batch is not None:
        found.append(indices(slot.batch))
        scheduler.finish(slot, len(slot.batch), 0.0)
    return found


def die(scheduler: Driven, slot: Slot, finished: int, phase: Phase) -> tuple[int, list[tuple[int, object]]]:
    """The slot's worker dies: how many results are delivered, and who is convicted."""
    convicted = scheduler.die(slot, finished, phase)
    assert slot.state is State.VACANT
    assert slot.batch is None
    return finished, [(element.index, element.item) for element in convicted]


# -- states


def test_starting_takes_nothing() -> None:
    scheduler = Driven(1)
    assert scheduler.put(Call(0)) is None
    assert scheduler.slots[0].state is State.VACANT
    assert scheduler.hold(scheduler.slots[0], object())
    assert scheduler.put(Call(1)) is None
    assert scheduler.slots[0].state is State.STARTING
    assert scheduler.waiting


def test_ready_takes_what_waits() -> None:
    scheduler = Driven(1)
    scheduler.put(Call(0))
    (slot,) = scheduler.slots
    assert scheduler.begin(slot)
    assert slot.busy
    assert indices(slot.batch) == [0]
    assert not scheduler.waiting
    assert not scheduler.idle


def test_ready_with_nothing_is_idle_and_takes_the_next() -> None:
    scheduler = ready()
    assert scheduler.slots[0].state is State.IDLE
    assert scheduler.idle
    slot = scheduler.put(Call(0))
    assert slot is scheduler.slots[0]
    assert slot.busy


def test_a_slot_whose_process_has_ended_gets_nothing_more() -> None:
    scheduler = ready()
    (slot,) = scheduler.slots
    scheduler.ended(slot)
    assert scheduler.put(Call(0)) is None
    scheduler.interrupted(object())
    assert scheduler.give_any() is None
    assert not scheduler.give(slot)
    assert slot.state is State.ENDED
    assert die(scheduler, slot, 0, Phase.SENT) == (0, [])
    assert scheduler.begin(slot)


def test_a_slot_whose_process_has_ended_keeps_what_it_has() -> None:
    scheduler = ready()
    slot = start(scheduler, Map(), 1)
    scheduler.ended(slot)
    assert indices(slot.batch) == [0]
    assert not scheduler.finish(slot, 1, 0.0), "it has said so before"
    assert slot.state is State.ENDED


def test_done_takes_the_next_or_is_idle() -> None:
    scheduler = ready()
    slot = scheduler.put(Call(0))
    assert slot is not None
    assert scheduler.put(Call(1)) is None
    assert scheduler.finish(slot, 1, 0.0)
    assert indices(slot.batch) == [1]
    assert not scheduler.finish(slot, 1, 0.0)
    assert slot.state is State.IDLE
    assert scheduler.idle


def test_every_idle_slot_takes_its_share() -> None:
    scheduler = ready(3)
    slots = [scheduler.put(Call(number)) for number in range(3)]
    assert sorted(slot.id for slot in slots if slot is not None) == [0, 1, 2]
    assert scheduler.put(Call(3)) is None


@pytest.mark.parametrize("state", [State.STARTING, State.IDLE])
def test_a_death_without_a_batch_blames_nobody(state: State) -> None:
    scheduler = ready() if state is State.IDLE else Driven(1)
    (slot,) = scheduler.slots
    if state is State.STARTING:
        token = object()
        assert scheduler.hold(slot, token)
        scheduler.let_go(slot, token)
    assert slot.state is state
    assert die(scheduler, slot, 0, Phase.SENT) == (0, [])
    assert scheduler.put(Call(0)) is None, "a dead slot in the list of the idle is passed over"
    assert scheduler.begin(slot)


def test_a_parked_slot_waits_for_something_to_change() -> None:
    scheduler = ready()
    slot = start(scheduler, Map(), 1)
    scheduler.cannot_be_sent(slot, ())
    assert slot.state is State.IDLE
    assert scheduler.can_assign
    assert scheduler.give_any() is slot
    assert indices(slot.batch) == [0]


# -- deaths over a batch: 10 elements, in one batch because the user said so


@pytest.fixture
def scheduler() -> Driven:
    return ready()


def batch_of_10(scheduler: Driven, job: MapJob) -> Slot:
    slot = start(scheduler, job, 10, unit=10)
    assert indices(slot.batch) == list(range(10))
    return slot


def test_dead_before_it_read_puts_everything_back(scheduler: Driven) -> None:
    slot = batch_of_10(scheduler, Map())
    assert die(scheduler, slot, 0, Phase.SENT) == (0, [])
    scheduler.begin(slot)
    assert [index for batch in drain(scheduler, slot) for index in batch] == list(range(10))


@pytest.mark.parametrize("finished", range(10))
def test_dead_while_running_blames_exactly_one(scheduler: Driven, finished: int) -> None:
    slot = batch_of_10(scheduler, Map())
    assert die(scheduler, slot, finished, Phase.RUNNING) == (finished, [(finished, finished)])
    scheduler.begin(slot)
    rest = drain(scheduler, slot)
    assert [index for batch in rest for index in batch] == list(range(finished + 1, 10))


def test_dead_after_the_last_result_blames_nobody(scheduler: Driven) -> None:
    slot = batch_of_10(scheduler, Map())
    assert die(scheduler, slot, 10, Phase.RUNNING) == (10, [])
    assert not scheduler.waiting


def test_dead_while_unpickling_blames_nobody_of_many_and_tries_them_alone(scheduler: Driven) -> None:
    slot = batch_of_10(scheduler, Map())
    assert die(scheduler, slot, 0, Phase.UNPICKLING) == (0, [])
    scheduler.begin(slot)
    seen = []
    for _ in range(10):
        (index,) = indices(slot.batch)
        seen.append(index)
        if index == 4:
            assert die(scheduler, slot, 0, Phase.UNPICKLING) == (0, [(4, 4)])
            scheduler.begin(slot)
        else:
            scheduler.finish(slot, 1, 0.0)
    assert seen == list(range(10))
    assert scheduler.idle


def test_one_that_dies_before_it_read_a_lonely_element_leaves_it_lonely(scheduler: Driven) -> None:
    slot = batch_of_10(scheduler, Map())
    die(scheduler, slot, 0, Phase.UNPICKLING)
    scheduler.begin(slot)
    assert indices(slot.batch) == [0]
    assert die(scheduler, slot, 0, Phase.SENT) == (0, [])
    scheduler.begin(slot)
    assert drain(scheduler, slot) == [[number] for number in range(10)]


def test_what_is_put_back_comes_before_what_waits(scheduler: Driven) -> None:
    slot = batch_of_10(scheduler, Map())
    scheduler.put(Chunk(Map(), 100, list(range(100, 103)), 3))
    die(scheduler, slot, 4, Phase.RUNNING)
    scheduler.begin(slot)
    flat = [index for batch in drain(scheduler, slot) for index in batch]
    assert flat == [5, 6, 7, 8, 9, 100, 101, 102]


def test_calls_in_one_batch_are_told_apart() -> None:
    scheduler = Driven(1)
    (slot,) = scheduler.slots
    calls = [Call(number) for number in range(10)]
    for call in calls:
        scheduler.put(call)
    scheduler.begin(slot)
    assert indices(slot.batch) == list(range(5)), "a fair share"
    (convicted,) = scheduler.die(slot, 2, Phase.RUNNING)
    assert convicted == Element(calls[2], 0, ((2,), {}))
    scheduler.begin(slot)
    assert [number for batch in drain(scheduler, slot) for number in batch] == [3, 4, 5, 6, 7, 8, 9]


def test_several_deaths_convict_several_and_run_nothing_twice() -> None:
    scheduler = ready()
    slot = start(scheduler, Map(), 30, unit=30)
    executed: list[int] = []
    convicted: list[int] = []
    while slot.batch is not None:
        batch = indices(slot.batch)
        bad = next((position for position, index in enumerate(batch) if index in (0, 7, 8, 29)), None)
        if bad is None:
            executed += batch
            scheduler.finish(slot, len(batch), 0.0)
            continue
        executed += batch[: bad + 1]
        finished, culprits = die(scheduler, slot, bad, Phase.RUNNING)
        assert finished == bad
        convicted += [index for index, _ in culprits]
        scheduler.begin(slot)
    assert convicted == [0, 7, 8, 29]
    assert sorted(executed) == list(range(30))
    assert scheduler.idle


# -- unreadable and unsendable


def test_unreadable_in_company_goes_one_by_one(scheduler: Driven) -> None:
    slot = batch_of_10(scheduler, Map())
    assert scheduler.cannot_be_read(slot) == []
    assert scheduler.give(slot)
    for index in range(10):
        assert indices(slot.batch) == [index]
        if index == 3:
            (convicted,) = scheduler.cannot_be_read(slot)
            assert (convicted.index, convicted.item) == (3, 3)
            scheduler.give(slot)
        else:
            scheduler.finish(slot, 1, 0.0)
    assert scheduler.idle


def test_unreadable_is_not_tried_again(scheduler: Driven) -> None:
    slot = start(scheduler, Map(retries=3), 1)
    assert len(scheduler.cannot_be_read(slot)) == 1
    assert not scheduler.waiting


def test_unsendable_puts_the_others_back(scheduler: Driven) -> None:
    slot = batch_of_10(scheduler, Map())
    scheduler.cannot_be_sent(slot, [2, 5])
    scheduler.give(slot)
    assert [index for batch in drain(scheduler, slot) for index in batch] == [0, 1, 3, 4, 6, 7, 8, 9]


def test_unsendable_costs_no_task() -> None:
    scheduler = ready(max_tasks=1)
    slot = start(scheduler, Map(), 2)
    scheduler.cannot_be_sent(slot, [0])
    assert scheduler.give(slot), "the worker has not done anything yet"
    assert indices(slot.batch) == [1]


def test_trim_keeps_the_first_and_learns_the_weight(scheduler: Driven) -> None:
    job = Map()
    slot = start(scheduler, job, 40)
    size = len(slot.batch or ())
    assert size > 2
    scheduler.trim(slot, 2, size << 20)
    assert indices(slot.batch) == [0, 1]
    scheduler.finish(slot, 2, 0.0)
    assert indices(slot.batch) == [2], "a megabyte each, so one by one"
    assert [index for batch in drain(scheduler, slot) for index in batch] == list(range(2, 40))


# -- retries


def test_a_suspect_is_run_again_alone_and_in_a_fresh_worker() -> None:
    scheduler = ready(2)
    first = start(scheduler, Map(retries=2), 10, unit=10)
    other = scheduler.put(Call(1))
    assert other is not None
    assert other is not first
    assert die(scheduler, first, 4, Phase.RUNNING) == (4, [])
    assert scheduler.finish(other, 1, 0.0)
    assert 4 not in indices(other.batch), "it has executed something already"
    scheduler.begin(first)
    assert indices(first.batch) == [4]
    assert die(scheduler, first, 0, Phase.RUNNING) == (0, [])
    scheduler.begin(first)
    assert indices(first.batch) == [4]
    assert die(scheduler, first, 0, Phase.RUNNING) == (0, [(4, 4)])
    scheduler.begin(first)
    rest = drain(scheduler, first) + drain(scheduler, other)
    assert sorted(index for batch in rest for index in batch) == [5, 6, 7, 8, 9]


def test_innocents_are_not_counted() -> None:
    scheduler = ready()
    job = Map(retries=1)
    slot = start(scheduler, job, 10, unit=10)
    for _ in range(5):  # dead before it read: nobody's fault, however often
        assert die(scheduler, slot, 0, Phase.SENT) == (0, [])
        scheduler.begin(slot)
    assert not job._attempts
    die(scheduler, slot, 0, Phase.UNPICKLING)
    scheduler.begin(slot)
    assert not job._attempts
    assert len(indices(slot.batch)) == 1
    die(scheduler, slot, 0, Phase.RUNNING)
    assert job._attempts == {0: 1}


def test_two_suspects_and_two_fresh_workers() -> None:
    scheduler = ready(2)
    one = start(scheduler, Map(retries=1), 3, unit=3)
    two = scheduler.put(Chunk(Map(retries=1), 0, list(range(3)), 3))
    assert two is not None
    die(scheduler, one, 1, Phase.RUNNING)
    die(scheduler, two, 1, Phase.RUNNING)
    scheduler.begin(one)
    scheduler.begin(two)
    assert indices(one.batch) == indices(two.batch) == [1]
    scheduler.finish(one, 1, 0.0)
    scheduler.finish(two, 1, 0.0)
    assert drain(scheduler, one) + drain(scheduler, two)
    assert scheduler.idle, "no suspect is left behind without a fresh worker"


# -- sizes of batches


def test_of_unknown_pace_a_few_to_look_at() -> None:
    scheduler = ready(4)
    slot = start(scheduler, Map(), 1000)
    assert slot.batch is not None
    assert 1 <= len(slot.batch) <= 16
    assert bool(slot.batch.patience) is (len(slot.batch) > 1)


def test_what_a_worker_gives_back_is_sent_elsewhere() -> None:
    scheduler = ready()
    slot = start(scheduler, Map(), 1000)
    assert slot.batch is not None
    assert len(slot.batch) > 1
    assert scheduler.finish(slot, 1, 0.2)
    assert indices(slot.batch) == [1], "elements of 0.2 s travel alone"
    assert not slot.batch.patience


@pytest.mark.parametrize(("pace", "expected"), [(1.0, 1), (0.001, 1), (0.0001, 10), (0.00001, 100)])
def test_a_batch_is_about_a_millisecond(pace: float, expected: int) -> None:
    scheduler = ready()
    job = Map()
    job._pace = pace
    slot = start(scheduler, job, 100_000)
    assert slot.batch is not None
    assert expected - 1 <= len(slot.batch) <= expected


def test_a_batch_has_an_upper_bound() -> None:
    scheduler = ready()
    job = Map()
    job._pace = 0.0
    assert len(start(scheduler, job, 100_000).batch or ()) == MAX_ELEMENTS


def test_towards_the_end_everybody_gets_a_share() -> None:
    scheduler = ready(4)
    job = Map()
    job._pace = 0.00005  # twenty in a millisecond
    slot = start(scheduler, job, 80)
    assert len(slot.batch or ()) == 10, "an eighth of what there is, for four workers"


def test_the_pace_is_learned() -> None:
    scheduler = ready()
    job = Map()
    slot = start(scheduler, job, 100_000)
    assert slot.batch is not None
    scheduler.finish(slot, len(slot.batch), len(slot.batch) * 0.0001)
    assert job._pace == pytest.approx(0.0001)
    scheduler.finish(slot, len(slot.batch or ()), len(slot.batch or ()) * 0.0003)
    assert job._pace == pytest.approx(0.0002), "half the news"


@pytest.mark.parametrize("unit", [1, 7, 50, 1000])
def test_a_user_s_chunks_stay_whole(unit: int) -> None:
    scheduler = ready()
    job = Map()
    job._pace = 0.00005  # twenty in a millisecond
    batches = drain(scheduler, start(scheduler, job, 1000, unit))
    assert [index for batch in batches for index in batch] == list(range(1000))
    assert all(batch[0] % unit == 0 for batch in batches)


def test_a_chunk_larger_than_a_batch_may_be_is_cut() -> None:
    scheduler = ready()
    batches = drain(scheduler, start(scheduler, Map(), 3 * MAX_ELEMENTS + 1, 3 * MAX_ELEMENTS + 1))
    assert [index for batch in batches for index in batch] == list(range(3 * MAX_ELEMENTS + 1))
    assert max(map(len, batches)) <= MAX_ELEMENTS


def test_chunks_of_one_job_that_follow_one_another_share_a_batch() -> None:
    scheduler = Driven(1)
    job, other = Map(), Map()
    job._pace = other._pace = 0.00001
    for start_ in range(0, 400, 10):
        scheduler.put(Chunk(job, start_, list(range(start_, start_ + 10)), 10))
    scheduler.put(Chunk(other, 0, [0, 1], 1))
    (slot,) = scheduler.slots
    scheduler.begin(slot)
    assert len(indices(slot.batch)) > 10
    batches = drain(scheduler, slot)
    assert [index for batch in batches for index in batch] == [*range(400), 0, 1]
    assert batches[-1][0] == 0, "never two jobs in one"


@pytest.mark.parametrize("unit", [1, 50])
def test_with_a_deadline_each_element_travels_alone(unit: int) -> None:
    scheduler = ready()
    job = Map(timeout=1.0)
    job._pace = 0.0
    assert drain(scheduler, start(scheduler, job, 100, unit)) == [[number] for number in range(100)]


def test_calls_with_a_deadline_travel_alone() -> None:
    scheduler = Driven(1)
    for number in range(9):
        scheduler.put(Call(number, timeout=1.0 if number % 3 == 0 else None))
    (slot,) = scheduler.slots
    scheduler.begin(slot)
    batches = drain(scheduler, slot)
    assert [number for batch in batches for number in batch] == list(range(9))
    assert [batch for batch in batches if batch[0] % 3 == 0] == [[0], [3], [6]]


def test_calls_and_maps_keep_their_order() -> None:
    scheduler = Driven(1)
    scheduler.put(Call(0))
    scheduler.put(Chunk(Map(), 1, [1, 2], 2))
    scheduler.put(Call(3))
    (slot,) = scheduler.slots
    scheduler.begin(slot)
    assert [number for batch in drain(scheduler, slot) for number in batch] == [0, 1, 2, 3]


# -- maxtasksperchild


def test_a_worker_retires_after_its_tasks() -> None:
    scheduler = ready(max_tasks=2)
    (slot,) = scheduler.slots
    assert scheduler.put(Call(0)) is slot
    scheduler.put(Call(1))
    scheduler.put(Call(2))
    assert scheduler.finish(slot, 1, 0.0)
    assert indices(slot.batch) == [1]
    assert not scheduler.finish(slot, 1, 0.0)
    assert slot.state is State.LEAVING
    assert scheduler.waiting
    die(scheduler, slot, 0, Phase.SENT)
    assert scheduler.begin(slot)
    assert indices(slot.batch) == [2]


def test_tasks_of_a_map_are_its_chunks() -> None:
    scheduler = ready(max_tasks=2)
    (slot,) = scheduler.slots
    job = Map()
    job._pace = 0.0
    start(scheduler, job, 50, unit=10)
    lives = []
    while slot.batch is not None:
        executed: list[int] = []
        while slot.batch is not None:
            executed += indices(slot.batch)
            scheduler.finish(slot, len(slot.batch), 0.0)
        lives.append(executed)
        assert slot.state is (State.LEAVING if len(executed) == 20 else State.IDLE)
        die(scheduler, slot, 0, Phase.SENT)
        scheduler.begin(slot)
    assert [len(executed) for executed in lives] == [20, 20, 10]
    assert [index for executed in lives for index in executed] == list(range(50))


# -- cancelling and ending


def test_cancelled_calls_are_passed_over() -> None:
    scheduler = Driven(1)
    calls = [Call(number) for number in range(6)]
    for call in calls:
        scheduler.put(call)
        call.cancelled = call.number % 2 == 0
    (slot,) = scheduler.slots
    scheduler.begin(slot)
    assert [number for batch in drain(scheduler, slot) for number in batch] == [1, 3, 5]
    assert scheduler.idle


def test_chunks_nobody_wants_are_dropped_and_told() -> None:
    scheduler = Driven(1)
    unwanted = Map()
    scheduler.put(Chunk(unwanted, 0, [0, 1, 2]))
    scheduler.put(Call(7))
    unwanted.wanted = False
    (slot,) = scheduler.slots
    scheduler.begin(slot)
    assert indices(slot.batch) == [7]
    assert [(chunk.job, len(chunk)) for chunk in scheduler.backlog.dropped] == [(unwanted, 3)]


def test_drop_queue_gives_back_everything_that_was_not_sent() -> None:
    scheduler = ready()
    slot = start(scheduler, Map(retries=1), 10, unit=10)
    die(scheduler, slot, 3, Phase.RUNNING)
    waiting = Call(5)
    scheduler.put(waiting)
    dropped = scheduler.backlog.drop()
    found: list[object] = []
    for entry in dropped:
        found += [entry] if isinstance(entry, Call) else entry.items
    assert found == [3, 4, 5, 6, 7, 8, 9, waiting]
    assert scheduler.idle
    assert not scheduler.begin(slot)


# -- what was not run is as if it had not been sent


@pytest.mark.parametrize("how", ["died", "unsendable"])
def test_a_retry_that_was_not_run_still_wants_a_fresh_worker(how: str) -> None:
    scheduler = ready(2)
    first = scheduler.put(Call(0, retries=1))
    other = scheduler.put(Call(1))
    assert first is not None
    assert other is not None
    die(scheduler, first, 0, Phase.RUNNING)
    scheduler.begin(first)
    if how == "died":
        assert die(scheduler, first, 0, Phase.SENT) == (0, [])
    else:
        scheduler.cannot_be_sent(first, ())  # there was no room just then
    assert not scheduler.finish(other, 1, 0.0), "it has executed something already"
    assert scheduler.begin(first) if how == "died" else scheduler.give(first)
    assert indices(first.batch) == [0]
    assert die(scheduler, first, 0, Phase.RUNNING) == (0, [(0, ((0,), {}))]), "only now is this its second attempt"


def test_unsendable_leaves_a_lonely_element_lonely(scheduler: Driven) -> None:
    slot = batch_of_10(scheduler, Map())
    scheduler.cannot_be_read(slot)
    scheduler.give(slot)
    scheduler.cannot_be_sent(slot, ())
    scheduler.give(slot)
    assert drain(scheduler, slot) == [[number] for number in range(10)]


@pytest.mark.parametrize("failed", [[], [0], [9], [9, 0, 5], list(range(10))])
def test_calls_that_cannot_be_sent_are_taken_out(failed: list[int]) -> None:
    scheduler = Driven(1)
    (slot,) = scheduler.slots
    for number in range(20):
        scheduler.put(Call(number))
    scheduler.begin(slot)
    assert indices(slot.batch) == list(range(10))
    scheduler.cannot_be_sent(slot, failed)
    scheduler.give(slot)
    left = [number for batch in drain(scheduler, slot) for number in batch]
    assert left == [number for number in range(20) if number not in failed]


@pytest.mark.parametrize("kind", ["calls", "map"])
@pytest.mark.parametrize("how", ["given back", "trimmed", "unsendable", "unreadable"])
def test_what_was_not_run_is_no_task(how: str, kind: str) -> None:
    scheduler = Driven(1, 10)
    (slot,) = scheduler.slots
    for entry in [Chunk(Map(), 0, list(range(40)))] if kind == "map" else [Call(number) for number in range(40)]:
        scheduler.put(entry)
    scheduler.begin(slot)
    assert indices(slot.batch) == list(range(10))
    assert slot.tasks_left == 0
    if how == "given back":
        assert scheduler.finish(slot, 1, 1.0)
        assert slot.tasks_left == 8, "one is executed, and one on its way"
        return
    if how == "trimmed":
        scheduler.trim(slot, 2, 100)
        assert slot.tasks_left == 8
    if how == "unreadable":
        scheduler.cannot_be_read(slot)
    else:
        scheduler.cannot_be_sent(slot, ())
    assert slot.tasks_left == 10


# -- units, wherever they are cut


def test_a_unit_is_never_given_back_by_half() -> None:
    scheduler = ready(4)
    slot = start(scheduler, Map(), 1000, unit=5)
    assert slot.batch is not None
    assert indices(slot.batch) == list(range(5)), "one of them, while the pace is unknown"
    assert not slot.batch.patience


def test_half_of_a_unit_stays_together_and_the_next_is_whole_again(scheduler: Driven) -> None:
    slot = start(scheduler, Map(), 40, unit=10)
    die(scheduler, slot, 3, Phase.RUNNING)
    scheduler.begin(slot)
    seen = []
    while slot.batch is not None:
        seen.append(indices(slot.batch))
        scheduler.finish(slot, len(slot.batch), 10.0 * len(slot.batch))
    assert seen == [[*range(4, 10)], [*range(10, 20)], [*range(20, 30)], [*range(30, 40)]]


def test_the_rest_of_a_unit_is_no_new_task() -> None:
    scheduler = ready(max_tasks=2)
    slot = start(scheduler, Map(), 30, unit=10)
    die(scheduler, slot, 5, Phase.RUNNING)
    scheduler.begin(slot)
    assert [index for batch in drain(scheduler, slot) for index in batch] == list(range(6, 30))
    assert slot.state is State.LEAVING


@pytest.mark.parametrize("unit", [1, 4])
def test_a_unit_counts_once_also_if_its_elements_travel_alone(unit: int) -> None:
    scheduler = ready(max_tasks=2)
    slot = start(scheduler, Map(timeout=1.0), 12, unit)
    lives = 0
    while slot.batch is not None:
        lives += 1
        drain(scheduler, slot)
        die(scheduler, slot, 0, Phase.SENT)
        scheduler.begin(slot)
    assert lives == 12 // unit // 2 + (unit > 1), "what is left of a unit goes to the next worker"


def test_large_elements_go_before_the_chunksize(scheduler: Driven) -> None:
    slot = start(scheduler, Map(), 100, unit=100)
    scheduler.trim(slot, 1, 100 << 20)
    scheduler.finish(slot, 1, 0.0)
    assert indices(slot.batch) == [1], "and not all the others once more, to be pickled and cut again"
    assert [index for batch in drain(scheduler, slot) for index in batch] == list(range(1, 100))


@pytest.mark.parametrize("weight", [1 << 18, 1 << 20, 1 << 40])
def test_large_elements_are_a_megabyte_together(weight: int) -> None:
    scheduler = ready()
    job = Map()
    job._pace, job._weight = 0.0, weight
    assert len(start(scheduler, job, 1000).batch or ()) == max(1, (1 << 20) // weight)


def test_values_travel_alone() -> None:
    scheduler = ready()
    job = Map()
    job._mode = Mode.VALUE
    job._pace = 0.0
    assert drain(scheduler, start(scheduler, job, 5)) == [[number] for number in range(5)]


def test_each_map_has_its_own_pace_and_calls_have_one() -> None:
    scheduler = ready()
    slow, fast = Map(), Map()
    slot = start(scheduler, slow, 1)
    scheduler.put(Chunk(fast, 0, [0]))
    scheduler.put(Call(0))
    scheduler.put(Call(1))
    scheduler.finish(slot, 1, 2.0)
    scheduler.finish(slot, 1, 0.5)
    assert (slow._pace, fast._pace) == (2.0, 0.5)
    scheduler.finish(slot, 1, 1.0)
    assert indices(slot.batch) == [1]
    assert slot.batch is not None
    assert not slot.batch.patience


# -- nobody's any more


@pytest.mark.parametrize("timeout", [None, 1.0])
def test_a_queue_of_cancelled_calls_is_empty(timeout: float | None) -> None:
    scheduler = ready()
    slot = scheduler.put(Call(0))
    assert slot is not None
    for number in range(9):
        call = Call(number, timeout=timeout)
        scheduler.put(call)
        call.cancelled = True
    assert not scheduler.finish(slot, 1, 0.0)
    assert scheduler.idle


def test_a_suspect_that_was_cancelled_is_not_run_again() -> None:
    scheduler = ready()
    call = Call(0, retries=1)
    slot = scheduler.put(call)
    assert slot is not None
    die(scheduler, slot, 0, Phase.RUNNING)
    call.cancelled = True
    assert not scheduler.begin(slot)
    assert scheduler.idle


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.UNPICKLING])
def test_nobody_wants_what_was_to_be_run_alone(scheduler: Driven, phase: Phase) -> None:
    job = Map(retries=1)
    slot = batch_of_10(scheduler, job)
    die(scheduler, slot, 0, phase)
    job.wanted = False
    assert not scheduler.begin(slot)
    assert sorted(index for chunk in scheduler.backlog.dropped for index in chunk.items) == list(range(10))
    assert scheduler.idle


def test_cancel_queue_keeps_the_calls_that_workers_are_being_started_for() -> None:
    scheduler = Driven(3)
    slot, *starting = scheduler.slots
    scheduler.begin(slot)
    assert scheduler.put(Call(0)) is slot
    for other in starting:
        assert scheduler.hold(other, object())
    for entry in [Call(1), Call(2, timeout=1.0), Call(3), Chunk(Map(), 0, [0, 1]), Call(4)]:
        scheduler.put(entry)
    assert len(scheduler.cancel_queue()) == 3
    assert drain(scheduler, slot) == [[0], [1], [2]]
    assert scheduler.idle


# -- who holds a slot, and what each event does to that


def loading() -> tuple[Driven, Slot, object]:
    scheduler = ready()
    slot = scheduler.put(Call(0))
    assert slot is not None
    assert slot.state is State.LOADING
    return scheduler, slot, scheduler.tokens[slot]


def running(*, direct: bool = False, elements: int = 1) -> tuple[Driven, Slot, object]:
    scheduler = ready()
    if elements == 1:
        slot = scheduler.put(Call(0))
    else:
        for number in range(4 * elements):
            scheduler.backlog.add(Call(number))
        slot = scheduler.give_any()
    assert slot is not None
    token = scheduler.tokens[slot]
    assert scheduler.handed_over(slot, token)
    if not direct:
        scheduler.let_go(slot, token)
    return scheduler, slot, token


def test_only_the_holder_hands_over_and_only_once() -> None:
    scheduler, slot, token = loading()
    assert not scheduler.handed_over(slot, object())
    assert scheduler.handed_over(slot, token)
    assert slot.state is State.RUNNING
    assert not scheduler.handed_over(slot, token)


def test_a_token_of_an_earlier_loading_is_nobodys() -> None:
    scheduler, slot, token = loading()
    scheduler.finish(slot, 1, 0.0)
    assert scheduler.put(Call(1)) is slot
    scheduler.let_go(slot, token)
    scheduler.unsendable(slot, token, [0])
    assert scheduler.interrupted(token) == []
    assert slot.state is State.LOADING
    assert slot.holder is scheduler.tokens[slot]
    assert indices(slot.batch) == [1]


def test_a_process_that_ends_while_its_slot_is_loaded_waits_for_the_holder() -> None:
    scheduler, slot, token = loading()
    scheduler.ended(slot)
    assert slot.state is State.ENDED
    assert not scheduler.may_be_reaped(slot)
    assert not scheduler.handed_over(slot, token), "what is sent now would come to nobody"
    scheduler.let_go(slot, token)
    assert scheduler.may_be_reaped(slot)
    assert scheduler.died(slot, Death()) == []
    assert slot.state is State.VACANT
    assert scheduler.waiting, "the call goes elsewhere"


@pytest.mark.parametrize("how", ["unsendable", "no room", "interrupted"])
def test_a_holder_that_gives_back_after_the_process_has_ended(how: str) -> None:
    scheduler, slot, token = loading()
    scheduler.ended(slot)
    if how == "unsendable":
        scheduler.unsendable(slot, token, [0])
    elif how == "no room":
        scheduler.no_room(slot, token)
    else:
        assert scheduler.interrupted(token) == [slot]
    assert scheduler.may_be_reaped(slot)
    assert slot.state is State.ENDED


def test_an_interrupted_holder_of_a_loading_slot_leaves_it_idle() -> None:
    scheduler, slot, token = loading()
    assert scheduler.interrupted(token) == [slot]
    assert slot.state is State.IDLE
    assert slot.holder is None
    assert scheduler.idle, "nobody has a result of what it was submitting"
    assert scheduler.put(Call(1)) is slot


def test_an_interrupted_direct_call_has_its_worker_killed() -> None:
    scheduler, slot, token = running(direct=True)
    assert scheduler.interrupted(token) == [slot]
    assert (slot.state, slot.why, slot.holder) == (State.LEAVING, Why.INTERRUPTED, None)
    assert slot.busy


def test_a_direct_call_that_lets_go_leaves_the_rest_to_the_loop() -> None:
    scheduler, slot, token = running(direct=True)
    assert scheduler.is_read_elsewhere(slot)
    scheduler.let_go(slot, token)
    assert slot.state is State.RUNNING
    assert not scheduler.is_read_elsewhere(slot)


@pytest.mark.parametrize("why", [Why.LATE, Why.CANCELLED])
def test_what_is_to_be_killed_for_its_element_has_one(why: Why) -> None:
    scheduler, slot, token = loading()
    assert not scheduler.condemn(slot, why), "it has not begun"
    assert scheduler.handed_over(slot, token)
    scheduler.let_go(slot, token)
    assert scheduler.condemn(slot, why)
    assert (slot.state, slot.why) == (State.LEAVING, why)
    assert not scheduler.condemn(slot, why), "once"
    scheduler.done(slot, 1, 0.0)
    assert (slot.state, slot.why, slot.busy) == (State.LEAVING, why, False), "it is being killed all the same"
    assert scheduler.put(Call(1)) is None
    scheduler.ended(slot)
    assert scheduler.died(slot, None) == []


def test_a_cancelled_element_is_not_tried_again() -> None:
    for why, tries_again in ((Why.CANCELLED, False), (Why.LATE, True)):
        scheduler = ready()
        slot = scheduler.put(Call(0, retries=1))
        assert slot is not None
        scheduler.hand_over(slot)
        assert scheduler.condemn(slot, why)
        assert (die(scheduler, slot, 0, Phase.RUNNING)[1] == []) is tries_again
        assert scheduler.waiting is tries_again


@pytest.mark.parametrize("state", [State.STARTING, State.IDLE, State.LOADING, State.RUNNING, State.LEAVING])
def test_misuse_condemns_whatever_lives_and_leaves_it_its_holder(state: State) -> None:
    scheduler, slot, token = loading() if state is State.LOADING else running()
    if state is State.STARTING:
        scheduler = Driven(1)
        (slot,) = scheduler.slots
        scheduler.hold(slot, token)
    elif state is State.IDLE:
        scheduler.done(slot, 1, 0.0)
    elif state is State.LEAVING:
        scheduler.done(slot, 1, 0.0)
        scheduler.retire(slot)
    assert slot.state is state
    held = slot.holder
    assert scheduler.condemn(slot, Why.MISUSED)
    assert (slot.state, slot.why, slot.holder) == (State.LEAVING, Why.MISUSED, held)
    assert not scheduler.condemn(slot, Why.MISUSED)


@pytest.mark.parametrize("state", [State.LOADING, State.RUNNING, State.IDLE, State.ENDED])
def test_the_end_takes_everything_and_leaves_each_holder_what_it_holds(state: State) -> None:
    scheduler, slot, token = loading() if state is State.LOADING else running(direct=state is State.RUNNING)
    if state is State.IDLE:
        scheduler.done(slot, 1, 0.0)
    elif state is State.ENDED:
        scheduler.ended(slot)
    waiting = Call(7)
    scheduler.backlog.add(waiting)
    entries = scheduler.end()
    assert len(entries) == (1 if state is State.IDLE else 2)
    assert waiting in entries
    assert slot.state is State.CLOSED
    assert slot.holder is (token if state in (State.LOADING, State.RUNNING) else None)
    assert not scheduler.handed_over(slot, token)
    scheduler.ended(slot)
    assert not scheduler.condemn(slot, Why.MISUSED)
    scheduler.unsendable(slot, token, ())
    scheduler.let_go(slot, token)
    assert scheduler.died(slot, None) == []
    assert (slot.state, slot.holder, slot.busy) == (State.CLOSED, None, False)
    assert scheduler.assign(object()) is None
    assert not scheduler.waiting


def test_a_process_that_cannot_be_started_leaves_its_slot_vacant() -> None:
    scheduler = Driven(1)
    (slot,) = scheduler.slots
    token = object()
    assert scheduler.hold(slot, token)
    assert not scheduler.hold(slot, object()), "one starter"
    scheduler.let_go(slot, token, started=False)
    assert slot.state is State.VACANT
    assert scheduler.begin(slot) is False
    assert slot.state is State.IDLE
    assert not scheduler.ready(slot), "it has said so"


def test_what_has_not_begun_is_asked_back_once_and_only_for_somebody_idle() -> None:
    scheduler = Driven(2)
    first, second = scheduler.slots
    for number in range(16):
        scheduler.backlog.add(Call(number))
    scheduler.begin(first)
    scheduler.hand_over(first)
    batch = first.batch
    assert batch is not None
    assert len(batch) > 1
    scheduler.begin(second)
    while scheduler.waiting or second.busy:
        assert second.batch is not None
        scheduler.finish(second, len(second.batch), 0.0)
    assert scheduler.recall() is None, "nobody has said that it takes long"
    scheduler.overdue(first, batch)
    assert scheduler.can_recall
    assert scheduler.recall() is first
    assert scheduler.recall() is None
    size = len(batch)
    scheduler.given_back(first, 1)
    assert len(batch) == 1
    assert scheduler.give_any() is second
    assert second.batch is not None
    assert indices(second.batch)[0] == 1
    scheduler.finish(first, 1, 0.0)
    rest = [1 for slot in (first, second) for found in drain(scheduler, slot) for _ in found]
    assert len(rest) == size - 1
    assert scheduler.idle


def test_a_batch_that_is_over_is_not_overdue() -> None:
    scheduler, slot, _ = running(elements=4)
    batch = slot.batch
    assert batch is not None
    assert len(batch) > 1
    scheduler.done(slot, len(batch), 0.0)
    scheduler.overdue(slot, batch)
    assert not scheduler.can_recall


@pytest.mark.parametrize("reason", list(Blocked))
def test_nothing_is_assigned_while_something_blocks_it(reason: Blocked) -> None:
    scheduler = ready()
    scheduler.block(reason)
    assert scheduler.put(Call(0)) is None
    assert not scheduler.can_assign
    assert scheduler.give_any() is None
    scheduler.block(reason, False)
    assert scheduler.can_assign
    assert scheduler.give_any() is scheduler.slots[0]


def test_room_that_was_wanting_comes_back_with_what_is_done() -> None:
    scheduler = ready(2)
    first, second = scheduler.put(Call(0)), scheduler.put(Call(1))
    assert first is not None
    assert second is not None
    scheduler.hand_over(first)
    scheduler.no_room(second, scheduler.tokens[second])
    assert scheduler.give_any() is None
    scheduler.finish(first, 1, 0.0, more=False)
    assert scheduler.give_any() is not None


def test_without_others_there_is_nobody_to_wait_for_room_from() -> None:
    scheduler, slot, token = loading()
    scheduler.no_room(slot, token)
    assert scheduler.can_assign


def test_a_worker_that_is_not_needed_is_told_to_leave_once() -> None:
    scheduler, slot, _ = running()
    assert not scheduler.retire(slot)
    scheduler.done(slot, 1, 0.0)
    assert scheduler.retire(slot)
    assert (slot.state, slot.why) == (State.LEAVING, Why.RETIRING)
    assert not scheduler.retire(slot)
    assert scheduler.put(Call(1)) is None
