"""The bench's rows on pools: many small calls, and few large arguments and results.

Every contender's pool is started before the first round and kept through all. Its first result is compared with what
it should be, outside the timing; a wrong one is an error and never a figure.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, NoReturn

from ._bench import Contenders, Row, Setting, WrongResultError
from ._bench_contenders import AnyPool, installed, quiet_start
from ._bench_tasks import array_of, bytes_of, echo, ends_of, inc, item_of, pong

__all__ = ["ROWS"]

_MIB: Final = 1 << 20
_FLOAT: Final = 8

_APPLIES: Final = 500
_MAPPED: Final = 50_000
_ARRAYS: Final = 12
_ARRAY: Final = 32 * _MIB
_BYTES: Final = 8 * _MIB
_BYTES_TASKS: Final = 16
_BOUND: Final = 256 * _MIB
_BOUND_TASKS: Final = 16


@contextlib.contextmanager
def _contenders(
    setting: Setting,
    kind: str,
    work: Callable[[AnyPool], Any],
    is_right: Callable[[Any], bool],
    *,
    calls: int = 1,
) -> Iterator[Contenders]:
    """Those that have calls of this kind, their pools started; `calls` is what the seconds are divided by."""
    with contextlib.ExitStack() as stack:
        contenders: Contenders = {}
        for contender in installed(setting):
            if kind not in contender.calls:
                continue
            try:
                pool = stack.enter_context(contender.started(setting))
            except Exception as error:
                contenders[contender.name] = functools.partial(_fail, error)
            else:
                contenders[contender.name] = _Turns(pool, work, is_right, calls)
        yield contenders


def _fail(error: Exception) -> NoReturn:
    raise error


class _Turns:
    """One contender in one row: a call is one round, and returns its seconds."""

    def __init__(
        self, pool: AnyPool, work: Callable[[AnyPool], Any], is_right: Callable[[Any], bool], calls: int
    ) -> None:
        self._pool = pool
        self._work = work
        self._is_right = is_right
        self._calls = calls
        self._checked = False

    def __call__(self) -> float:
        start = time.perf_counter()
        result = self._work(self._pool)
        seconds = time.perf_counter() - start
        if not self._checked:
            if not self._is_right(result):
                raise WrongResultError("not the result that it should be")
            self._checked = True
        return seconds / self._calls


# -- small calls


def _submit(count: int) -> Callable[[Setting], AbstractContextManager[Contenders]]:
    def opened(setting: Setting) -> AbstractContextManager[Contenders]:
        calls = setting.scaled(count)
        expected = list(range(1, calls + 1))
        return _contenders(
            setting, "submit", lambda pool: pool.submit(inc, range(calls)), expected.__eq__, calls=calls
        )  # fmt: skip

    return opened


@contextlib.contextmanager
def _apply(setting: Setting) -> Iterator[Contenders]:
    calls = setting.scaled(_APPLIES)
    expected = list(range(1, calls + 1))

    def work(pool: AnyPool) -> list[int]:
        apply = pool.apply
        return [apply(inc, number) for number in range(calls)]

    with _ping_pong(setting, calls) as limit, _contenders(setting, "apply", work, expected.__eq__, calls=calls) as all:
        yield {"bare pipe ping-pong": limit, **all}


@contextlib.contextmanager
def _ping_pong(setting: Setting, calls: int) -> Iterator[Callable[[], float]]:
    context: Any = multiprocessing.get_context(setting.start_method)
    ours, theirs = context.Pipe()
    process = context.Process(target=pong, args=(theirs, ours), daemon=True)
    with quiet_start():
        process.start()
    theirs.close()

    def rounds() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            ours.send_bytes(b"ping")
            ours.recv_bytes()
        return (time.perf_counter() - start) / calls

    try:
        yield rounds
    finally:
        ours.close()
        process.join()
        process.close()


@contextlib.contextmanager
def _map(setting: Setting) -> Iterator[Contenders]:
    items = range(setting.scaled(_MAPPED))
    expected = list(range(1, len(items) + 1))

    def plain() -> float:
        start = time.perf_counter()
        [inc(item) for item in items]
        return time.perf_counter() - start

    with _contenders(setting, "map", lambda pool: pool.map(inc, items, None), expected.__eq__) as all:
        yield {"plain loop": plain, **all}


# -- large arguments and results


def _copying(sources: list[Any]) -> Callable[[], float]:
    """The limit of the rows below: each source copied once, into memory that is there already."""
    targets = [bytearray(memoryview(source).nbytes) for source in sources]

    def copy() -> float:
        start = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            # Both sides as memoryviews of bytes: assigned to the bytearray itself, some types are copied twice.
            memoryview(target)[:] = memoryview(source).cast("B")
        return time.perf_counter() - start

    return copy


def _arrays(setting: Setting) -> list[Any]:
    length = setting.scaled(_ARRAY) // _FLOAT
    return [importlib.import_module("numpy").arange(first, first + length, dtype="float64") for first in range(_ARRAYS)]


def _same_arrays(found: list[Any], expected: list[Any]) -> bool:
    equal = importlib.import_module("numpy").array_equal
    return len(found) == len(expected) and all(map(equal, found, expected))


@contextlib.contextmanager
def _arrays_in(setting: Setting) -> Iterator[Contenders]:
    arrays = _arrays(setting)
    expected = [ends_of(array) for array in arrays]
    with _contenders(setting, "map", lambda pool: pool.map(ends_of, arrays, 1), expected.__eq__) as all:
        yield {"one plain copy": _copying(arrays), **all}


@contextlib.contextmanager
def _arrays_out(setting: Setting) -> Iterator[Contenders]:
    arrays = _arrays(setting)
    task = functools.partial(array_of, len(arrays[0]))
    with _contenders(
        setting, "map", lambda pool: pool.map(task, range(_ARRAYS), 1), lambda found: _same_arrays(found, arrays)
    ) as all:  # fmt: skip
        yield {"one plain copy": _copying(arrays), **all}


@contextlib.contextmanager
def _arrays_echoed(setting: Setting) -> Iterator[Contenders]:
    arrays = _arrays(setting)
    with _contenders(
        setting, "map", lambda pool: pool.map(echo, arrays, 1), lambda found: _same_arrays(found, arrays)
    ) as all:  # fmt: skip
        yield {"one plain copy": _copying(arrays), **all}


@contextlib.contextmanager
def _bytes_in(setting: Setting) -> Iterator[Contenders]:
    sources = [bytes([number]) * setting.scaled(_BYTES) for number in range(_BYTES_TASKS)]
    expected = [len(source) for source in sources]
    with _contenders(setting, "map", lambda pool: pool.map(len, sources, 1), expected.__eq__) as all:
        yield {"one plain copy": _copying(sources), **all}


@contextlib.contextmanager
def _bytes_out(setting: Setting) -> Iterator[Contenders]:
    task = functools.partial(bytes_of, setting.scaled(_BYTES))
    numbers = [number % 2 for number in range(_BYTES_TASKS)]
    expected = [task(number) for number in numbers]
    bytes_of.cache_clear()  # not for forked workers to find
    with _contenders(setting, "map", lambda pool: pool.map(task, numbers, 1), expected.__eq__) as all:
        yield {"one plain copy": _copying(expected), **all}


@contextlib.contextmanager
def _bound(setting: Setting) -> Iterator[Contenders]:
    array = importlib.import_module("numpy").arange(setting.scaled(_BOUND) // _FLOAT, dtype="float64")
    task = functools.partial(item_of, array)
    expected = [float(index) for index in range(_BOUND_TASKS)]
    with _contenders(setting, "map", lambda pool: pool.map(task, range(_BOUND_TASKS), 1), expected.__eq__) as all:
        yield {"one plain copy": _copying([array]), **all}


ROWS: Final[tuple[Row, ...]] = (
    Row("pool", "2 000 x apply_async(inc), per call", "us", _submit(2_000)),
    Row("pool", "20 000 x apply_async(inc), per call", "us", _submit(20_000)),
    Row("pool", "apply(inc), per call", "us", _apply, limit="bare pipe ping-pong"),
    Row("pool", "map(inc, range(50 000))", "ms", _map, limit="plain loop"),
    Row("pool", "12 arrays of 32 MiB in", "ms", _arrays_in, limit="one plain copy", needs="numpy"),
    Row("pool", "12 arrays of 32 MiB out", "ms", _arrays_out, limit="one plain copy", needs="numpy"),
    Row("pool", "12 arrays of 32 MiB echoed", "ms", _arrays_echoed, limit="one plain copy", needs="numpy"),
    Row("pool", "16 bytes of 8 MiB in", "ms", _bytes_in, limit="one plain copy"),
    Row("pool", "16 bytes of 8 MiB out", "ms", _bytes_out, limit="one plain copy"),
    Row("pool", "256 MiB array in a partial, 16 tasks", "ms", _bound, limit="one plain copy", needs="numpy"),
)
