"""SharedMem: a header and a value of variable length over any region. Lock-free: it synchronises nothing.

Whoever owns the memory at the moment, by a message that said so, calls these methods; `pool/_slot.py` tells how
that works between a coordinator and a worker. `locked.py` has the same calls under a lock for those who have no
messages. Only `stable_copy` is meant for observers that own nothing.
"""

from __future__ import annotations

import errno
import os
import time
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from ._backends import Backend, announce, attach_region, create_region, room
from ._buffers import raw_bytes
from ._header import PORTSHM_HEADER, Header, HeaderCodec, checked_length, region_size
from ._region import Region, RegionAddress, name_for
from .errors import (
    HeaderError,
    RegionClosedError,
    RegionNameError,
    RegionRefusedError,
    TornValueError,
    ValueTooLargeError,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SharedMem", "max_capacity"]

_UINT64: Final = 0xFFFF_FFFF_FFFF_FFFF


def max_capacity(
    backend: Backend = "auto", dir: str | os.PathLike[str] | None = None, header: HeaderCodec = PORTSHM_HEADER
) -> int:
    """The largest capacity in bytes that `SharedMem.create` could reserve there right now (others allocate too)."""
    return max(0, room(backend, dir) - header.size)


class SharedMem:
    """A region of memory shared between processes: a fixed header plus a value of up to `capacity` bytes.

    Made by `create` (which owns it) or `attach`. Any process that has attached may read and write; nothing is
    locked, so hand the memory over by message. Leaving a ``with`` block closes, and unlinks too if this process
    is the owner. An owner that is garbage-collected or exits without closing removes its region; one that is
    killed leaves it behind, to be read by whoever has the address and removed by ``portshm clean``.
    """

    def __init__(self, region: Region, header: HeaderCodec, *, readonly: bool = False) -> None:
        """Take over a region whose header is in place. Use `create` or `attach`."""
        self._codec = header
        self._readonly = readonly
        self._adopt(region)

    def _adopt(self, region: Region) -> None:
        view = region.view()
        self._capacity = self._codec.check(view)
        self._region = region
        announce(view, str(region.address))
        start = self._codec.size
        self._header: Header | None = self._codec.view(view, self._capacity)
        self._value = view[start : start + self._capacity]
        if self._codec.describes_itself:
            self._sequence = self._codec.cell(view, "sequence")
        self._finalizer = weakref.finalize(self, _drop, region, os.getpid()) if region.owner else None

    @classmethod
    def create(
        cls,
        capacity: int,
        *,
        backend: Backend = "auto",
        name: str | None = None,
        dir: str | os.PathLike[str] | None = None,
        header: HeaderCodec = PORTSHM_HEADER,
    ) -> SharedMem:
        """Make a new region for values of up to `capacity` bytes, all of it reserved, and own it.

        Args:
            capacity: bytes, at least 1.
            backend: ``"file"``, ``"named"``, or ``"auto"``: shared memory, else a temporary file.
            name: a label for the name in the operating system, which starts with ``portshm_``; random if None.
            dir: folder for the file backend; the system's temporary folder if None.
            header: the layout; `GO_FUZZ_HEADER` makes the very file that Go's fuzzer uses, and only a file.

        Raises:
            RegionSizeError: a capacity below 1, or beyond what can be mapped.
            RegionFullError: not enough room (ENOSPC); names the mount.
            RegionExistsError: the name is taken. Creation is always exclusive.
        """
        size = region_size(capacity, header)
        if not header.describes_itself:
            # Capacity is the file's length there, and only a file's length is exact on every platform.
            if backend == "named":
                raise RegionNameError(f"layout {header.name!r} states no capacity: use backend='file'")
            backend = "file"
        region = create_region(size, backend, name=name, dir=dir)
        try:
            header.initialise(region.view(), capacity=capacity)
            return cls(region, header)
        except BaseException:
            region.unlink()
            region.close()
            raise

    @classmethod
    def attach(
        cls,
        address: RegionAddress | str | os.PathLike[str],
        *,
        readonly: bool = False,
        header: HeaderCodec | None = PORTSHM_HEADER,
    ) -> SharedMem:
        """Map a region that exists, by its address (also as text) or, for a file, its path.

        Args:
            readonly: views cannot be written through, and a file is mapped without write permission.
            header: the layout it was created with; None accepts any layout that extends the default one.

        Raises:
            RegionNotFoundError: nothing is there.
            RegionRefusedError: a link, no regular file, somebody else's, or open to others.
            HeaderError: not the bytes that this layout begins with (`NotReadyError`: not yet).
        """
        region = attach_region(RegionAddress.parse(address), readonly=readonly)
        try:
            codec = header if header is not None else PORTSHM_HEADER.as_found(region.view())
            return cls(region, codec, readonly=readonly)
        except BaseException:
            region.close()
            raise

    # -- what it is

    @property
    def header(self) -> Header:
        """The live header: reading a field reads memory, assigning stores it."""
        if self._header is None:
            raise RegionClosedError("the shared memory is closed; attach again by its address")
        return self._header

    def cell(self, name: str) -> memoryview:
        """One scalar header field as a memoryview of one item: the quickest way to load and store it over and over.

        Stores through it are range-checked by memoryview and nothing else.
        """
        self.header  # noqa: B018  raises if closed
        return self._codec.cell(self._region.view(), name)

    @property
    def layout(self) -> HeaderCodec:
        """The codec of this memory's header."""
        return self._codec

    @property
    def capacity(self) -> int:
        """Bytes that the value may have at most, as asked for at creation on every platform."""
        return self._capacity

    @property
    def size(self) -> int:
        """Bytes of header and full value together."""
        return self._codec.size + self._capacity

    @property
    def address(self) -> RegionAddress:
        """What another process needs to attach."""
        return self._region.address

    @property
    def path(self) -> str | None:
        """The file's path, or None for a named region."""
        return self.address.name if self.address.kind == "file" else None

    @property
    def name(self) -> str | None:
        """The segment's name, or None for a file region."""
        return self.address.name if self.address.kind == "shm" else None

    @property
    def owner(self) -> bool:
        """Whether this process created the region. A forked child never owns."""
        return self._region.owner

    @property
    def readonly(self) -> bool:
        return self._readonly

    @property
    def closed(self) -> bool:
        return self._header is None

    @property
    def superseded(self) -> bool:
        """Whether the owner has moved on to another generation; `refresh` follows it."""
        return bool(self.header.superseded) if self._codec.describes_itself else False

    @property
    def writing(self) -> bool:
        """Whether a value is being written, or its writer died over it."""
        return bool(self.header.sequence & 1) if self._codec.describes_itself else False

    # -- the value

    def area(self) -> memoryview:
        """All `capacity` bytes, whatever the value's length: for those who keep more there than the value."""
        self.header  # noqa: B018  raises if closed
        return self._value

    def value_ref(self) -> memoryview:
        """The value's bytes in shared memory, not a copy; writable unless attached read-only.

        Valid for as long as somebody holds it, also after `close()`. It covers the length that the value has now;
        stores through it do not move the sequence word, so `stable_copy` does not see them coming.
        """
        length = self._length()
        return self._value[:length]

    def value_copy(self) -> bytes:
        """A copy of the value's bytes."""
        return bytes(self.value_ref())

    def set_value(self, data: Any) -> None:
        """Store the bytes of anything that exports a contiguous buffer; the length counts bytes, not items.

        Raises:
            ValueTooLargeError: before anything is touched.
            BufferError: the buffer is not contiguous.
            TypeError: no buffer, or one of object pointers, which mean nothing elsewhere.
        """
        source = raw_bytes(data)
        length = source.nbytes
        header = self._writable()
        if length > self._capacity:
            raise ValueTooLargeError(length, self._capacity)
        sequence = self._begin_write()
        self._value[:length] = source
        header.value_len = length
        self._end_write(sequence)

    def set_value_len(self, length: int) -> None:
        """Change the value's length in bytes; what bytes it gains are whatever the memory holds."""
        header = self._writable()
        try:
            length = checked_length(length, self._capacity)
        except HeaderError as error:
            if isinstance(error.found, int) and error.found > self._capacity:
                raise ValueTooLargeError(error.found, self._capacity) from None
            raise
        sequence = self._begin_write()
        header.value_len = length
        self._end_write(sequence)

    def stable_copy(self, timeout: float = 1.0) -> bytes:
        """A complete value, for an observer that does not own the memory: the old one or the new, never a mixture.

        Waits up to `timeout` seconds for a writer to finish. The sequence word is odd while a value is being
        written and different afterwards, so a copy between two equal even words is whole. That rests on stores
        and loads staying in order, which x86-64 promises and pure Python cannot enforce elsewhere.

        Raises:
            TornValueError: the writer died over it, or writes without pause.
        """
        if not self._codec.describes_itself:
            raise HeaderError("sequence", f"layout {self._codec.name!r} without it", "a layout on PORTSHM_HEADER")
        header = self.header
        deadline = time.monotonic() + timeout
        pause = 1e-6
        while True:
            before = header.sequence
            if not before & 1:
                copy = self.value_copy()
                if header.sequence == before:
                    return copy
            if time.monotonic() >= deadline:
                raise TornValueError(
                    f"no complete value within {timeout:g} s at {self.address}: "
                    "its writer died over it, or writes without pause"
                )
            # There is nothing to wait on: the writer does not know that somebody looks on.
            time.sleep(pause)
            pause = min(pause * 2, 0.005)

    def _begin_write(self) -> int:
        if not self._codec.describes_itself:
            return 0
        # A writer that died left it odd. The next odd number, never the same even one, so that a reader whose
        # copy spans the two writes sees that something happened.
        sequence: int = (self._sequence[0] + 1 & _UINT64) | 1
        self._sequence[0] = sequence
        return sequence

    def _end_write(self, sequence: int) -> None:
        if self._codec.describes_itself:
            self._sequence[0] = sequence + 1 & _UINT64

    def _writable(self) -> Header:
        header = self.header
        if self._readonly:
            raise RegionRefusedError(
                errno.EACCES, "attached read-only; attach(address) without readonly=True", str(self.address)
            )
        return header

    def _length(self) -> int:
        # One read, then checked, then used: a writer that crashed or means harm may have left anything here,
        # and may change it between two reads.
        length = self.header.value_len
        if not 0 <= length <= self._capacity:
            raise HeaderError("value_len", length, f"a length from 0 to the capacity, {self._capacity}")
        return length

    # -- generations

    def resize(self, capacity: int) -> None:
        """Move on to a new region of `capacity` bytes, with value, count, PRNG state and user fields carried over.

        Never in place: macOS allows one ftruncate per segment and Windows none while it is mapped. So this object
        changes to a new address, under a fresh name in the same place; send it to the others. Those who are
        attached to the old one see `superseded` and `refresh`. Views taken before stay on the old memory.

        Raises:
            RegionRefusedError: not the owner.
            ValueTooLargeError: the present value does not fit; nothing was changed.
        """
        if not self.owner:
            raise RegionRefusedError(errno.EPERM, "only the owner resizes; send it a message", str(self.address))
        length = self._length()
        old, codec = self._region, self._codec
        size = region_size(capacity, codec)
        if length > capacity:
            raise ValueTooLargeError(length, capacity)
        folder = os.path.dirname(old.address.name) if old.address.kind == "file" else None
        new = create_region(size, "file" if folder is not None else "named", dir=folder)
        try:
            source, target = old.view(), new.view()
            for field in codec.carried_fields():
                target[field.offset : field.offset + field.size] = source[field.offset : field.offset + field.size]
            target[codec.size : codec.size + length] = source[codec.size : codec.size + length]
            generation = codec.load(source, "generation") + 1 if codec.describes_itself else 0
            codec.initialise(target, capacity=capacity, generation=generation)
        except BaseException:
            new.unlink()
            new.close()
            raise
        if codec.describes_itself:
            codec.store(source, "successor", os.path.basename(new.address.name).encode())
            codec.store(source, "superseded", True)
        del source, target
        self._give_up()
        old.unlink()
        old.close()
        self._adopt(new)

    def refresh(self, address: RegionAddress | str | os.PathLike[str] | None = None) -> bool:
        """Attach to the present generation; whether there was a newer one.

        Without `address` the successor is read from the old header. Pass the address that came by message where
        the owner may have moved on more than once, or where the layout has no such field.

        Raises:
            RegionNotFoundError: the successor is gone too; ask the owner for its address.
            RegionRefusedError: this is the owner, who has `resize` for that.
        """
        if address is None:
            if not self.superseded:
                return False
            target = self._successor()
        else:
            target = RegionAddress.parse(address)
            if target == self.address:
                return False
            if self.owner:
                raise RegionRefusedError(errno.EPERM, "an owner does not move on to another's memory", str(target))
        region = attach_region(target, readonly=self._readonly)
        try:
            self._codec.check(region.view())
        except BaseException:
            region.close()
            raise
        old = self._region
        self._give_up()
        old.close()
        self._adopt(region)
        return True

    def _successor(self) -> RegionAddress:
        stated: bytes = self.header.successor
        name = stated.rstrip(b"\0").decode("ascii", "replace")
        if not name or name_for(name) != name:
            raise HeaderError("successor", stated, "the name of a region")
        if self.address.kind == "shm":
            return RegionAddress("shm", name)
        return RegionAddress("file", os.path.join(os.path.dirname(self.address.name), name))

    # -- the end

    def close(self) -> None:
        """Give up the memory. Never fails, and views taken before stay valid; the mapping goes with the last one.

        An owner that closes without `unlink` leaves the region to whoever has the address, and to the reaper.
        """
        self._give_up()
        self._region.close()

    def unlink(self) -> None:
        """Remove the region's name, if this process is the owner; nobody can attach any more. Twice is fine."""
        self._region.unlink()

    def _give_up(self) -> None:
        self._header = None
        self._value = self._sequence = memoryview(b"")
        if self._finalizer is not None:
            self._finalizer.detach()

    def __enter__(self) -> Self:
        self.header  # noqa: B018  raises if closed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.unlink()
        finally:
            self.close()

    def __reduce__(self) -> Any:
        return _attach, (str(self.address), self._readonly, self._codec)

    def __repr__(self) -> str:
        if self.closed:
            return f"<SharedMem {self.address} closed>"
        role = "owner" if self.owner else "attached read-only" if self._readonly else "attached"
        return f"<SharedMem {self.address} {role} value {self.header.value_len} of {self._capacity} bytes>"


def _attach(address: str, readonly: bool, header: HeaderCodec) -> SharedMem:
    return SharedMem.attach(address, readonly=readonly, header=header)


def _drop(region: Region, pid: int) -> None:
    # A forked child inherits the finalizer and must not remove what is its parent's.
    if os.getpid() == pid:
        region.unlink()
        region.close()
