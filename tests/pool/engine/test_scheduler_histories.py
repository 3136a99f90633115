"""Thousands of random histories of the scheduler: whatever happens, each element ends exactly once."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from portshm.pool._engine.deaths import Death
from portshm.pool._engine.scheduler import Blocked, Scheduler, Slot, State, Why
from portshm.pool._wire.slot_memory import MAX_ELEMENTS, Mode
from portshm.pool._work import Batch, Chunk, Entry, Job
from portshm.pool._work import Element as Blamed
from tests.pool.engine.scheduling import Call, Map

PACES = (1e-9, 0.00005, 0.001, 10.0)  # seconds per element

Element = tuple[Job, int]


def elements_of(batch: Batch) -> list[Element]:
    found = [batch.element(position) for position in range(len(batch))]
    return [(element.job, element.index) for element in found]


def elements_in(entries: list[Entry]) -> list[Element]:
    found: list[Element] = []
    for entry in entries:
        if isinstance(entry, Chunk):
            found += [(entry.job, entry.start + position) for position in range(len(entry))]
        else:
            found.append((entry, 0))
    return found


class World:
    """Threads and workers, as the scheduler sees them, that do what they like; and what a user would see of it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.max_tasks = self.random.choice([None, None, 1, 2, 5])
        self.scheduler = Scheduler(self.random.randint(1, 4), self.max_tasks)
        self.submitted: list[Element] = []
        self.jobs: list[Call | Map] = []
        self.finished: Counter[Element] = Counter()
        self.failed: Counter[Element] = Counter()
        self.lost: Counter[Element] = Counter()  # with the thread that was interrupted as it submitted them
        self.ended: Counter[Element] = Counter()  # with the pool
        self.crashed: Counter[Element] = Counter()
        self.lonely: set[Element] = set()  # to be executed alone from now on
        self.tasks: Counter[int] = Counter()  # by slot: tasks that its present process has executed
        self.used: set[int] = set()  # slots whose present process has unpickled something
        self.old_tokens: list[object] = []
        self.over = False

    # -- the user

    def submit(self) -> None:
        chance = self.random
        retries, timeout = chance.choice([0, 0, 1, 2]), chance.choice([None, None, None, 1.0])
        if chance.random() < 0.6:
            for _ in range(chance.choice([1, 1, 5, 20])):
                call = Call(retries=retries, timeout=timeout)
                self.jobs.append(call)
                self.submit_entry(call)
            return
        job = Map(retries=retries, timeout=timeout, mode=chance.choice([Mode.MAP, Mode.STARMAP, Mode.VALUE]))
        self.jobs.append(job)
        unit = 1 if job._mode is Mode.VALUE else chance.choice([1, 1, 2, 3, 7, 50])
        start = 0
        for _ in range(chance.randint(1, 4)):
            items = list(range(start, start + unit * chance.randint(1, 10 // unit + 1)))
            self.submit_entry(Chunk(job, start, items, unit))
            start += len(items)

    def submit_entry(self, entry: Entry) -> None:
        """As a thread does; it may be interrupted while it holds a slot, and then nobody has a result of the entry."""
        elements = elements_in([entry])
        self.submitted += elements
        token = object()
        slot = self.scheduler.submit(entry, token)
        while slot is not None:
            assert slot.batch is not None
            assert {*elements_of(slot.batch)} <= {*elements}, "a thread sends nothing but what it submits itself"
            if self.random.random() < 0.05:
                self.lost.update(elements_of(slot.batch))
                assert self.scheduler.interrupted(token) == [slot]
                assert slot.holder is None
                return
            self.hold(slot, token)
            slot = self.scheduler.submit_more(entry, token) if self.random.random() < 0.9 else None

    def lose_interest(self) -> None:
        job = self.random.choice(self.jobs)
        if isinstance(job, Map):
            job.wanted = False
        elif not job._begun:
            job.cancelled = True

    # -- who holds a slot

    def assign(self) -> None:
        token = object()
        slot = self.scheduler.assign(token)
        if slot is not None:
            self.hold(slot, token)

    def hold(self, slot: Slot, token: object) -> None:
        """Load the slot, and hand it over or not. Its process may end meanwhile."""
        batch, made, chance = slot.batch, self.scheduler, self.random
        assert batch is not None
        assert slot.state is State.LOADING
        assert slot.holder is token
        elements = elements_of(batch)
        self.check_batch(slot, elements)
        if chance.random() < 0.04 and len(elements) > 1:
            keep = chance.randint(1, len(elements) - 1)
            made.trim(slot, keep, chance.choice([10, 1 << 22]))
            assert elements_of(batch) == elements[:keep]
        if chance.random() < 0.05:
            made.ended(slot)
            assert not made.may_be_reaped(slot)
        roll = chance.random()
        if roll < 0.03:
            failed = [position for position in range(len(batch)) if chance.random() < 0.3]
            self.failed.update(elements[position] for position in failed)
            made.unsendable(slot, token, failed)
        elif roll < 0.05:
            made.no_room(slot, token)
        else:
            assert made.handed_over(slot, token) is (slot.state is State.RUNNING)
            made.let_go(slot, token)
        assert slot.holder is None
        self.old_tokens.append(token)

    def check_batch(self, slot: Slot, elements: list[Element]) -> None:
        assert len(elements) <= MAX_ELEMENTS
        if len(elements) > 1:
            assert all(job._options.timeout is None for job, _ in elements), "a deadline has a batch of its own"
            assert not self.lonely & {*elements}
        for element in elements:
            assert slot.id not in self.used or not self.crashed[element], "a retry is in a fresh worker"
        others = [other.batch for other in self.scheduler.slots if other is not slot and other.batch is not None]
        assert not {*elements} & {element for batch in others for element in elements_of(batch)}, "handed out twice"

    def come_late(self) -> None:
        """Whoever held a slot long ago changes nothing."""
        token, made = self.random.choice(self.old_tokens), self.scheduler
        slot = self.random.choice(made.slots)
        before = slot.state, slot.batch, slot.holder, slot.tasks_left, made.waiting
        assert not made.handed_over(slot, token)
        made.let_go(slot, token)
        made.unsendable(slot, token, [0])
        made.no_room(slot, token)
        assert made.interrupted(token) == []
        assert before == (slot.state, slot.batch, slot.holder, slot.tasks_left, made.waiting)

    # -- the workers

    def happen(self, slot: Slot, *, peaceful: bool = False) -> None:
        """Something that can happen to a worker in this state."""
        made, chance = self.scheduler, self.random
        if slot.state is State.VACANT:
            token = object()
            assert made.hold(slot, token)
            made.let_go(slot, token, started=peaceful or chance.random() < 0.9)
        elif slot.state is State.STARTING:
            if peaceful or chance.random() < 0.8:
                assert made.ready(slot)
                self.give(slot)
            else:
                self.die(slot)
        elif slot.state is State.IDLE:
            if not peaceful and chance.random() < 0.1:
                self.die(slot)
        elif slot.state is State.RUNNING:
            self.run_batch(slot, peaceful)
        else:
            assert slot.state in (State.LEAVING, State.ENDED)
            if slot.why is Why.RETIRING:
                assert self.tasks[slot.id] == self.max_tasks, "neither sooner nor later"
            self.die(slot)

    def run_batch(self, slot: Slot, peaceful: bool) -> None:
        made, chance, batch = self.scheduler, self.random, slot.batch
        assert batch is not None
        roll = 0.0 if peaceful else chance.random()
        if roll < 0.55:
            few = batch.patience and chance.random() < 0.5
            self.done(slot, batch, chance.randint(1, len(batch)) if few else len(batch))
        elif roll < 0.65 and batch.patience:
            made.overdue(slot, batch)
            asked = made.recall()
            assert asked in (None, slot)
            if asked is slot or chance.random() < 0.5:
                made.given_back(slot, chance.randint(1, len(batch)))
        elif roll < 0.72:
            elements = elements_of(batch)
            if len(elements) > 1:
                self.lonely.update(elements)
            self.used.add(slot.id)
            self.blame(batch, made.unreadable(slot), range(1))
            self.give(slot)
        elif roll < 0.85:
            assert made.condemn(slot, chance.choice([Why.LATE, Why.CANCELLED, Why.MISUSED, Why.DISCONNECTED]))
            assert not made.condemn(slot, Why.LATE)
            if chance.random() < 0.3:
                self.done(slot, batch, len(batch))
                assert slot.state is State.LEAVING
        else:
            self.die(slot)

    def done(self, slot: Slot, batch: Batch, finished: int) -> None:
        self.execute(slot, elements_of(batch), finished, batch)
        self.used.add(slot.id)
        self.scheduler.done(slot, finished, self.random.choice(PACES) * finished)
        self.give(slot)

    def give(self, slot: Slot) -> None:
        token = object()
        if self.random.random() < 0.9 and self.scheduler.assign_to(slot, token):
            self.hold(slot, token)

    def die(self, slot: Slot) -> None:
        made, chance, batch = self.scheduler, self.random, slot.batch
        made.ended(slot)
        assert made.may_be_reaped(slot)
        assert made.assign_to(slot, object()) is False
        death = None
        if batch is not None:
            elements = elements_of(batch)
            finished = chance.randint(0, len(elements))
            overwritten = chance.random() < 0.1
            death = chance.choice([
                Death(),
                Death(unpickling=True),
                Death(0, len(elements)) if overwritten else Death(finished, min(finished + 1, len(elements))),
            ])  # fmt: skip
            self.execute(slot, elements, death.finished, batch)
            if death.unpickling:
                self.lonely.update(elements)
                self.crashed.update(elements if len(elements) == 1 else ())
            self.lonely.update(elements[death.finished : death.began])
            self.crashed.update(elements[death.finished : death.began])
        no_retry = slot.why is Why.CANCELLED or (death is not None and death.began - death.finished > 1)
        convicted = made.died(slot, death)
        self.tasks[slot.id] = 0
        self.used.discard(slot.id)
        assert slot.state is State.VACANT
        if death is None:
            assert convicted == []
            return
        assert batch is not None
        self.blame(batch, convicted, range(1) if death.unpickling else range(death.finished, death.began))
        for element in convicted:
            tries = self.crashed[element.job, element.index]
            assert no_retry or tries == element.job._options.retries + 1, "not before its last attempt"

    def blame(self, batch: Batch, convicted: list[Blamed], began: range) -> None:
        for element in convicted:
            assert element in [batch.element(position) for position in began], "nobody who did not run"
            self.failed[element.job, element.index] += 1

    def execute(self, slot: Slot, elements: list[Element], finished: int, batch: Batch) -> None:
        for job, index in elements[:finished]:
            self.finished[job, index] += 1
            if batch.chunk is None or index % batch.chunk.unit == 0:
                self.tasks[slot.id] += 1
        assert self.max_tasks is None or self.tasks[slot.id] <= self.max_tasks

    # -- all of it

    def run(self, events: int) -> None:
        for _ in range(events):
            roll = self.random.random()
            if roll < 0.15:
                self.submit()
            elif roll < 0.2 and self.jobs:
                self.lose_interest()
            elif roll < 0.23 and self.old_tokens:
                self.come_late()
            elif roll < 0.26:
                self.scheduler.block(self.random.choice(list(Blocked)), self.random.random() < 0.3)
            else:
                self.happen(self.random.choice(self.scheduler.slots))
            self.assign()
            self.check_slots()
        if self.random.random() < 0.2:
            self.end()
        else:
            self.run_to_the_end()

    def run_to_the_end(self) -> None:
        for reason in Blocked:
            self.scheduler.block(reason, False)
        turns = 0
        while not self.scheduler.idle:
            for slot in self.scheduler.slots:
                self.happen(slot, peaceful=True)
                self.assign()
            for reason in Blocked:  # what is not done gives no room back
                self.scheduler.block(reason, False)
            turns += 1
            assert turns < 10 * len(self.submitted) + 100, "it comes to an end"

    def end(self) -> None:
        self.ended.update(elements_in(self.scheduler.end()))
        for slot in self.scheduler.slots:
            assert (slot.state, slot.batch) == (State.CLOSED, None)
            self.scheduler.ended(slot)
            assert self.scheduler.died(slot, None) == []
            assert not self.scheduler.ready(slot)
            assert not self.scheduler.hold(slot, object())
        assert self.scheduler.assign(object()) is None
        assert self.scheduler.idle

    def check_slots(self) -> None:
        for slot in self.scheduler.slots:
            assert (slot.batch is not None) or slot.state not in (State.LOADING, State.RUNNING)
            assert slot.batch is None or slot.state in (State.LOADING, State.RUNNING, State.LEAVING, State.ENDED)
            assert slot.holder is None, "between two events nobody is at it here"

    def check(self) -> None:
        backlog = self.scheduler.backlog
        assert (backlog._extra, backlog._special) == (0, 0), "the sums over the queue are those of an empty one"
        dropped = Counter(elements_in([*backlog.dropped]))
        for element in self.submitted:
            job, _ = element
            unwanted = isinstance(job, Map) and not job.wanted
            cancelled = isinstance(job, Call) and job.cancelled
            outcomes = self.finished, self.failed, dropped, self.lost, self.ended
            ended = sum(outcome[element] for outcome in outcomes)
            assert ended == 1 or (ended == 0 and cancelled), "each exactly once"
            assert unwanted or not dropped[element]
            assert self.crashed[element] <= job._options.retries + 1
        assert {*self.finished, *self.failed, *dropped} <= {*self.submitted}


def live(seeds: range) -> None:
    for seed in seeds:
        world = World(seed)
        try:
            world.run(40)
            world.check()
        except BaseException as error:
            raise AssertionError(f"history {seed}") from error


@pytest.mark.parametrize("block", range(4))
def test_each_element_ends_exactly_once(block: int) -> None:
    live(range(block * 500, (block + 1) * 500))


@pytest.mark.slow
def test_each_element_ends_exactly_once_in_a_hundred_thousand_histories() -> None:
    live(range(10_000, 110_000))
