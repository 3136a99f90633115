"""What the backends need from a POSIX system. `_windows.py` supplies the same functions.

Facts this file stands on:

- A lock by flock(2) belongs to the open file description: the kernel drops it when the last descriptor of it is
  closed, by whatever death. fcntl(2) locks would be dropped as soon as this process closes *any* descriptor of the
  file, and pids lie across containers.
- A forked child shares the description, and so the lock. `_close_in_forked_children` gives it up there. A mapping
  holds on to its description as a descriptor does, so what the lock is on and what is mapped are two descriptions
  of the same file where that costs no second descriptor (from 3.13).
- mmap.mmap duplicates the descriptor it is given and keeps the copy until the mapping goes; ``trackfd=False``
  (CPython 3.13, issue 78502) makes it not do so.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterable
from typing import Any, Final

from ..errors import RegionExistsError, RegionFullError, RegionNameError, RegionNotFoundError, RegionRefusedError

assert sys.platform != "win32"  # for the type checker

# Linux keeps POSIX shared memory in this tmpfs (shm_open(3)); elsewhere it has no place in the file system.
_SHM_DIR: Final = "/dev/shm"

_EXTRA_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW


class OwnedFile:
    """A file of which this process is the owner: created exclusively, mode 0600, locked for as long as it is open."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = _create_locked(path)
        self._pid = os.getpid()
        _owned.add(self)

    @property
    def mine(self) -> bool:
        """False in a forked child."""
        return self._pid == os.getpid()

    def map(self, size: int) -> mmap.mmap:
        """Map `size` reserved bytes for reading and writing. Afterwards the file costs one descriptor in all."""
        if sys.version_info >= (3, 13):
            fd = os.open(self.path, os.O_RDWR | _EXTRA_FLAGS)
            try:
                if not os.path.samestat(os.fstat(fd), os.fstat(self.fd)):
                    raise RegionNotFoundError(errno.ENOENT, "somebody has put another file in its place", self.path)
                return mmap.mmap(fd, size, flags=_shared_flags(size), trackfd=False)
            finally:
                os.close(fd)
        mapping = mmap.mmap(self.fd, size, flags=_shared_flags(size))
        # The mapping's own duplicate now holds the lock; a second descriptor would be one too many.
        self.close()
        return mapping

    def close(self) -> None:
        _owned.discard(self)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


# From this size on a region's pages are mapped at once and not one by one as they are touched: 4 ms instead of 18
# for 32 MiB, where every touch of a page is a fault of more than a microsecond.
_POPULATE: Final = 1 << 20


def _shared_flags(size: int) -> int:
    return mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if size >= _POPULATE else 0)  # Linux has it


_owned: weakref.WeakSet[OwnedFile] = weakref.WeakSet()


def _close_in_forked_children() -> None:
    for file in list(_owned):
        file.close()


os.register_at_fork(after_in_child=_close_in_forked_children)


def _create_locked(path: str) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _EXTRA_FLAGS, 0o600)
        except FileExistsError:
            raise RegionExistsError(errno.EEXIST, "a region (or something else) has this name", path) from None
        except OSError as error:
            raise translated(error, path, 0) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks (some NFS and FUSE mounts: ENOLCK, EOPNOTSUPP). The reaper cannot
            # lock there either, so it leaves the file alone.
            return fd
        # Between open and flock a reaper may have taken this file for an orphan and unlinked it: then our
        # descriptor has no name any more, and we start again.
        if _same_file(fd, path):
            return fd
        os.close(fd)


def _same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def reserve(fd: int, size: int, path: str) -> None:
    """Give an empty file `size` bytes that are really there, so that no later store ends in SIGBUS.

    ftruncate alone makes a sparse file, and touching it on a full tmpfs kills the process (CPython issue 114390).
    """
    try:
        status = os.fstatvfs(fd)
        if status.f_blocks and size > status.f_bfree * status.f_frsize:  # some that have no limit say 0
            # Not even tried, for the file system would be full meanwhile.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, size)
                return
            except OSError as error:
                # Not every file system can: ZFS and FreeBSD say EINVAL, others EOPNOTSUPP or ENODEV.
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV, errno.ENOSYS):
                    raise
        _write_zeros(fd, size)
    except OSError as error:
        raise translated(error, path, size) from error


def _write_zeros(fd: int, size: int) -> None:
    block = bytes(min(size, 1 << 20))
    done = 0
    while done < size:
        done += os.pwrite(fd, block[: size - done], done)


