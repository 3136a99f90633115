"""Objects through memory: the same on the other side, large buffers without a copy, and nonsense refused."""

from __future__ import annotations

import array
import gc
import pickle
import random
import struct
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from portshm._large_bytes import copy_of
from portshm._payload import OUT_OF_BAND, Payload, pack, pack_batch, pack_small, read_payload, unpack
from portshm.pool._engine.regions import RegionStore

LARGE = OUT_OF_BAND * 3 + 5


@dataclass
class Record:
    name: str
    data: Any
    more: Any = None


class Raises:
    def __reduce__(self) -> Any:
        raise LookupError("on purpose")


def through_memory(obj: Any) -> Any:
    payload = pack(obj)
    memory = bytearray(payload.size)
    payload.write_into(memoryview(memory))
    return unpack(read_payload(memoryview(memory)))


VALUES: dict[str, Callable[[int], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "text": lambda size: "é" * size,
    "array": lambda size: array.array("d", range(size // 8)),
    "nested": lambda size: {"a": [bytes(size), (bytearray(size), 1)], "b": None},
    "deep": lambda size: [[[[[[bytes(size)]]]]]],
    "dataclass": lambda size: Record("x", bytes(size), Record("y", [bytearray(size)])),
    "many": lambda size: [bytes([number]) * size for number in range(20)],
}


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "array", "nested", "dataclass", "many"])
def test_large_memory_is_not_in_the_stream(kind: str) -> None:
    assert len(pack(VALUES[kind](1 << 20)).stream) < 2000


def test_arrays_whose_memory_cannot_be_cast() -> None:
    value = array.array("w" if sys.version_info >= (3, 13) else "u", "x" * OUT_OF_BAND)
    assert through_memory(value) == value


@pytest.mark.parametrize("size", [0, 1, 63, 64, OUT_OF_BAND - 1, OUT_OF_BAND, LARGE, 1 << 21])
@pytest.mark.parametrize("kind", VALUES)
def test_round_trip(kind: str, size: int) -> None:
    value = VALUES[kind](size)
    found = through_memory(value)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, (9 << 20) + 12_345])
@pytest.mark.parametrize("readonly", [False, True])
def test_a_copy_is_bytes_of_its_own(size: int, readonly: bool) -> None:
    source = bytearray(random.Random(size).randbytes(size))
    expected = bytes(source)
    found = copy_of(memoryview(source).toreadonly() if readonly else memoryview(source))
    source[:] = bytes(size)
    assert type(found) is bytes
    assert found == expected
    assert hash(found) == hash(expected)


def test_a_pickle_buffer_arrives_as_a_view() -> None:
    data = bytearray(random.Random(1).randbytes(LARGE))
    found = through_memory(pickle.PickleBuffer(data))
    assert bytes(found) == data


