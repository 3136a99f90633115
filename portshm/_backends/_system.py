"""The operating system's side of the backends: the same functions from a file per system."""

from __future__ import annotations

import sys
from typing import Final

if sys.platform == "win32":
    from ._windows import (
        OwnedFile,
        fill_file,
        free_bytes,
        map_existing,
        marker_dir,
        memory_dir,
        open_existing,
        owner_alive,
        remove,
        remove_orphan,
        reserve,
        shm_path,
        translated,
        unlink_segment,
    )
else:
    from ._posix import (
        OwnedFile,
        fill_file,
        free_bytes,
        map_existing,
        marker_dir,
        memory_dir,
        open_existing,
        owner_alive,
        remove,
        remove_orphan,
        reserve,
        shm_path,
        translated,
        unlink_segment,
    )

__all__ = [
    "MARKER_SUFFIX",
    "OwnedFile",
    "fill_file",
    "free_bytes",
    "map_existing",
    "marker_dir",
    "memory_dir",
    "open_existing",
    "owner_alive",
    "remove",
    "remove_orphan",
    "reserve",
    "shm_path",
    "translated",
    "unlink_segment",
]

# The owner's mark of a named segment is the file NAME + this.
MARKER_SUFFIX: Final = ".owner"
