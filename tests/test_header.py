from __future__ import annotations

import ctypes
import math
import pickle
import struct
import sys
from typing import Any

import pytest

from portshm import (
    GO_FUZZ_HEADER,
    PORTSHM_HEADER,
    HeaderCodec,
    HeaderError,
    NotReadyError,
    RegionSizeError,
    region_size,
)
from portshm._header import BYTE_ORDER_MARK, MAGIC

OTHER_ORDER: Any = "big" if sys.byteorder == "little" else "little"
CAPACITY = 100
LAYOUT_OF_VERSION_1 = 2892121908
LAYOUTS = [PORTSHM_HEADER, GO_FUZZ_HEADER]
USER = PORTSHM_HEADER.extend(
    "user", b1="b", B1="B", h1="h", H1="H", i1="i", I1="I", q1="q", Q1="Q", f1="f", d1="d", flag="?", text="5s"
)

SEED_FIELDS = {"count": -2, "value_len": 3, "rand_state": 0x0102030405060708, "rand_inc": 2**64 - 1, "raw_in_mem": True}


def published(codec: HeaderCodec = PORTSHM_HEADER, extra: int = 0) -> memoryview:
    memory = memoryview(bytearray(codec.size + CAPACITY + extra))
    codec.initialise(memory, capacity=CAPACITY)
    return memory


# -- bytes


GO_GOLDEN = {
    "little": "feffffffffffffff 0300000000000000 0807060504030201 ffffffffffffffff 01 00000000000000",
    "big": "fffffffffffffffe 0000000000000003 0102030405060708 ffffffffffffffff 01 00000000000000",
}

DEFAULT_GOLDEN = {
    "little": (
        "706f727473686d00 04030201 01000000 c000000000000000 6400000000000000 {layout} 00 000000"
        "0700000000000000 00000000000000000000000000000000"
        "0900000000000000 feffffffffffffff 0300000000000000 0807060504030201 ffffffffffffffff 01 00000000000000"
        "2a00000000000000 0000000000000000"
    ),
    "big": (
        "706f727473686d00 01020304 00000001 00000000000000c0 0000000000000064 {layout} 00 000000"
        "0000000000000007 00000000000000000000000000000000"
        "0000000000000009 fffffffffffffffe 0000000000000003 0102030405060708 ffffffffffffffff 01 00000000000000"
        "000000000000002a 0000000000000000"
    ),
}


@pytest.mark.parametrize("order", ["little", "big"])
def test_golden_bytes_of_the_seeds_layout(order: Any) -> None:
    golden = bytes.fromhex(GO_GOLDEN[order])
    codec = GO_FUZZ_HEADER.with_byteorder(order)
    assert len(golden) == codec.size == 40
    assert codec.pack(SEED_FIELDS) == golden
    assert codec.unpack(golden) == SEED_FIELDS


@pytest.mark.parametrize("order", ["little", "big"])
def test_golden_bytes_of_the_default_layout(order: Any) -> None:
    codec = PORTSHM_HEADER.with_byteorder(order)
    layout = codec.layout_id.to_bytes(4, order).hex()
    golden = bytes.fromhex(DEFAULT_GOLDEN[order].format(layout=layout)) + b"portshm_next".ljust(64, b"\0")
    values = {
        "magic": MAGIC,
        "byte_order": BYTE_ORDER_MARK,
        "version": 1,
        "header_size": 192,
        "capacity": CAPACITY,
        "layout": codec.layout_id,
        "superseded": False,
        "generation": 7,
        "sequence": 9,
        **SEED_FIELDS,
        "holder": 42,
        "successor": b"portshm_next".ljust(64, b"\0"),
    }
    assert len(golden) == codec.size == 192
    assert codec.pack(values) == golden
    assert codec.unpack(golden) == values


def test_the_default_layout_is_the_same_on_every_machine() -> None:
    # An id made of names and formats; if this number changes, so must VERSION.
    assert PORTSHM_HEADER.layout_id == PORTSHM_HEADER.with_byteorder(OTHER_ORDER).layout_id == LAYOUT_OF_VERSION_1


