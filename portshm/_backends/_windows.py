"""What the backends need from Windows. `_posix.py` supplies the same functions.

Written from Microsoft's and CPython's documentation; type-checked for win32, not run on Windows here. Facts:

- os.open shares the file for reading and writing but not for deletion, so a file that somebody has open, or
  mapped, cannot be renamed or deleted (ERROR_SHARING_VIOLATION, ERROR_USER_MAPPED_FILE). The open file *is* the
  owner's lock: it ends with the process.
- A mapped file cannot be deleted, so removal may fail; the next reaper takes it.
- There are no modes or links to check as on POSIX: %TEMP% is per user and its ACL keeps others out.
- mmap.mmap duplicates the handle it is given, always before CPython 3.15.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable

from ..errors import RegionExistsError, RegionFullError, RegionNotFoundError, RegionRefusedError

assert sys.platform == "win32"  # for the type checker

_EXTRA_FLAGS = os.O_BINARY | os.O_NOINHERIT


class OwnedFile:
    """A file of which this process is the owner: created exclusively, and open for as long as it lives."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _EXTRA_FLAGS, 0o600)
        except FileExistsError:
            raise RegionExistsError(errno.EEXIST, "a region (or something else) has this name", path) from None
        except OSError as error:
            raise translated(error, path, 0) from error

    @property
    def mine(self) -> bool:
        return True  # no fork here

    def map(self, size: int) -> mmap.mmap:
        mapping = mmap.mmap(self.fd, size)
        self.close()  # the mapping's duplicate keeps the file open
        return mapping

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def reserve(fd: int, size: int, path: str) -> None:
    block = bytes(min(size, 1 << 20))
    done = 0
    try:
        while done < size:
            done += os.write(fd, block[: size - done])
    except OSError as error:
        raise translated(error, path, size) from error


def open_existing(path: str, *, readonly: bool = False) -> int:
    try:
        return os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | _EXTRA_FLAGS)
    except OSError as error:
        raise translated(error, path, 0) from error


def map_existing(fd: int, *, access: int) -> mmap.mmap:
    return mmap.mmap(fd, 0, access=access)


def fill_file(path: str, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
    # Not by writing to the file, whose mapped views need not see that (MapViewOfFile, "Remarks").
    fd = open_existing(path)
    try:
        mapping = map_existing(fd, access=mmap.ACCESS_WRITE)
    finally:
        os.close(fd)
    with mapping:
        for at, piece in pieces:
            mapping[at : at + len(piece)] = piece


def owner_alive(path: str) -> bool | None:
    try:
        os.rename(path, path)  # needs DELETE access, which an open file denies; changes nothing
    except FileNotFoundError:
        return None
    except OSError:
        return True
    return False


def remove_orphan(path: str, *, segment: str | None = None) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def remove(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except PermissionError:
        return False  # mapped by us or somebody else
    return True


def unlink_segment(name: str) -> None:
    """Nothing to do: a segment goes with its last handle."""


def shm_path(name: str) -> str | None:
    return None


def memory_dir() -> str | None:
    return None


def marker_dir() -> str:
    return tempfile.gettempdir()


def free_bytes(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError as error:
        raise translated(error, path, 0) from error


def mount_of(path: str) -> str:
    return os.path.splitdrive(os.path.abspath(path))[0]


def translated(error: OSError, path: str, size: int) -> Exception:
    if error.errno == errno.ENOSPC:
        return RegionFullError(
            errno.ENOSPC,
            f"no room for {size} bytes: {free_bytes(os.path.dirname(path))} are free; use a smaller capacity or "
            "another dir=",
            mount_of(path),
        )
    if error.errno == errno.ENOENT:
        return RegionNotFoundError(errno.ENOENT, "no such region", path)
    if error.errno in (errno.EACCES, errno.EPERM):
        return RegionRefusedError(errno.EACCES, os.strerror(error.errno), path)
    return error
