"""Large bytes objects, made in huge pages where the system has them.

Whoever makes a bytes object of 8 MiB spends most of the time in page faults: malloc takes fresh memory from the
kernel, which zeroes it 4 KiB at a time. Linux does it 2 MiB at a time where it is asked to (madvise(2),
MADV_HUGEPAGE; numpy does so for its arrays since 1.17), which halves the time of the whole.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, Final

__all__ = ["copy_of"]

# Below this there may be no whole huge page in it.
_LARGE: Final = 4 << 20


def copy_of(view: memoryview) -> bytes:
    """``bytes(view)`` of a flat view."""
    if len(view) < _LARGE or view.readonly:
        return bytes(view)
    global _copy
    if _copy is None:
        _copy = _find_copy()
    return _copy(view)


_copy: Callable[[memoryview], bytes] | None = None


def _find_copy() -> Callable[[memoryview], bytes]:
    """How it is done here. At the first large object, because ctypes takes its time to be imported."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return bytes
    try:
        import ctypes

        new = ctypes.pythonapi.PyBytes_FromStringAndSize
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
        address_of = ctypes.pythonapi.PyBytes_AsString
        address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.py_object]
        madvise = ctypes.CDLL(None).madvise
        madvise.restype, madvise.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (ImportError, AttributeError, OSError):  # builds without ctypes, other Pythons, other C libraries
        return bytes

    def copy(view: memoryview) -> bytes:
        # The C API's way to make a bytes object: get one that is not filled yet, and fill it before anybody sees it.
        made: Any = new(None, len(view))
        start = address_of(made)
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise(first, (start + len(view) - first) // mmap.PAGESIZE * mmap.PAGESIZE, advice)  # it is only advice
        ctypes.memmove(start, ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view))
        return made  # type: ignore[no-any-return]

    return copy
