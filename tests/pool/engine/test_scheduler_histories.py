"""Thousands of random histories of the scheduler: whatever happens, each element ends exactly once."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from portshm.pool._engine.scheduler import Batch, Chunk, Job, Scheduler, Slot, State, Verdict
from portshm.pool._wire.slot_memory import MAX_ELEMENTS, Mode, Phase

PACES = (1e-9, 0.00005, 0.001, 10.0)  # seconds per element

Element = tuple[Job, int]


class Call(Job):
    def __init__(self, retries: int, timeout: float | None) -> None:
        super().__init__()
        self.retries = retries
        self.timeout = timeout
        self.call = len, (), {}
        self.begun = self.cancelled = False

    def begin(self) -> bool:
        self.begun = True
        return not self.cancelled


class Map(Job):
    def __init__(self, retries: int, timeout: float | None, mode: Mode) -> None:
        super().__init__()
        self.retries = retries
        self.timeout = timeout
        self.mode = mode
        self.abandoned = False

    def begin(self) -> bool:
        return not self.abandoned


class World:
    """Workers, as the scheduler sees them, that do what they like; and what a user would see of it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.max_tasks = self.random.choice([None, None, 1, 2, 5])
        self.scheduler = Scheduler(self.random.randint(1, 4), self.max_tasks)
        self.submitted: list[Element] = []
        self.jobs: list[Call | Map] = []
        self.finished: Counter[Element] = Counter()
        self.failed: Counter[Element] = Counter()
        self.crashed: Counter[Element] = Counter()
        self.lonely: set[Element] = set()  # to be executed alone from now on
        self.tasks: Counter[int] = Counter()  # by slot: tasks that its present process has executed
        self.used: set[int] = set()  # slots whose present process has unpickled something

    # -- the user

    def submit(self) -> None:
        chance = self.random
        retries, timeout = chance.choice([0, 0, 1, 2]), chance.choice([None, None, None, 1.0])
        if chance.random() < 0.6:
            for _ in range(chance.choice([1, 1, 5, 20])):
                call = Call(retries, timeout)
                self.jobs.append(call)
                self.submitted.append((call, 0))
                self.sent(self.scheduler.submit(call))
            return
        job = Map(retries, timeout, chance.choice([Mode.MAP, Mode.STARMAP, Mode.VALUE]))
        self.jobs.append(job)
        unit = 1 if job.mode is Mode.VALUE else chance.choice([1, 1, 2, 3, 7, 50])
        start = 0
        for _ in range(chance.randint(1, 4)):
            items = list(range(start, start + unit * chance.randint(1, 10 // unit + 1)))
            self.submitted += [(job, index) for index in items]
            self.sent(self.scheduler.submit(Chunk(job, start, items, unit)))
            start += len(items)

    def lose_interest(self) -> None:
        job = self.random.choice(self.jobs)
        if isinstance(job, Map):
            job.abandoned = True
        elif not job.begun:
            job.cancelled = True

    # -- the sender

    def sent(self, slot: Slot | None) -> None:
        """The slot may have got a batch, which may turn out to be too large, or not to be sendable at all."""
        while slot is not None and slot.batch is not None:
            elements = self.elements(slot.batch)
            assert len(elements) <= MAX_ELEMENTS
            if len(elements) > 1:
                assert all(job.timeout is None for job, _ in elements), "a deadline has a batch of its own"
                assert not self.lonely & {*elements}
            for element in elements:
                assert slot.id not in self.used or not self.crashed[element], "a retry is in a fresh worker"
            roll = self.random.random()
            if roll < 0.04 and len(elements) > 1:
                keep = self.random.randint(1, len(elements) - 1)
                self.scheduler.trim(slot, keep, self.random.choice([10, 1 << 22]))
                assert self.elements(slot.batch) == elements[:keep]
                return
            if roll > 0.04:
                return
            failed = [position for position in range(len(elements)) if self.random.random() < 0.3]
            self.scheduler.unsendable(slot, failed)
            self.failed.update(elements[position] for position in failed)
            if self.random.random() < 0.3:
                self.scheduler.free(slot, more=False)
                return
            self.scheduler.free(slot)

    def elements(self, batch: Batch) -> list[Element]:
        return [batch.owner(position)[:2] for position in range(len(batch))]

    # -- the workers

    def happen(self, slot: Slot, *, peaceful: bool = False) -> None:
        """Something that can happen to a worker in this state."""
        made, chance = self.scheduler, self.random
        if slot.state is State.STARTING:
            if peaceful or chance.random() < 0.8:
                made.ready(slot)
                self.sent(slot)
            else:
                self.die(slot, 0, Phase.SENT)
        elif slot.state is State.IDLE:
            if not peaceful and chance.random() < 0.1:
                self.die(slot, 0, Phase.SENT)
        elif slot.state is State.RETIRING:
            assert self.tasks[slot.id] == self.max_tasks, "neither sooner nor later"
            self.die(slot, 0, Phase.SENT)
        else:
            batch = slot.batch
            assert batch is not None
            if peaceful or chance.random() < 0.6:
                few = batch.patience and chance.random() < 0.5
                finished = chance.randint(1, len(batch)) if few else len(batch)
                self.execute(slot, batch, finished)
                self.used.add(slot.id)
                got = made.done(slot, finished, chance.choice(PACES) * finished)
                assert got is (slot.batch is not None)
            elif chance.random() < 0.15:
                self.blame(batch, made.unreadable(slot), 0)
                self.used.add(slot.id)
                if len(batch) > 1:
                    self.lonely.update(self.elements(batch))
                made.free(slot)
            else:
                phase = chance.choice([Phase.SENT, Phase.UNPICKLING, Phase.RUNNING, Phase.RUNNING])
                self.die(slot, chance.randint(0, len(batch)) if phase is Phase.RUNNING else 0, phase)
            self.sent(slot)

    def die(self, slot: Slot, finished: int, phase: Phase) -> None:
        batch = slot.batch
        if batch is not None:
            elements = self.elements(batch)
            self.execute(slot, batch, finished)
            if phase is Phase.UNPICKLING:
                self.lonely.update(elements)
                self.crashed.update(elements if len(elements) == 1 else ())
            elif phase is Phase.RUNNING and finished < len(elements):
                self.lonely.add(elements[finished])
                self.crashed[elements[finished]] += 1
        verdict = self.scheduler.died(slot, finished, phase)
        self.tasks[slot.id] = 0
        self.used.discard(slot.id)
        assert slot.state is State.STARTING
        assert verdict.finished == finished
        if batch is None:
            assert verdict.culprit is None
        else:
            self.blame(batch, verdict, finished)
            if verdict.culprit is not None:
                job, index, _ = verdict.culprit
                assert self.crashed[job, index] == job.retries + 1, "not before its last attempt"

    def blame(self, batch: Batch, verdict: Verdict, position: int) -> None:
        if verdict.culprit is not None:
            assert verdict.culprit == batch.owner(position)
            self.failed[verdict.culprit[:2]] += 1

    def execute(self, slot: Slot, batch: Batch, finished: int) -> None:
        for job, index in self.elements(batch)[:finished]:
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
            else:
                self.happen(self.random.choice(self.scheduler.slots))
            self.sent(self.scheduler.assign_idle())
        self.scheduler.closing = True
        turns = 0
        while not self.scheduler.idle:
            for slot in self.scheduler.slots:
                self.happen(slot, peaceful=True)
                self.sent(self.scheduler.assign_idle())
            turns += 1
            assert turns < 10 * len(self.submitted) + 100, "it comes to an end"

    def check(self) -> None:
        made = self.scheduler
        assert (made._extra, made._special) == (0, 0), "the sums over the queue are those of an empty one"
        dropped = Counter(
            (chunk.job, chunk.start + position) for chunk in made.dropped for position in range(len(chunk))
        )
        for element in self.submitted:
            job, _ = element
            unwanted = isinstance(job, Map) and job.abandoned
            cancelled = isinstance(job, Call) and job.cancelled
            ended = self.finished[element] + self.failed[element] + dropped[element]
            assert ended == 1 or (ended == 0 and cancelled), "each exactly once"
            assert unwanted or not dropped[element]
            assert self.crashed[element] <= job.retries + 1
            assert self.failed[element] or self.crashed[element] <= job.retries
        assert {*self.finished, *self.failed, *dropped} <= {*self.submitted}


@pytest.mark.parametrize("block", range(4))
def test_each_element_ends_exactly_once(block: int) -> None:
    for seed in range(block * 250, (block + 1) * 250):
        world = World(seed)
        try:
            world.run(40)
            world.check()
        except BaseException as error:
            raise AssertionError(f"history {seed}") from error
