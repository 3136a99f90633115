"""The header codec: named fields <-> bytes, on `struct`. It maps no memory and knows no operating system.

Rules that every layout keeps, because they are what makes a field readable by another process at any moment
(measured on x86-64, CPython 3.11-3.13):

- Host byte order, natural alignment, one field per store. Such a field of up to 8 bytes is stored whole: 0 torn
  of 4 million reads. With the other byte order struct works byte by byte and 1.6 % of reads were torn; across a
  cache line up to 11 % were.
- Alignment is computed here: struct's ``@`` aligns 8-byte fields to 4 on i386 and would give another layout.
- Fields are stored through a cast memoryview and never by ``Struct.pack_into``, which zeroes the field before
  it packs (so a reader could see the zero, and a value out of range would leave it behind).
- The magic is stored last. Zeros there mean "not published yet", anything else but the magic "not ours".

Pure Python has no memory fences. Order between two fields is what the processor gives (x86 keeps stores in
order, ARM does not), so no field is ever the signal that another one may be read: ownership moves by message.
"""

from __future__ import annotations

import operator
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from .errors import HeaderError, NotReadyError, RegionSizeError

__all__ = ["GO_FUZZ_HEADER", "PORTSHM_HEADER", "Header", "HeaderCodec"]

ByteOrder = Literal["little", "big"]

# Only formats of one width on every platform (struct's standard sizes); `l`, `n` and `P` differ between
# 32 and 64 bit, and native `@` agrees with these sizes on every platform CPython runs on.
_SCALAR_SIZES: Final = {
    "b": 1, "B": 1, "?": 1, "h": 2, "H": 2, "i": 4, "I": 4, "f": 4, "q": 8, "Q": 8, "d": 8,
}  # fmt: skip

CACHE_LINE: Final = 64

MAGIC: Final = b"portshm\0"
VERSION: Final = 1
BYTE_ORDER_MARK: Final = 0x01020304
_SWAPPED_MARK: Final = 0x04030201

_EXPLAIN: Final = {
    "byte_order": f"{{}}, this machine's ({sys.byteorder}-endian; {_SWAPPED_MARK} is the other order)",
    "version": "{}, the version this portshm reads",
    "header_size": "{} bytes, the size of the layout it is attached with",
    "layout": "{}, the id of the layout it is attached with; pass the creator's header=",
}

# What a layout begins with if it describes itself. Naturally aligned as they stand, so one struct of standard sizes
# reads and writes all of them, which is for the creator before the magic is there and for a reader after it.
_DESCRIPTION: Final = {
    "magic": "8s", "byte_order": "I", "version": "I", "header_size": "q", "capacity": "q", "layout": "I",
}  # fmt: skip

# The fields that describe the region itself: not assigned through a live header, not carried over by a resize.
_STRUCTURAL: Final = frozenset(
    ("magic", "byte_order", "version", "header_size", "capacity", "layout", "superseded", "generation", "sequence",
     "successor", "holder")
)  # fmt: skip


class Field(NamedTuple):
    """One named field: where it lies and how its bytes are read."""

    name: str
    format: str
    offset: int
    size: int

    @property
    def expected(self) -> str:
        """What may be stored here, in words for an error message."""
        bits = self.size * 8
        if self.format.endswith("s"):
            return f"at most {self.size} bytes"
        if self.format == "?":
            return "True or False"
        if self.format in "fd":
            return "a number"
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if self.format.islower() else (0, (1 << bits) - 1)
        return f"an integer from {low} to {high}"


def _field(name: str, fmt: str, after: int) -> Field:
    if not name.isidentifier() or name.startswith("_"):
        raise HeaderError(name, name, "a field name that is an identifier and does not start with '_'")
    if fmt.endswith("s") and fmt[:-1].isdigit() and int(fmt[:-1]) > 0:
        return Field(name, fmt, after, int(fmt[:-1]))
    if fmt not in _SCALAR_SIZES:
        raise HeaderError(name, fmt, f"one of the formats {' '.join(_SCALAR_SIZES)} or a byte string such as '16s'")
    size = _SCALAR_SIZES[fmt]
    return Field(name, fmt, _round_up(after, size), size)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def checked_length(value: Any, limit: int) -> int:
    """`value` as a length in bytes; any integer type will do, numpy's too."""
    try:
        value = operator.index(value)
    except TypeError:
        raise HeaderError("value_len", value, "an integer") from None
    if not 0 <= value <= limit:
        raise HeaderError("value_len", value, f"a length from 0 to the capacity, {limit}")
    return int(value)


