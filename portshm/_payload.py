"""Objects <-> memory: pickle protocol 5 with large buffers out of band.

A `Payload` is a pickle stream and the buffers that it leaves out. Written into a region it is a table of lengths, the
stream, and the buffers, each on a cache line. Read back, the stream is unpickled where it lies and the buffers
become views of the region: one copy in, none out. numpy, arrow and pandas export their memory this way by themselves,
so nothing of theirs is imported here.

`bytes`, `bytearray` and `array` do not: pickle copies them into the stream. Large ones near the top of the object are
taken out by hand, through `persistent_id`, and are copied once on arrival, because such an object owns its memory.
"""

from __future__ import annotations

import copyreg
import io
import itertools
import pickle
import struct
import types
from array import array
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from ._backends import locate
from ._large_bytes import copy_of
from .errors import TransportError

__all__ = [
    "FIXED",
    "WORTH_A_MAPPING",
    "is_plain",
    "Payload",
    "Place",
    "pack",
    "pack_batch",
    "pack_small",
    "read_payload",
    "unpack",
    "unpack_batch",
]

# Below this a buffer is cheaper in the stream than as a view of its own.
OUT_OF_BAND: Final = 1 << 15

# Buffers that somebody may keep stay in the shared memory that they came in if it is worth a mapping of its own. Below
# this many bytes a copy costs next to nothing, and what it came in is free again, with its descriptors.
WORTH_A_MAPPING: Final = 1 << 20

_ALIGN: Final = 64
_COUNT: Final = struct.Struct("<Q")

# What no pickle begins with: before elements that were pickled one by one.
_ONE_BY_ONE: Final = bytes(8)

# Besides plain values these cannot be changed by who gets them: they are pickled by name.
FIXED: Final = frozenset((types.FunctionType, types.BuiltinFunctionType, type))

# Types whose objects own their memory, and that pickle copies into the stream.
_OWN_MEMORY: Final = frozenset((bytes, bytearray, array))

# How many items of one container are looked at for large bytes.
_LOOK_AT: Final = 32

# These pickle the same with plain pickle.dumps, which is four times as fast for small objects.
_PLAIN: Final = frozenset((int, float, bool, str, type(None), bytes, complex))


class _Pickler(pickle.Pickler):
    # What multiprocessing knows to pickle (connections, sockets, bound methods ...) besides copyreg's.
    # `_extra_reducers` is where ForkingPickler.register puts it, since 3.4; building ForkingPickler itself for
    # every small result costs more than pickling it.
    dispatch_table: ClassVar[Any] = ChainMap(ForkingPickler._extra_reducers, copyreg.dispatch_table)  # type: ignore


class _BytesPickler(_Pickler):
    """Takes large bytes, bytearrays and arrays out of the stream."""

    large: list[memoryview]
    known: dict[int, int]  # id of the object -> index; pickle's own memo is not asked for these

    def persistent_id(self, obj: Any) -> tuple[int, str] | None:
        kind = type(obj)
        if kind in _OWN_MEMORY and _is_large(obj):
            # An id stays its object's: the view keeps the object alive.
            index = self.known.setdefault(id(obj), len(self.large))
            if index == len(self.large):
                self.large.append(memoryview(obj).cast("B"))
            return index, obj.typecode if kind is array else kind.__name__
        return None


class _Unpickler(pickle.Unpickler):
    large: list[memoryview]
    loaded: dict[int, Any]  # what was one object is one object again

    def persistent_load(self, pid: tuple[int, str]) -> Any:
        index, kind = pid
        found = self.loaded.get(index)
        if found is None:
            view = self.large[index]
            if kind == "bytes":
                found = copy_of(view)
            elif kind == "bytearray":
                found = bytearray(view)
            else:
                found = array(kind)
                found.frombytes(view)
            self.loaded[index] = found
        return found


class Place(NamedTuple):
    """Where a buffer is that lies in a region already."""

    region: int  # its id in the pool's store; 0 for the memory of a `SharedMem`
    address: str
    offset: int
    length: int


