"""RegionStore: the coordinator's regions for large payloads and results, made once and recycled.

Every region is created and kept open by the coordinator, so a worker's death takes none along (on Windows a named
segment dies with its last handle). A region is in one of three places: free, with a batch or a result on its way,
or under views that user code holds. The last of these ends when the mapping behind the views is deallocated.
"""

from __future__ import annotations

import errno
import threading
import weakref
from collections import deque
from typing import Any, Final

from ..._backends import Backend, announce, attach_region, create_region, room
from ..._payload import WORTH_A_MAPPING
from ..._region import Region
from ...errors import RegionClosedError, RegionFullError
from .._interrupts import interrupts_deferred

__all__ = ["RegionStore", "StoreFullError", "StoredRegion"]

_SMALLEST: Final = 1 << 16

# Free regions are kept for the next payload up to this many bytes, and no more than a quarter of what the system
# has left; beyond that the largest are given back. Making a region anew costs more than the copy into it.
_KEEP_FREE: Final = 1 << 30
_MOST_FREE: Final = 64  # each has a descriptor

# Results that lie in shared memory under the user's views at the same time: each has one descriptor or two, of which a
# process may have 1024 by default.
_MOST_LEASES: Final = 256


class StoreFullError(RegionFullError):
    """The pool's own limit, `max_shared_bytes`, is reached."""


class StoredRegion:
    """One region of the store. `users` counts the batches and results that are in it."""

    __slots__ = ("address", "id", "region", "size", "users", "view")

    def __init__(self, id: int, region: Region, size: int) -> None:
        self.id = id
        self.region = region
        self.size = size
        self.address = str(region.address)
        self.view = region.view()
        self.users = 1


def _size_class(size: int) -> int:
    """Round up in sixteenths of a power of two, so that sizes which are nearly alike meet again."""
    size = max(size, _SMALLEST)
    step = max(_SMALLEST, 1 << (size.bit_length() - 5))
    return -(-size // step) * step


class RegionStore:
    """Thread-safe. `limit` bounds the bytes in use and free together; None for no bound but the system's."""

    def __init__(self, backend: Backend, limit: int | None) -> None:
        self._backend = backend
        self._limit = limit
        # Reentrant: a signal handler may come within, and end the pool.
        self.lock = threading.RLock()
        self._regions: dict[int, StoredRegion] = {}
        self._free: list[StoredRegion] = []
        self._next_id = 1
        # Where weak references to mappings go whose last view died, and ids that are released. A garbage collection
        # may run anywhere, also in a thread that holds the lock, so they take none.
        self._returned: deque[int | weakref.ref[Any]] = deque()
        self._leases: dict[weakref.ref[Any], int] = {}  # of mappings under views of the user's
        self._leased_bytes = 0
        self._bytes = 0
        self._closed = False

    @property
    def bytes(self) -> int:
        """Bytes of shared memory that the store has at present, free regions included."""
        return self._bytes

    @interrupts_deferred()
    def acquire(self, size: int, *, force: bool = False) -> StoredRegion:
        """A region of at least `size` bytes with one user; `force` goes beyond the limit.

        Raises:
            StoreFullError: the limit would be passed.
            RegionFullError: the system has no room.
            RegionClosedError: after `close`.
        """
        size = _size_class(size)
        with self.lock:
            self._collect()
            fitting = [stored for stored in self._free if size <= stored.size <= 2 * size]
            if fitting:
                stored = min(fitting, key=lambda stored: stored.size)
                self._free.remove(stored)
                stored.users = 1
                self._regions[stored.id] = stored
                return stored
            if self._limit is not None and self._bytes + size > self._limit:
                self._drop_free(self._bytes + size - self._limit)
                if self._bytes + size > self._limit and not force:
                    raise StoreFullError(
                        errno.ENOSPC,
                        f"{size} more bytes, {self._bytes} in use; raise max_shared_bytes={self._limit}",
                        "pool",
                    )
            self._bytes += size
            id = self._next_id
            self._next_id += 1
        try:
            try:
                region = create_region(size, self._backend)
            except RegionFullError:
                with self.lock:
                    self._drop_free(self._bytes)
                region = create_region(size, self._backend)
        except BaseException:
            with self.lock:
                self._bytes -= size
            raise
        stored = StoredRegion(id, region, size)
        with self.lock:
            if not self._closed:
                self._regions[id] = stored
                return stored
        _destroy(stored)  # nobody else would
        raise RegionClosedError("the pool has ended")

    def add_user(self, id: int) -> None:
        with self.lock:
            self._regions[id].users += 1

    def id_at(self, address: str) -> int:
        """The id of the region at `address`, which has a user."""
        with self.lock:
            return next(stored.id for stored in self._regions.values() if stored.address == address)

    def release(self, id: int) -> None:
        """One user less. Safe to call from a finalizer."""
        self._returned.append(id)

    @interrupts_deferred()
    def lease(self, stored: StoredRegion, size: int) -> memoryview:
        """The first `size` bytes of a result for the views that the user gets: in place, or a copy where that is wiser.

        In place it is a mapping of its own, and the region has one user more until that is deallocated.
        """
        with self.lock:
            self._collect()
            room = self._limit is None or self._leased_bytes + stored.size <= self._limit // 2  # the rest is for others
            if size < WORTH_A_MAPPING or len(self._leases) >= _MOST_LEASES or not room:
                return memoryview(bytearray(stored.view[:size]))
            view = attach_region(stored.region.address).view()
            announce(view, stored.address, self)
            # A weak reference whose callback is C code: a Ctrl-C inside weakref.finalize's Python would be swallowed
            # there.
            self._leases[weakref.ref(view.obj, self._returned.append)] = stored.id
            self._leased_bytes += stored.size
            self._regions[stored.id].users += 1
            return view

    def close(self) -> None:
        """Give all regions back to the system. Views that user code holds stay valid."""
        with self.lock:
            self._closed = True
            self._collect()
            for stored in [*self._regions.values(), *self._free]:
                _destroy(stored)
            self._regions.clear()
            self._free.clear()
            self._bytes = 0

    def _collect(self) -> None:
        while self._returned:
            returned = self._returned.popleft()
            id = returned if isinstance(returned, int) else self._leases.pop(returned)
            stored = self._regions.get(id)
            if stored is not None:
                if returned is not id:
                    self._leased_bytes -= stored.size
                stored.users -= 1
                if stored.users == 0:
                    del self._regions[stored.id]
                    self._free.append(stored)
        while len(self._free) > _MOST_FREE:
            self._drop_free(1)
        free = sum(stored.size for stored in self._free)
        if free > _SMALLEST and free > (keep := min(_KEEP_FREE, (room(self._backend) + free) // 4)):
            self._drop_free(free - keep)

    def _drop_free(self, excess: int) -> None:
        self._free.sort(key=lambda stored: stored.size)
        while self._free and excess > 0:
            stored = self._free.pop()
            excess -= stored.size
            self._bytes -= stored.size
            _destroy(stored)


def _destroy(stored: StoredRegion) -> None:
    stored.region.unlink()
    stored.view = memoryview(b"")
    stored.region.close()
