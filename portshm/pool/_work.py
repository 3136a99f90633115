"""What there is to do: jobs, the chunks that they are queued in, and the batches that go to a worker.

The faces' results derive from `Job` and `MapJob`. Users see these objects, so whatever the engine does with them has a
name with an underscore: only what `multiprocessing.pool` and `concurrent.futures` show is public.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from ._wire.slot_memory import Mode

__all__ = ["Batch", "Chunk", "Element", "Engine", "Entry", "Job", "MapJob", "OnCrash", "TaskOptions"]

OnCrash = Literal["raise", "return"]

_ids = itertools.count(1)


class TaskOptions(NamedTuple):
    """What is to happen with an element that takes too long, or that its worker dies over."""

    timeout: float | None = None  # seconds
    retries: int = 0  # how often it is run again, alone in a fresh worker
    on_crash: OnCrash = "raise"  # or the WorkerCrashed is its result


class Engine(Protocol):
    """What a job needs of the coordinator."""

    def later(self, action: Callable[[], None]) -> None:
        """Run `action`, which may run user code, on the callback thread."""

    def forget(self, job: MapJob) -> None:
        """All elements of the job are settled."""


class Job:
    """Something whose elements are to be executed.

    A job of mode CALLS is a single call and stands in the queue itself; others are queued in `Chunk`s. Has no slots of
    its own, so that a result can be a job and an `Outcome`; subclasses make room for what is declared here.
    """

    __slots__ = ()

    _options: TaskOptions
    _attempts: dict[int, int] | None  # index -> crashes so far
    # Function, args and kwargs of a single call; None once it is settled.
    _call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None
    _mode: Mode = Mode.CALLS
    # Whether `_begin` has to be asked: single calls of a pool cannot be cancelled.
    _cancellable = True
    # Whether its caller was told that it is running, and so that it cannot be cancelled any more.
    _begun = False

    def _begin(self) -> bool:
        """Called when the job is about to be sent; False if it was cancelled meanwhile."""
        return True

    def _settle(self, ok: bool, value: Any) -> None:
        """End a single call, with its result or its exception. By whoever the call belongs to, and so once."""
        raise NotImplementedError

    def _unpicklable(self, value: str, reason: BaseException) -> BaseException:
        """The exception for a result that could not be pickled: its repr, and why."""
        raise NotImplementedError


class MapJob(Job):
    """The part of all map-like jobs that the engine deals with.

    Results may come from the loop, from a thread of its, and from the caller; `_lock` guards what they change.
    """

    def __init__(self, function: Callable[..., Any], mode: Mode, engine: Engine, options: TaskOptions) -> None:
        self._id = next(_ids)
        self._function = function
        self._mode = mode
        self._engine = engine
        self._options = options
        self._attempts = None
        self._pace: float | None = None  # seconds per element
        self._weight = 0  # bytes per element, where they are many
        self._apart = False  # its results are delivered by the serial thread, in their order
        self._lock = threading.RLock()  # reentrant: a collection in it may drop the last iterator

    def _deliver(self, start: int, values: list[Any]) -> None:
        """Results of consecutive elements. The list is given away."""
        raise NotImplementedError

    def _fail(self, index: int, error: BaseException) -> None:
        """The exception of one element."""
        raise NotImplementedError

    def _stop_reading(self, error: BaseException) -> None:
        """Read no more of an input whose reading waits for its results to be taken; `error` is the next result."""

    def _drop(self, count: int) -> None:
        """So many elements will not be executed, as `_begin` wanted it."""
        raise NotImplementedError

    def _abort(self, error: BaseException) -> None:
        """Nothing more will come: the pool was terminated or is broken."""
        raise NotImplementedError


class Chunk:
    """Elements of a job that follow one another, of which batches are taken from the front.

    Always whole units: of 1 where we may cut as we like, else of the user's chunksize. A unit starts at every
    multiple of it, also where a crash has left half of one in the queue.
    """

    __slots__ = ("_at", "items", "job", "start", "unit")

    def __init__(self, job: MapJob, start: int, items: Sequence[Any], unit: int = 1) -> None:
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


Entry: TypeAlias = Job | Chunk  # of the queue


@dataclass(frozen=True)
class Element:
    """One element, as it is blamed or settled."""

    job: Job
    index: int
    item: Any


class Batch:
    """What is sent in one message: calls, or consecutive elements of one map. Made for one slot and sent once."""

    __slots__ = ("calls", "chunk", "id", "job", "origin", "patience", "plain")

    def __init__(self, id: int, calls: list[Job], chunk: Chunk | None, origin: deque[Entry]) -> None:
        self.id = id
        self.calls = calls
        self.chunk = chunk
        self.job: Job = chunk.job if chunk is not None else calls[0]
        self.origin = origin  # the queue it came from, where it goes back to if nothing of it was sent
        self.plain: bool | None = None  # as `is_plain` of what it holds, once somebody has asked
        self.patience = 0.0  # seconds after which the worker gives back what it has not begun; 0: it executes all

    def __len__(self) -> int:
        return len(self.chunk.items) if self.chunk is not None else len(self.calls)

    @property
    def mode(self) -> Mode:
        return self.job._mode

    @property
    def timeout(self) -> float | None:
        return self.job._options.timeout

    @property
    def content(self) -> Sequence[Any]:
        """What is pickled."""
        return self.chunk.items if self.chunk is not None else [call._call for call in self.calls]

    def tasks(self, count: int | None = None) -> int:
        """How many tasks the first `count` elements (all) are in the eyes of maxtasksperchild."""
        count = len(self) if count is None else count
        return count if self.chunk is None else self.chunk.tasks(count)

    def element(self, position: int) -> Element:
        if self.chunk is not None:
            return Element(self.chunk.job, self.chunk.start + position, self.chunk.items[position])
        call = self.calls[position]
        if call._call is None:
            return Element(call, 0, ())
        _, args, kwargs = call._call
        return Element(call, 0, (args, dict(kwargs)))  # the user's from here on

    def rest(self, start: int, stop: int | None = None) -> list[Entry]:
        """The elements from `start` to `stop` as entries of the queue."""
        if self.chunk is None:
            return list(self.calls[start:stop])
        items = self.chunk.items[start:stop]
        return [Chunk(self.chunk.job, self.chunk.start + start, items, self.chunk.unit)] if items else []

    def cut(self, keep: int) -> None:
        """Have the first elements only."""
        del self.calls[keep:]
        if self.chunk is not None:
            self.chunk = Chunk(self.chunk.job, self.chunk.start, self.chunk.items[:keep], self.chunk.unit)

    def one_by_one(self) -> list[Entry]:
        return [entry for position in range(len(self)) for entry in self.rest(position, position + 1)]
