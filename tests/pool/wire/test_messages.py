"""Frames: everything that is sent comes back, in whatever pieces, and everything else is refused."""

from __future__ import annotations

import random
import struct

import pytest

from portshm.pool._wire.messages import (
    Done,
    Forget,
    GarbageError,
    Grant,
    Message,
    Move,
    Need,
    Ready,
    Released,
    Run,
    StartFailed,
    Stop,
    decode,
    encode,
)  # fmt: skip

MESSAGES: list[Message] = [
    Run(1, 2),
    Run(2**62, 3, 7, "file:/dev/shm/portshm_x"),
    Grant(3, 1 << 40, "shm:portshm_y"),
    Grant(0, 0, "no room: \N{SNOWMAN}"),
    Move("file:/tmp/é"),
    Forget(9),
    Stop(),
    Ready(4711),
    StartFailed("Traceback\n" * 100),
    Need(0),
    Done(5, -1, 10**15),
    Done(5, 3, 0, 1, "1,2,3"),
    Released(""),
]


def decoded(buffer: bytearray) -> list[Message]:
    found = []
    while (message := decode(buffer)) is not None:
        found.append(message)
    return found


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: Message) -> None:
    buffer = bytearray(encode(message))
    found = decode(buffer)
    assert found == message
    assert type(found) is type(message)
    assert not buffer


@pytest.mark.parametrize("size", [1, 2, 3, 39, 40, 41, 1000])
def test_in_pieces(size: int) -> None:
    data = b"".join(map(encode, MESSAGES))
    buffer, found = bytearray(), []
    for start in range(0, len(data), size):
        buffer += data[start : start + size]
        found += decoded(buffer)
    assert found == MESSAGES
    assert not buffer


def test_a_text_has_an_upper_bound() -> None:
    message = decode(bytearray(encode(StartFailed("x" * 1_000_000))))
    assert isinstance(message, StartFailed)
    assert 32_000 <= len(message.text) <= 1 << 16


@pytest.mark.parametrize(
    "garbage",
    [
        b"x",
        b"\0",
        b"hello, world\n",
        b"P",  # the second byte of the mark, and not the first
        encode(Stop())[1:],
        struct.pack("<HHI4q", 0x5350, 99, 0, 0, 0, 0, 0),
        struct.pack("<HHI4q", 0x5350, 0, 0, 0, 0, 0, 0),
        struct.pack("<HHI4q", 0x5350, 14, 1 << 17, 0, 0, 0, 0),
        struct.pack("<HHI4q", 0x5053, 14, 0, 0, 0, 0, 0),
    ],
)
def test_garbage_is_refused(garbage: bytes) -> None:
    if garbage == b"P":  # as a beginning it is possible: 0x5350 in little-endian
        assert decode(bytearray(garbage)) is None
        garbage += b"x"
    with pytest.raises(GarbageError):
        decode(bytearray(garbage))
    after = bytearray(encode(Ready(1)) + garbage)
    assert decode(after) == Ready(1)
    with pytest.raises(GarbageError):
        decode(after)


def test_a_text_that_is_no_text_is_no_reason_to_fail() -> None:
    frame = bytearray(encode(Released("1234")))
    frame[-4:] = b"\xff\xfe\xfd\xfc"
    message = decode(frame)
    assert isinstance(message, Released)
    assert not any(part.isdecimal() for part in message.ids.split(","))


def test_random_bytes_never_do_anything_else() -> None:
    chance = random.Random(1)
    refused = 0
    for _ in range(5000):
        data = bytearray(encode(chance.choice(MESSAGES)))
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            for message in decoded(data):
                assert type(message).__name__ in {type(known).__name__ for known in MESSAGES}
        except GarbageError:
            refused += 1
    assert refused
