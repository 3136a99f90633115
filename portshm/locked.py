"""The same calls as `SharedMem`, each under a `filelock.FileLock`: for processes that pass no messages.

The only module that imports filelock (``pip install portshm[sync]``). The lock is one that the kernel frees when its
holder dies, by whatever death; the next holder learns of it by `LockedSharedMem.abandoned`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

try:
    import filelock
except ImportError as error:
    raise ImportError("portshm.locked needs the package filelock: pip install 'portshm[sync]'") from error

from ._backends import marker_dir
from ._region import RegionAddress, name_for
from ._shared_mem import SharedMem
from .errors import LockNotHeldError, LockTimeoutError, RegionRefusedError

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._header import Header

__all__ = ["LockedSharedMem", "lock_path"]


def lock_path(address: RegionAddress) -> str:
    """The lock file that belongs to an address: beside a file region, beside the owner's mark for a named one.

    So `clean` sees whether the region still exists, and containers that share the memory share the lock.
    """
    if address.kind == "file":
        return address.name + ".lock"
    return os.path.join(marker_dir(), name_for(address.name) + ".lock")


class LockedSharedMem:
    """A `SharedMem` of which every call holds an inter-process lock; ``with`` holds it over several calls.

    ::

        with LockedSharedMem(mem, timeout=5) as m:
            m.header.count += 1

    Args:
        mem: stays the caller's: closing and unlinking it is his business, or goes through here just as well.
        timeout: seconds that each acquisition may wait; None waits for ever. `LockTimeoutError` after that.

    The lock is a file whose path derives from the address, so whoever attaches to the same address shares it. It is
    reentrant within a thread. Where the owner resizes, holders follow to the new generation and its lock.
    """

    def __init__(self, mem: SharedMem, *, timeout: float | None = None) -> None:
        self._mem = mem
        self._timeout = timeout
        self._abandoned = False
        self._depth = 0  # changed by whoever has the lock only
        self._holder: memoryview | None = None
        self._pid = os.getpid()
        self._lock = self._new_lock()

    def _forget_the_parents_hold(self) -> None:
        """In a forked child: begin with a lock of its own, which nobody here holds. filelock refuses to share one."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._depth = 0
            self._holder = None
            self._abandoned = False
            # Kept: some versions of filelock unlock when an object goes, and that would be the parent's hold.
            self._parents_lock = self._lock
            self._lock = self._new_lock()

    def _new_lock(self) -> filelock.BaseFileLock:
        # 10 ms rather than filelock's 50: the kernel wakes nobody, every waiter polls.
        return filelock.FileLock(lock_path(self._mem.address), poll_interval=0.01, mode=0o600)

    @property
    def mem(self) -> SharedMem:
        """The memory itself, without the lock."""
        return self._mem

    @property
    def abandoned(self) -> bool:
        """Whether the holder before this one died inside the lock, so that the value may be half changed.

        Told once per death: to the first holder afterwards, until it lets go of the lock.
        """
        return self._abandoned

    def acquire(self) -> None:
        """Wait for the lock, at most `timeout` seconds.

        Raises:
            LockTimeoutError: somebody else has it.
            RegionRefusedError: what lies at its path is no lock file, or none can be made there.
        """
        self._forget_the_parents_hold()
        while True:
            lock = self._lock
            try:
                lock.acquire(timeout=-1 if self._timeout is None else self._timeout)
            except filelock.Timeout:
                raise LockTimeoutError(lock.lock_file, self._timeout or 0.0) from None
            except OSError as error:  # a link or a folder that somebody has put there, or a folder we may not write to
                raise RegionRefusedError(
                    errno.EACCES, f"cannot be the lock ({error.strerror})", lock.lock_file
                ) from error
            try:
                if lock is self._lock and self._hold():
                    return
            except BaseException:
                lock.release()
                raise
            # It guards memory that nobody uses any more: the owner has resized, or another thread of this
            # process has followed it while we waited, and made the file again by opening it.
            _forget(lock)
            lock.release()

    def release(self) -> None:
        """Let go of the lock."""
        self._forget_the_parents_hold()
        if self._depth == 0:
            return  # forked inside the parent's ``with`` block: it is the parent's to release
        if self._depth == 1:
            if self._holder is not None:
                self._holder[0] = 0
                self._holder = None
            self._abandoned = False
        self._depth -= 1
        self._lock.release()

    def _hold(self) -> bool:
        """Take note that this thread has the lock. False if the region was superseded; then we follow its owner."""
        if self._depth == 0:
            if self._mem.superseded and not self._mem.owner:
                self._mem.refresh()
                self._lock = self._new_lock()
                return False
            self._mark_held()
        self._depth += 1
        return True

    def _mark_held(self) -> None:
        # The kernel frees a dead holder's lock without telling anybody, so the holder leaves its mark in memory.
        if self._mem.layout.describes_itself and not self._mem.readonly:
            self._holder = self._mem.cell("holder")
            # Or: a resize under this very hold must not forget what the hold began with.
            self._abandoned |= self._holder[0] != 0
            self._holder[0] = os.getpid()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    # -- the calls of SharedMem

    @property
    def header(self) -> Header:
        """The live header; only inside ``with``, because each use of it comes after this call has returned."""
        return self._held().header

    def value_ref(self) -> memoryview:
        """The value's bytes in shared memory; only inside ``with``, and to be used there only."""
        return self._held().value_ref()

    def value_copy(self) -> bytes:
        with self:
            return self._mem.value_copy()

    def set_value(self, data: Any) -> None:
        with self:
            self._mem.set_value(data)

    def set_value_len(self, length: int) -> None:
        with self:
            self._mem.set_value_len(length)

    def stable_copy(self, timeout: float = 1.0) -> bytes:
        with self:
            return self._mem.stable_copy(timeout)

    def resize(self, capacity: int) -> None:
        """Move on to a new generation, and to the lock that belongs to its address. The owner only."""
        with self:
            old = self._lock
            self._mem.resize(capacity)
            # Nobody can have this lock yet: only the new address leads to it, and we have told nobody.
            self._lock = self._new_lock()
            for _ in range(self._depth):
                self._lock.acquire()
            self._mark_held()
            _forget(old)
            old.release(force=True)

    def refresh(self, address: RegionAddress | str | os.PathLike[str] | None = None) -> bool:
        """Follow the owner to the present generation, as taking the lock does by itself; or to `address`."""
        if address is None:
            before = self._mem.address
            with self:
                return self._mem.address != before
        changed = self._mem.refresh(address)
        if changed:
            self._lock = self._new_lock()
        return changed

    @property
    def capacity(self) -> int:
        return self._mem.capacity

    @property
    def size(self) -> int:
        return self._mem.size

    @property
    def address(self) -> RegionAddress:
        return self._mem.address

    @property
    def path(self) -> str | None:
        return self._mem.path

    @property
    def name(self) -> str | None:
        return self._mem.name

    @property
    def owner(self) -> bool:
        return self._mem.owner

    @property
    def superseded(self) -> bool:
        return self._mem.superseded

    @property
    def closed(self) -> bool:
        return self._mem.closed

    def close(self) -> None:
        self._mem.close()

    def unlink(self) -> None:
        """Remove the region's name and the lock file, if this process is the owner."""
        if self._mem.owner:
            _forget(self._lock)
        self._mem.unlink()

    def _held(self) -> SharedMem:
        self._forget_the_parents_hold()
        if not self._lock.is_locked:
            raise LockNotHeldError("use header and value_ref() inside `with LockedSharedMem(mem) as m:`")
        return self._mem

    def __reduce__(self) -> Any:
        return _rebuild, (self._mem, self._timeout)

    def __repr__(self) -> str:
        return f"<LockedSharedMem of {self._mem!r} by {self._lock.lock_file}>"


def _forget(lock: filelock.BaseFileLock) -> None:
    """Remove a lock's file. Windows does not while somebody has it open; then the reaper does."""
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)


def _rebuild(mem: SharedMem, timeout: float | None) -> LockedSharedMem:
    return LockedSharedMem(mem, timeout=timeout)
