"""FileRegion: a region that is a file mapped into memory, as the seed's.

In a folder that is memory (/dev/shm on Linux) this *is* shared memory, at one descriptor and without the
standard library's resource tracker.
"""

from __future__ import annotations

import mmap
import os
import tempfile

from .._region import RegionAddress, fresh_name, name_for
from ..errors import NotReadyError, RegionError, RegionNameError, RegionNotFoundError
from ._mapping import Mapping
from ._system import OwnedFile, map_existing, open_existing, remove, reserve, translated

__all__ = ["FileRegion"]


class FileRegion:
    """A file of exactly `size` bytes, mapped. See `Region` for what it promises."""

    def __init__(self, address: RegionAddress, mapping: Mapping, owned: OwnedFile | None) -> None:
        self.address = address
        self._mapping = mapping
        self._owned = owned
        self._remove_at_close = False

    @classmethod
    def create(cls, size: int, *, name: str | None = None, dir: str | os.PathLike[str] | None = None) -> FileRegion:
        folder = os.fspath(dir) if dir is not None else tempfile.gettempdir()
        if not folder or "\0" in folder:
            raise RegionNameError(f"dir {folder!r} is not a folder")
        folder = os.path.abspath(folder)
        path = os.path.join(folder, name_for(name) if name is not None else fresh_name())
        try:
            owned = OwnedFile(path)
        except RegionNotFoundError:
            raise RegionNameError(f"dir {folder!r} is not a folder") from None
        try:
            reserve(owned.fd, size, path)
            mapping = owned.map(size)
        except BaseException as error:
            remove(path)
            owned.close()
            if isinstance(error, OSError) and not isinstance(error, RegionError):
                raise translated(error, path, size) from error
            raise
        return cls(RegionAddress("file", path), Mapping(mapping), owned)

    @classmethod
    def attach(cls, address: RegionAddress, *, readonly: bool = False, private: bool = False) -> FileRegion:
        """Map an existing file; `private` gives copy-on-write pages that nobody else ever sees changed."""
        path = address.name
        access = mmap.ACCESS_COPY if private else mmap.ACCESS_READ if readonly else mmap.ACCESS_WRITE
        fd = open_existing(path, readonly=readonly or private)
        try:
            size = os.fstat(fd).st_size
            if size == 0:  # created, not yet reserved; and mmap refuses length 0
                raise NotReadyError("header_size", "an empty file", "a file that its creator has filled")
            mapping = map_existing(fd, access=access)
        except OSError as error:
            raise translated(error, path, size) from error
        finally:
            os.close(fd)
        return cls(address, Mapping(mapping, readonly=readonly), None)

    @property
    def size(self) -> int:
        return self._mapping.size

    @property
    def owner(self) -> bool:
        return self._owned is not None and self._owned.mine

    @property
    def closed(self) -> bool:
        return self._mapping.closed

    def view(self) -> memoryview:
        return self._mapping.view()

    def close(self) -> None:
        self._mapping.close()
        if self._owned is not None and self._owned.mine:
            self._owned.close()
            if self._remove_at_close:
                remove(self.address.name)

    def unlink(self) -> None:
        if self.owner:
            # Windows does not delete what is mapped: there the name goes when we close, or with the next reaper.
            self._remove_at_close = not remove(self.address.name)