class Memory(bytearray):
    """Says when it is gone, and leaves the stream as a buffer."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return bytearray, (pickle.PickleBuffer(self),)


@pytest.mark.parametrize("company", [(), (bytes(LARGE),)])
def test_what_was_packed_is_let_go_of_at_once(company: tuple[Any, ...]) -> None:
    memory = Memory(LARGE)
    gone = weakref.ref(memory)
    gc.disable()  # it must not need one
    try:
        assert pack((memory, *company)).views
        assert not pack_batch([(memory, *company)] * 2, RegionStore("auto", None)).plain
        del memory
        assert gone() is None
    finally:
        gc.enable()


def test_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    for value in (
        numpy.arange(10),
        numpy.arange(100_000.0),
        numpy.asfortranarray(numpy.arange(60_000).reshape(200, 300)),
        numpy.arange(200_000)[::2],
        numpy.zeros((0, 3)),
        numpy.array([{"a": 1}, None], dtype=object),
    ):
        found = through_memory({"x": value})["x"]
        assert (found == value).all()
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert found.flags.writeable


def test_large_buffers_are_not_copied_on_arrival() -> None:
    numpy = pytest.importorskip("numpy")
    payload = pack(numpy.zeros(100_000))
    assert len(payload.stream) < 1000
    assert [len(view) for view in payload.views] == [800_000]
    memory = bytearray(payload.size)
    payload.write_into(memoryview(memory))
    found = unpack(read_payload(memoryview(memory)))
    memory[-1] = memory[-8] = 0x40
    start = memory.index(b"\x40")
    assert found[-1] != 0, "the array is a view of the memory"
    assert start > 0


def test_large_bytes_are_real_bytes() -> None:
    payload = pack((bytes(LARGE), bytearray(LARGE)))
    assert len(payload.stream) < 1000
    memory = bytearray(payload.size)
    payload.write_into(memoryview(memory))
    one, two = unpack(read_payload(memoryview(memory)))
    memory[:] = b"\xff" * len(memory)
    assert one == two == bytes(LARGE)


def test_one_object_stays_one_object() -> None:
    data, mutable = bytes(LARGE), bytearray(LARGE)
    one, two, three, four = through_memory([data, data, mutable, mutable])
    assert one is two
    assert three is four


def test_size_is_what_is_written() -> None:
    for value in (1, bytes(LARGE), [array.array("q", range(9000))] * 3, ["x" * 70_000, bytearray(LARGE)]):
        payload = pack(value)
        memory = bytearray(b"\xaa" * (payload.size + 100))
        payload.write_into(memoryview(memory)[: payload.size])
        assert memory[payload.size :] == b"\xaa" * 100
        assert unpack(read_payload(memoryview(memory))) == value
        with pytest.raises((ValueError, struct.error)):
            payload.write_into(memoryview(bytearray(max(0, payload.size - 128))))


def test_buffers_lie_on_cache_lines() -> None:
    payload = pack([array.array("d", range(5000)), array.array("d", range(5001)), bytes(LARGE)])
    memory = bytearray(payload.size)
    view = memoryview(memory)
    payload.write_into(view)
    found = read_payload(view)
    for part in (*found.views, *found.large):
        assert bytes(part[:8]) in memory
    assert [len(part) for part in (*found.views, *found.large)] == [40_000, 40_008, LARGE]


def test_small_things_are_just_a_pickle() -> None:
    for value in (1, 2.5, "text", None, True, b"x", [1, {"a": (2, 3)}], Record("x", 1), b"x" * (OUT_OF_BAND - 1)):
        data = pack_small(value)
        assert isinstance(data, bytes)
        assert pickle.loads(data) == value
    assert isinstance(pack_small(bytes(OUT_OF_BAND)), Payload)


def test_what_an_object_raises_comes_out() -> None:
    for value in (Raises(), [1, Raises()], [bytes(LARGE), Raises()]):
        with pytest.raises(LookupError):
            pack(value)
    with pytest.raises(LookupError):
        pack_small(Raises())


@pytest.mark.parametrize(
    "table",
    [
        (1 << 63, 0, 0, 8),
        (0, 1 << 63, 0, 8),
        (2**64 - 1, 2**64 - 1, 0, 8),
        (0, 0, 1 << 40, 8),
        (0, 0, 0, 1 << 40),
        (0, 0, 0, 2**64 - 1),
        (300, 300, 0, 8),
        (1, 0, 0, 8, 2**64 - 64),
        (0, 0, 10_000, 8),
    ],
)
def test_a_table_of_nonsense_is_refused(table: tuple[int, ...]) -> None:
    memory = bytearray(4096)
    struct.pack_into(f"<{len(table)}Q", memory, 0, *table)
    with pytest.raises(ValueError, match="payload"):
        read_payload(memoryview(memory))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 24, 31])
def test_memory_too_small_for_a_table(size: int) -> None:
    with pytest.raises(ValueError, match="payload"):
        read_payload(memoryview(bytearray(size)))


def test_places_are_not_gone_to_by_those_who_cannot() -> None:
    """The coordinator reads what a worker wrote: it must not be sent anywhere, nor unpickle what would send it."""
    memory = bytearray(4096)
    struct.pack_into("<4Q", memory, 0, 0, 0, 100, 8)
    with pytest.raises(ValueError, match="places"):
        read_payload(memoryview(memory))


def test_random_damage_never_reads_beyond_the_memory() -> None:
    payload = pack([bytes(LARGE), array.array("d", range(9000))])
    whole = bytearray(payload.size)
    payload.write_into(memoryview(whole))
    chance = random.Random(2)
    refused = 0
    for _ in range(2000):
        memory = bytearray(whole[:64])
        memory[chance.randrange(40)] = chance.randrange(256)
        try:
            found = read_payload(memoryview(memory + whole[64:]))
        except ValueError:
            refused += 1
        else:
            assert sum(map(len, (*found.views, *found.large))) <= len(whole)
    assert refused
