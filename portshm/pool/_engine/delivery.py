"""Results on their way from a worker: read from its record, unpickled, and handed to the jobs they belong to."""

from __future__ import annotations

import builtins
import io
import pickle
from collections.abc import Callable, Iterable
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from typing import Any, Final, NamedTuple, TypeAlias

from ..._payload import read_payload, unpack
from ...errors import TransportError
from .._interrupts import is_interrupt
from .._wire.slot_memory import Entry, Outcome, RecordError, Reference, RemoteError
from .._work import Batch, Element, Job, MapJob
from .regions import RegionStore, StoredRegion
from .worker import WorkerProcess

__all__ = ["Claimed", "Delivery", "fail", "rebuild", "settle"]

# Outcome of one element: (True, result) or (False, exception).
Result: TypeAlias = tuple[bool, Any]


class NeedsUserCodeError(Exception):
    """An object of a class that is not among the known ones."""


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles what runs no user code: plain values, and exceptions of Python's own that hold nothing else."""

    _KNOWN: Final = {
        ("builtins", name): kind
        for name, kind in vars(builtins).items()
        if isinstance(kind, type) and issubclass(kind, BaseException)
    } | {(RemoteError.__module__, RemoteError.__qualname__): RemoteError}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise NeedsUserCodeError(f"{module}.{name}") from None


def _plain_loads(data: bytes) -> Any:
    return _PlainUnpickler(io.BytesIO(data)).load()


class Claimed(NamedTuple):
    """One entry of a record. It needs the worker no more: if its data lies in a region, that is here."""

    kind: Entry
    data: bytes
    stored: StoredRegion | None = None
    size: int = 0  # bytes of the region that it has


class Delivery:
    """Results as they come out of a worker's record, or out of the regions that it was granted."""

    def __init__(self, store: RegionStore) -> None:
        self._store = store

    def claim(self, process: WorkerProcess | None, entries: Iterable[Outcome]) -> list[Claimed]:
        """Take over what the process's entries refer to."""
        claimed = []
        for kind, data in entries:
            if kind is Entry.REGION:
                try:
                    reference = Reference.unpack(data)
                    stored = None if process is None else process.granted.pop(reference.region, None)
                    if stored is None:
                        raise RecordError(f"a reference to region {reference.region}, which was not granted")
                except RecordError as error:
                    claimed.append(Claimed(Entry.REGION, str(error).encode()))
                else:
                    size = max(0, min(reference.size, stored.size))
                    claimed.append(Claimed(reference.kind, b"", stored, size))
            else:
                claimed.append(Claimed(kind, data))
        return claimed

    def plain_results(self, entries: Iterable[Claimed]) -> list[Result] | None:
        """The results, if none of them can run user code as it is unpickled."""
        results = []
        try:
            for entry in entries:
                if entry.stored is not None or entry.kind not in (Entry.VALUE, Entry.ERROR):
                    return None
                results.append(self._result(entry, _plain_loads))
        except NeedsUserCodeError:
            return None
        return results

    def results(self, entries: Iterable[Claimed]) -> list[Result]:
        """The results. Whatever they do when they are unpickled is an error of their own."""
        return [self._result(entry, pickle.loads) for entry in entries]

    def deliver(self, batch: Batch, numbers: memoryview, results: list[Result]) -> None:
        """Settle the first elements of a batch: those with plain numbers, then those with results. These are taken."""
        plain = numbers.tolist()
        if batch.chunk is None:
            for call, number in zip(batch.calls, plain, strict=False):
                call._settle(True, number)
            for call, (ok, value) in zip(batch.calls[len(plain) :], results, strict=False):
                settle(call, ok, value)
            return
        job, start = batch.chunk.job, batch.chunk.start
        assert isinstance(job, MapJob)
        if plain:
            job._deliver(start, plain)
            start += len(numbers)
        if all(ok for ok, _ in results):
            values = [value for _, value in results]
            results.clear()  # who gets them must be the last to have them
            if values:
                job._deliver(start, values)
            return
        for index, (ok, value) in enumerate(results, start):
            if ok:
                job._deliver(index, [value])
            else:
                fail(Element(job, index, None), value)

    def _result(self, entry: Claimed, loads: Callable[[bytes], Any]) -> Result:
        try:
            kind, data, stored, size = entry
            if kind is Entry.REGION:
                raise RecordError(data.decode())
            if stored is not None:
                if kind is Entry.VALUE:
                    return True, self._fetch(stored, size)
                data = self._fetch_bytes(stored)
            if kind is Entry.VALUE:
                return True, loads(data)
            if kind is Entry.ERROR:
                return False, rebuild(loads(data), loads)
            return False, _Unpicklable(*loads(data))
        except NeedsUserCodeError:
            raise
        except BaseException as error:
            if is_interrupt(error):
                raise
            failure = TransportError(f"the result could not be unpickled: {error!r}")
            failure.__cause__ = error
            return False, failure

    def _fetch(self, stored: StoredRegion, size: int) -> Any:
        """A large result; its buffers stay where they are for as long as the user keeps them, if that is worth it."""
        try:
            parcel = read_payload(stored.view)
            if not parcel.views:
                return unpack(parcel)
            return unpack(read_payload(self._store.lease(stored, size)))
        finally:
            self._store.release(stored.id)

    def _fetch_bytes(self, stored: StoredRegion) -> bytes:
        try:
            return bytes(read_payload(stored.view).stream)
        finally:
            self._store.release(stored.id)


class _Unpicklable:
    """A result that could not be pickled, as the worker describes it; each face has its own exception for it."""

    def __init__(self, value: str, reason: RemoteError) -> None:
        self.value = value
        self.reason = rebuild(reason)


def settle(call: Job, ok: bool, value: Any) -> None:
    """End a single call."""
    if isinstance(value, _Unpicklable):
        value = call._unpicklable(value.value, value.reason)
    call._settle(ok, value)


def fail(element: Element, error: Any) -> None:
    """End one element of a job, or a single call, with an error."""
    job = element.job
    if not isinstance(job, MapJob):
        settle(job, False, error)
        return
    if isinstance(error, _Unpicklable):
        error = job._unpicklable(error.value, error.reason)
    job._fail(element.index, error)


def rebuild(remote: RemoteError, loads: Callable[[bytes], Any] = pickle.loads) -> BaseException:
    """The task's exception with the worker's traceback as its cause, or the next best thing."""
    error: Any = None
    if remote.pickled is not None:
        try:
            error = loads(remote.pickled)
        except NeedsUserCodeError:
            raise
        except BaseException as reason:
            if is_interrupt(reason):
                raise
            error = TransportError(f"the task raised {remote.text}, which cannot be rebuilt here: {reason!r}")
    if not isinstance(error, BaseException):
        error = TransportError(f"the task raised {remote.text}, which cannot be pickled")
    error.__cause__ = RemoteTraceback(f'\n"""\n{remote.traceback}"""')
    return error  # type: ignore[no-any-return]
