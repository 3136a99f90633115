"""The scheduler: pure state, events in, decisions out. No pipe, process, clock, lock or thread.

Who may touch a worker is the state of its slot, and `holder`: a token that one thread made for one loading (or one
start). The holder of a LOADING slot owns the slot's memory; of a RUNNING slot (a direct call) its pipe's reading end.
Nobody else reaps, reads from or closes what has a holder.

    =========  ============================  =============================================================
    state      event                         what follows
    =========  ============================  =============================================================
    VACANT     hold, from `due`              STARTING with a holder: a process is being started
    STARTING   let go, no process            VACANT
    STARTING   ready                         IDLE
    IDLE       assigned                      LOADING, with a batch and a holder
    IDLE       retired                       LEAVING; it is told to
    LOADING    handed over                   RUNNING; a direct call keeps its holder
    LOADING    trimmed                       LOADING; what is beyond one message goes back to the queue
    LOADING    unsendable, no room           IDLE; elements that cannot be pickled fail, the others go back
    LOADING    interrupted                   IDLE; nobody has a result of what the thread was submitting
    RUNNING    interrupted (a direct call)   LEAVING; nobody can say whether the frame went out: kill it
    RUNNING    let go (a direct call)        RUNNING, without a holder: the loop reads
    RUNNING    given back                    RUNNING; what had not begun goes back to the front of the queue
    RUNNING    overdue                       RUNNING; to be asked to give back, as soon as somebody is idle
    RUNNING    done                          IDLE, or LEAVING when it has done its tasks
    RUNNING    unreadable                    IDLE; its elements one by one; a single one is blamed
    RUNNING    condemned: late, cancelled    LEAVING, with its batch: kill it
    any live   condemned: misused, silent    LEAVING, with its batch and its holder: kill it
    any live   ended                         ENDED, with its batch and its holder: gets no more
    LEAVING    done, given back              LEAVING
    ENDED      done, given back              ENDED: what the pipe still held
    ENDED      let go, interrupted           ENDED, without a holder: may be reaped
    ENDED      died                          VACANT; see below
    any        the pool's end                CLOSED; its batch fails, its holder, if any, closes what it held
    CLOSED     anything                      CLOSED
    =========  ============================  =============================================================

What a death means is said by a `Death` (`deaths.py`): the first `finished` elements are delivered, those up to `began`
are blamed, the others go back to the front of the queue. Who is blamed is convicted, or run again alone in a fresh
worker if its job allows retries. A batch that was being unpickled is run again one by one, which runs nothing twice,
because nothing ran; a single element is blamed.

Nothing is assigned while something blocks it (`Blocked`): that is state of the scheduler, too.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from typing import Final

from .._work import Batch, Element, Entry
from .backlog import Backlog
from .deaths import Death

__all__ = ["Blocked", "Scheduler", "Slot", "State", "Why"]


class State(enum.Enum):
    VACANT = enum.auto()  # without a process
    STARTING = enum.auto()
    IDLE = enum.auto()
    LOADING = enum.auto()
    RUNNING = enum.auto()
    LEAVING = enum.auto()  # gets no more, and is expected to end
    ENDED = enum.auto()  # its process has
    CLOSED = enum.auto()  # the pool has


class Why(enum.Enum):
    """Why a slot is LEAVING."""

    RETIRING = enum.auto()  # it has done its tasks
    LATE = enum.auto()  # its element missed its deadline
    CANCELLED = enum.auto()  # its element is not wanted any more
    MISUSED = enum.auto()  # a task has made it none of ours
    DISCONNECTED = enum.auto()  # its end of the pipe is closed
    INTERRUPTED = enum.auto()  # nobody can say whether it has a batch


class Blocked(enum.Enum):
    """Why nothing is being sent although there is something queued and somebody idle."""

    NO_ROOM = enum.auto()  # a batch found no room in the store; what is running will give some back
    CONGESTED = enum.auto()  # results pile up before the serial thread
    INTERRUPTED = enum.auto()  # Ctrl-C has ended an element: the program may be about to cancel the rest


_LIVE: Final = frozenset((State.STARTING, State.IDLE, State.LOADING, State.RUNNING, State.LEAVING))


class Slot:
    """What the scheduler knows of one worker. Changed under the engine's lock only."""

    __slots__ = ("batch", "fresh", "holder", "id", "state", "tasks_left", "why")

    def __init__(self, id: int, tasks: int | None) -> None:
        self.id = id
        self.vacate(tasks)

    def vacate(self, tasks: int | None) -> None:
        self.state = State.VACANT
        self.batch: Batch | None = None
        self.holder: object | None = None
        self.fresh = True  # has executed nothing yet
        self.tasks_left = tasks
        self.why: Why | None = None

    @property
    def busy(self) -> bool:
        return self.batch is not None


