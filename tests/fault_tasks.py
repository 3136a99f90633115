"""What the pools of `tests/pool/test_engine_faults.py` execute, pickle and unpickle. Importable by a spawned worker."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import stat
import struct
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from portshm.pool._wire.messages import Done, Message, Need, Ready, Released, StartFailed, encode
from tests.tasks import hang, note, wait_for

# -- what waits where it is pickled or unpickled


class WaitsWhenPickled:
    """Is pickled when its path exists; a task, too."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        wait_for(self.path)
        return WaitsWhenPickled, (self.path,)

    def __call__(self, *_: object) -> int:
        return 1


class ErrorUnpickledLate(Exception):
    """An exception that is rebuilt when its path exists."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __reduce__(self) -> Any:
        return late_error, (self.path,)


def late_error(path: str) -> ErrorUnpickledLate:
    wait_for(path)
    return ErrorUnpickledLate(path)


class UnreadableWithLateError:
    """Raises, where it is unpickled, an exception that itself is unpickled late."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return raise_late_error, (self.path,)


def raise_late_error(path: str) -> NoReturn:
    raise ErrorUnpickledLate(path)


# -- what has a signal come to where it is pickled or unpickled


class SignalsWhenPickled:
    """Has an alarm come to the process that pickles it; in the main thread, in the midst of the pickling."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGALRM)
        return SignalsWhenPickled, ()


class SignalsWhenUnpickled:
    """Has an alarm come to the process that unpickles it, unless that is the one given."""

    def __init__(self, spared: int) -> None:
        self.spared = spared

    def __reduce__(self) -> Any:
        return signal_unless, (self.spared,)


def signal_unless(spared: int) -> int:
    if os.getpid() != spared:
        os.kill(os.getpid(), signal.SIGALRM)
    return spared


def make_signals_when_unpickled(_: object = None) -> SignalsWhenUnpickled:
    return SignalsWhenUnpickled(os.getpid())


# -- meeting


def meet(folder: str, number: int) -> int:
    """Return when the task with the next number, or the one before if this is odd, has begun too."""
    if folder:
        Path(f"{folder}{number}").touch()
        partner = Path(f"{folder}{number ^ 1}")
        deadline = time.monotonic() + 5.0
        while not partner.exists():
            if time.monotonic() > deadline:
                raise LookupError(f"{number} is alone")
            time.sleep(0.001)
    return number


def noted_or_slow(log: str, number: int, gate: str) -> int:
    """Note the number; the one with a gate ends when that exists."""
    if gate:
        wait_for(gate)
    note(log, number)
    return number


# -- frames that no worker of ours would send


def frame(kind: int, *numbers: int, text: bytes = b"", length: int | None = None) -> bytes:
    numbers = (*numbers, 0, 0, 0, 0)[:4]
    return struct.pack("<HHI4q", 0x5350, kind, len(text) if length is None else length, *numbers) + text


def _whole(*messages: Message) -> bytes:
    return b"".join(map(encode, messages))


_HUGE = 2**63 - 1

FRAMES: dict[str, bytes] = {
    "a second Ready": _whole(Ready(1)),
    "many Readys": _whole(*[Ready(number) for number in range(200)]),
    "a failed start": _whole(StartFailed("not so")),
    "half a head": _whole(Done(1, 1, 1))[:20],
    "one byte": _whole(Done(1, 1, 1))[:1],
    "a head without its text": frame(15, text=b"", length=60_000),
    "half a text": frame(12, text=b"x" * 100, length=40_000),
    "Released with 5,000 digits": frame(15, text=b"9" * 5_000),
    "Released with a sign": frame(15, text="-1,+1,²,٣, 4".encode()),
    "Released of nothing": frame(15, text=b",,,,"),
    "Released of everything": _whole(Released(",".join(map(str, range(3_000))))),
    "no text at all": frame(15, text=b"\xff\xfe\x00" * 50),
    "Done of every batch": _whole(*[Done(batch, 1, 1) for batch in range(1, 64)]),
    "Done twice": _whole(*[Done(batch, 1, 1) for batch in range(1, 64) for _ in range(2)]),
    "Done of all elements": _whole(*[Done(batch, count, 1) for batch in range(1, 12) for count in (20, 6, 3, 2)]),
    "Done of fewer than none": _whole(*[Done(batch, -7, 1) for batch in range(1, 64)]),
    "Done unread": _whole(*[Done(batch, -1, 1) for batch in range(1, 64)]),
    "Done of too many": _whole(*[Done(batch, _HUGE, 1) for batch in range(1, 64)]),
    "Done in no time": _whole(*[Done(batch, 1, -_HUGE) for batch in range(1, 64)]),
    "a Need of less than nothing": _whole(Need(-1)),
    "a Need of nothing": _whole(Need(0)),
    "a Need of everything": _whole(Need(_HUGE)),
    "a Need of terabytes": _whole(Need(1 << 45)),
    "many Needs": _whole(*[Need(1) for _ in range(200)]),
    "numbers out of range": frame(14, -_HUGE, -_HUGE, -_HUGE, -_HUGE),
} | {f"kind {kind}": frame(kind, 1, 1, 1, 1) for kind in (0, 1, 2, 3, 4, 5, 6, 10, 16, 17, 18, 19, 20, 21, 99, 0xFFFF)}


def write_frame(name: str, then: str) -> int:
    """Write it to every socket of this process, which is the worker's pipe; then return, hang or raise."""
    for fd in range(3, 256):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.write(fd, FRAMES[name])
    if then == "hang":
        hang()
    if then == "stay":
        time.sleep(0.02)  # until it has been read, in all likelihood
    if then == "raise":
        raise LookupError("on purpose")
    return 1


