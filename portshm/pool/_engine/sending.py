"""Batches on their way to a worker: pickled, and put into the slot's memory or into a region of the store.

Done by the thread that was given the slot, be it the loop or one that submitted; several at once, for different slots.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from ..._buffers import raw_bytes
from ..._payload import FIXED, Payload, Place, is_plain, pack, pack_batch
from ...errors import PoolError
from .._interrupts import is_interrupt
from .._results import MapJob
from .._wire.messages import Run
from .._wire.slot_memory import PAYLOAD_MAX, Mode
from .regions import RegionStore, StoredRegion, StoreFullError
from .scheduler import Batch, Scheduler, Slot
from .worker import Worker

__all__ = ["Loader", "NoRoomError", "PackedFunction", "UnsendableError"]

# Bytes of payload beyond which a batch of several elements is cut.
_LARGE_BATCH: Final = 1 << 20


class PackedFunction(NamedTuple):
    """The function of a map as it is sent: pickled, or in a region of the store if it is large."""

    pickled: bytes | None
    stored: StoredRegion | None
    places: tuple[Place, ...] = ()


class UnsendableError(Exception):
    """Elements of a batch (by position) that cannot be pickled."""

    def __init__(self, failed: dict[int, BaseException]) -> None:
        self.failed = failed


class NoRoomError(Exception):
    """The store is full for now; other batches will give space back."""


def _content(batch: Batch) -> Sequence[Any]:
    return batch.chunk.items if batch.chunk is not None else [call.call for call in batch.calls]


class Loader:
    """`lock` is the scheduler's."""

    def __init__(self, scheduler: Scheduler, lock: threading.RLock, store: RegionStore) -> None:
        self._scheduler = scheduler
        self._lock = lock
        self._store = store

    def load(self, worker: Worker, slot: Slot, batch: Batch) -> Run:
        """Put the batch into memory. What goes wrong with it is an UnsendableError, whatever it was."""
        entrusted: list[int] = []
        functions = set(worker.functions)
        try:
            return self._load(worker, slot, batch, entrusted)
        except BaseException as error:
            # The worker is told nothing, so it has nothing.
            for id in entrusted:
                worker.regions.remove(id)
                self._store.release(id)
            worker.functions &= functions
            if isinstance(error, (UnsendableError, NoRoomError)) or not isinstance(error, Exception):
                raise
            raise UnsendableError(dict.fromkeys(range(len(batch)), error)) from error

    def _load(self, worker: Worker, slot: Slot, batch: Batch, entrusted: list[int]) -> Run:
        stored: StoredRegion | None = None
        if batch.mode is Mode.VALUE:
            assert batch.chunk is not None
            payload: bytes | memoryview = raw_bytes(batch.chunk.items[0])
        else:
            parcel = self._pack(batch)
            if parcel.plain and len(parcel.stream) < PAYLOAD_MAX:
                self._scheduler.lighten(batch)
            elif len(batch) > 1 and parcel.size > _LARGE_BATCH:
                # Large elements are not waited for in company.
                with self._lock:
                    self._scheduler.trim(slot, max(1, len(batch) * _LARGE_BATCH // parcel.size), parcel.size)
                parcel = self._pack(batch)
            payload = parcel.stream
            if not parcel.plain or len(payload) > PAYLOAD_MAX:
                stored = self._store_parcel(parcel)
                payload = b""
                self._entrust(worker, entrusted, stored.id, parcel.places.values())
        head = b"" if batch.mode is Mode.CALLS else self._function_head(worker, batch, entrusted)
        worker.load(batch.id, len(batch), payload, head, int(batch.patience * 1e9))
        if stored is None:
            return Run(batch.id, batch.mode)
        return Run(batch.id, batch.mode, stored.id, stored.address)

    def is_plain(self, batch: Batch) -> bool:
        """Whether no user code can run as the batch is loaded."""
        job = batch.job
        if isinstance(job, MapJob) and job.packed_function is None and type(job.function) not in FIXED:
            return False
        if batch.plain is None:
            batch.plain = batch.mode is Mode.VALUE or is_plain(_content(batch))
        return batch.plain

    def _pack(self, batch: Batch) -> Payload:
        content = _content(batch)
        try:
            return pack_batch(content, self._store, plain=batch.plain)
        except BaseException as error:
            if is_interrupt(error):
                raise
            if len(content) == 1:
                raise UnsendableError({0: error}) from error
        # Which ones are to blame?
        failed = {}
        for position, item in enumerate(content):
            try:
                pack([item], self._store)
            except BaseException as error:
                if is_interrupt(error):
                    raise
                failed[position] = error
        if not failed:  # each alone can be pickled: then each alone it is, whatever that was
            raise UnsendableError({0: PoolError("could be pickled alone, but not together with others")})
        raise UnsendableError(failed)

    def _store_parcel(self, parcel: Payload) -> StoredRegion:
        try:
            stored = self._store.acquire(parcel.size)
        except StoreFullError:
            with self._lock:
                busy = sum(slot.batch is not None for slot in self._scheduler.slots)
            if busy > 1:
                raise NoRoomError from None
            stored = self._store.acquire(parcel.size, force=True)  # nobody else would ever make room
        parcel.write_into(stored.view)
        return stored

    def _function_head(self, worker: Worker, batch: Batch, entrusted: list[int]) -> bytes:
        job = batch.job
        assert isinstance(job, MapJob)
        if job.id in worker.functions:
            return pickle.dumps((job.id, None, 0, ""), 5)
        # Who comes second waits: it would take as long to make another copy, and as much memory.
        with job.packing:
            if job.packed_function is None:
                try:
                    job.packed_function = self._pack_function(job)
                except BaseException as error:
                    if is_interrupt(error):
                        raise
                    raise UnsendableError(dict.fromkeys(range(len(batch)), error)) from error
            packed: PackedFunction = job.packed_function
        worker.functions.add(job.id)
        if packed.stored is None:
            return pickle.dumps((job.id, packed.pickled, 0, ""), 5)
        self._store.add_user(packed.stored.id)
        self._entrust(worker, entrusted, packed.stored.id, packed.places)
        return pickle.dumps((job.id, None, packed.stored.id, packed.stored.address), 5)

    def _entrust(self, worker: Worker, entrusted: list[int], id: int, places: Iterable[Place]) -> None:
        """Note the regions that the worker holds from now on: a payload's, and those that its buffers lie in."""
        ids = [id]
        for place in places:
            if place.region:
                self._store.add_user(place.region)
                ids.append(place.region)
        worker.regions += ids
        entrusted += ids

    def _pack_function(self, job: MapJob) -> PackedFunction:
        parcel = pack(job.function, self._store)
        if not parcel.plain or len(parcel.stream) > PAYLOAD_MAX:
            stored = self._store.acquire(parcel.size, force=True)
            parcel.write_into(stored.view)
            return PackedFunction(None, stored, tuple(parcel.places.values()))
        return PackedFunction(bytes(parcel.stream), None)
