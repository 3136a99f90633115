"""The few messages between coordinator and worker, and their bytes.

A frame is a fixed head (magic, kind, length of the text, four integers) and a text. Nothing in it is pickled: what
comes out of a worker's pipe may have been written by a task that went wild, and must at worst be refused.
Payloads never travel here; they lie in shared memory, and a message says who may touch it now.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple, TypeAlias, get_type_hints

__all__ = [
    "Done",
    "Forget",
    "GarbageError",
    "GivenBack",
    "Grant",
    "Message",
    "Move",
    "Need",
    "Ready",
    "Released",
    "Run",
    "StartFailed",
    "Stop",
    "TakeBack",
    "decode",
    "encode",
    "released_ids",
]


class GarbageError(Exception):
    """Bytes on the pipe that are no message of ours."""


# To the worker ------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Execute a batch. The worker owns the slot's memory until it says `Done`."""

    batch: int
    mode: int  # a `Mode`
    region: int = 0  # id of the region that the payload is in; 0: it is the slot's value
    address: str = ""


class Grant(NamedTuple):
    """A region for one large result; id 0 means there is none to be had, and `address` says why."""

    region: int
    size: int
    address: str


class Move(NamedTuple):
    """The slot's memory has a new generation at `address`."""

    address: str


class Forget(NamedTuple):
    """No more elements of this function will come."""

    function: int


class TakeBack(NamedTuple):
    """Give back what has not begun of this batch; answered by `GivenBack`, if it is executing."""

    batch: int


class Stop(NamedTuple):
    """Leave in an orderly way."""


# To the coordinator -------------------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """The worker has run the initializer and waits for work."""

    pid: int


class StartFailed(NamedTuple):
    """The initializer raised; `text` is its traceback."""

    text: str


class Need(NamedTuple):
    """The result of the element that is executing wants a region of `size` bytes; answered by `Grant`."""

    size: int


class Done(NamedTuple):
    """The batch is over, the results are on record, and the memory is the coordinator's again.

    `finished` is -1 when the payload could not be unpickled: then nothing ran, and the record holds the reason.
    """

    batch: int
    finished: int
    elapsed: int  # nanoseconds
    interrupted: int = 0  # 1: an element of it was ended by Ctrl-C
    released: str = ""  # as in `Released`


class GivenBack(NamedTuple):
    """The elements of the batch from position `kept` on have not begun, and will not in this worker."""

    batch: int
    kept: int


class Released(NamedTuple):
    """The last views of these regions (ids, comma-separated) have died in the worker, which had them since `Run`."""

    ids: str


Message: TypeAlias = (
    Run | Grant | Move | Forget | Stop | TakeBack | Ready | StartFailed | Need | Done | Released | GivenBack
)

# The number of each type in a frame; a number is never given to another type.
_TYPES: Final[dict[int, type[Message]]] = {
    1: Run, 2: Grant, 3: Move, 4: Forget, 5: Stop, 6: TakeBack,
    11: Ready, 12: StartFailed, 13: Need, 14: Done, 15: Released, 16: GivenBack,
}  # fmt: skip
_KINDS: Final = {cls: kind for kind, cls in _TYPES.items()}

# How many integers a type has, and whether a text after them.
_SHAPES: Final = {
    kind: (types.count(int), str in types)
    for kind, types in ((kind, list(get_type_hints(cls).values())) for kind, cls in _TYPES.items())
}
_HEAD: Final = struct.Struct("<HHI4q")
_MAGIC: Final = 0x5350
_MAX_TEXT: Final = 1 << 16


def encode(message: Message) -> bytes:
    """The frame of a message."""
    kind = _KINDS[type(message)]
    ints, has_text = _SHAPES[kind]
    fields: tuple[Any, ...] = message
    text = fields[-1].encode("utf-8", "replace")[:_MAX_TEXT] if has_text else b""
    return _HEAD.pack(_MAGIC, kind, len(text), *fields[:ints], *(0,) * (4 - ints)) + text


def decode(buffer: bytearray) -> Message | None:
    """Take the first whole message out of `buffer`; None if there is not one yet."""
    if len(buffer) < _HEAD.size:
        if buffer and not _MAGIC.to_bytes(2, "little").startswith(bytes(buffer[:2])):
            raise GarbageError(bytes(buffer[:32]))
        return None
    magic, kind, length, *ints = _HEAD.unpack_from(buffer)
    if magic != _MAGIC or kind not in _TYPES or length > _MAX_TEXT:
        raise GarbageError(bytes(buffer[:32]))
    end = _HEAD.size + length
    if len(buffer) < end:
        return None
    text = buffer[_HEAD.size : end].decode("utf-8", "replace")
    del buffer[:end]
    count, has_text = _SHAPES[kind]
    make: Any = _TYPES[kind]
    message: Message = make(*ints[:count], *((text,) if has_text else ()))
    return message


def released_ids(text: str) -> list[int]:
    """The ids in a `Released` or `Done`. GarbageError if they are none."""
    if not text:
        return []
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise GarbageError(text[:32].encode())
    return [int(part) for part in parts]