def write_frame_if(log: str, number: int, name: str, then: str) -> int:
    note(log, number)
    if name:
        write_frame(name, then)
    return number * 10


# -- classes that are not what they say


class _Unhashable(type):
    def __eq__(cls, other: object) -> bool:  # and so no __hash__
        return cls is other


class OfUnhashableClass(metaclass=_Unhashable):
    pass


class _EqualToInt(type):
    def __eq__(cls, other: object) -> bool:
        return other is int or cls is other

    def __hash__(cls) -> int:
        return hash(int)


class SaysItIsInt(metaclass=_EqualToInt):
    """Its class is equal to `int`, and it has no `__int__`."""


class _Answers(type):
    def __getattr__(cls, name: str) -> Any:
        return lambda *_: name


class AnswersEverything(metaclass=_Answers):
    pass


class _Raises(type):
    def __getattr__(cls, name: str) -> Any:
        raise RuntimeError(f"nobody is to ask for {name}")


class ClassOfSecrets(metaclass=_Raises):
    pass


class _Lazy:
    """A field that must not be asked for, as those of a database's row that is detached from its session."""

    def __get__(self, obj: object, owner: object = None) -> Any:
        if obj is None:
            return self
        raise RuntimeError("the field was asked for")

    def __set__(self, obj: object, value: object) -> None: ...


@dataclasses.dataclass
class LazyRow:
    field: Any = _Lazy()

    def __reduce__(self) -> Any:
        return LazyRow, ()


class Secretive:
    """No attribute of it is to be asked for that pickle does not ask for."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("__class__", "__reduce_ex__", "__reduce__", "__setstate__"):
            return object.__getattribute__(self, name)
        raise RuntimeError(f"nobody is to ask for {name}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Secretive, ()


STRANGE = {
    kind.__name__: kind
    for kind in (OfUnhashableClass, SaysItIsInt, AnswersEverything, ClassOfSecrets, LazyRow, Secretive)
}


def make_strange(name: str) -> Any:
    return STRANGE[name]()


def kind_of(obj: Any) -> str:
    return type(obj).__name__


def strange_and_kind(obj: Any) -> Any:
    """The object itself, to go back."""
    return obj


# -- ends


class EndsPool:
    """Terminates a pool when it is collected."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.where: list[str] = []

    def __del__(self) -> None:
        self.where.append(threading.current_thread().name)
        self.pool.terminate()


def noted_sleep(log: str, seconds: float) -> None:
    note(log, os.getpid())
    time.sleep(seconds)


def noted_ten_times(item: tuple[str, int]) -> int:
    log, number = item
    note(log, number)
    return number * 10


class Spread:
    """A function of one tuple, out of one of several arguments."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, item: tuple[Any, ...]) -> Any:
        return self.function(*item)


class Maybe:
    """A number that can be pickled or not."""

    def __init__(self, refuses: bool, number: int) -> None:
        self.refuses = refuses
        self.number = number

    def __reduce__(self) -> Any:
        if self.refuses:
            raise LookupError(self.number)
        return Maybe, (False, self.number)


def number_of(item: Maybe) -> int:
    return item.number


class HalfFrame:
    """Writes it, and hangs."""

    def __init__(self, log: str) -> None:
        self.log = log

    def __call__(self, name: str) -> int:
        note(self.log, name)
        return write_frame(name, "hang")
