"""The bench's rows on shared memory without a pool: `SharedMem` beside a plain copy and the standard library."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing import shared_memory
from typing import Any, Final

from ._bench import OURS, Contenders, Row, Setting
from ._shared_mem import SharedMem

__all__ = ["ROWS"]

_MIB: Final = 1 << 20
_VALUE: Final = 64 * _MIB
_SMALL: Final = 64 << 10
_FIELD_TURNS: Final = 200_000
_CREATE_TURNS: Final = 200


def _timed(action: Callable[[], object], turns: int = 1) -> Callable[[], float]:
    """A contender that calls `action` so many times and returns the seconds of one."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(turns):
            action()
        return (time.perf_counter() - start) / turns

    return run


@contextlib.contextmanager
def _set_value(setting: Setting) -> Iterator[Contenders]:
    size = setting.scaled(_VALUE)
    # bytearray from bytearray: other types are first copied into one, and that would be two copies.
    source, target = bytearray(os.urandom(size)), bytearray(size)

    def copy() -> None:
        target[:] = source

    with SharedMem.create(size) as mem:
        yield {"one plain copy": _timed(copy), OURS: _timed(lambda: mem.set_value(source))}


@contextlib.contextmanager
def _value_copy(setting: Setting) -> Iterator[Contenders]:
    source = os.urandom(setting.scaled(_VALUE))
    with SharedMem.create(len(source)) as mem:
        mem.set_value(source)
        view = memoryview(source)
        yield {"one plain copy": _timed(lambda: bytes(view)), OURS: _timed(mem.value_copy)}


# The loops of the next two are written out: a call per turn would cost more than what is measured.


@contextlib.contextmanager
def _field_load(setting: Setting) -> Iterator[Contenders]:
    turns = setting.scaled(_FIELD_TURNS)
    with SharedMem.create(_SMALL) as mem:
        header, cell = mem.header, mem.cell("count")

        def ours() -> float:
            start = time.perf_counter()
            for _ in range(turns):
                header.count  # noqa: B018
            return (time.perf_counter() - start) / turns

        def plain() -> float:
            start = time.perf_counter()
            for _ in range(turns):
                cell[0]
            return (time.perf_counter() - start) / turns

        yield {"memoryview item": plain, OURS: ours}


@contextlib.contextmanager
def _field_store(setting: Setting) -> Iterator[Contenders]:
    turns = setting.scaled(_FIELD_TURNS)
    with SharedMem.create(_SMALL) as mem:
        header, cell = mem.header, mem.cell("count")

        def ours() -> float:
            start = time.perf_counter()
            for number in range(turns):
                header.count = number
            return (time.perf_counter() - start) / turns

        def plain() -> float:
            start = time.perf_counter()
            for number in range(turns):
                cell[0] = number
            return (time.perf_counter() - start) / turns

        yield {"memoryview item": plain, OURS: ours}


def _stdlib_life() -> None:
    segment = shared_memory.SharedMemory(create=True, size=_SMALL)
    segment.close()
    segment.unlink()


def _stdlib_life_with_pages() -> None:
    """The same with its memory really there, as after `SharedMem.create`, which reserves it."""
    segment = shared_memory.SharedMemory(create=True, size=_SMALL)
    assert segment.buf is not None
    segment.buf[:] = bytes(_SMALL)
    segment.close()
    segment.unlink()


def _create(backend: Any) -> Callable[[Setting], AbstractContextManager[Contenders]]:
    def life() -> None:
        mem = SharedMem.create(_SMALL, backend=backend)
        mem.close()
        mem.unlink()

    @contextlib.contextmanager
    def opened(setting: Setting) -> Iterator[Contenders]:
        turns = setting.scaled(_CREATE_TURNS)
        yield {
            OURS: _timed(life, turns),
            "SharedMemory": _timed(_stdlib_life, turns),
            "SharedMemory, zeroed": _timed(_stdlib_life_with_pages, turns),
        }

    return opened


ROWS: Final[tuple[Row, ...]] = (
    Row("memory", "set_value 64 MiB", "ms", _set_value, limit="one plain copy"),
    Row("memory", "value_copy 64 MiB", "ms", _value_copy, limit="one plain copy"),
    Row("memory", "header field load", "ns", _field_load, limit="memoryview item"),
    Row("memory", "header field store", "ns", _field_store, limit="memoryview item"),
    Row("memory", "create+close+unlink 64 KiB, auto", "us", _create("auto")),
    Row("memory", "create+close+unlink 64 KiB, file in the temporary folder", "us", _create("file")),
    Row("memory", "create+close+unlink 64 KiB, named", "us", _create("named")),
)
