"""The scheduler as the engine drives it: an event, and in the same breath the decision that follows from it."""

from __future__ import annotations

from collections.abc import Iterable

from portshm.pool._engine.deaths import Death
from portshm.pool._engine.scheduler import Scheduler, Slot, State
from portshm.pool._wire.slot_memory import Mode, Phase
from portshm.pool._work import Element, Entry, Job, MapJob, TaskOptions


class Nobody:
    """The engine of jobs that are never delivered."""

    def later(self, action: object) -> None:
        raise NotImplementedError

    def forget(self, job: object) -> None:
        raise NotImplementedError


class Call(Job):
    """A single call by its number."""

    def __init__(self, number: int = 0, *, timeout: float | None = None, retries: int = 0) -> None:
        self._options = TaskOptions(timeout, retries)
        self._attempts = None
        self._call = (self, (number,), {})
        self.number = number
        self._begun = self.cancelled = False

    def _begin(self) -> bool:
        self._begun = True
        return not self.cancelled


class Map(MapJob):
    def __init__(self, *, timeout: float | None = None, retries: int = 0, mode: Mode = Mode.MAP) -> None:
        super().__init__(len, mode, Nobody(), TaskOptions(timeout, retries))
        self.wanted = True

    def _begin(self) -> bool:
        return self.wanted


class Driven(Scheduler):
    """Each slot that gets a batch is held by one token of its own until it is handed over."""

    def __init__(self, slots: int, max_tasks: int | None = None) -> None:
        super().__init__(slots, max_tasks)
        self.tokens = {slot: object() for slot in self.slots}

    def put(self, entry: Entry) -> Slot | None:
        """Submit it; the slot that has got a batch."""
        token = object()
        return self._note(self.submit(entry, token), token)

    def give_any(self) -> Slot | None:
        token = object()
        return self._note(self.assign(token), token)

    def give(self, slot: Slot) -> bool:
        token = object()
        return self.assign_to(slot, token) and self._note(slot, token) is slot

    def _note(self, slot: Slot | None, token: object) -> Slot | None:
        if slot is not None:
            self.tokens[slot] = token
            assert slot.state is State.LOADING
            assert slot.holder is token
        return slot

    def begin(self, slot: Slot) -> bool:
        """Its process is started and says that it is ready; whether it has got a batch."""
        token = object()
        assert self.hold(slot, token)
        self.let_go(slot, token)
        assert self.ready(slot)
        return self.give(slot)

    def hand_over(self, slot: Slot) -> None:
        if slot.state is State.LOADING:
            assert self.handed_over(slot, self.tokens[slot])
            self.let_go(slot, self.tokens[slot])

    def finish(self, slot: Slot, finished: int, elapsed: float, *, more: bool = True) -> bool:
        """The worker says `Done`; whether it has got another batch."""
        self.hand_over(slot)
        self.done(slot, finished, elapsed)
        return more and self.give(slot)

    def cannot_be_read(self, slot: Slot) -> list[Element]:
        self.hand_over(slot)
        return self.unreadable(slot)

    def cannot_be_sent(self, slot: Slot, failed: Iterable[int]) -> None:
        self.unsendable(slot, self.tokens[slot], failed)

    def die(self, slot: Slot, finished: int, phase: Phase) -> list[Element]:
        """Its process ends, having come so far with its batch; who is convicted."""
        self.hand_over(slot)
        self.ended(slot)
        assert slot.state is State.ENDED
        assert self.may_be_reaped(slot)
        if slot.batch is None:
            death = None
        elif phase is Phase.RUNNING:
            death = Death(finished, min(finished + 1, len(slot.batch)))
        else:
            death = Death(unpickling=phase is Phase.UNPICKLING)
        return self.died(slot, death)
