"""What the pools of the tests execute: harmless functions, and every way of going wrong.

Importable without side effects, so that a spawned worker finds them too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from portshm.pool import Pool
from portshm.pool._wire.messages import Done, encode

FOREVER = 600.0  # seconds; whoever sleeps that long is killed


def inc(x: int) -> int:
    return x + 1


def same(x: Any) -> Any:
    return x


def add(x: int, y: int, *, times: int = 1) -> int:
    return (x + y) * times


def pid(_: object = None) -> int:
    return os.getpid()


def fail(x: object) -> NoReturn:
    raise ValueError(x)


def raise_it(error: BaseException) -> NoReturn:
    raise error


def raise_kind(kind: type[BaseException]) -> NoReturn:
    raise kind("on purpose")


def note_and_stop(log: str, number: int, stop: bool) -> int:
    note(log, number)
    if stop:
        raise StopIteration(number)
    return number


def hang(_: object = None) -> None:
    time.sleep(FOREVER)


# -- the execution log: one line per element that was started, appended whole (O_APPEND), whoever writes


def note(log: str, text: object) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, f"{text}\n".encode())
    finally:
        os.close(fd)


def noted(log: str | Path) -> list[str]:
    try:
        return Path(log).read_text().splitlines()
    except FileNotFoundError:
        return []


def counted(log: str | Path) -> Counter[int]:
    """How often each element was started."""
    return Counter(int(line.split()[0]) for line in noted(log))


# -- dying

DEATHS = {
    "exit": lambda: os._exit(1),
    "SIGSEGV": lambda: ctypes.string_at(0),
    "SIGABRT": os.abort,
    "SIGKILL": lambda: kill_self(signal.SIGKILL),
    "hang": hang,
}


def kill_self(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(FOREVER)  # until it is delivered


class Step(NamedTuple):
    """One element that notes its start and then does what `action` says."""

    log: str
    number: int
    action: str = ""


def run(step: Step) -> int:
    note(step.log, f"{step.number} {os.getpid()}")
    if step.action:
        DEATHS[step.action]()
    return step.number * 10


def run_args(log: str, number: int, action: str = "") -> int:
    return run(Step(log, number, action))


class DieOnce(NamedTuple):
    """An element that kills its worker the first `deaths` times it is executed."""

    log: str
    number: int
    deaths: int


def run_die_once(item: DieOnce) -> tuple[int, int]:
    note(item.log, f"{item.number} {os.getpid()}")
    if counted(item.log)[item.number] <= item.deaths:
        os._exit(1)
    return item.number, os.getpid()


def die(action: str) -> None:
    DEATHS[action]()


def ignore_sigterm(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(path, os.getpid())
    time.sleep(FOREVER)


def noted_hang(path: str) -> None:
    note(path, os.getpid())
    time.sleep(FOREVER)


def hang_in_c(path: str) -> None:
    """Note the pid, and let no other thread of this process run for a very long time."""
    note(path, os.getpid())
    re.match("(a+)+$", "a" * 60 + "b")


def stop_self(path: str) -> None:
    note(path, os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(FOREVER)


def wait_for(path: str) -> int:
    """Note the start in `path`.started and return when `path` exists."""
    note(path + ".started", os.getpid())
    while not os.path.exists(path):
        time.sleep(0.002)
    return os.getpid()


def counted_wait(item: tuple[str, int]) -> int:
    """Return the number; the element with number 10 waits for the file, after it has noted its start."""
    path, number = item
    if number == 10:
        wait_for(path)
    return number


# -- pickles that go wrong


class CannotPickle:
    def __reduce__(self) -> NoReturn:
        raise RuntimeError("this cannot be pickled")

    def __call__(self, *_: object) -> None: ...


class CannotUnpickle:
    """Travels, and raises on arrival."""

    def __reduce__(self) -> Any:
        return raise_it, (RuntimeError("this cannot be unpickled"),)

    def __call__(self, *_: object) -> None: ...


class KillsWhenUnpickled:
    """Ends the process that unpickles it, unless it is the one given."""

    def __init__(self, spared: int) -> None:
        self.spared = spared

    def __reduce__(self) -> Any:
        return kill_unless, (self.spared,)

    def __call__(self, *_: object) -> None: ...


class KillsWhenPickled:
    """Ends the process that pickles it, unless it is the one given."""

    def __init__(self, spared: int) -> None:
        self.spared = spared

    def __reduce__(self) -> Any:
        return KillsWhenPickled, (kill_unless(self.spared),)


class UnpickledSlowly:
    """Notes where it is unpickled and hangs there, unless that is the process given."""

    def __init__(self, path: str, spared: int) -> None:
        self.path = path
        self.spared = spared

    def __reduce__(self) -> Any:
        return hang_unless, (self.path, self.spared)


class PickledSlowly:
    def __init__(self, path: str, spared: int) -> None:
        self.path = path
        self.spared = spared

    def __reduce__(self) -> Any:
        return same, (hang_unless(self.path, self.spared),)


def make_pickled_slowly(path: str, spared: int) -> PickledSlowly:
    return PickledSlowly(path, spared)


class Gated:
    """Is unpickled when its path exists."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return wait_for, (self.path,)


def gated(path: str) -> Gated:
    return Gated(path)


class DiesOverBuffer:
    """Pickles a large buffer out of band, and kills its process before the rest."""

    def __reduce__(self) -> Any:
        return list, ((bytearray(1 << 19), KillsWhenPickled(0)),)


