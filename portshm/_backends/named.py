"""NamedRegion: a region that is a `multiprocessing.shared_memory.SharedMemory`.

What the standard library leaves to be mended, all of it here:

- Its resource tracker destroys segments that others still use, and warns about clean programs (CPython issue
  82300); ``track=False`` exists from 3.13 only.
- A failed attach unlinks the *owner's* segment (issue 153279).
- Its size is set by ftruncate and not reserved (issue 114390).
- `close()` raises while a view is alive, and `__del__` then writes to stderr.

Ownership is a locked file beside the segment, ``NAME.owner``: a shared-memory object cannot be locked on macOS nor
listed there. On Windows a segment dies with its last handle, so there is never an orphan, and the creator has to
stay for as long as anybody shall attach.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import sys
import types
from collections.abc import Callable
from multiprocessing import shared_memory
from multiprocessing.shared_memory import SharedMemory
from typing import Any, TypeVar

from .._region import RegionAddress, fresh_name, name_for
from ..errors import NotReadyError, RegionExistsError, RegionNotFoundError
from ._mapping import Mapping
from ._system import (
    MARKER_SUFFIX,
    OwnedFile,
    marker_dir,
    open_existing,
    remove,
    reserve,
    shm_path,
    translated,
    unlink_segment,
)

__all__ = ["NamedRegion"]

_F = TypeVar("_F", bound=Callable[..., Any])


def _twin(method: _F, **replaced: object) -> _F:
    """`method` of the standard library's class with other objects under some of the names it uses.

    Patching its module would change it for everybody else in the process.
    """
    assert isinstance(method, types.FunctionType)
    twin = types.FunctionType(
        method.__code__,
        {**vars(shared_memory), **replaced},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    twin.__kwdefaults__ = method.__kwdefaults__
    return twin  # type: ignore[return-value]


def _ignore(name: str, rtype: str) -> None: ...


class _Segment(SharedMemory):
    """The standard library's class, untracked, and harmless when attaching fails or a view outlives it."""

    if sys.version_info >= (3, 13):
        if sys.platform == "win32":
            _init = SharedMemory.__init__
        else:
            # A mapping without a descriptor of its own, so that views which outlive `close` cost none.
            _init = _twin(
                SharedMemory.__init__, mmap=types.SimpleNamespace(mmap=functools.partial(mmap.mmap, trackfd=False))
            )

        def __init__(self, name: str, *, create_size: int = 0) -> None:
            self._init(name, create_size > 0, create_size, track=False)

    else:
        # A tracker that does nothing. Unregistering afterwards instead would race with other processes on the
        # same tracker, which then prints a KeyError.
        _init = _twin(
            SharedMemory.__init__, resource_tracker=types.SimpleNamespace(register=_ignore, unregister=_ignore)
        )

        def __init__(self, name: str, *, create_size: int = 0) -> None:
            self._init(name, create_size > 0, create_size)

    def unlink(self) -> None:
        """Do nothing: the constructor calls this when mapping fails, also where the segment is somebody else's."""

    def release(self, *, readonly: bool = False) -> Mapping:
        """Take the mapping over and close the rest.

        The mmap object is reached through the public ``buf.obj``. Only forgetting it needs a private attribute:
        `_mmap`, the same in CPython 3.8 to 3.15. Without that, the class would try to close the mapping itself.
        """
        assert self.buf is not None
        mapping = Mapping(self.buf.obj, readonly=readonly)  # type: ignore[arg-type]
        self._mmap = None
        self.close()
        return mapping


class NamedRegion:
    """A named segment of shared memory, mapped. See `Region` for what it promises."""

    def __init__(self, name: str, mapping: Mapping, owned: OwnedFile | None) -> None:
        self.address = RegionAddress("shm", name)
        self._mapping = mapping
        self._owned = owned

    @classmethod
    def create(cls, size: int, *, name: str | None = None) -> NamedRegion:
        os_name = name_for(name) if name is not None else fresh_name()
        owned = OwnedFile(_marker(os_name))  # first, so that a segment is never without its mark
        try:
            mapping = _open(os_name, create_size=size).release()
            _reserve(os_name, size)
            return cls(os_name, mapping, owned)
        except BaseException as error:
            if not isinstance(error, RegionExistsError):
                unlink_segment(os_name)
            remove(owned.path)
            owned.close()
            raise

    @classmethod
    def attach(cls, address: RegionAddress, *, readonly: bool = False) -> NamedRegion:
        _check_trusted(address.name)
        return cls(address.name, _open(address.name).release(readonly=readonly), None)

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

    def unlink(self) -> None:
        if self._owned is not None and self._owned.mine:
            unlink_segment(self.address.name)
            remove(self._owned.path)


def _marker(name: str) -> str:
    return os.path.join(marker_dir(), name + MARKER_SUFFIX)


def _open(name: str, *, create_size: int = 0) -> _Segment:
    try:
        return _Segment(name, create_size=create_size)
    except FileExistsError:
        raise RegionExistsError(errno.EEXIST, "a segment of shared memory has this name", name) from None
    except FileNotFoundError:
        if create_size:  # no /dev/shm: shm_open(3) says ENOENT
            raise RegionNotFoundError(errno.ENOENT, "there is no shared memory on this system", name) from None
        raise RegionNotFoundError(errno.ENOENT, "no segment of shared memory has this name", name) from None
    except ValueError as error:  # size 0, which mmap refuses
        raise NotReadyError("header_size", str(error), "a segment that its creator has sized") from None
    except OSError as error:
        raise translated(error, shm_path(name) or name, create_size) from error


def _reserve(name: str, size: int) -> None:
    """Reserve the pages where the system lets us reach them; macOS and Windows commit or fail at creation."""
    if (path := shm_path(name)) is not None:
        fd = open_existing(path)
        try:
            reserve(fd, size, path)
        finally:
            os.close(fd)


def _check_trusted(name: str) -> None:
    if (path := shm_path(name)) is not None:
        fd = open_existing(path)
        os.close(fd)
