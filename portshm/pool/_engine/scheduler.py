"""The scheduler: pure state, events in, decisions out. No pipe, process, clock, lock or thread.

States of a slot, and what moves it:

    ==========  ===========================  =========================================================
    state       event                        decision
    ==========  ===========================  =========================================================
    STARTING    ready                        IDLE, or BUSY with a batch
    STARTING    died                         start another, unless starts fail one after the other
    IDLE        entry submitted              BUSY with a batch
    IDLE        died                         start another
    BUSY        done                         IDLE, BUSY with the next batch, or RETIRING
    BUSY        done, could not be unpickled its elements one by one; a single one fails
    BUSY        died                         see below; start another
    RETIRING    died                         start another, unless the pool closes
    any         ended                        ENDED: has what it has and gets no more; `died` follows
    ==========  ===========================  =========================================================

When a worker dies over a batch, its memory tells how far it was:

- not read: nothing has happened; all elements go back to the front of the queue.
- being unpickled: one of the elements may be the cause. A single one is the culprit; several are sent again one by
  one, which runs nothing twice, because nothing ran.
- running: the elements before `count` are finished and delivered; element `count` is the culprit; the others go
  back to the front of the queue. The culprit is convicted, or run again alone in a fresh worker if its job allows
  retries. Innocents are never counted.

A culprit is at most one element, and nothing else that ran is run again.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from .._wire.slot_memory import MAX_ELEMENTS, Mode, Phase

__all__ = ["Batch", "Chunk", "Job", "Scheduler", "Slot", "State", "Verdict"]

# Seconds of work that one message should carry. Longer batches save nothing more and hold back what is behind a
# slow element; shorter ones cost more for the message than for the work.
_BATCH_SECONDS: Final = 0.001

# A message that carries less work than this costs more than it carries.
_LEAST_SECONDS: Final = 0.0003

# Elements for the first batch of a job, of whose pace nothing is known.
_UNKNOWN_PACE: Final = 16

# Seconds after which the worker gives back what it has not begun of a batch: where the pace was not known, and where it
# was and is no longer true.
_PROBE: Final = 0.0002
_PATIENCE: Final = 0.01

# Bytes of payload in one batch of elements that are known to be large.
_BATCH_BYTES: Final = 1 << 20

# How much a new measurement that is slower counts against what is known of a job's pace.
_NEW_WEIGHT: Final = 0.5


class Job:
    """Something whose elements are to be executed; the faces' results derive from it.

    A job of mode CALLS is a single call and stands in the queue itself; others are queued in `Chunk`s.
    """

    __slots__ = ("attempts", "call", "pace", "retries", "timeout", "weight")

    mode: Mode = Mode.CALLS
    # Whether `begin` has to be asked: single calls of a pool cannot be cancelled.
    cancellable = True
    # How many tasks it is, as a chunk has some.
    units = 1
    # Whether its caller was told that it is running, and so that it cannot be cancelled any more.
    begun = False

    def __init__(self) -> None:
        self.timeout: float | None = None  # seconds per element
        self.retries = 0
        self.attempts: dict[int, int] | None = None  # index -> crashes so far
        self.pace: float | None = None  # seconds per element
        self.weight = 0  # bytes per element, where they are many
        # Function, args and kwargs of a single call; None once it is settled.
        self.call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None

    def begin(self) -> bool:
        """Called when the job is about to be sent; False if it was cancelled meanwhile."""
        return True

    # What a single call has besides; jobs in chunks have their own.

    def settle(self, ok: bool, value: Any) -> None:
        """End it, with its result or its exception."""
        raise NotImplementedError

    def unpicklable(self, value: str, reason: BaseException) -> BaseException:
        """The exception for a result that could not be pickled: its repr, and why."""
        raise NotImplementedError


class Chunk:
    """Elements of a job that follow one another, of which batches are taken from the front.

    Always whole units: of 1 where we may cut as we like, else of the user's chunksize. A unit starts at every
    multiple of it, also where a crash has left half of one in the queue.
    """

    __slots__ = ("_at", "items", "job", "start", "unit")

    def __init__(self, job: Job, start: int, items: Sequence[Any], unit: int = 1) -> None:
        self.job = job
        self.start = start  # index of the first element that is left
        self.items = items
        self.unit = unit
        self._at = 0

    @property
    def units(self) -> int:
        return -(-len(self) // self.unit)

    def __len__(self) -> int:
        return len(self.items) - self._at

    def tasks(self, count: int) -> int:
        """How many units begin in the next `count` elements, so that none is counted twice wherever it is cut."""
        return -(-(self.start + count) // self.unit) - -(-self.start // self.unit)

    def take(self, count: int) -> Sequence[Any]:
        """The next `count` items, which the chunk no longer has."""
        at, self._at = self._at, self._at + count
        self.start += count
        return self.items if at == 0 and self._at == len(self.items) else self.items[at : self._at]


class Batch:
    """What is sent in one message: calls, or consecutive elements of one map."""

    __slots__ = ("calls", "chunk", "id", "job", "origin", "patience", "plain")

    def __init__(self, id: int, calls: list[Job], chunk: Chunk | None, origin: deque[Job | Chunk]) -> None:
        self.id = id
        self.calls = calls
        self.chunk = chunk
        self.job = chunk.job if chunk is not None else calls[0]
        self.origin = origin  # the queue it came from, where it goes back to if nothing of it was sent
        self.plain: bool | None = None  # as `is_plain` of what it holds, once somebody has asked
        self.patience = 0.0  # seconds after which the worker gives back what it has not begun; 0: it executes all

    def __len__(self) -> int:
        return len(self.chunk.items) if self.chunk is not None else len(self.calls)

    @property
    def mode(self) -> Mode:
        return self.job.mode

    def tasks(self, count: int | None = None) -> int:
        """How many tasks the first `count` elements (all) are in the eyes of maxtasksperchild."""
        count = len(self) if count is None else count
        return count if self.chunk is None else self.chunk.tasks(count)

    def owner(self, position: int) -> tuple[Job, int, Any]:
        """Job, index in the job, and item of the element at `position`."""
        if self.chunk is not None:
            return self.chunk.job, self.chunk.start + position, self.chunk.items[position]
        call = self.calls[position]
        if call.call is None:
            return call, 0, ()
        _, args, kwargs = call.call
        return call, 0, (args, dict(kwargs))  # the user's from here on

    def rest(self, start: int, stop: int | None = None) -> list[Job | Chunk]:
        """The elements from `start` to `stop` as entries of the queue."""
        if self.chunk is None:
            return list(self.calls[start:stop])
        items = self.chunk.items[start:stop]
        return [Chunk(self.chunk.job, self.chunk.start + start, items, self.chunk.unit)] if items else []

    def cut(self, keep: int) -> None:
        """Have the first elements only."""
        del self.calls[keep:]
        if self.chunk is not None:
            self.chunk = Chunk(self.job, self.chunk.start, self.chunk.items[:keep], self.chunk.unit)

    def one_by_one(self) -> list[Job | Chunk]:
        return [entry for position in range(len(self)) for entry in self.rest(position, position + 1)]


class State(enum.Enum):
    STARTING = enum.auto()
    IDLE = enum.auto()
    BUSY = enum.auto()
    RETIRING = enum.auto()
    ENDED = enum.auto()


class Slot:
    """What the scheduler knows of one worker."""

    __slots__ = ("batch", "fresh", "id", "state", "tasks_left")

    def __init__(self, id: int, tasks: int | None) -> None:
        self.id = id
        self.restart(tasks)

    def restart(self, tasks: int | None) -> None:
        self.state = State.STARTING
        self.batch: Batch | None = None
        self.fresh = True
        self.tasks_left = tasks


class Verdict:
    """What follows from a batch that ended badly: who is to blame, if anybody."""

    __slots__ = ("culprit", "finished")

    def __init__(self, finished: int, culprit: tuple[Job, int, Any] | None) -> None:
        self.finished = finished  # results on record to be delivered
        self.culprit = culprit  # convicted: job, index, item


class Scheduler:
    """Which elements go to which slot."""

    def __init__(self, slots: int, max_tasks: int | None = None) -> None:
        self._max_tasks = max_tasks
        self.slots = [Slot(id, max_tasks) for id in range(slots)]
        self._idle: deque[Slot] = deque()
        self._queue: deque[Job | Chunk] = deque()
        # Entries to be executed alone: suspects of a crash, and what was in a batch that could not be unpickled.
        self._alone: deque[Job | Chunk] = deque()
        self._retry: deque[Job | Chunk] = deque()  # alone and in a fresh worker
        self._extra = 0  # elements in the queue beyond one per entry
        self._special = 0  # entries in the queue that are not plain calls: chunks, and calls with a deadline
        self.dropped: list[Chunk] = []  # taken out of the queue because their job is not to begin any more
        self._next_batch = 1
        # Calls have their pace and weight in common: most are never seen again.
        self._call_pace: float | None = None
        self._call_weight = 0
        self.closing = False

    # -- what is there

    @property
    def waiting(self) -> bool:
        """Whether anything is queued."""
        return bool(self._queue or self._alone or self._retry)

    @property
    def has_idle(self) -> bool:
        """Whether an entry that is submitted now may be sent at once."""
        return bool(self._idle) and not self.waiting

    @property
    def can_assign(self) -> bool:
        """Whether there may be both something queued and somebody idle."""
        return bool(self._idle) and self.waiting

    @property
    def idle(self) -> bool:
        """Whether nothing is queued and nothing is executing."""
        return not self.waiting and all(slot.batch is None for slot in self.slots)

    # -- events

    def submit(self, entry: Job | Chunk) -> Slot | None:
        """Queue an entry; the idle slot that has got a batch for it, if there is one.

        Not if others were queued before it: a batch of this thread's has nothing in it but what this thread submits.
        """
        first = bool(self._idle) and not self.waiting
        self._queue.append(entry)
        if type(entry) is Chunk or entry.timeout is not None:  # type: ignore[union-attr]
            self._note(entry, 1)
        return self.assign_idle() if first else None

    def submit_more(self, entry: Job | Chunk) -> Slot | None:
        """Another idle slot that has got a batch of the same entry, if it is still the first in the queue."""
        queue = self._queue
        first = bool(self._idle) and bool(queue) and queue[0] is entry and not (self._alone or self._retry)
        return self.assign_idle() if first else None

    def repair(self) -> None:
        """A thread was interrupted in the middle of `submit`: derive again what others may rely on."""
        for slot in self.slots:
            if slot.state is State.IDLE and slot.batch is None and slot not in self._idle:
                self._idle.append(slot)
        entries = [entry for entry in self._queue if isinstance(entry, Job) or len(entry)]
        self._queue.clear()
        self._queue.extend(entries)
        self._note_all()

    def assign_idle(self) -> Slot | None:
        """Give an idle slot a batch, if there are both."""
        while self._idle:
            slot = self._idle.popleft()
            if slot.state is not State.IDLE:
                continue
            if self._assign(slot):
                return slot
            self._idle.append(slot)
            return None
        return None

    def ready(self, slot: Slot) -> bool:
        """The worker has started; whether it has got a batch."""
        return self.free(slot)

    def done(self, slot: Slot, finished: int, elapsed: float, *, more: bool = True) -> bool:
        """The first `finished` elements have taken `elapsed` seconds, the others were given back.

        Returns whether the slot has got another batch, as `free` does.
        """
        batch = slot.batch
        assert batch is not None
        self._note_pace(batch, elapsed / finished)
        if finished < len(batch):
            self._put_back(batch, batch.rest(finished))
            if slot.tasks_left is not None:
                slot.tasks_left += batch.tasks() - batch.tasks(finished)
        slot.fresh = False
        slot.batch = None
        return self.free(slot, more=more)

    def unreadable(self, slot: Slot) -> Verdict:
        """Nothing of the batch ran, because it could not be unpickled."""
        batch, slot.batch = slot.batch, None
        assert batch is not None
        slot.fresh = False
        if slot.tasks_left is not None:
            slot.tasks_left += batch.tasks()
        return self._nothing_ran(batch, retry=False)  # it would fail in the same way again

    def trim(self, slot: Slot, keep: int, size: int) -> None:
        """The slot's batch is `size` bytes, too many for one message: it keeps its first elements only."""
        batch = slot.batch
        assert batch is not None
        weight = size // len(batch)
        if batch.chunk is not None:
            batch.job.weight = weight
        else:
            self._call_weight = weight
        self._put_back(batch, batch.rest(keep))
        if slot.tasks_left is not None:
            slot.tasks_left += batch.tasks() - batch.tasks(keep)
        batch.cut(keep)

    def lighten(self, batch: Batch) -> None:
        """The batch turned out small: those after it need not be cut for their size."""
        if batch.chunk is not None:
            batch.job.weight = 0
        else:
            self._call_weight = 0

    def unsendable(self, slot: Slot, failed: Iterable[int]) -> None:
        """The batch could not be pickled; `failed` are the positions that are to blame, the others go back."""
        batch, slot.batch = slot.batch, None
        assert batch is not None
        edges = [-1, *sorted(failed), len(batch)]
        self._put_back(
            batch, [entry for bad, next_bad in itertools.pairwise(edges) for entry in batch.rest(bad + 1, next_bad)]
        )
        if slot.tasks_left is not None:
            slot.tasks_left += batch.tasks()

    def ended(self, slot: Slot) -> None:
        """The worker's process has ended; what it had is still to be looked at, and `died` to be told."""
        slot.state = State.ENDED

    def died(self, slot: Slot, finished: int = 0, phase: Phase = Phase.SENT) -> Verdict:
        """The worker's process has ended, having finished so much of its batch; the slot is STARTING again."""
        batch = slot.batch
        slot.restart(self._max_tasks)
        if batch is None:
            return Verdict(0, None)
        if phase is Phase.UNPICKLING:
            return self._nothing_ran(batch, retry=True)
        if phase is Phase.SENT:
            self._put_back(batch, batch.rest(0))
            return Verdict(0, None)
        # All finished and no `Done`: it died between two batches, and nobody is to blame.
        culprit = self._suspect(batch, finished) if finished < len(batch) else None
        self._put_back(batch, batch.rest(finished + 1))
        return Verdict(finished, culprit)

    def free(self, slot: Slot, *, more: bool = True) -> bool:
        """The slot has no batch (any more) and its worker is ready; whether it has got one.

        Without `more` it has not: who asks is to send nothing, or nothing yet.
        """
        if slot.state is State.ENDED:
            return False
        if slot.tasks_left is not None and slot.tasks_left <= 0:
            slot.state = State.RETIRING
            return False
        if more and self._assign(slot):
            return True
        slot.state = State.IDLE
        self._idle.append(slot)
        return False

    def drop_queue(self) -> list[Job | Chunk]:
        """Take everything out of the queue, and so all that has not been sent."""
        dropped = [*self._retry, *self._alone, *self._queue]
        self._retry.clear()
        self._alone.clear()
        self._queue.clear()
        self._special = self._extra = 0
        return dropped

    def cancel_queue(self, keep: int = 0) -> list[Job | Chunk]:
        """As `drop_queue`, but for the first `keep` entries, if those are calls, and calls that were put back."""
        first = set(itertools.takewhile(lambda entry: isinstance(entry, Job), itertools.islice(self._queue, keep)))
        cancelled: list[Job | Chunk] = []
        for queue in (self._retry, self._alone, self._queue):
            entries = list(queue)
            queue.clear()
            for entry in entries:
                stays = isinstance(entry, Job) and (entry in first or entry.begun)
                (queue if stays else cancelled).append(entry)
        self._note_all()
        return cancelled

    # -- decisions

    def _assign(self, slot: Slot) -> bool:
        batch = self._take(slot)
        if batch is None:
            return False
        slot.batch = batch
        slot.state = State.BUSY
        if slot.tasks_left is not None:
            slot.tasks_left -= batch.tasks()
        return True

    def _take(self, slot: Slot) -> Batch | None:
        for queue, alone in ((self._retry, slot.fresh), (self._alone, True)):
            while alone and queue:
                entry = queue.popleft()
                if isinstance(entry, Chunk):
                    if entry.job.begin():
                        return self._batch([], entry, queue)
                    self.dropped.append(entry)
                elif entry.begin():
                    return self._batch([entry], None, queue)
        queue = self._queue
        while queue:
            head = queue[0]
            if isinstance(head, Chunk):
                if head.job.begin():
                    return self._take_chunks(slot)
                queue.popleft()
                self._note(head, -1)
                self.dropped.append(head)
                continue
            calls = self._take_calls(slot)
            if calls:
                return self._batch(calls, None, queue)
        return None

    def _take_calls(self, slot: Slot) -> list[Job]:
        """Calls from the head of the queue; none if those were all cancelled."""
        queue = self._queue
        first = queue[0]
        assert isinstance(first, Job)
        limit = 1 if first.timeout is not None else self._limit(self._call_pace, self._call_weight)
        if slot.tasks_left is not None:
            limit = min(limit, slot.tasks_left)
        if self._special:
            limit = self._plain_calls_ahead(limit)
        popleft = queue.popleft
        calls: list[Any] = [popleft() for _ in range(min(limit, len(queue)))]
        if first.timeout is not None:
            self._note(first, -1)
        return [call for call in calls if call.begin()] if first.cancellable else calls

    def _plain_calls_ahead(self, limit: int) -> int:
        """How many calls, at most `limit`, come before the next entry that cannot be in the same batch."""
        count = 1
        while count < min(limit, len(self._queue)):
            entry = self._queue[count]
            if isinstance(entry, Chunk) or entry.timeout is not None:
                break
            count += 1
        return count

    def _take_chunks(self, slot: Slot) -> Batch:
        queue = self._queue
        first = queue[0]
        assert isinstance(first, Chunk)
        job, start, unit = first.job, first.start, first.unit
        limit, most = self._limit(job.pace, job.weight), MAX_ELEMENTS
        if slot.tasks_left is not None:  # up to where a unit begins that is one too many
            most = min(most, unit * (slot.tasks_left - -start // unit) - start)
        if job.timeout is not None or job.mode is Mode.VALUE:
            # A deadline ends the worker, and must not end another element that happens to be executing when the
            # kill arrives; alone in its batch, an element is either the late one or finished.
            most = 1
        if job.weight:
            unit = 1  # large elements are not waited for in company, whatever the chunksize
        elif job.pace is None and unit > 1:
            limit = 1  # one unit at first: whole units are not given back
        limit = min(limit, most)
        items: Sequence[Any] = []
        while queue and len(items) < limit:
            chunk = queue[0]
            if not isinstance(chunk, Chunk) or chunk.job is not job or chunk.start != start + len(items):
                break
            units = max((limit - len(items)) // unit, 0 if items else 1)
            count = min(units * unit - chunk.start % unit, len(chunk), most - len(items))
            if count <= 0:
                break
            self._note(chunk, -1)
            taken = chunk.take(count)
            items = [*items, *taken] if items else taken
            if len(chunk):
                self._note(chunk, 1)
                break
            queue.popleft()
        return self._batch([], Chunk(job, start, items, first.unit), queue)

    def _batch(self, calls: list[Job], chunk: Chunk | None, origin: deque[Job | Chunk]) -> Batch:
        batch = Batch(self._next_batch, calls, chunk, origin)
        pace, unit = (self._call_pace, 1) if chunk is None else (chunk.job.pace, chunk.unit)
        if len(batch) > 1 and unit == 1:
            batch.patience = _PROBE if pace is None else _PATIENCE
        self._next_batch += 1
        return batch

    def _note(self, entry: Job | Chunk, sign: int) -> None:
        """An entry that is not a plain call has come into the queue (1) or left it (-1)."""
        self._special += sign
        if isinstance(entry, Chunk):
            self._extra += sign * (len(entry) - 1)

    def _note_all(self) -> None:
        self._special = self._extra = 0
        for entry in self._queue:
            if isinstance(entry, Chunk) or entry.timeout is not None:
                self._note(entry, 1)

    def _limit(self, pace: float | None, weight: int) -> int:
        """Elements for one batch: about a millisecond of work, and towards the end a fair share of what is left."""
        queued = len(self._queue) + self._extra
        if queued <= len(self.slots):
            # What is known of others' pace need not be true of these few, and who shares a batch waits for its slowest.
            return 1
        share = -(-queued // (2 * len(self.slots)))
        if weight:
            share = min(share, max(1, _BATCH_BYTES // weight))
        if pace is None or weight:
            return max(1, min(share, _UNKNOWN_PACE))
        worthwhile = int(_LEAST_SECONDS / max(pace, 1e-9))
        return max(1, min(int(_BATCH_SECONDS / max(pace, 1e-9)), max(share, worthwhile), MAX_ELEMENTS))

    def _note_pace(self, batch: Batch, seconds: float) -> None:
        known = batch.job.pace if batch.chunk is not None else self._call_pace
        # What is quicker than was known is believed at once: the first elements of a job find everything cold, and
        # if it is not true of those to come, the worker gives them back.
        pace = seconds if known is None or seconds < known else known + _NEW_WEIGHT * (seconds - known)
        if batch.chunk is not None:
            batch.job.pace = pace
        else:
            self._call_pace = pace

    def _nothing_ran(self, batch: Batch, *, retry: bool) -> Verdict:
        if len(batch) == 1:
            return Verdict(0, self._suspect(batch, 0) if retry else batch.owner(0))
        self._alone.extend(batch.one_by_one())
        return Verdict(0, None)

    def _suspect(self, batch: Batch, position: int) -> tuple[Job, int, Any] | None:
        """Convict the element, or queue it for another attempt if its job allows one."""
        job, index, item = batch.owner(position)
        if job.retries:
            attempts = job.attempts = job.attempts or {}
            attempts[index] = attempts.get(index, 0) + 1
            if attempts[index] <= job.retries:
                self._retry.extend(batch.rest(position, position + 1))
                return None
        return job, index, item

    def _put_back(self, batch: Batch, entries: list[Job | Chunk]) -> None:
        """To the front of the queue that the batch came from."""
        batch.origin.extendleft(reversed(entries))
        if batch.origin is not self._queue:
            return
        for entry in entries:
            if isinstance(entry, Chunk) or entry.timeout is not None:
                self._note(entry, 1)
