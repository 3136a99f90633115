"""Which region a buffer lies in, for those who would rather pass an address than a copy."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any, NamedTuple

__all__ = ["Located", "announce", "locate"]


class Located(NamedTuple):
    """A stretch of a region that others can map."""

    address: str
    offset: int
    length: int
    keeper: Any  # who recycles the region, or None where only its owner's `unlink` ends it


class _Entry:
    def __init__(self, address: str, keeper: Any) -> None:
        self.address = address
        self.keeper = keeper
        self.start: int | None = None  # found when it is first asked for: it takes ctypes, which takes its time


# Shared, writable file mappings of this process. A mapping that is gone is no longer in it.
_mappings: weakref.WeakKeyDictionary[mmap.mmap, _Entry] = weakref.WeakKeyDictionary()


def announce(view: memoryview, address: str, keeper: Any = None) -> None:
    """Make a mapping known by a view of all of it."""
    if isinstance(view.obj, mmap.mmap) and address.startswith("file:"):
        _mappings[view.obj] = _Entry(address, keeper)


def locate(buffer: memoryview) -> Located | None:
    """Where in which region a flat, writable buffer lies; None if in none, or if that is not to be found out."""
    if not _mappings or buffer.readonly:
        return None
    start = _start_of(buffer)
    for mapping, entry in list(_mappings.items()):
        if entry.start is None:
            entry.start = _start_of(mapping)
        base = entry.start
        if base and base <= start and start + buffer.nbytes <= base + len(mapping):
            if entry.keeper is None and not os.path.exists(entry.address.removeprefix("file:")):
                return None  # unlinked: nobody else can map it any more
            return Located(entry.address, start - base, buffer.nbytes, entry.keeper)
    return None


def _start_of(buffer: Any) -> int:
    # Only ctypes tells where memory is; some builds of Python do without it.
    try:
        import ctypes

        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (ImportError, ValueError, TypeError):
        return 0