class Scheduler:
    """Which elements go to which slot."""

    def __init__(self, slots: int, max_tasks: int | None = None) -> None:
        self._max_tasks = max_tasks
        self.slots = [Slot(id, max_tasks) for id in range(slots)]
        self._idle: deque[Slot] = deque()
        self.backlog = Backlog(slots)
        self._blocked: set[Blocked] = set()
        self._overdue: set[Slot] = set()  # RUNNING with a batch that takes longer than batches should

    # -- what is there

    @property
    def waiting(self) -> bool:
        """Whether anything is queued."""
        return bool(self.backlog)

    @property
    def has_idle(self) -> bool:
        """Whether an entry that is submitted now may be sent at once."""
        return bool(self._idle) and not self.backlog and not self._blocked

    @property
    def can_assign(self) -> bool:
        """Whether there may be both something queued and somebody idle."""
        return bool(self._idle) and bool(self.backlog) and not self._blocked

    @property
    def idle(self) -> bool:
        """Whether nothing is queued and nothing is executing."""
        return not self.waiting and not any(slot.busy for slot in self.slots)

    # -- what is submitted

    def submit(self, entry: Entry, token: object) -> Slot | None:
        """Queue an entry; the idle slot that has got a batch for it, held by `token`, if there is one.

        Not if others were queued before it: a batch of this thread's has nothing in it but what this thread submits.
        """
        first = bool(self._idle) and self.has_idle  # mostly there is none
        self.backlog.add(entry)
        return self.assign(token) if first else None

    def submit_more(self, entry: Entry, token: object) -> Slot | None:
        """Another idle slot that has got a batch of the same entry, if it is still the first in the queue."""
        return self.assign(token) if self._idle and self.backlog.is_next(entry) else None

    def end(self) -> list[Entry]:
        """The pool has ended: all that was queued or with a worker, for it to fail."""
        entries = self.backlog.drop()
        for slot in self.slots:
            if slot.batch is not None:
                entries += slot.batch.rest(0)
                slot.batch = None
            slot.state = State.CLOSED
        self._idle.clear()
        return entries

    def cancel_queue(self) -> list[Entry]:
        """Take everything out of the queue but calls that somebody was told are running.

        Nor the first calls for which a worker is being started: their caller may count on it.
        """
        return self.backlog.cancel(keep=sum(slot.state is State.STARTING for slot in self.slots))

    def block(self, reason: Blocked, yes: bool = True) -> None:
        """Assign nothing, or again, as far as this reason goes."""
        if yes:
            self._blocked.add(reason)
        else:
            self._blocked.discard(reason)

    # -- who gets what

    def assign(self, token: object) -> Slot | None:
        """Give an idle slot a batch, if there are both; it is LOADING, and `token` holds it."""
        if self._blocked or not self.backlog:
            return None
        for _ in range(len(self._idle)):  # one may be passed over: a retry wants a fresh worker
            slot = self._idle.popleft()
            if slot.state is State.IDLE:
                if self._assign(slot, token):
                    return slot
                self._idle.append(slot)
        return None

    def assign_to(self, slot: Slot, token: object) -> bool:
        """As `assign`, but to this slot, which has just become idle."""
        if slot.state is not State.IDLE or self._blocked or not self._assign(slot, token):
            return False
        if self._idle and self._idle[-1] is slot:
            self._idle.pop()
        else:
            self._idle.remove(slot)
        return True

    def hold(self, slot: Slot, token: object) -> bool:
        """Have a process started in the slot by whoever has the token, unless it has one or the pool has ended."""
        if slot.state is not State.VACANT or slot.holder is not None:
            return False
        slot.state, slot.holder = State.STARTING, token
        return True

    # -- by the holder

    def handed_over(self, slot: Slot, token: object) -> bool:
        """The batch is in the memory, and the worker's from now on; whether it may be told."""
        if slot.holder is not token or slot.state is not State.LOADING:
            return False
        slot.state = State.RUNNING
        return True

    def let_go(self, slot: Slot, token: object, *, started: bool = True) -> None:
        """The holder needs the slot no more; what it has a batch for it keeps. Without a process nothing starts."""
        if slot.holder is token:
            slot.holder = None
            if slot.state is State.STARTING and not started:
                slot.vacate(self._max_tasks)

    def trim(self, slot: Slot, keep: int, size: int) -> None:
        """The slot's batch is `size` bytes, too many for one message: it keeps its first elements only."""
        if slot.batch is not None:  # None: the pool has ended
            self._return_tasks(slot, slot.batch, keep)
            self.backlog.trim(slot.batch, keep, size)

    def unsendable(self, slot: Slot, token: object, failed: Iterable[int]) -> None:
        """The batch could not be pickled; `failed` are the positions that are to blame, the others go back."""
        batch = slot.batch
        if slot.holder is not token:
            return
        slot.holder = None
        if batch is None:
            return  # the pool has ended
        self._return_tasks(slot, batch, 0)
        self.backlog.put_back_but(batch, failed)
        slot.batch = None
        self._rest(slot)

    def no_room(self, slot: Slot, token: object) -> None:
        """The batch found no room in the store. What others have there they will give back."""
        if slot.holder is token and slot.batch is not None:
            self.unsendable(slot, token, ())
            self.block(Blocked.NO_ROOM, any(other.busy for other in self.slots))

    def interrupted(self, token: object) -> list[Slot]:
        """An exception stopped the thread with this token somewhere. Returns the slots that it held.

        What it was submitting nobody has got a result of. Workers of slots that are LEAVING now are to be killed.
        """
        let_go = []
        for slot in self.slots:
            if slot.holder is not token:
                continue
            let_go.append(slot)
            slot.holder = None
            if slot.state is State.LOADING:
                if slot.batch is not None:
                    self._return_tasks(slot, slot.batch, 0)
                slot.batch = None
                self._rest(slot)
            elif slot.state is State.RUNNING:
                slot.state, slot.why = State.LEAVING, Why.INTERRUPTED
        self._repair()
        return let_go

    # -- by the worker's messages

    def ready(self, slot: Slot) -> bool:
        """The worker has started; False if it has said so before."""
        if slot.state is not State.STARTING:
            return False
        self._rest(slot)
        return True

    def done(self, slot: Slot, finished: int, elapsed: float) -> None:
        """The first `finished` elements have taken `elapsed` seconds, the others were given back."""
        batch = slot.batch
        assert batch is not None
        if finished:
            self.backlog.note_pace(batch, elapsed / finished)
        if finished < len(batch):
            self._return_tasks(slot, batch, finished)
            self.backlog.put_back(batch, batch.rest(finished))
        slot.fresh = False
        self._overdue.discard(slot)
        slot.batch = slot.holder = None
        self._blocked.discard(Blocked.NO_ROOM)
        self._rest(slot)

    def unreadable(self, slot: Slot) -> list[Element]:
        """Nothing of the batch ran, because it could not be unpickled; who is convicted of it."""
        batch = slot.batch
        assert batch is not None
        slot.fresh = False
        self._overdue.discard(slot)
        self._return_tasks(slot, batch, 0)
        slot.batch = slot.holder = None
        self._rest(slot)
        return self.backlog.nothing_ran(batch, retry=False)  # it would fail in the same way again

    def given_back(self, slot: Slot, kept: int) -> None:
        """The elements from position `kept` on have not begun, and will not in this worker."""
        batch = slot.batch
        assert batch is not None
        self._return_tasks(slot, batch, kept)
        self.backlog.put_back(batch, batch.rest(kept))
        batch.cut(kept)
        self._overdue.discard(slot)

    # -- by the clock

    def overdue(self, slot: Slot, batch: Batch) -> None:
        """The batch takes longer than batches should."""
        if slot.batch is batch and slot.state is State.RUNNING and len(batch) > 1 and batch.patience:
            self._overdue.add(slot)

    @property
    def can_recall(self) -> bool:
        """Whether there may be a slot that is to be asked to give back, because others have nothing to do."""
        return bool(self._overdue) and bool(self._idle) and not self.waiting

    def recall(self) -> Slot | None:
        """Such a slot; each is asked once."""
        while self.can_recall:
            slot = self._overdue.pop()
            if slot.state is State.RUNNING and slot.batch is not None:
                return slot
        return None

    def retire(self, slot: Slot) -> bool:
        """The pool needs the worker no more, which has nothing to do; it is to be told to leave."""
        if slot.state is not State.IDLE:
            return False
        slot.state, slot.why = State.LEAVING, Why.RETIRING
        return True

    def condemn(self, slot: Slot, why: Why) -> bool:
        """The worker is to be killed; False if it is not, for what it is to be killed for is over, or has not begun."""
        states = _LIVE if why in (Why.MISUSED, Why.DISCONNECTED) else (State.RUNNING,)
        if slot.state not in states or (slot.state is State.LEAVING and slot.why is not Why.RETIRING):
            return False
        slot.state, slot.why = State.LEAVING, why
        return True

    # -- by the end of its process

    def ended(self, slot: Slot) -> None:
        """The worker's process has ended; what it has left is to be looked at when nobody holds it."""
        if slot.state in _LIVE:
            slot.state = State.ENDED

    def may_be_reaped(self, slot: Slot) -> bool:
        """Whether its process has ended, and nobody holds it."""
        return slot.state is State.ENDED and slot.holder is None

    def is_read_elsewhere(self, slot: Slot) -> bool:
        """Whether what the worker says is read by its holder (a direct call), or by nobody any more."""
        return slot.state is State.CLOSED or (slot.state is State.RUNNING and slot.holder is not None)

    def died(self, slot: Slot, death: Death | None) -> list[Element]:
        """What its process has left has been looked at; nothing, if it had no batch. Who is convicted of the death."""
        batch, retry = slot.batch, slot.why is not Why.CANCELLED
        if slot.state is State.CLOSED:
            return []
        slot.vacate(self._max_tasks)
        self._overdue.discard(slot)
        self._blocked.discard(Blocked.NO_ROOM)
        if batch is None or death is None:
            return []
        if death.unpickling:
            return self.backlog.nothing_ran(batch, retry=retry)
        self.backlog.put_back(batch, batch.rest(death.began))
        # Each retry wants a fresh worker, and one death brings but one.
        retry = retry and death.began - death.finished == 1
        suspects = [self.backlog.suspect(batch, at, retry=retry) for at in range(death.finished, death.began)]
        return [element for element in suspects if element is not None]

    # -- decisions

    def _rest(self, slot: Slot) -> None:
        """The slot has no batch any more."""
        if slot.state not in (State.STARTING, State.LOADING, State.RUNNING):
            return
        if slot.tasks_left is not None and slot.tasks_left <= 0:
            slot.state, slot.why = State.LEAVING, Why.RETIRING
            return
        slot.state = State.IDLE
        self._idle.append(slot)

    def _assign(self, slot: Slot, token: object) -> bool:
        batch = self.backlog.take(fresh=slot.fresh, tasks_left=slot.tasks_left)
        if batch is None:
            return False
        slot.batch, slot.holder = batch, token
        slot.state = State.LOADING
        if slot.tasks_left is not None:
            slot.tasks_left -= batch.tasks()
        return True

    def _return_tasks(self, slot: Slot, batch: Batch, keep: int) -> None:
        """What is behind the first `keep` elements does not count against the slot's tasks."""
        if slot.tasks_left is not None:
            slot.tasks_left += batch.tasks() - batch.tasks(keep)

    def _repair(self) -> None:
        """A thread was interrupted between any two steps: derive again what others may rely on."""
        for slot in self.slots:
            if slot.holder is None and slot.batch is None and slot.state in (State.LOADING, State.RUNNING):
                self._rest(slot)
            elif slot.state is State.IDLE:
                slot.batch = slot.holder = None  # of what was being submitted
                if slot not in self._idle:
                    self._idle.append(slot)
        self.backlog.repair()