def checked_bool(name: str, value: Any) -> bool:
    """`value` as a bool, if it is one or a number that is as good."""
    if value in (0, 1):
        return bool(value)
    raise HeaderError(name, value, "True or False")


class Header:
    """A live view of one header in memory: reading a field reads memory, assigning stores it.

    Made by `HeaderCodec.view`, which adds a property per field. It aliases the memory it was made over and keeps
    that memory mapped for as long as it lives. Assigning a value that the field cannot hold, or a field that
    describes the region itself, raises `HeaderError` and writes nothing.
    """

    __slots__ = ("_cells", "_limit")

    _codec: HeaderCodec
    if TYPE_CHECKING:  # the seed's five; which fields there really are is up to the codec
        count: int
        value_len: int
        rand_state: int
        rand_inc: int
        raw_in_mem: bool

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, buffer: memoryview, limit: int) -> None:
        # One cast per format, so that an item load or store is one machine load or store. Natural alignment makes
        # every field a whole item of it.
        self._cells = tuple(
            buffer[: self._codec.size // size * size].cast(fmt)  # type: ignore[call-overload]
            for fmt, size in self._codec.cell_formats.items()
        )
        self._limit = limit

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Each field's name and present value, in the order of the layout."""
        return ((name, getattr(self, name)) for name in self._codec.fields)

    def __repr__(self) -> str:
        return f"<Header {' '.join(f'{name}={value!r}' for name, value in self)}>"


def _scalar_property(field: Field, cells: int, *, assignable: bool) -> property:
    item = field.offset // field.size

    def load(header: Header) -> Any:
        return header._cells[cells][item]

    def store(header: Header, value: Any) -> None:
        try:
            header._cells[cells][item] = value
        except (TypeError, ValueError):
            if header._cells[cells].readonly:
                raise HeaderError(field.name, "a read-only attachment", "attach(address, readonly=False)") from None
            raise HeaderError(field.name, value, field.expected) from None

    def store_length(header: Header, value: Any) -> None:
        store(header, checked_length(value, header._limit))

    def store_single(header: Header, value: Any) -> None:
        try:
            struct.pack("=f", value)  # memoryview would store what is too large for it as infinity
        except OverflowError:
            raise HeaderError(field.name, value, "a number that fits 32 bits") from None
        except struct.error:
            pass  # no number: told below
        store(header, value)

    def store_bool(header: Header, value: Any) -> None:
        store(header, checked_bool(field.name, value))  # memoryview would store whether it is true

    def refuse(header: Header, value: Any) -> None:
        raise HeaderError(field.name, value, "no assignment: this field describes the region itself")

    if not assignable:
        return property(load, refuse)
    if field.name == "value_len":
        return property(load, store_length)
    return property(load, {"f": store_single, "?": store_bool}.get(field.format, store))


def _bytes_property(field: Field, cells: int, *, assignable: bool) -> property:
    place = slice(field.offset, field.offset + field.size)

    def load(header: Header) -> bytes:
        return bytes(header._cells[cells][place])

    def store(header: Header, value: Any) -> None:
        if not assignable:
            raise HeaderError(field.name, value, "no assignment: this field describes the region itself")
        if header._cells[cells].readonly:
            raise HeaderError(field.name, "a read-only attachment", "attach(address, readonly=False)")
        if not isinstance(value, (bytes, bytearray)) or len(value) > field.size:
            raise HeaderError(field.name, value, field.expected)
        header._cells[cells][place] = bytes(value).ljust(field.size, b"\0")

    return property(load, store)


class HeaderCodec:
    """An ordered set of named `struct` fields at computed, naturally aligned offsets.

    Args:
        name: what the layout is called in error messages.
        fields: field name -> struct format, one of ``b B ? h H i I q Q f d`` or ``<n>s``; ``<n>x`` keeps n bytes
            free under a name that is never asked for.
        align: the header's size is rounded up to a multiple of this many bytes.
        byteorder: other than the host's only for `pack` and `unpack` of foreign bytes.

    A layout that starts with the fields of `PORTSHM_HEADER` describes itself in memory; another one
    (`GO_FUZZ_HEADER`) is just the bytes, and both sides have to agree on it.
    """

    def __init__(
        self,
        name: str,
        fields: Mapping[str, str],
        *,
        align: int = 8,
        byteorder: ByteOrder = sys.byteorder,
    ) -> None:
        self.name = name
        self.byteorder: ByteOrder = byteorder
        self.align = align
        self.fields: dict[str, Field] = {}
        self._formats = dict(fields)
        end = 0
        for field_name, fmt in fields.items():
            if fmt.endswith("x") and fmt[:-1].isdigit():
                end += int(fmt[:-1])
                continue
            field = _field(field_name, fmt, end)
            self.fields[field_name] = field
            end = field.offset + field.size
        self._end = end
        self.size = _round_up(end, align)
        self._order = "<" if byteorder == "little" else ">"
        self._layout_id = zlib.crc32(",".join(f"{name}:{fmt}" for name, fmt in self._formats.items()).encode())
        # Whether the layout holds magic, size and capacity, so that a reader can check it.
        self.describes_itself = list(self._formats.items())[: len(_DESCRIPTION)] == list(_DESCRIPTION.items())
        self._description_struct = struct.Struct(self._order + "".join(_DESCRIPTION.values()))
        # What `Header` casts the memory to, and the bytes of an item.
        self.cell_formats: dict[str, int] = {}
        for field in self.fields.values():
            fmt = "B" if field.format.endswith("s") else field.format
            self.cell_formats[fmt] = _SCALAR_SIZES[fmt]
        self._view_type = self._make_view_type()

    @property
    def layout_id(self) -> int:
        """CRC-32 of the fields' names and formats: two layouts that differ are not taken for one another."""
        return self._layout_id

    def extend(self, name: str, /, **fields: str) -> HeaderCodec:
        """A new layout: this one, followed by `fields` (name=struct format) on a cache line of their own."""
        taken = sorted(set(fields) & set(self._formats))
        if taken:
            raise HeaderError(taken[0], taken[0], f"a name that layout {self.name!r} does not have already")
        free = {f"pad_{self._end}": f"{self.size - self._end}x"}
        return HeaderCodec(name, {**self._formats, **free, **fields}, align=self.align, byteorder=self.byteorder)

    def with_byteorder(self, byteorder: ByteOrder) -> HeaderCodec:
        """The same layout in the given byte order, to pack and unpack the bytes of another machine."""
        return HeaderCodec(self.name, self._formats, align=self.align, byteorder=byteorder)

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """The whole header as bytes; fields not named are zero. Raises `HeaderError` for what does not fit."""
        out = bytearray(self.size)
        for name, value in values.items():
            field = self._known(name)
            out[field.offset : field.offset + field.size] = self._pack_field(field, value)
        return bytes(out)

    def unpack(self, buffer: Any) -> dict[str, Any]:
        """Every field's value, from the first `size` bytes of `buffer`."""
        view = memoryview(buffer)
        self._check_room(view.nbytes)
        return {name: self.load(view, name) for name in self.fields}

    def load(self, buffer: Any, name: str) -> Any:
        """One field's value from a buffer that starts with this header."""
        field = self._known(name)
        try:
            return struct.unpack_from(self._order + field.format, buffer, field.offset)[0]
        except struct.error:
            raise HeaderError(name, f"{memoryview(buffer).nbytes} bytes", f"at least {self.size}") from None

    def store(self, buffer: Any, name: str, value: Any) -> None:
        """Store one field into a writable buffer that starts with this header."""
        field = self._known(name)
        data = self._pack_field(field, value)
        view = memoryview(buffer)
        self._check_room(view.nbytes)
        view[field.offset : field.offset + field.size] = data

    def cell(self, buffer: memoryview, name: str) -> memoryview:
        """One scalar field as a memoryview of length 1, whose item is loaded and stored whole."""
        field = self._known(name)
        return buffer[field.offset : field.offset + field.size].cast(field.format)  # type: ignore[call-overload, no-any-return]

    def carried_fields(self) -> list[Field]:
        """The fields that a new generation takes over: all but those that describe the region itself."""
        own = (_STRUCTURAL - {"sequence"}) if self.describes_itself else frozenset[str]()
        return [field for field in self.fields.values() if field.name not in own]

    def view(self, buffer: memoryview, limit: int) -> Header:
        """A live `Header` over `buffer`; `limit` is the largest `value_len` that may be assigned, in bytes."""
        self._check_room(buffer.nbytes)
        if self.byteorder != sys.byteorder:
            raise HeaderError("byte_order", self.byteorder, f"{sys.byteorder!r}; the other one is for pack and unpack")
        return self._view_type(buffer, limit)

    def initialise(self, buffer: memoryview, *, capacity: int, generation: int = 0) -> None:
        """Write the header of a new, zeroed region, the magic last."""
        if not self.describes_itself:
            return
        self._check_room(buffer.nbytes)
        self._description_struct.pack_into(buffer, 0, b"", *self._description(capacity).values())
        if generation:
            self.store(buffer, "generation", generation)
        buffer[: len(MAGIC)] = MAGIC

    def check(self, buffer: memoryview) -> int:
        """Check a header against its mapping and return the capacity in bytes.

        The capacity comes from the header: a mapping's length is rounded up to pages of 4, 16 or 64 KiB on
        some platforms. Only a layout without description takes it from `buffer`, which must then be exact.
        """
        self._check_room(buffer.nbytes)
        if not self.describes_itself:
            if buffer.nbytes == self.size:
                raise HeaderError("capacity", 0, "at least 1 byte after the header")
            return buffer.nbytes - self.size
        magic, *found = self._description_struct.unpack_from(buffer)
        if magic != MAGIC:
            kind = HeaderError if any(magic) else NotReadyError
            raise kind("magic", magic, repr(MAGIC))
        capacity: int = found[3]
        for value, (name, expected) in zip(found, self._description(capacity).items(), strict=True):
            if value != expected:
                raise HeaderError(name, value, _EXPLAIN.get(name, "{}").format(expected))
        if not 1 <= capacity <= buffer.nbytes - self.size:
            raise HeaderError(
                "capacity", capacity, f"1 to {buffer.nbytes - self.size}, what is mapped after the header"
            )
        return capacity

    def as_found(self, buffer: memoryview) -> HeaderCodec:
        """This layout, widened to the header size and layout that the memory itself states.

        For readers that do not know the creator's own fields, such as the inspector.
        """
        self._check_room(buffer.nbytes)
        known = {"magic": MAGIC, "byte_order": BYTE_ORDER_MARK, "version": VERSION}
        if not self.describes_itself or any(self.load(buffer, name) != value for name, value in known.items()):
            return self  # `check` says what is wrong
        if self.load(buffer, "layout") == self.layout_id:
            return self
        stated: int = self.load(buffer, "header_size")
        if stated % CACHE_LINE or not self.size <= stated < buffer.nbytes:
            raise HeaderError("header_size", stated, f"a multiple of {CACHE_LINE} from {self.size}, inside the mapping")
        return _ForeignLayout(self, stated, self.load(buffer, "layout"))

    def _description(self, capacity: int) -> dict[str, Any]:
        return {
            "byte_order": BYTE_ORDER_MARK,
            "version": VERSION,
            "header_size": self.size,
            "capacity": capacity,
            "layout": self.layout_id,
        }

    def _pack_field(self, field: Field, value: Any) -> bytes:
        if field.name == "value_len" and isinstance(value, int) and value < 0:
            raise HeaderError("value_len", value, "a length of 0 or more")
        if field.format.endswith("s") and (not isinstance(value, (bytes, bytearray)) or len(value) > field.size):
            raise HeaderError(field.name, value, field.expected)  # struct would cut it silently
        if field.format == "?":
            value = checked_bool(field.name, value)
        try:
            return struct.pack(self._order + field.format, value)
        except (struct.error, OverflowError):
            raise HeaderError(field.name, value, field.expected) from None

    def _known(self, name: str) -> Field:
        try:
            return self.fields[name]
        except KeyError:
            raise HeaderError(name, name, f"a field of layout {self.name!r}: {', '.join(self.fields)}") from None

    def _check_room(self, length: int) -> None:
        if length < self.size:
            raise HeaderError("header_size", f"{length} bytes in all", f"at least {self.size} for layout {self.name!r}")

    def _make_view_type(self) -> type[Header]:
        own = _STRUCTURAL if self.describes_itself else frozenset[str]()
        members: dict[str, Any] = {"__slots__": (), "_codec": self}
        formats = list(self.cell_formats)
        for field in self.fields.values():
            text = field.format.endswith("s")
            make = _bytes_property if text else _scalar_property
            members[field.name] = make(
                field, formats.index("B" if text else field.format), assignable=field.name not in own
            )
        return type("Header", (Header,), members)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, HeaderCodec)
            and (self.fields, self.size, self.byteorder) == (other.fields, other.size, other.byteorder)
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.layout_id, self.size, self.byteorder))

    def __reduce__(self) -> Any:
        return _rebuild, (self.name, self._formats, self.align, self.byteorder)

    def __repr__(self) -> str:
        return f"<HeaderCodec {self.name!r} {self.size} bytes: {' '.join(self.fields)}>"


