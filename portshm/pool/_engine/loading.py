"""Batches on their way into memory: pickled, and put into the slot's memory or into a region of the store.

Done by the thread that holds the slot; several at once, for different slots. This is where user code may run before a
batch is sent, so the loop does it only for what certainly runs none (`is_plain`).
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterable
from typing import NamedTuple

from ..._buffers import raw_bytes
from ..._payload import Payload, Place, is_plain, pack, pack_batch
from ...errors import PoolError
from .._interrupts import is_interrupt
from .._wire.messages import Run
from .._wire.slot_memory import PAYLOAD_MAX, Mode
from .._work import Batch, MapJob
from .backlog import BATCH_BYTES
from .regions import RegionStore, StoredRegion, StoreFullError
from .scheduler import Scheduler, Slot
from .worker import Worker, WorkerProcess

__all__ = ["Loader", "NoRoomError", "UnsendableError"]


class PackedFunction(NamedTuple):
    """The function of a map as it is sent: pickled, or in a region of the store if it is large."""

    pickled: bytes | None
    stored: StoredRegion | None
    places: tuple[Place, ...] = ()


class _Packing:
    """The function of one map: packed once, by whoever comes first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held by the thread that packs it, which may run user code
        self.packed: PackedFunction | None = None
        self.forgotten = False  # the map has ended


class UnsendableError(Exception):
    """Elements of a batch (by position) that cannot be pickled."""

    def __init__(self, failed: dict[int, BaseException]) -> None:
        self.failed = failed


class NoRoomError(Exception):
    """The store is full for now; other batches will give space back."""


class Loader:
    """Any thread, for a slot that it holds. `lock` is the engine's, and nothing is packed under it."""

    def __init__(self, scheduler: Scheduler, lock: threading.RLock, store: RegionStore) -> None:
        self._scheduler = scheduler
        self._lock = lock
        self._store = store
        self._functions: dict[int, _Packing] = {}  # by map

    def load(self, worker: Worker, process: WorkerProcess, slot: Slot, batch: Batch) -> Run:
        """Put the batch into memory. What goes wrong with it is an UnsendableError, whatever it was."""
        entrusted: list[int] = []
        functions = set(process.functions)
        try:
            return self._load(worker, process, slot, batch, entrusted)
        except BaseException as error:
            # The worker is told nothing, so it has nothing.
            for id in entrusted:
                process.regions.remove(id)
                self._store.release(id)
            process.functions &= functions
            if isinstance(error, (UnsendableError, NoRoomError)) or is_interrupt(error):
                raise
            raise UnsendableError(dict.fromkeys(range(len(batch)), error)) from error

    def _load(self, worker: Worker, process: WorkerProcess, slot: Slot, batch: Batch, entrusted: list[int]) -> Run:
        stored: StoredRegion | None = None
        if batch.mode is Mode.VALUE:
            payload: bytes | memoryview = raw_bytes(batch.content[0])
        else:
            packed = self._pack(batch)
            if packed.plain and len(packed.stream) < PAYLOAD_MAX:
                with self._lock:
                    self._scheduler.backlog.lighten(batch)
            elif len(batch) > 1 and packed.size > BATCH_BYTES:
                # Large elements are not waited for in company.
                with self._lock:
                    self._scheduler.trim(slot, max(1, len(batch) * BATCH_BYTES // packed.size), packed.size)
                packed = self._pack(batch)
            payload = packed.stream
            if not packed.plain or len(payload) > PAYLOAD_MAX:
                stored = self._put_in_store(packed)
                payload = b""
                self._entrust(process, entrusted, stored.id, packed.places.values())
        head = b"" if batch.mode is Mode.CALLS else self._function_head(process, batch, entrusted)
        worker.load(batch.id, len(batch), payload, head, int(batch.patience * 1e9))
        if stored is None:
            return Run(batch.id, batch.mode)
        return Run(batch.id, batch.mode, stored.id, stored.address)

    def is_plain(self, batch: Batch) -> bool:
        """Whether no user code can run, and no lock be waited for, as the batch is loaded."""
        job = batch.job
        if isinstance(job, MapJob):
            packing = self._functions.get(job._id)
            if (packing is None or packing.packed is None) and not is_plain([(job._function,)]):
                return False
        if batch.plain is None:
            batch.plain = batch.mode is Mode.VALUE or is_plain(batch.content)
        return batch.plain

    def forget(self, job: MapJob) -> None:
        """The map has ended. Waits for nobody: a function that is still being packed goes when that is done."""
        with self._lock:
            packing = self._functions.pop(job._id, None)
            packed = None
            if packing is not None:
                packing.forgotten = True
                packed = packing.packed
        if packed is not None and packed.stored is not None:
            self._store.release(packed.stored.id)

    def _pack(self, batch: Batch) -> Payload:
        content = batch.content
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

    def _put_in_store(self, payload: Payload) -> StoredRegion:
        try:
            stored = self._store.acquire(payload.size)
        except StoreFullError:
            with self._lock:
                others = sum(slot.busy for slot in self._scheduler.slots) > 1
            if others:
                raise NoRoomError from None
            stored = self._store.acquire(payload.size, force=True)  # nobody else would ever make room
        payload.write_into(stored.view)
        return stored

    def _function_head(self, process: WorkerProcess, batch: Batch, entrusted: list[int]) -> bytes:
        job = batch.job
        assert isinstance(job, MapJob)
        if job._id in process.functions:
            return pickle.dumps((job._id, None, 0, ""), 5)
        try:
            packed = self._packed_function(job)
        except BaseException as error:
            if is_interrupt(error):
                raise
            raise UnsendableError(dict.fromkeys(range(len(batch)), error)) from error
        process.functions.add(job._id)
        if packed.stored is None:
            return pickle.dumps((job._id, packed.pickled, 0, ""), 5)
        self._store.add_user(packed.stored.id)
        self._entrust(process, entrusted, packed.stored.id, packed.places)
        return pickle.dumps((job._id, None, packed.stored.id, packed.stored.address), 5)

    def _packed_function(self, job: MapJob) -> PackedFunction:
        with self._lock:
            packing = self._functions.get(job._id)
            if packing is None:
                packing = self._functions[job._id] = _Packing()
        # Who comes second waits: it would take as long to make another copy, and as much memory.
        with packing.lock:
            if packing.packed is not None:
                return packing.packed
            packed = self._pack_function(job)
            with self._lock:
                if not packing.forgotten:
                    packing.packed = packed
                    return packed
        if packed.stored is not None:
            self._store.release(packed.stored.id)
        raise PoolError("the map has ended")

    def _pack_function(self, job: MapJob) -> PackedFunction:
        payload = pack(job._function, self._store)
        if not payload.plain or len(payload.stream) > PAYLOAD_MAX:
            stored = self._store.acquire(payload.size, force=True)
            payload.write_into(stored.view)
            return PackedFunction(None, stored, tuple(payload.places.values()))
        return PackedFunction(bytes(payload.stream), None)

    def _entrust(self, process: WorkerProcess, entrusted: list[int], id: int, places: Iterable[Place]) -> None:
        """Note the regions that the worker holds from now on: a payload's, and those that its buffers lie in."""
        ids = [id]
        for place in places:
            if place.region:
                self._store.add_user(place.region)
                ids.append(place.region)
        process.regions += ids
        entrusted += ids
