"""Results on their way from a worker: read from its record, unpickled, and handed to the jobs they belong to."""

from __future__ import annotations

import pickle
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from typing import Any

from ..errors import TransportError
from ._exit_status import is_interrupt
from ._regions import RegionStore, StoredRegion
from ._results import MapJob
from ._scheduler import Batch, Job
from ._slot import Entry, Outcome, Record, RecordError, Reference, RemoteError
from ._transport import read_parcel, unpack
from ._worker import Worker

__all__ = ["Delivery", "fail", "rebuild", "settle"]


class Delivery:
    """Results as they come out of a worker's record, or out of the regions that it was granted."""

    def __init__(self, store: RegionStore) -> None:
        self._store = store

    def deliver(self, worker: Worker, batch: Batch, record: Record) -> None:
        """Settle the first elements of a batch that `worker` had: those with plain numbers, then those with entries."""
        numbers = record.numbers.tolist()
        outcomes = [self._result(worker, entry) for entry in record.entries]
        if batch.chunk is None:
            for call, number in zip(batch.calls, numbers, strict=False):
                call.settle(True, number)
            for call, (ok, value) in zip(batch.calls[len(numbers) :], outcomes, strict=False):
                settle(call, ok, value)
            return
        job, start = batch.chunk.job, batch.chunk.start
        assert isinstance(job, MapJob)
        if numbers:
            job.deliver(start, numbers)
            start += len(record.numbers)
        if all(ok for ok, _ in outcomes):
            values = [value for _, value in outcomes]
            outcomes.clear()  # who gets them must be the last to have them
            if values:
                job.deliver(start, values)
            return
        for index, (ok, value) in enumerate(outcomes, start):
            if ok:
                job.deliver(index, [value])
            else:
                fail(job, index, value)

    def _result(self, worker: Worker, entry: Outcome) -> tuple[bool, Any]:
        """(ok, result or exception) of one entry. Whatever the bytes do when they are unpickled ends here."""
        kind, data = entry
        try:
            if kind is Entry.REGION:
                reference = Reference.unpack(data)
                if reference.kind is Entry.VALUE:
                    return True, self._fetch(worker, reference)
                kind, data = reference.kind, self._fetch_bytes(worker, reference)
            if kind is Entry.VALUE:
                return True, pickle.loads(data)
            if kind is Entry.ERROR:
                return False, rebuild(pickle.loads(data))
            return False, _Unpicklable(*pickle.loads(data))
        except BaseException as error:
            if is_interrupt(error):
                raise
            failure = TransportError(f"the result could not be unpickled: {error!r}")
            failure.__cause__ = error
            return False, failure

    def _fetch(self, worker: Worker, reference: Reference) -> Any:
        """A large result; its buffers stay where they are for as long as the user keeps them, if that is worth it."""
        stored = self._granted(worker, reference)
        try:
            parcel = read_parcel(stored.view)
            if not parcel.views:
                return unpack(parcel)
            return unpack(read_parcel(self._store.lease(stored, max(0, min(reference.size, stored.size)))))
        finally:
            self._store.release(stored.id)

    def _fetch_bytes(self, worker: Worker, reference: Reference) -> bytes:
        stored = self._granted(worker, reference)
        try:
            return bytes(read_parcel(stored.view).stream)
        finally:
            self._store.release(stored.id)

    def _granted(self, worker: Worker, reference: Reference) -> StoredRegion:
        stored = worker.granted.pop(reference.region, None)
        if stored is None:
            raise RecordError(f"a reference to region {reference.region}, which was not granted")
        return stored


class _Unpicklable:
    """A result that could not be pickled, as the worker describes it; each face has its own exception for it."""

    def __init__(self, value: str, reason: RemoteError) -> None:
        self.value = value
        self.reason = rebuild(reason)


def settle(call: Job, ok: bool, value: Any) -> None:
    """End a single call."""
    if isinstance(value, _Unpicklable):
        value = call.unpicklable(value.value, value.reason)
    call.settle(ok, value)


def fail(job: Job, index: int, error: Any) -> None:
    """End one element of a job, or a single call, with an error."""
    if not isinstance(job, MapJob):
        settle(job, False, error)
        return
    if isinstance(error, _Unpicklable):
        error = job.unpicklable(error.value, error.reason)
    job.fail(index, error)


def rebuild(remote: RemoteError) -> BaseException:
    """The task's exception with the worker's traceback as its cause, or the next best thing."""
    error: Any = None
    if remote.pickled is not None:
        try:
            error = pickle.loads(remote.pickled)
        except BaseException as reason:
            if is_interrupt(reason):
                raise
            error = TransportError(f"the task raised {remote.text}, which cannot be rebuilt here: {reason!r}")
    if not isinstance(error, BaseException):
        error = TransportError(f"the task raised {remote.text}, which cannot be pickled")
    error.__cause__ = RemoteTraceback(f'\n"""\n{remote.traceback}"""')
    return error  # type: ignore[no-any-return]
