from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import portshm
from portshm import (
    LockNotHeldError,
    LockTimeoutError,
    RegionClosedError,
    RegionRefusedError,
    SharedMem,
    ValueTooLargeError,
)

from . import children
from .children import start_python

pytest.importorskip("filelock")
locked = importlib.import_module("portshm.locked")

Create = Callable[..., SharedMem]

HOLDER = """
import sys
from portshm import SharedMem
from portshm.locked import LockedSharedMem
with LockedSharedMem(SharedMem.attach(sys.argv[1])) as m:
    m.set_value(b"half")
    print("held", flush=True)
    sys.stdin.read()
"""


FORKING_HOLDER = """
import os, sys, time
from portshm import SharedMem
from portshm.locked import LockedSharedMem
with LockedSharedMem(SharedMem.attach(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def mem(create: Create) -> Any:
    made = create()
    yield made
    locked.LockedSharedMem(made).unlink()


def held_elsewhere(mem: SharedMem) -> Any:
    """Another program that holds the lock."""
    process = start_python(HOLDER, mem.address)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_no_increment_is_lost(mem: SharedMem, backend: str, start_method: str) -> None:
    # 4 times 10 000 take ten seconds, so once; how a child came about makes no difference to the lock.
    rounds = 10_000 if (backend, start_method) == ("file", multiprocessing.get_all_start_methods()[0]) else 200
    context: Any = multiprocessing.get_context(start_method)
    processes = [
        context.Process(target=children.count_up, args=(locked.LockedSharedMem(mem), rounds)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
        process.close()
    assert mem.header.count == 4 * rounds


def test_threads_of_one_process_exclude_one_another(mem: SharedMem) -> None:
    shared = locked.LockedSharedMem(mem)
    threads = [threading.Thread(target=children.count_up, args=(shared, 500)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mem.header.count == 2000


def test_the_same_calls_as_the_core(mem: SharedMem) -> None:
    m = locked.LockedSharedMem(mem)
    m.set_value(b"abcdef")
    assert (m.value_copy(), m.stable_copy()) == (b"abcdef", b"abcdef")
    m.set_value_len(3)
    assert m.value_copy() == b"abc"
    with m:
        m.value_ref()[:1] = b"X"
        m.header.count += 1
    assert (mem.value_copy(), mem.header.count) == (b"Xbc", 1)
    for name in ("capacity", "size", "address", "path", "name", "owner", "superseded", "closed"):
        assert getattr(m, name) == getattr(mem, name)
    with pytest.raises(ValueTooLargeError):
        m.set_value(bytes(65))
    m.set_value(b"the lock is free again")


def test_live_views_are_to_be_had_inside_the_hold_only(mem: SharedMem) -> None:
    m = locked.LockedSharedMem(mem)
    for use in (lambda: m.header, m.value_ref):
        with pytest.raises(LockNotHeldError):
            use()
    with m:
        assert m.header.count == 0
        refused = []

        def other_thread() -> None:
            try:
                m.value_ref()
            except LockNotHeldError as error:
                refused.append(error)

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert refused, "the hold is this thread's"
    with pytest.raises(LockNotHeldError):
        m.value_ref()


def test_a_hold_may_be_nested(mem: SharedMem) -> None:
    m = locked.LockedSharedMem(mem)
    with m, m:
        m.set_value(b"x")
        with m:
            pass
        assert m.header.value_len == 1
    with pytest.raises(LockNotHeldError):
        m.header  # noqa: B018


def test_the_lock_is_free_after_an_exception(mem: SharedMem) -> None:
    m, other = locked.LockedSharedMem(mem), locked.LockedSharedMem(SharedMem.attach(mem.address), timeout=5)
    with pytest.raises(ZeroDivisionError), m:
        raise ZeroDivisionError
    with other:
        assert not other.abandoned
    other.close()


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_a_lock_held_by_another_process_times_out(mem: SharedMem, timeout: float) -> None:
    with held_elsewhere(mem) as process:
        m = locked.LockedSharedMem(mem, timeout=timeout)
        start = time.monotonic()
        with pytest.raises(LockTimeoutError) as caught:
            m.set_value(b"x")
        assert time.monotonic() - start >= timeout
        assert (caught.value.path, caught.value.timeout) == (locked.lock_path(mem.address), timeout)
        assert mem.value_copy() == b"half"
        process.communicate()
        m = locked.LockedSharedMem(mem, timeout=10)
        with m:
            assert not m.abandoned, "it let go of the lock by itself"


def test_a_killed_holder_frees_the_lock_and_the_next_is_told_once(mem: SharedMem) -> None:
    m = locked.LockedSharedMem(mem, timeout=10)
    for _ in range(3):
        with held_elsewhere(mem) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
        with m:
            assert m.abandoned
            assert m.value_copy() == b"half"
            assert m.abandoned, "until the hold ends"
        assert not m.abandoned
        with m:
            assert not m.abandoned


def test_a_resize_does_not_forget_that_the_holder_died(create: Create) -> None:
    mem = create()
    m = locked.LockedSharedMem(mem, timeout=10)
    with held_elsewhere(mem) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with m:
        m.resize(100)
        assert m.abandoned
    with m:
        assert not m.abandoned
    m.unlink()


def test_a_waiter_gets_the_lock_when_its_holder_is_killed(mem: SharedMem) -> None:
    with held_elsewhere(mem) as process:
        told = []

        def wait() -> None:
            with locked.LockedSharedMem(mem, timeout=30) as m:
                told.append(m.abandoned)

        thread = threading.Thread(target=wait)
        thread.start()
        process.send_signal(signal.SIGKILL)
        process.wait()
        thread.join()
    assert told == [True]


def test_others_follow_a_resize_to_the_new_memory_and_its_lock(mem: SharedMem) -> None:
    m = locked.LockedSharedMem(mem, timeout=10)
    other = locked.LockedSharedMem(SharedMem.attach(mem.address), timeout=0.05)
    m.set_value(b"first")
    assert other.value_copy() == b"first"
    m.resize(100_000)
    m.set_value(b"x" * 100_000)
    assert other.value_copy() == b"x" * 100_000
    assert other.address == m.address
    with m, pytest.raises(LockTimeoutError):
        other.set_value(b"never")
    with m:
        m.resize(200_000)
        m.header.count = 5
        with pytest.raises(LockTimeoutError):
            other.refresh()
    assert other.address == m.address, "it has followed, and then waited for the lock of the new one in vain"
    assert not other.refresh()
    m.resize(300_000)
    assert other.refresh()
    with other:
        assert other.header.count == 5
    other.close()


def test_threads_that_wait_while_the_region_is_resized_wait_on(mem: SharedMem) -> None:
    # They wait on the old lock, and get it while the resizer still holds the new one.
    shared = locked.LockedSharedMem(mem, timeout=30)
    inside: list[str] = []

    def enter() -> None:
        with shared:
            inside.append("waiter")
            shared.header.count += 1

    with shared:
        threads = [threading.Thread(target=enter) for _ in range(3)]
        for thread in threads:
            thread.start()
        for capacity in (100, 1000, 10_000):
            shared.resize(capacity)
            for thread in threads:
                thread.join(0.05)  # long enough for several polls of the lock; they must not get in
        assert inside == []
    for thread in threads:
        thread.join()
    assert len(inside) == 3
    assert mem.header.count == 3


def test_travels_by_pickle(mem: SharedMem) -> None:
    m = locked.LockedSharedMem(mem, timeout=3)
    m.set_value(b"abc")
    copy = pickle.loads(pickle.dumps(m))
    assert copy.value_copy() == b"abc"
    assert copy._timeout == 3
    assert not copy.owner
    copy.close()


def test_the_lock_belongs_to_the_address(create: Create) -> None:
    one, two = create(), create()
    assert locked.lock_path(one.address) != locked.lock_path(two.address)
    with SharedMem.attach(one.address) as other:
        assert locked.lock_path(other.address) == locked.lock_path(one.address)


def test_closed_memory_does_not_keep_the_lock(mem: SharedMem) -> None:
    m = locked.LockedSharedMem(mem, timeout=0)
    mem.close()
    for _ in range(2):
        with pytest.raises(RegionClosedError):
            m.acquire()


def test_read_only_memory_can_be_locked(mem: SharedMem) -> None:
    mem.set_value(b"abc")
    with SharedMem.attach(mem.address, readonly=True) as reader:
        m = locked.LockedSharedMem(reader, timeout=5)
        with m:
            assert (m.value_copy(), m.abandoned) == (b"abc", False)


def test_the_seeds_layout_can_be_locked(tmp_path: Path) -> None:
    with SharedMem.create(10, header=portshm.GO_FUZZ_HEADER, dir=tmp_path) as mem:
        with locked.LockedSharedMem(mem) as m:
            m.header.count += 1
            assert not m.abandoned
        assert mem.path is not None
        assert os.path.getsize(mem.path) == 50
        m.unlink()
    assert os.listdir(tmp_path) == []


def test_the_lock_file_goes_with_the_region(tmp_path: Path) -> None:
    mem = SharedMem.create(10, dir=tmp_path)
    m = locked.LockedSharedMem(mem)
    m.set_value(b"x")
    m.resize(20)
    assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(p) for p in (str(mem.path), f"{mem.path}.lock"))
    m.unlink()
    m.close()
    assert os.listdir(tmp_path) == []
    del m, mem
    gc.collect()


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("what", ["link", "folder"])
def test_what_somebody_has_put_in_the_lock_s_place_is_refused(tmp_path: Path, what: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with SharedMem.create(8, dir=tmp_path) as mem:
        path = Path(locked.lock_path(mem.address))
        path.symlink_to(victim) if what == "link" else path.mkdir()
        with pytest.raises(RegionRefusedError, match="cannot be the lock"):
            locked.LockedSharedMem(mem, timeout=1).value_copy()
    assert victim.read_text() == "precious"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_of_the_holder_does_not_keep_the_lock(mem: SharedMem) -> None:
    with start_python(FORKING_HOLDER, str(mem.address)) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            shared = locked.LockedSharedMem(mem, timeout=30)
            with shared:
                assert shared.abandoned
            os.kill(child, 0)  # it is still there
        finally:
            os.kill(child, signal.SIGKILL)
