"""What the bench's workers do: next to nothing, so that the figures are those of the way there and back.

In a module of their own because workers that are spawned import their functions. numpy is imported by the functions
that need it, since the bench has rows without.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["array_of", "bytes_of", "call", "echo", "ends_of", "inc", "item_of", "nap", "pong"]


def inc(number: int) -> int:
    return number + 1


def nap(seconds: float) -> None:
    """Keep one worker busy while the others get a task of their own."""
    time.sleep(seconds)


def echo(value: Any) -> Any:
    return value


def call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def ends_of(array: Any) -> float:
    """One number out of a large array, without reading all of it."""
    return float(array[0]) * float(array[-1])


def item_of(array: Any, index: int) -> float:
    return float(array[index])


def array_of(length: int, first: int) -> Any:
    """`length` float64s that count up from `first`.

    All are cut from one array that the worker keeps: making one afresh takes as long as copying it does, and would
    be most of what a row measures.
    """
    return _counting(length + 64)[first : first + length]


@functools.lru_cache(maxsize=1)
def _counting(length: int) -> Any:
    return importlib.import_module("numpy").arange(length, dtype="float64")


@functools.lru_cache(maxsize=2)
def bytes_of(length: int, value: int) -> bytes:
    """`length` bytes of one value; the worker keeps them, see `array_of`."""
    return bytes([value]) * length


def pong(connection: Connection, others: Connection) -> None:
    """Send back what comes, until the other side is closed."""
    others.close()  # a forked child has the other side too, and would never see it close
    with connection:
        while True:
            try:
                connection.send_bytes(connection.recv_bytes())
            except (EOFError, OSError):
                return
