"""The raw bytes of anything that exports a buffer, without a copy."""

from __future__ import annotations

import pickle
import re
from typing import Any

__all__ = ["raw_bytes"]


def raw_bytes(data: Any) -> memoryview:
    """A flat view of `data`'s bytes.

    Raises:
        BufferError: not contiguous, so that there are no plain bytes to point at.
        TypeError: no buffer at all, or one of Python objects: their pointers mean nothing in another process.
    """
    if isinstance(data, bytes):
        return memoryview(data)
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(
            f"{type(data).__name__} exports no buffer: expected bytes, bytearray, memoryview, array, mmap or an "
            "array object (text: encode it; other objects: pickle them)"
        ) from None
    except ValueError:
        # numpy has no buffer format for some types (datetime64, timedelta64), but shows them as plain bytes
        # of the same width.
        if not (hasattr(data, "view") and hasattr(data, "itemsize")):
            raise
        view = memoryview(data.view(f"V{data.itemsize}"))
    # Between colons stand the field names of a structured type, which may well contain an O.
    if "O" in re.sub(":[^:]*:", "", view.format):
        raise TypeError(f"buffer of format {view.format!r}: Python objects' pointers mean nothing in another process")
    if not view.contiguous:
        raise BufferError("the buffer is not contiguous; copy it first, for instance with numpy.ascontiguousarray()")
    # Flat for any shape, Fortran order and empty ones too, which memoryview.cast refuses.
    return pickle.PickleBuffer(view).raw()
