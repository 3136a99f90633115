"""Fixtures that multiply a test (`backend`, `start_method`), and the check after every test that nothing is left."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest

from portshm import SharedMem
from portshm._region import PREFIX

# What the kernel and the standard library finish a moment after the call that started it: a daemon thread that
# is on its way out, a child that has been sent its last message.
SETTLE_SECONDS = 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="minutes long: --slow"))


def pytest_collection_finish(session: pytest.Session) -> None:
    # What exists by now stays to the end; without it the collection after each test takes milliseconds, not 50.
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["file", "named"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each mechanism by its name, and not `auto`, which is always one of them."""
    return str(request.param)


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request: pytest.FixtureRequest) -> str:
    if request.param not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform has no start method {request.param}")
    return str(request.param)


@pytest.fixture
def create(backend: str) -> Iterator[Callable[..., SharedMem]]:
    """`SharedMem.create` on the backend of this run; unlinked and closed afterwards."""
    with contextlib.ExitStack() as stack:

        def make(capacity: int = 64, **options: object) -> SharedMem:
            return stack.enter_context(_Ended(SharedMem.create(capacity, backend=backend, **options)))  # type: ignore[arg-type]

        yield make


class _Ended(contextlib.AbstractContextManager[SharedMem]):
    # SharedMem's own __enter__ refuses what the test has closed by then; this only ends it.
    def __init__(self, mem: SharedMem) -> None:
        self.mem = mem

    def __enter__(self) -> SharedMem:
        return self.mem

    def __exit__(self, *_: object) -> None:
        self.mem.unlink()
        self.mem.close()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No child, thread, segment, temporary file or descriptor is left by any test."""
    before = _present()
    yield
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        gc.collect()
        multiprocessing.active_children()  # reaps those that have ended
        left = _left(before, _present())
        if not left:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    for kind, key in left:
        if kind == "child":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(key), signal.SIGKILL)
        if kind == "entry":
            with contextlib.suppress(OSError):
                os.unlink(key)
    pytest.fail(f"left behind: {sorted((kind, key, before_or_now) for (kind, key), before_or_now in left.items())}")


_Things = dict[tuple[str, str], str]


def _present() -> _Things:
    things: _Things = {("thread", str(thread.ident)): thread.name for thread in threading.enumerate()}
    for folder in {tempfile.gettempdir(), "/dev/shm"}:
        with contextlib.suppress(OSError):
            for entry in os.listdir(folder):
                if entry.startswith(PREFIX):
                    things["entry", f"{folder}/{entry}"] = ""
    if sys.platform == "linux":
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the listing's own descriptor
                things["descriptor", fd] = os.readlink(f"/proc/self/fd/{fd}")
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                    things["child", pid] = ""
    else:
        for child in multiprocessing.active_children():
            things["child", str(child.pid)] = child.name
    return things


def _left(before: _Things, now: _Things) -> _Things:
    """What is there now and was not before, apart from the standard library's helpers and other people's things."""
    helpers = _standard_helpers()
    left: _Things = {}
    for key, what in now.items():
        kind, name = key
        if before.get(key) == what or key in helpers:
            continue
        if kind == "entry" and _held_by_others(name):
            continue
        left[key] = what
    return left


def _standard_helpers() -> set[tuple[str, str]]:
    """The resource tracker and the fork server: started on first use, and there until this process ends."""
    tracker, server = resource_tracker._resource_tracker, getattr(forkserver, "_forkserver", None)  # type: ignore[attr-defined]
    numbers = {
        ("descriptor", tracker._fd),
        ("child", tracker._pid),
        ("descriptor", getattr(server, "_forkserver_alive_fd", None)),
        ("child", getattr(server, "_forkserver_pid", None)),
    }
    return {(kind, str(number)) for kind, number in numbers if number is not None}


def _held_by_others(path: str) -> bool:
    """Whether this entry belongs to a live region of another process, such as another run of these tests.

    All of a region's entries (memory, mark, lock file) hang together by name; the lock is on memory or mark.
    """
    try:
        import fcntl
    except ImportError:
        return False
    bare = path.removesuffix(".lock").removesuffix(".owner")
    for candidate in (bare, bare + ".owner"):
        try:
            fd = os.open(candidate, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            if any(os.path.samestat(status, held) for held in _open_files(besides=fd)):
                return False  # held by us
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
    return False


def _open_files(besides: int) -> Iterator[os.stat_result]:
    for fd in os.listdir("/proc/self/fd"):
        if int(fd) != besides:
            with contextlib.suppress(OSError):
                yield os.fstat(int(fd))
