"""The life of one memory mapping, the same for every backend."""

from __future__ import annotations

import mmap

from ..errors import RegionClosedError

__all__ = ["Mapping"]


class Mapping:
    """A mapping that can be given up at any time, and that goes with the last view of it.

    `mmap.close()` raises BufferError while a view exists. Then we only drop our reference: the views hold the
    mmap object, and its deallocation unmaps. Nobody is interrupted and nothing reaches stderr.
    """

    def __init__(self, mapping: mmap.mmap, *, readonly: bool = False) -> None:
        self._mmap: mmap.mmap | None = mapping
        self._readonly = readonly
        self.size = len(mapping)

    @property
    def closed(self) -> bool:
        return self._mmap is None

    def view(self) -> memoryview:
        if self._mmap is None:
            raise RegionClosedError("the region is closed; attach again by its address")
        view = memoryview(self._mmap)
        return view.toreadonly() if self._readonly else view

    def close(self) -> None:
        mapping, self._mmap = self._mmap, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:
                pass