def die_over_large_result(_: str) -> Any:
    return DiesOverBuffer()


def kill_unless(spared: int) -> int:
    if os.getpid() != spared:
        os._exit(9)
    return spared


def hang_unless(path: str, spared: int) -> str:
    if os.getpid() != spared:
        note(path, os.getpid())
        time.sleep(FOREVER)
    return path


def make_cannot_pickle(_: object) -> CannotPickle:
    return CannotPickle()


def make_cannot_unpickle(_: object) -> CannotUnpickle:
    return CannotUnpickle()


def make_kills_when_pickled(spared: int) -> KillsWhenPickled:
    return KillsWhenPickled(spared)


class NeedsTwoArguments(Exception):
    """Its pickle names one argument, so it cannot be rebuilt."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(one)


class HoldsLock(Exception):
    """Cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Odd(BaseException):
    pass


def raise_unbuildable(_: object) -> NoReturn:
    raise NeedsTwoArguments(1, 2)


def raise_unpicklable(_: object) -> NoReturn:
    raise HoldsLock("the lock")


# -- misuse of what the worker has


def close_everything(_: object) -> None:
    os.closerange(0, 4096)


def close_everything_and_hang() -> None:
    close_everything(0)
    time.sleep(FOREVER)


def close_everything_and_count() -> int:
    close_everything(0)
    return 1


def close_everything_if(item: str) -> str:
    if item:
        close_everything(0)
    return item


def scribble(byte: bytes) -> None:
    """Overwrite everything that this process has mapped of the pool's memory."""
    for obj in gc.get_objects():
        if isinstance(obj, mmap.mmap):
            with contextlib.suppress(TypeError):  # read-only
                obj[:] = byte * len(obj)


def wipe_if(log: str, number: int, last: int, then: str) -> int:
    """Note the number; the last one zeroes the memory that it finds, as a wild store might, and dies or hangs."""
    note(log, number)
    if number == last:
        scribble(b"\0")
        hang() if then == "hang" else die(then)
    return number


def write_garbage(kind: str) -> None:
    """Write to every socket of this process, which is the worker's pipe."""
    data = {
        "noise": b"\xde\xad\xbe\xef" * 100,
        "text": b"hello, I am a print() that went astray\n",
        "flood": b"x" * 60_000,
        "half": encode(Done(1, 1, 1))[:20],  # the beginning of a message
        "stale": encode(Done(10**9, 1, 1)),  # a whole one, about a batch that never was
        "length": struct.pack("<HHI4q", 0x5350, 14, 0xFFFF_FFFF, 1, 1, 1, 1),  # a text of four gigabytes
        "kind": struct.pack("<HHI4q", 0x5350, 99, 0, 1, 1, 1, 1),
    }[kind]
    for fd in range(3, 256):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.write(fd, data)
        except OSError:
            continue


def start_child(_: object) -> int:
    return subprocess.run([sys.executable, "-c", "raise SystemExit(7)"], check=False).returncode


def nested_map(numbers: list[int]) -> list[int]:
    with Pool(2) as pool:
        return pool.map(inc, numbers)


def nested_hang(path: str) -> None:
    with Pool(2) as pool:
        pool.map(noted_hang, [path] * 2, chunksize=1)


def fork_and_die(path: str) -> None:
    """Leave a grandchild behind that holds whatever was inherited, and die."""
    if os.fork() == 0:
        note(path, os.getpid())
        time.sleep(FOREVER)
    while not noted(path):
        time.sleep(0.002)
    os._exit(3)


def clone_and_die(path: str) -> None:
    """The same, past Python's fork handlers, so that the pipe's end is really inherited."""
    libc = ctypes.PyDLL(None)
    if libc.fork() == 0:
        note(path, os.getpid())
        time.sleep(FOREVER)
    while not noted(path):
        time.sleep(0.002)
    os._exit(3)


# -- initializers

_given: list[Any] = []


def remember(value: Any) -> None:
    _given.append(value)


def remembered(_: object = None) -> list[Any]:
    return list(_given)


def start_badly(log: str, how: str) -> None:
    note(log, os.getpid())
    if how == "raise":
        raise RuntimeError("no database")
    DEATHS[how]()


# -- arrays


def add_in_place(array: Any) -> Any:
    array += 1
    return array


def add_and_die_twice(log: str, array: Any) -> float:
    note(log, os.getpid())
    array += 1
    if len(noted(log)) < 3:
        os._exit(1)
    return float(array.sum())


_kept: list[Any] = []


def keep(item: Any) -> int:
    _kept.append(item)
    return os.getpid()


def kept_sums(_: object = None) -> list[float]:
    return [float(item.sum()) for item in _kept]


def total(item: Any) -> float:
    return float(item.sum())


def ones(count: int) -> Any:
    import numpy

    return numpy.ones(count)


def filled(item: tuple[int, int]) -> Any:
    """`count` bytes that all are `number % 251`."""
    number, count = item
    return bytes([number % 251]) * count


# -- the soak


class SoakItem(NamedTuple):
    log: str
    number: int
    payload: bytes
    answer: int  # bytes


def soak_payload(number: int, size: int) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


def soak(item: SoakItem) -> tuple[int, bytes]:
    note(item.log, item.number)
    assert item.payload == soak_payload(item.number, len(item.payload))
    time.sleep(item.number % 4 * 0.0005)
    return item.number, soak_payload(item.number, item.answer)
