from __future__ import annotations

import errno
import multiprocessing
import pickle
from concurrent.futures.process import BrokenProcessPool

import pytest

from portshm import errors

# Every class, with arguments of the kind it is raised with, and what a caller of the standard library would catch.
SAMPLES: dict[type[BaseException], tuple[tuple[object, ...], tuple[type[BaseException], ...]]] = {
    errors.PortShmError: (("sentence",), (Exception,)),
    errors.RegionError: (("sentence",), (errors.PortShmError,)),
    errors.RegionExistsError: ((errno.EEXIST, "sentence", "/x"), (errors.RegionError, FileExistsError)),
    errors.RegionNotFoundError: ((errno.ENOENT, "sentence", "/x"), (errors.RegionError, FileNotFoundError)),
    errors.RegionRefusedError: ((errno.EACCES, "sentence", "/x"), (errors.RegionError, PermissionError)),
    errors.RegionFullError: ((errno.ENOSPC, "sentence", "/x"), (errors.RegionError, OSError)),
    errors.RegionSizeError: (("sentence",), (errors.RegionError, ValueError)),
    errors.RegionNameError: (("sentence",), (errors.RegionError, ValueError)),
    errors.RegionClosedError: (("sentence",), (errors.RegionError, ValueError)),
    errors.HeaderError: (("count", -1, "0 or more"), (errors.PortShmError, ValueError)),
    errors.NotReadyError: (("magic", b"\0", "b'portshm'"), (errors.HeaderError,)),
    errors.TornValueError: (("sentence",), (errors.PortShmError, ValueError)),
    errors.ValueTooLargeError: ((11, 10), (errors.PortShmError, ValueError)),
    errors.LockTimeoutError: (("/x.lock", 0.5), (errors.PortShmError, TimeoutError)),
    errors.LockNotHeldError: (("sentence",), (errors.PortShmError, RuntimeError)),
    errors.PoolError: (("sentence",), (errors.PortShmError,)),
    errors.TransportError: (("sentence",), (errors.PoolError, BrokenProcessPool)),
    errors.WorkerCrashed: ((3, b"item", 42, -11, "SIGSEGV", "stack"), (errors.PoolError, BrokenProcessPool)),
    errors.TaskTimeoutError: ((3, b"item", 42, -9, "slow"), (errors.WorkerCrashed, multiprocessing.TimeoutError)),
    errors.WorkerStartError: (("reason", "detail"), (errors.PoolError, BrokenProcessPool)),
    errors.PoolTerminatedError: (("sentence",), (errors.PoolError, BrokenProcessPool)),
}


def test_every_class_is_sampled() -> None:
    assert {cls.__name__ for cls in SAMPLES} == set(errors.__all__)


@pytest.mark.parametrize("cls", SAMPLES, ids=lambda cls: cls.__name__)
def test_bases(cls: type[BaseException]) -> None:
    assert all(issubclass(cls, base) for base in SAMPLES[cls][1])


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", SAMPLES, ids=lambda cls: cls.__name__)
def test_survives_pickling(cls: type[BaseException], protocol: int) -> None:
    error = cls(*SAMPLES[cls][0])
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is cls
    assert (copy.args, str(copy), vars(copy)) == (error.args, str(error), vars(error))


def test_os_errors_keep_errno_and_file_when_pickled() -> None:
    copy = pickle.loads(pickle.dumps(errors.RegionFullError(errno.ENOSPC, "no room", "/dev/shm")))
    assert (copy.errno, copy.filename) == (errno.ENOSPC, "/dev/shm")


def test_sentences_carry_the_fields() -> None:
    assert str(errors.HeaderError("count", -1, "0 or more")) == "header field 'count': found -1, expected 0 or more"
    assert "11 bytes, capacity is 10" in str(errors.ValueTooLargeError(11, 10))
    assert "/x.lock" in str(errors.LockTimeoutError("/x.lock", 0.5))
    assert "0.5 s" in str(errors.LockTimeoutError("/x.lock", 0.5))


def test_a_crash_tells_element_cause_and_signal() -> None:
    crash = errors.WorkerCrashed(3, b"item", 42, -11, "killed by SIGSEGV")
    assert str(crash) == "worker 42 crashed on element 3 (b'item'): killed by SIGSEGV"
    assert crash.signal == 11
    assert errors.WorkerCrashed(0, None, None, 1, "exited").signal is None
    assert errors.WorkerCrashed(0, None, None, -250, "unknown").signal == 250


class _NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("item", [_NoRepr(), bytes(1 << 20), list(range(10_000))], ids=["raising", "bytes", "long"])
def test_the_sentence_is_short_and_safe_whatever_the_item(item: object) -> None:
    assert len(str(errors.WorkerCrashed(0, item, 1, 1, "exited"))) < 500
