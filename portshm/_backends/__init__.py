"""The backends, and the only place that chooses one."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from .._region import Region, RegionAddress
from ..errors import RegionExistsError, RegionNameError, RegionNotFoundError
from ._located import Located, announce, locate
from ._system import fill_file, free_bytes, marker_dir, memory_dir
from .file import FileRegion

if TYPE_CHECKING:
    from .named import NamedRegion

__all__ = [
    "Backend",
    "Located",
    "announce",
    "attach_region",
    "create_region",
    "fill_region",
    "locate",
    "marker_dir",
    "private_view",
    "room",
    "search_dirs",
]

Backend = Literal["auto", "file", "named"]


def create_region(
    size: int, backend: Backend = "auto", *, name: str | None = None, dir: str | os.PathLike[str] | None = None
) -> Region:
    """A new region of `size` reserved bytes, owned by this process.

    ``"auto"`` is shared memory where there is some with room for it, and a temporary file otherwise. On Linux
    that memory is a file in /dev/shm: the same pages as a named segment, at one descriptor instead of three, and
    it can be mapped copy-on-write.
    """
    _check_backend(backend)
    if backend == "named":
        if dir is not None:
            raise RegionNameError(f"dir={os.fspath(dir)!r}: named shared memory lies in no folder; use backend='file'")
        return _named().create(size, name=name)
    if backend == "file" or dir is not None:
        return FileRegion.create(size, name=name, dir=dir)
    try:
        memory = memory_dir()
        return FileRegion.create(size, name=name, dir=memory) if memory else _named().create(size, name=name)
    except RegionExistsError:
        raise
    except OSError:
        return FileRegion.create(size, name=name)


def _check_backend(backend: str) -> None:
    if backend not in ("auto", "file", "named"):
        raise RegionNameError(f"backend {backend!r}: expected 'auto', 'file' or 'named'")


def attach_region(address: RegionAddress, *, readonly: bool = False) -> Region:
    """Map a region that exists. Destroys nothing, not even when it fails."""
    if address.kind == "file":
        return FileRegion.attach(address, readonly=readonly)
    return _named().attach(address, readonly=readonly)


def fill_region(address: RegionAddress, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
    """Write pieces at their offsets into a region that exists and has room for them."""
    if address.kind == "file":
        fill_file(address.name, pieces)
        return
    region = _named().attach(address)
    try:
        memory = region.view()
        for at, piece in pieces:
            memory[at : at + len(piece)] = piece
    finally:
        region.close()


def private_view(address: RegionAddress) -> memoryview:
    """The bytes of a region as they are now, to be changed without anybody else seeing it.

    A file is mapped copy-on-write: only pages that are written to are copied. The standard library's named
    segments can only be mapped shared, so there it is a copy.
    """
    if address.kind == "file":
        return FileRegion.attach(address, private=True).view()
    region = _named().attach(address, readonly=True)
    copy = bytearray(region.view())
    region.close()
    return memoryview(copy)


def _named() -> type[NamedRegion]:
    # Imported when it is asked for: multiprocessing.shared_memory cannot be imported where Python was built
    # without POSIX shared memory (Android).
    try:
        from .named import NamedRegion
    except ImportError as error:
        raise RegionNotFoundError(errno.ENOSYS, "this Python has no named shared memory", "shm:") from error
    return NamedRegion


def room(backend: Backend = "auto", dir: str | os.PathLike[str] | None = None) -> int:
    """Bytes that a new region could have at most right now: what is free there, and what can be mapped."""
    _check_backend(backend)
    if dir is not None:
        places = [os.fspath(dir)]
    elif backend == "file":
        places = [tempfile.gettempdir()]
    else:
        memory = memory_dir()
        places = [memory] if memory else []
        if backend == "auto":
            places.append(tempfile.gettempdir())
    return min(sys.maxsize, max(map(free_bytes, places), default=sys.maxsize))


def search_dirs() -> list[str]:
    """Where regions lie unless their creator chose another folder."""
    return sorted({tempfile.gettempdir(), *filter(None, [memory_dir()])})