def test_go_layout_is_what_a_c_compiler_makes_of_the_struct() -> None:
    class Model(ctypes.Structure):
        _fields_ = (
            ("count", ctypes.c_int64),
            ("value_len", ctypes.c_int64),
            ("rand_state", ctypes.c_uint64),
            ("rand_inc", ctypes.c_uint64),
            ("raw_in_mem", ctypes.c_bool),
        )

    if ctypes.alignment(ctypes.c_uint64) == 8:  # i386 aligns it to 4, which is not the layout of Go's 64-bit fuzzer
        assert ctypes.sizeof(Model) == GO_FUZZ_HEADER.size
    for name, field in GO_FUZZ_HEADER.fields.items():
        assert (field.offset, field.size) == (getattr(Model, name).offset, getattr(Model, name).size)
    model = Model.from_buffer_copy(GO_FUZZ_HEADER.pack(SEED_FIELDS))
    assert {name: getattr(model, name) for name in SEED_FIELDS} == SEED_FIELDS


@pytest.mark.parametrize("codec", [*LAYOUTS, USER], ids=lambda codec: codec.name)
def test_every_field_is_naturally_aligned_and_inside_one_cache_line(codec: HeaderCodec) -> None:
    end = 0
    for field in codec.fields.values():
        assert field.offset >= end, "fields overlap"
        end = field.offset + field.size
        if not field.format.endswith("s"):
            assert field.offset % field.size == 0
            assert field.offset // 64 == (end - 1) // 64
    assert end <= codec.size
    assert PORTSHM_HEADER.size % 64 == 0


# -- extremes, by pack, by store and by assignment


def extremes(fmt: str) -> tuple[list[Any], list[Any]]:
    """What fits the format to the last bit, and what just does not."""
    if fmt == "?":
        return [False, True, 0, 1], [2, -1, "no", None]
    if fmt.endswith("s"):
        size = int(fmt[:-1])
        return [bytes(size), b"\xff" * size], [b"x" * (size + 1), "text", 7, None]
    if fmt in "fd":
        largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0] if fmt == "f" else sys.float_info.max
        too_large = [1e39] if fmt == "f" else [10**400]
        return [0.0, -largest, largest, math.inf], [*too_large, "1.0", None]
    bits = 8 * struct.calcsize("<" + fmt)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if fmt.islower() else (0, 2**bits - 1)
    return [low, high, 0], [low - 1, high + 1, 1.5, "1", None]


USER_FIELDS = [name for name in USER.fields if name not in PORTSHM_HEADER.fields]
SEED_SCALARS = ["count", "rand_state", "rand_inc", "raw_in_mem"]


@pytest.mark.parametrize("name", [*SEED_SCALARS, *USER_FIELDS])
def test_a_field_holds_its_extremes_and_refuses_what_is_beyond(name: str) -> None:
    memory = published(USER)
    header = USER.view(memory, CAPACITY)
    field = USER.fields[name]
    good, bad = extremes(field.format)
    for value in good:
        setattr(header, name, value)
        assert getattr(header, name) == value == USER.load(memory, name)
        USER.store(memory, name, value)
        assert USER.unpack(USER.pack({name: value}))[name] == value == getattr(header, name)
    before = bytes(memory)
    for value in bad:
        for attempt in (
            lambda value=value: setattr(header, name, value),
            lambda value=value: USER.store(memory, name, value),
            lambda value=value: USER.pack({name: value}),
        ):
            with pytest.raises(HeaderError) as caught:
                attempt()
            assert (caught.value.field, caught.value.found) == (name, value)
            assert caught.value.expected
            assert bytes(memory) == before


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("length", [-1, CAPACITY + 1, 2**63, -(2**63) - 1, 1.0, "1", None])
def test_a_length_outside_the_value_is_refused(layout: HeaderCodec, length: Any) -> None:
    memory = published(layout)
    before = bytes(memory)
    with pytest.raises(HeaderError, match="value_len"):
        layout.view(memory, CAPACITY).value_len = length
    assert bytes(memory) == before


def test_a_length_may_be_of_any_integer_type() -> None:
    class Index:
        def __index__(self) -> int:
            return CAPACITY

    header = PORTSHM_HEADER.view(published(), CAPACITY)
    header.value_len = Index()
    assert header.value_len == CAPACITY