def open_existing(path: str, *, readonly: bool = False) -> int:
    """Open a region's file after checking that it is a plain file of ours that nobody else can reach."""
    try:
        # O_NONBLOCK: a planted FIFO must not hang the open.
        fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_NONBLOCK | _EXTRA_FLAGS)
    except OSError as error:
        raise translated(error, path, 0) from error
    try:
        _check_trusted(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_trusted(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RegionRefusedError(errno.EACCES, "not a regular file", path)
    if status.st_uid != os.geteuid():
        raise RegionRefusedError(errno.EACCES, f"belongs to user {status.st_uid}, not to us ({os.geteuid()})", path)
    if status.st_mode & 0o077:
        raise RegionRefusedError(
            errno.EACCES, f"open to others (mode {stat.S_IMODE(status.st_mode):04o}, expected 0600)", path
        )


def map_existing(fd: int, *, access: int) -> mmap.mmap:
    """Map the whole file behind `fd`."""
    how: dict[str, Any] = {"access": access}
    if access == mmap.ACCESS_WRITE:
        how = {"flags": _shared_flags(os.fstat(fd).st_size)}
    if sys.version_info >= (3, 13):
        how["trackfd"] = False
    return mmap.mmap(fd, 0, **how)


def fill_file(path: str, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
    """Write into a region's file, for those who would map it just for that.

    The pages are the same, and the kernel finds them without a fault for each: 0.5 ms for 8 MiB instead of 2.2.
    """
    fd = open_existing(path)
    try:
        for at, piece in pieces:
            rest = memoryview(piece)
            while rest:  # one call writes at most 2 GiB less a page (write(2))
                done = os.pwrite(fd, rest, at)
                rest, at = rest[done:], at + done
    except OSError as error:
        raise translated(error, path, 0) from error
    finally:
        os.close(fd)


def owner_alive(path: str) -> bool | None:
    """Whether some process still holds the owner's lock; None if there is no such file or it is not ours to judge."""
    try:
        fd = open_existing(path, readonly=True)
    except OSError:
        return None
    try:
        return not _lock_now(fd)
    finally:
        os.close(fd)


def remove_orphan(path: str, *, segment: str | None = None) -> bool:
    """Remove the file if its owner is gone, and before it the named segment whose mark it is.

    All of it under the owner's lock: without, another reaper could be through already, a new owner have taken the
    name, and its segment would be the one that goes.
    """
    try:
        fd = open_existing(path)
    except OSError:
        return False
    try:
        if not _lock_now(fd) or not _same_file(fd, path):
            return False
        if segment is not None:
            unlink_segment(segment)  # first: macOS lists no segments, so without its mark nobody would find it
        remove(path)
        return True
    except OSError:
        return False  # in a folder that we may not write to
    finally:
        os.close(fd)


def _lock_now(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # held, or a file system without locks: either way not ours to remove
    return True


def remove(path: str) -> bool:
    """Remove a name; that it is gone already is fine. False if it has to wait until nobody maps it (Windows)."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise translated(error, path, 0) from error
    return True


def unlink_segment(name: str) -> None:
    """Remove a named segment of shared memory; that it is gone already is fine."""
    # What SharedMemory.unlink calls; that method itself needs an open segment, and an orphan of size 0 has none.
    import _posixshmem  # type: ignore[import-not-found]  # absent on Android

    try:
        _posixshmem.shm_unlink("/" + name)
    except FileNotFoundError:
        pass


def shm_path(name: str) -> str | None:
    """Where a named segment can be seen in the file system, if anywhere."""
    path = f"{_SHM_DIR}/{name}"
    return path if os.path.lexists(path) else None


def memory_dir() -> str | None:
    """A folder whose files are memory, or None."""
    return _SHM_DIR if os.access(f"{_SHM_DIR}/", os.W_OK | os.X_OK) else None  # the slash: only if it is a folder


def marker_dir() -> str:
    """Where the owner's mark of a named segment lies: beside the segments where they can be seen.

    Containers may share /dev/shm without sharing /tmp, and must see each other's marks just then.
    """
    return memory_dir() or tempfile.gettempdir()


def free_bytes(path: str) -> int:
    try:
        status = os.statvfs(path)
    except OSError as error:
        raise translated(error, path, 0) from error
    return status.f_bavail * status.f_frsize


def mount_of(path: str) -> str:
    """The mount point that `path` lies under."""
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def translated(error: OSError, path: str, size: int) -> Exception:
    """An operating system's error as one of ours; above the backends nobody looks at errno."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = os.path.dirname(path)
        return RegionFullError(
            errno.ENOSPC,
            f"no room for {size} bytes: {free_bytes(folder)} are free; use a smaller capacity, "
            "another dir=, or make the mount larger (docker run --shm-size)",
            mount_of(folder),
        )
    if error.errno in (errno.ENOMEM, errno.EFBIG):
        return RegionFullError(
            errno.ENOSPC, f"{size} bytes is more than may be mapped here ({os.strerror(error.errno)})", path
        )
    if error.errno == errno.ENAMETOOLONG:
        return RegionNameError(f"{path!r}: {os.strerror(error.errno)}")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return RegionNotFoundError(errno.ENOENT, "no such region", path)
    if error.errno in (errno.ELOOP, errno.EMLINK):  # O_NOFOLLOW on a link; FreeBSD says EMLINK
        return RegionRefusedError(errno.EACCES, "is a symbolic link, which is never followed", path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENXIO):
        return RegionRefusedError(errno.EACCES, os.strerror(error.errno), path)
    return error
