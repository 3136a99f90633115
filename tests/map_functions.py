"""What `portshm map` calls in the tests: `act` does what the first word of a file says."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from portshm import PoolError


class BadText(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class NeedsTwo(Exception):
    def __init__(self, one: object, two: object) -> None:
        super().__init__(one)


class TwoLines:
    def __repr__(self) -> str:
        return "one,\n  two"


ODD: dict[bytes, BaseException] = {
    b"exit": SystemExit(3),
    b"interrupt": KeyboardInterrupt(),
    b"generator": GeneratorExit(),
    b"pool": PoolError("not the pool's own"),
    b"text": BadText(),
    b"rebuild": NeedsTwo(1, 2),
}


def raise_odd(data: memoryview) -> TwoLines:
    """Raise what the bytes say, of the errors that are no plain ones; or return something with a strange repr."""
    if (error := ODD.get(bytes(data))) is not None:
        raise error
    return TwoLines()


def act(value: memoryview) -> object:
    word, _, rest = bytes(value[:200]).partition(b" ")
    match word:
        case b"segfault":
            ctypes.string_at(0)
        case b"abort":
            os.abort()
        case b"exit":
            os._exit(int(rest))
        case b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case b"hang":
            time.sleep(600)
        case b"raise":
            raise ValueError(rest.decode())
        case b"scribble":  # over its own copy of the value, and dies: the evidence is what the worker saw last
            value[:8] = b"SCRIBBLE"
            os._exit(1)
        case b"once":  # crashes the first time only
            marker = Path(rest.decode())
            if not marker.exists():
                marker.touch()
                os._exit(1)
    return len(value), type(value).__name__


not_callable = 1