@pytest.mark.parametrize(
    "name",
    ["magic", "byte_order", "version", "header_size", "capacity", "layout", "superseded", "generation", "sequence",
     "holder", "successor"],
)  # fmt: skip
def test_what_describes_the_region_is_not_assigned(name: str) -> None:
    memory = published()
    before = bytes(memory)
    header = PORTSHM_HEADER.view(memory, CAPACITY)
    with pytest.raises(HeaderError, match=name):
        setattr(header, name, getattr(header, name))
    assert bytes(memory) == before


def test_a_misspelt_field_is_no_field() -> None:
    header = PORTSHM_HEADER.view(published(), CAPACITY)
    with pytest.raises(AttributeError):
        header.cuont = 1
    with pytest.raises(HeaderError, match="cuont"):
        PORTSHM_HEADER.load(published(), "cuont")
    with pytest.raises(HeaderError, match="cuont"):
        PORTSHM_HEADER.pack({"cuont": 1})


def test_a_read_only_header_says_so() -> None:
    header = USER.view(published(USER).toreadonly(), CAPACITY)
    for name, value in [("count", 1), ("text", b"x"), ("value_len", 1), ("f1", 1.0)]:
        with pytest.raises(HeaderError, match="read-only"):
            setattr(header, name, value)


def test_the_header_is_live() -> None:
    memory = published()
    one, two = PORTSHM_HEADER.view(memory, CAPACITY), PORTSHM_HEADER.view(memory, CAPACITY)
    one.count += 5
    assert two.count == 5
    assert dict(two)["count"] == 5
    assert "count=5" in repr(two)


# -- rejection


def test_check_gives_the_capacity_from_the_header_and_not_from_the_mapping() -> None:
    assert PORTSHM_HEADER.check(published(extra=4096)) == CAPACITY
    assert GO_FUZZ_HEADER.check(published(GO_FUZZ_HEADER)) == CAPACITY


FORGERIES: list[tuple[str, Any]] = [
    ("magic", b"PORTSHM\0"),
    ("magic", b"\0ortshm\0"),
    ("byte_order", 0x04030201),
    ("byte_order", 0),
    ("version", 0),
    ("version", 2),
    ("header_size", 0),
    ("header_size", 40),
    ("header_size", 2**62),
    ("layout", 0),
    ("capacity", 0),
    ("capacity", -1),
    ("capacity", CAPACITY + 1),
    ("capacity", 2**63 - 1),
    ("capacity", -(2**63)),
]


@pytest.mark.parametrize(("name", "value"), FORGERIES)
def test_a_forged_header_is_refused_by_name_and_left_alone(name: str, value: Any) -> None:
    memory = published()
    PORTSHM_HEADER.store(memory, name, value)
    before = bytes(memory)
    with pytest.raises(HeaderError) as caught:
        PORTSHM_HEADER.check(memory)
    assert (caught.value.field, caught.value.found) == (name, value)
    assert caught.value.expected
    assert not isinstance(caught.value, NotReadyError)
    assert bytes(memory) == before


def test_a_header_of_a_machine_of_the_other_byte_order_is_refused() -> None:
    other = PORTSHM_HEADER.with_byteorder(OTHER_ORDER)
    memory = published(other)
    with pytest.raises(HeaderError, match="byte_order") as caught:
        PORTSHM_HEADER.check(memory)
    assert caught.value.found == 0x04030201
    with pytest.raises(HeaderError, match="byte_order"):
        other.view(memory, CAPACITY)  # a live view would read its fields in this machine's order


def test_zeros_are_a_region_that_is_not_ready() -> None:
    memory = memoryview(bytearray(PORTSHM_HEADER.size + CAPACITY))
    for codec in (PORTSHM_HEADER, PORTSHM_HEADER.as_found(memory)):
        with pytest.raises(NotReadyError, match="magic"):
            codec.check(memory)


def test_a_creator_that_fails_half_way_leaves_a_region_that_is_not_ready() -> None:
    memory = memoryview(bytearray(PORTSHM_HEADER.size + CAPACITY))
    with pytest.raises(HeaderError, match="generation"):
        PORTSHM_HEADER.initialise(memory, capacity=CAPACITY, generation=2**64)
    assert any(memory), "it did fail half-way"
    with pytest.raises(NotReadyError):
        PORTSHM_HEADER.check(memory)