class _ForeignLayout(HeaderCodec):
    """The fields that a base layout knows, in a header that somebody else extended."""

    def __init__(self, base: HeaderCodec, size: int, layout_id: int) -> None:
        super().__init__(f"{base.name}+", base._formats, align=base.align)
        self._base = base
        self.size = size
        self._layout_id = layout_id

    def __reduce__(self) -> Any:
        return _ForeignLayout, (self._base, self.size, self._layout_id)


def _rebuild(name: str, fields: dict[str, str], align: int, byteorder: ByteOrder) -> HeaderCodec:
    return HeaderCodec(name, fields, align=align, byteorder=byteorder)


# Whole cache lines of 64 bytes: what the region is, then the seed's five fields with the sequence word beside
# them, then the name of the successor.
PORTSHM_HEADER: Final = HeaderCodec(
    "portshm",
    {
        "magic": "8s",
        "byte_order": "I",
        "version": "I",
        "header_size": "q",
        "capacity": "q",
        "layout": "I",
        "superseded": "?",  # a later generation exists; `successor` names it
        "pad_37": "3x",
        "generation": "Q",
        "pad_48": "16x",
        # second line
        "sequence": "Q",  # odd while a value is being written
        "count": "q",
        "value_len": "q",
        "rand_state": "Q",
        "rand_inc": "Q",
        "raw_in_mem": "?",
        "pad_105": "7x",
        "holder": "Q",  # who is under the lock of `locked.py`; left behind by a holder that died
        "pad_120": "8x",
        # third line
        "successor": "64s",
    },
    align=CACHE_LINE,
)

# Go's sharedMemHeader as its compiler lays it out on 64-bit machines (src/internal/fuzz/mem.go), value at 40.
GO_FUZZ_HEADER: Final = HeaderCodec(
    "go_fuzz",
    {"count": "q", "value_len": "q", "rand_state": "Q", "rand_inc": "Q", "raw_in_mem": "?"},
)


def region_size(capacity: int, header: HeaderCodec = PORTSHM_HEADER) -> int:
    """Bytes that a region needs for its header and a value of `capacity` bytes."""
    try:
        capacity = operator.index(capacity)
    except TypeError:
        raise RegionSizeError(f"capacity {capacity!r}: expected an integer, of bytes") from None
    if capacity < 1:
        raise RegionSizeError(f"capacity {capacity}: a region holds at least 1 byte")
    size = header.size + capacity
    if size > sys.maxsize:
        raise RegionSizeError(f"capacity {capacity}: this platform maps at most {sys.maxsize - header.size} bytes")
    return size
