"""Stand-ins for the outer world: a region that is a bytearray."""

from __future__ import annotations

from portshm import RegionAddress, RegionClosedError
from portshm._header import HeaderCodec, region_size


class HeapRegion:
    """`Region` on the heap of this process, with `extra` bytes as a mapping has that was rounded up to pages."""

    def __init__(self, size: int, *, extra: int = 0, owner: bool = True) -> None:
        self.address = RegionAddress("shm", "portshm_heap")
        self.owner = owner
        self.closed = False
        self.unlinked = False
        self.memory = bytearray(size + extra)

    @classmethod
    def published(cls, capacity: int, header: HeaderCodec, *, extra: int = 0) -> HeapRegion:
        """A region whose creator has written the header."""
        region = cls(region_size(capacity, header), extra=extra)
        header.initialise(region.view(), capacity=capacity)
        return region

    @property
    def size(self) -> int:
        return len(self.memory)

    def view(self) -> memoryview:
        if self.closed:
            raise RegionClosedError("the region is closed")
        return memoryview(self.memory)

    def close(self) -> None:
        self.closed = True

    def unlink(self) -> None:
        self.unlinked = True