@pytest.mark.parametrize("codec", LAYOUTS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("missing", [1, 8, 10_000])
def test_a_truncated_header_is_refused(codec: HeaderCodec, missing: int) -> None:
    short = memoryview(bytearray(max(0, codec.size - missing)))
    for attempt in (
        lambda: codec.check(short),
        lambda: codec.unpack(short),
        lambda: codec.view(short, 1),
        lambda: codec.store(short, "count", 1),
        lambda: codec.as_found(short),
    ):
        with pytest.raises(HeaderError, match=r"header_size|count"):
            attempt()
    assert not any(short)


def test_a_value_that_was_cut_off_is_refused() -> None:
    whole = published()
    with pytest.raises(HeaderError, match="capacity"):
        PORTSHM_HEADER.check(whole[:-1])
    with pytest.raises(HeaderError, match="capacity"):
        PORTSHM_HEADER.check(whole[: PORTSHM_HEADER.size])
    with pytest.raises(HeaderError, match="capacity"):
        GO_FUZZ_HEADER.check(published(GO_FUZZ_HEADER)[: GO_FUZZ_HEADER.size])


# -- layouts of one's own


def test_extend_puts_the_users_fields_on_a_line_of_their_own() -> None:
    frame = PORTSHM_HEADER.extend("frame", frame_id="q", width="I", height="I", stamp="d")
    assert [f.offset for n, f in frame.fields.items() if n not in PORTSHM_HEADER.fields] == [192, 200, 204, 208]
    assert frame.size == 256
    assert {n: f for n, f in frame.fields.items() if n in PORTSHM_HEADER.fields} == PORTSHM_HEADER.fields
    header = frame.view(published(frame), CAPACITY)
    header.frame_id, header.stamp = -5, 0.25
    assert (header.frame_id, header.width, header.stamp) == (-5, 0, 0.25)


def test_layouts_that_differ_are_not_taken_for_one_another() -> None:
    one, two = PORTSHM_HEADER.extend("x", a="q"), PORTSHM_HEADER.extend("x", b="q")
    assert one.size == two.size
    assert one != two
    with pytest.raises(HeaderError, match="layout"):
        two.check(published(one))
    with pytest.raises(HeaderError, match="header_size"):
        PORTSHM_HEADER.check(published(one))


def test_extending_twice_keeps_what_was_there() -> None:
    once = PORTSHM_HEADER.extend("once", a="B")
    twice = once.extend("twice", b="q")
    assert twice.fields["a"] == once.fields["a"]
    assert twice.fields["b"].offset == once.size


@pytest.mark.parametrize("fields", [{"count": "q"}, {"x": "l"}, {"x": "0s"}, {"x": "@q"}, {"_x": "q"}, {"x": "P"}])
def test_a_field_that_cannot_be_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(HeaderError):
        PORTSHM_HEADER.extend("bad", **fields)


def test_a_reader_that_does_not_know_the_layout_reads_the_part_it_knows() -> None:
    memory = published(USER, extra=64)
    USER.store(memory, "count", 5)
    codec = PORTSHM_HEADER.as_found(memory)
    assert codec.check(memory) == CAPACITY
    assert codec.view(memory, CAPACITY).count == 5
    assert codec.size == USER.size


@pytest.mark.parametrize("stated", [0, -64, 64, 200, 2**62])
def test_a_stated_header_size_that_cannot_be_is_refused(stated: int) -> None:
    memory = published(USER)
    USER.store(memory, "header_size", stated)
    with pytest.raises(HeaderError, match="header_size"):
        PORTSHM_HEADER.as_found(memory).check(memory)


@pytest.mark.parametrize(
    "codec", [*LAYOUTS, USER, PORTSHM_HEADER.as_found(published(USER))], ids=lambda codec: codec.name
)
def test_a_layout_pickles(codec: HeaderCodec) -> None:
    copy = pickle.loads(pickle.dumps(codec))
    assert copy == codec
    assert hash(copy) == hash(codec)
    assert (copy.layout_id, copy.size, copy.fields) == (codec.layout_id, codec.size, codec.fields)


# -- sizes


def test_region_size_is_header_and_value() -> None:
    assert region_size(1) == 193
    assert region_size(100, GO_FUZZ_HEADER) == 140


@pytest.mark.parametrize("capacity", [0, -1, -sys.maxsize, sys.maxsize, sys.maxsize + 1])
def test_a_size_that_no_region_can_have_is_refused(capacity: int) -> None:
    with pytest.raises(RegionSizeError, match=str(capacity)):
        region_size(capacity)