class Payload(NamedTuple):
    """A pickle stream with the buffers it leaves out: `views` to be seen in place, `large` to be copied.

    For a view that lies in a region already there is an empty one, and its place in `places`.
    """

    stream: bytes | memoryview
    views: list[memoryview]
    large: list[memoryview]
    places: Mapping[int, Place] = types.MappingProxyType({})

    @property
    def plain(self) -> bool:
        """Whether the stream is all there is."""
        return not (self.views or self.large)

    def _parts(self) -> list[bytes | memoryview]:
        places = pickle.dumps({index: tuple(place) for index, place in self.places.items()}, 5) if self.places else b""
        return [places, self.stream, *self.views, *self.large]

    @property
    def size(self) -> int:
        """Bytes of memory that it needs."""
        parts = self._parts()
        return _aligned(_COUNT.size * (2 + len(parts))) + sum(_aligned(len(part)) for part in parts)

    def pieces(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """What is to be written into the memory, and at which offsets."""
        parts = self._parts()
        table = [len(self.views), len(self.large), *(len(part) for part in parts)]
        yield 0, struct.pack(f"<{len(table)}Q", *table)
        at = _aligned(_COUNT.size * len(table))
        for part in parts:
            yield at, part
            at += _aligned(len(part))

    def write_into(self, memory: memoryview) -> None:
        for at, piece in self.pieces():
            memory[at : at + len(piece)] = piece


class RegionUsers(Protocol):
    """Somebody with regions of his own, of which he knows the users."""

    def id_at(self, address: str) -> int: ...


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def pack(obj: Any, keeper: RegionUsers | None = None) -> Payload:
    """Pickle `obj`, leaving large buffers out. Raises whatever the object's own code raises.

    Buffers that lie in a region of `keeper`, or in the memory of a `SharedMem`, are not copied but named by their
    place. Not without a keeper: then nobody would see to it that the region stays.
    """
    packer = _Packer(keeper, large=_holds_large_bytes(obj, 4))
    packer.dump(obj)
    return packer.payload(packer.out.getvalue())


def pack_batch(items: Sequence[Any], keeper: RegionUsers, *, plain: bool | None = None) -> Payload:
    """Pickle the elements of a batch, for `unpack_batch`.

    In one piece, if they can have nothing in common that one of them could change; else each by itself, because
    what is one object in one pickle arrives as one object, and what a task does to its arguments is no affair of
    the next. `plain`: what `is_plain` says of them, if it has been asked.
    """
    if len(items) == 1 or plain or (plain is None and is_plain(items)):
        return pack(items, keeper)
    packer = _Packer(keeper, large=_holds_large_bytes(items, 4))
    ends = []
    for item in items:
        packer.dump(item)
        ends += [packer.out.tell(), packer.views]
    table = struct.pack(f"<Q{len(ends)}Q", len(items), *ends)
    return packer.payload(_ONE_BY_ONE + table + packer.out.getvalue())


def is_plain(items: Sequence[Any]) -> bool:
    """Whether the elements of a batch have nothing in common that one could change, and no pickling of their own."""
    if type(items) is range:
        return True
    kinds = set(map(type, items))
    if kinds <= _PLAIN:
        return True
    if kinds != {tuple}:
        return False
    for item in items:
        for part in item:
            kind = type(part)
            if kind not in _PLAIN and kind not in FIXED:
                if kind is tuple and _PLAIN.issuperset(map(type, part)):
                    continue
                if kind is dict and not part:  # the keyword arguments of a call without any
                    continue
                return False
    return True


class _Packer:
    """One stream, of one pickle or of several that have nothing in common, and the buffers that they leave out."""

    def __init__(self, keeper: RegionUsers | None, *, large: bool) -> None:
        self.out = io.BytesIO()
        self._buffers = _Buffers(keeper)
        self._large: list[memoryview] = []
        if large:
            pickler = _BytesPickler(self.out, 5, buffer_callback=self._buffers)
            pickler.large, pickler.known = self._large, {}
            self._pickler: _Pickler = pickler
        else:
            self._pickler = _Pickler(self.out, 5, buffer_callback=self._buffers)

    @property
    def views(self) -> int:
        """How many buffers have been left out to be seen in place."""
        return len(self._buffers.views)

    def dump(self, obj: Any) -> None:
        self._pickler.dump(obj)
        self._pickler.clear_memo()

    def payload(self, stream: bytes) -> Payload:
        return Payload(stream, self._buffers.views, self._large, self._buffers.places)


class _Buffers:
    """The pickler's `buffer_callback`: takes what is large.

    Not a method of the packer's: the pickler keeps its callback, and in a cycle of the two the views would keep user
    memory, or a region, until the next garbage collection.
    """

    def __init__(self, keeper: RegionUsers | None) -> None:
        self.views: list[memoryview] = []
        self.places: dict[int, Place] = {}
        self._keeper = keeper

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether the buffer is to be in the stream."""
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous: pickle decides
            return True
        if raw.nbytes < OUT_OF_BAND:
            return True
        keeper = self._keeper
        found = locate(raw) if keeper is not None else None
        if found is not None and found.keeper in (None, keeper):
            id = keeper.id_at(found.address) if keeper is not None and found.keeper is not None else 0
            self.places[len(self.views)] = Place(id, found.address, found.offset, found.length)
            raw = memoryview(b"")
        self.views.append(raw)
        return False


def pack_small(obj: Any) -> bytes | Payload:
    """As `pack`, but just the stream where there is nothing else."""
    if type(obj) in _PLAIN and (type(obj) is not bytes or len(obj) < OUT_OF_BAND):
        return pickle.dumps(obj, 5)
    payload = pack(obj)
    return bytes(payload.stream) if payload.plain else payload


def _is_large(obj: Any) -> bool:
    if type(obj) is not array:
        return len(obj) >= OUT_OF_BAND
    return len(obj) * obj.itemsize >= OUT_OF_BAND and obj.typecode not in "uw"  # whose memory cannot be cast


def _holds_large_bytes(obj: Any, depth: int) -> bool:
    """Whether there is a large bytes object near the top. Looks at no more than a few dozen places."""
    kind = type(obj)
    if kind in _OWN_MEMORY:
        return _is_large(obj)
    if kind is tuple or kind is list:
        items = obj if len(obj) <= _LOOK_AT else obj[:_LOOK_AT]
    elif kind is dict:
        items = itertools.islice(obj.values(), _LOOK_AT)
    elif hasattr(kind, "__dataclass_fields__"):
        items = [getattr(obj, name, None) for name in kind.__dataclass_fields__]
    else:
        return False
    for item in items:
        kind = type(item)
        if kind in _PLAIN:
            if kind is bytes and len(item) >= OUT_OF_BAND:
                return True
        elif depth and kind is not types.FunctionType and _holds_large_bytes(item, depth - 1):
            return True
    return False


def read_payload(memory: memoryview, visit: Callable[[Place], memoryview] | None = None) -> Payload:
    """The payload that was written at the start of `memory`, as views. ValueError if the table is nonsense.

    `visit` gives the bytes at a place; without it, a payload that names places is nonsense too.
    """
    if len(memory) < 2 * _COUNT.size:
        raise ValueError(f"payload of {len(memory)} bytes")
    counts = struct.unpack_from("<2Q", memory, 0)
    if sum(counts) > len(memory) // _COUNT.size - 4:
        raise ValueError(f"payload of {sum(counts)} buffers in {len(memory)} bytes")
    lengths = struct.unpack_from(f"<{2 + sum(counts)}Q", memory, 2 * _COUNT.size)
    at = _aligned(_COUNT.size * (2 + len(lengths)))
    parts = []
    for length in lengths:
        if at + length > len(memory):
            raise ValueError(f"payload runs beyond its {len(memory)} bytes")
        parts.append(memory[at : at + length])
        at += _aligned(length)
    places, stream, *buffers = parts
    views, large = buffers[: counts[0]], buffers[counts[0] :]
    if places:
        if visit is None:
            raise ValueError("payload names places, and is read by somebody who cannot go there")
        for index, place in pickle.loads(places).items():
            views[index] = visit(Place(*place))
    return Payload(stream, views, large)


def unpack(payload: Payload) -> Any:
    """The object. Its large buffers are views of the payload's memory, which they keep alive."""
    if not payload.large:
        return pickle.loads(payload.stream, buffers=payload.views)
    unpickler = _Unpickler(io.BytesIO(payload.stream), buffers=payload.views)
    unpickler.large, unpickler.loaded = payload.large, {}
    return unpickler.load()


def unpack_batch(payload: Payload) -> Iterable[Any]:
    """The elements of a batch, each unpickled when it is its turn where they were pickled one by one."""
    if payload.stream[:8] == _ONE_BY_ONE:
        return _Items(payload)
    return unpack(payload)  # type: ignore[no-any-return]


class _Items:
    """Elements that were pickled one by one. What one of them does when it is unpickled is an error of its own."""

    def __init__(self, payload: Payload) -> None:
        _, count = struct.unpack_from("<2Q", payload.stream)
        table = struct.unpack_from(f"<{2 * count}Q", payload.stream, 16)
        self._ends = zip(table[::2], table[1::2], strict=True)
        self._payload = payload
        self._bodies = memoryview(payload.stream)[16 + 16 * count :]
        self._at = self._view = 0

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> Any:
        # Not a generator, which ends with the first exception that comes out of it.
        start, first = self._at, self._view
        self._at, self._view = next(self._ends)
        body, views = self._bodies[start : self._at], self._payload.views[first : self._view]
        try:
            return unpack(Payload(body, views, self._payload.large))
        except BaseException as error:
            raise TransportError(f"the worker could not unpickle what it was to call: {error!r}") from error
