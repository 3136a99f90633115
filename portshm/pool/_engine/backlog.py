"""The backlog: what is queued, and which of it makes a batch. Pure state, like the scheduler, whose part it is.

A batch is about a millisecond of work: what a message costs must be little beside what it carries, and nobody should
wait for a slow element in others' company.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from .._wire.slot_memory import MAX_ELEMENTS, Mode
from .._work import Batch, Chunk, Element, Entry, Job

__all__ = ["BATCH_BYTES", "PATIENCE", "Backlog"]

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
PATIENCE: Final = 0.01

# Bytes of payload beyond which a batch of several elements is cut: large elements are not waited for in company.
BATCH_BYTES: Final = 1 << 20

# How much a new measurement that is slower counts against what is known of a job's pace.
_NEW_WEIGHT: Final = 0.5


class Backlog:
    """Entries in the order in which they are to be executed. `slots` is how many workers share them."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._queue: deque[Entry] = deque()
        # Entries to be executed alone: suspects of a crash, and what was in a batch that could not be unpickled.
        self._alone: deque[Entry] = deque()
        self._retry: deque[Entry] = deque()  # alone and in a fresh worker
        self._extra = 0  # elements in the queue beyond one per entry
        self._special = 0  # entries in the queue that are not plain calls: chunks, and calls with a deadline
        self.dropped: list[Chunk] = []  # taken out of the queue because their job is not to begin any more
        self._next_batch = 1
        # Calls have their pace and weight in common: most are never seen again.
        self._call_pace: float | None = None
        self._call_weight = 0

    def __bool__(self) -> bool:
        return bool(self._queue or self._alone or self._retry)

    def add(self, entry: Entry) -> None:
        self._queue.append(entry)
        if type(entry) is Chunk or entry._options.timeout is not None:  # type: ignore[union-attr]
            self._note(entry, 1)

    def is_next(self, entry: Entry) -> bool:
        """Whether this is what the next batch would be taken from."""
        return bool(self._queue) and self._queue[0] is entry and not (self._alone or self._retry)

    def take(self, *, fresh: bool, tasks_left: int | None) -> Batch | None:
        """The next batch, for a worker that has executed nothing yet (`fresh`) and may do so many tasks (None: any)."""
        for queue, alone in ((self._retry, fresh), (self._alone, True)):
            while alone and queue:
                entry = queue.popleft()
                if isinstance(entry, Chunk):
                    if entry.job._begin():
                        return self._batch([], entry, queue)
                    self.dropped.append(entry)
                elif entry._begin():
                    return self._batch([entry], None, queue)
        queue = self._queue
        while queue:
            head = queue[0]
            if isinstance(head, Chunk):
                if head.job._begin():
                    return self._take_chunks(tasks_left)
                queue.popleft()
                self._note(head, -1)
                self.dropped.append(head)
                continue
            calls = self._take_calls(tasks_left)
            if calls:
                return self._batch(calls, None, queue)
        return None

    def _take_calls(self, tasks_left: int | None) -> list[Job]:
        """Calls from the head of the queue; none if those were all cancelled."""
        queue = self._queue
        first = queue[0]
        assert isinstance(first, Job)
        limit = 1 if first._options.timeout is not None else self._limit(self._call_pace, self._call_weight)
        if tasks_left is not None:
            limit = min(limit, tasks_left)
        if self._special:
            limit = self._plain_calls_ahead(limit)
        popleft = queue.popleft
        calls: list[Any] = [popleft() for _ in range(min(limit, len(queue)))]
        if first._options.timeout is not None:
            self._note(first, -1)
        return [call for call in calls if call._begin()] if first._cancellable else calls

    def _plain_calls_ahead(self, limit: int) -> int:
        """How many calls, at most `limit`, come before the next entry that cannot be in the same batch."""
        count = 1
        while count < min(limit, len(self._queue)):
            entry = self._queue[count]
            if isinstance(entry, Chunk) or entry._options.timeout is not None:
                break
            count += 1
        return count

    def _take_chunks(self, tasks_left: int | None) -> Batch:
        queue = self._queue
        first = queue[0]
        assert isinstance(first, Chunk)
        job, start, unit = first.job, first.start, first.unit
        limit, most = self._limit(job._pace, job._weight), MAX_ELEMENTS
        if tasks_left is not None:  # up to where a unit begins that is one too many
            most = min(most, unit * (tasks_left - -start // unit) - start)
        if job._options.timeout is not None or job._mode is Mode.VALUE:
            # A deadline ends the worker, and must not end another element that happens to be executing when the
            # kill arrives; alone in its batch, an element is either the late one or finished.
            most = 1
        if job._weight:
            unit = 1  # large elements are not waited for in company, whatever the chunksize
        elif job._pace is None and unit > 1:
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

    def _batch(self, calls: list[Job], chunk: Chunk | None, origin: deque[Entry]) -> Batch:
        batch = Batch(self._next_batch, calls, chunk, origin)
        pace, unit = (self._call_pace, 1) if chunk is None else (chunk.job._pace, chunk.unit)
        if len(batch) > 1 and unit == 1:
            batch.patience = _PROBE if pace is None else PATIENCE
        self._next_batch += 1
        return batch

    # -- what comes back

    def put_back(self, batch: Batch, entries: list[Entry]) -> None:
        """To the front of the queue that the batch came from."""
        batch.origin.extendleft(reversed(entries))
        if batch.origin is not self._queue:
            return
        for entry in entries:
            if isinstance(entry, Chunk) or entry._options.timeout is not None:
                self._note(entry, 1)

    def trim(self, batch: Batch, keep: int, size: int) -> None:
        """The batch is `size` bytes, too many for one message: it keeps its first elements only."""
        self._weigh(batch, size // len(batch))
        self.put_back(batch, batch.rest(keep))
        batch.cut(keep)

    def lighten(self, batch: Batch) -> None:
        """The batch turned out small: those after it need not be cut for their size."""
        self._weigh(batch, 0)

    def _weigh(self, batch: Batch, weight: int) -> None:
        if batch.chunk is not None:
            batch.chunk.job._weight = weight
        else:
            self._call_weight = weight

    def put_back_but(self, batch: Batch, failed: Iterable[int]) -> None:
        """To the front of the queue, without the elements at these positions."""
        edges = [-1, *sorted(failed), len(batch)]
        self.put_back(batch, [entry for bad, end in itertools.pairwise(edges) for entry in batch.rest(bad + 1, end)])

    def nothing_ran(self, batch: Batch, *, retry: bool) -> list[Element]:
        """It could not be unpickled: its elements are to be sent one by one, and one that is alone is convicted."""
        if len(batch) == 1:
            convicted = self.suspect(batch, 0, retry=retry)
            return [] if convicted is None else [convicted]
        self._alone.extend(batch.one_by_one())
        return []

    def suspect(self, batch: Batch, position: int, *, retry: bool = True) -> Element | None:
        """Convict the element, or queue it for another attempt if its job allows one."""
        element = batch.element(position)
        job, retries = element.job, element.job._options.retries
        if retries and retry:
            attempts = job._attempts = job._attempts or {}  # type: ignore[misc]  # in the subclass's slots
            attempts[element.index] = attempts.get(element.index, 0) + 1
            if attempts[element.index] <= retries:
                self._retry.extend(batch.rest(position, position + 1))
                return None
        return element

    def note_pace(self, batch: Batch, seconds: float) -> None:
        """An element of the batch has taken so long."""
        known = batch.chunk.job._pace if batch.chunk is not None else self._call_pace
        # What is quicker than was known is believed at once: the first elements of a job find everything cold, and
        # if it is not true of those to come, the worker gives them back.
        pace = seconds if known is None or seconds < known else known + _NEW_WEIGHT * (seconds - known)
        if batch.chunk is not None:
            batch.chunk.job._pace = pace
        else:
            self._call_pace = pace

    # -- what is taken out

    def take_dropped(self) -> list[Chunk]:
        dropped, self.dropped = self.dropped, []
        return dropped

    def drop(self) -> list[Entry]:
        """Take out everything."""
        dropped = [*self._retry, *self._alone, *self._queue]
        self._retry.clear()
        self._alone.clear()
        self._queue.clear()
        self._special = self._extra = 0
        return dropped

    def cancel(self, keep: int) -> list[Entry]:
        """As `drop`, but for calls that are running in somebody's eyes, and for the calls among the first `keep`."""
        first = set(itertools.takewhile(lambda entry: isinstance(entry, Job), itertools.islice(self._queue, keep)))
        cancelled: list[Entry] = []
        for queue in (self._retry, self._alone, self._queue):
            entries = list(queue)
            queue.clear()
            for entry in entries:
                stays = isinstance(entry, Job) and (entry in first or entry._begun)
                (queue if stays else cancelled).append(entry)
        self._note_all()
        return cancelled

    def repair(self) -> None:
        """A thread was interrupted between any two steps of ours: derive again what others rely on."""
        entries = [entry for entry in self._queue if isinstance(entry, Job) or len(entry)]
        self._queue.clear()
        self._queue.extend(entries)
        self._note_all()

    # -- how much there is

    def _limit(self, pace: float | None, weight: int) -> int:
        """Elements for one batch: about a millisecond of work, and towards the end a fair share of what is left."""
        queued = len(self._queue) + self._extra
        if queued <= self._slots:
            # What is known of others' pace need not be true of these few, and who shares a batch waits for its slowest.
            return 1
        share = -(-queued // (2 * self._slots))
        if weight:
            share = min(share, max(1, BATCH_BYTES // weight))
        if pace is None or weight:
            return max(1, min(share, _UNKNOWN_PACE))
        worthwhile = int(_LEAST_SECONDS / max(pace, 1e-9))
        return max(1, min(int(_BATCH_SECONDS / max(pace, 1e-9)), max(share, worthwhile), MAX_ELEMENTS))

    def _note(self, entry: Entry, sign: int) -> None:
        """An entry that is not a plain call has come into the queue (1) or left it (-1)."""
        self._special += sign
        if isinstance(entry, Chunk):
            self._extra += sign * (len(entry) - 1)

    def _note_all(self) -> None:
        self._special = self._extra = 0
        for entry in self._queue:
            if isinstance(entry, Chunk) or entry._options.timeout is not None:
                self._note(entry, 1)
