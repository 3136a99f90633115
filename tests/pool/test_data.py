"""What large data costs, and whose it is: bytes, arrays and views as arguments and as results."""

from __future__ import annotations

import functools
import gc
import itertools
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import PickleBuffer
from typing import Any

import pytest

from portshm import SharedMem
from portshm.errors import WorkerCrashed
from portshm.pool import Pool
from portshm.pool._engine import regions as _regions
from portshm.pool._engine.loading import Loader, NoRoomError
from tests.tasks import note, noted, same, wait_for

MakePool = Callable[..., Pool]

KB, MB = 1 << 10, 1 << 20

# Below and above what travels in the slot's memory, and what gets a region of its own.
SIZES = [1, 10, 100 * KB, MB, 40 * MB]


def add_one(view: memoryview) -> tuple[int, int]:
    """First and last byte, one higher."""
    view[0] += 1
    if len(view) > 1:
        view[-1] += 1
    return view[0], view[-1]


def add_one_and_die_once(log: str, view: memoryview) -> tuple[int, int]:
    found = add_one(view)
    note(log, found)
    if len(noted(log)) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def add_to_both(mine: memoryview, other: memoryview) -> tuple[int, int]:
    return add_one(mine)[0], add_one(other)[0]


def grown(data: Any) -> bytearray:
    return bytearray(data) + b"!"


def zeros(size: int) -> PickleBuffer:
    return PickleBuffer(bytearray(size))


def sent_back(data: Any) -> Any:
    return PickleBuffer(data) if isinstance(data, memoryview) else data


KEPT: list[Any] = []


def kept_and_open(data: Any) -> int:
    """Keep it for good; how many descriptors this process has."""
    KEPT.append(data)
    return len(os.listdir("/proc/self/fd"))


def length(data: Any) -> int:
    return len(data)


def ends(data: Any) -> tuple[type, int, int, int]:
    return type(data), len(data), data[0], data[-1]


@pytest.mark.parametrize("size", SIZES)
def test_a_task_edits_what_is_its_own(make_pool: MakePool, size: int) -> None:
    pool = make_pool(2)
    original = bytearray(size)
    argument = PickleBuffer(original)
    assert pool.map(add_one, [argument] * 4, chunksize=1) == [(1, 1)] * 4, "of a map, one by one"
    assert pool.map(add_one, [argument] * 4, chunksize=4) == [(1, 1)] * 4, "of one chunk"
    assert [pool.apply(add_one, (argument,)) for _ in range(3)] == [(1, 1)] * 3
    assert pool.apply(add_to_both, (PickleBuffer(bytearray(size)), argument)) == (1, 1)
    assert not any(original[:1] + original[-1:])


@pytest.mark.parametrize("size", SIZES)
def test_a_retry_sees_what_the_first_attempt_saw(make_pool: MakePool, log: str, size: int) -> None:
    pool = make_pool(2, retries=1)
    original = bytearray(size)
    assert pool.apply(add_one_and_die_once, (log, PickleBuffer(original))) == (1, 1)
    assert noted(log) == ["(1, 1)", "(1, 1)"]
    assert not any(original[:1] + original[-1:])


class CountsArrivals:
    """A callable whose data is `data`, and which notes each time that it is unpickled."""

    def __init__(self, log: str, data: Any) -> None:
        self.log = log
        self.data = data

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        note(self.log, os.getpid())

    def __call__(self, item: int) -> int:
        return item + len(self.data)


@pytest.mark.parametrize("size", [10, MB, 40 * MB])
def test_the_callable_of_a_map_crosses_once_per_worker(make_pool: MakePool, log: str, size: int) -> None:
    pool = make_pool(2)
    function = CountsArrivals(log, bytes(size))
    assert pool.map(function, range(500), chunksize=1) == list(range(size, size + 500))
    arrivals = noted(log)
    assert 1 <= len(arrivals) <= 2
    assert len(set(arrivals)) == len(arrivals), "not twice to one worker"


def test_one_copy_of_what_a_partial_holds(make_pool: MakePool) -> None:
    pool = make_pool(2)
    before = pool.shared_bytes
    function = functools.partial(add_to_both, PickleBuffer(bytearray(40 * MB)))
    assert len(pool.map(function, [PickleBuffer(bytearray(1)) for _ in range(16)], chunksize=1)) == 16
    assert pool.shared_bytes < before + 60 * MB


@dataclass
class Record:
    name: str
    body: Any


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "alone": lambda data: data,
    "tuple": lambda data: (1, data),
    "list": lambda data: [data, data],
    "dict": lambda data: {"a": data, "b": 2},
    "dataclass": lambda data: Record("x", data),
}


@pytest.mark.parametrize("size", [0, 1, 100 * KB, 3 * MB, 9 * MB])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_arrive_as_they_were(make_pool: MakePool, kind: type, size: int) -> None:
    pool = make_pool(1)
    data = kind(os.urandom(size))
    for name, wrap in WRAPPED.items():
        sent = wrap(data)
        got = pool.apply(same, (sent,))
        assert got == sent, name
        inner = got if name == "alone" else next(v for v in vars_of(got) if isinstance(v, (bytes, bytearray)))
        assert type(inner) is kind, name
    assert pool.apply(grown, (data,)) == bytes(data) + b"!"


def vars_of(value: Any) -> list[Any]:
    if isinstance(value, Record):
        return list(vars(value).values())
    return list(value.values()) if isinstance(value, dict) else list(value)


def test_a_result_s_memory_is_used_again_when_its_last_view_is_gone(make_pool: MakePool) -> None:
    pool = make_pool(1)
    kept = pool.apply(zeros, (4 * MB,))
    part = memoryview(kept)[1000:2000]
    most = 0
    for number in range(20):
        view = memoryview(pool.apply(zeros, (4 * MB,)))
        assert not any(view[:4096])
        view[:] = bytes([number + 1]) * len(view)
        most = max(most, pool.shared_bytes)
        del view
    assert most < pool.stats()[0].shared_bytes + 16 * MB, "that one, this one, and one on its way"
    del kept
    gc.collect()
    part[:] = b"p" * 1000
    for _ in range(5):
        assert not any(memoryview(pool.apply(zeros, (4 * MB,)))[:4096])
    assert bytes(part) == b"p" * 1000, "a slice of it keeps it"


def test_what_lies_in_shared_memory_is_not_copied(make_pool: MakePool) -> None:
    pool = make_pool(2)
    result = memoryview(pool.apply(zeros, (40 * MB,)))
    with SharedMem.create(40 * MB, backend="file") as mem:
        mem.set_value_len(40 * MB)
        for view in (result, mem.value_ref()):
            view[:] = b"\x05" * len(view)
            before = pool.shared_bytes
            for part in (view, view[MB:], view[: 30 * MB], view[10 * MB : 20 * MB]):
                assert pool.map(add_one, [PickleBuffer(part)] * 3, chunksize=1) == [(6, 6)] * 3
                assert (part[0], part[-1]) == (5, 5), "edits are the task's own here too"
            assert pool.shared_bytes < before + MB, "nothing but addresses was sent"
            del part
        view.release()
        mem.unlink()


def test_who_sends_it_may_let_go_of_it_at_once(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pending = [pool.apply_async(ends, (PickleBuffer(pool.apply(zeros, (4 * MB,))),)) for _ in range(10)]
    for call in pending:
        assert call.get() == (memoryview, 4 * MB, 0, 0)


def produced(count: int, size: int) -> Iterator[PickleBuffer]:
    for _ in range(count):
        yield PickleBuffer(bytearray(size))


LIMIT = 32 * MB


@pytest.mark.parametrize("how", ["apply_async", "map", "imap"])
def test_pending_arguments_stay_within_the_limit(make_pool: MakePool, how: str) -> None:
    pool = make_pool(2, max_shared_bytes=LIMIT)
    before = pool.shared_bytes
    most = 0
    if how == "apply_async":
        argument = PickleBuffer(bytearray(5 * MB))
        calls = [pool.apply_async(length, (argument,)) for _ in range(100)]
        for call in calls:
            most = max(most, pool.shared_bytes)
            assert call.get() == 5 * MB
    elif how == "map":
        result = pool.map_async(length, list(produced(20, 5 * MB)) * 5)
        while not result.ready():
            most = max(most, pool.shared_bytes)
            result.wait(0.001)
        assert result.get() == [5 * MB] * 100
    else:
        for number in pool.imap(length, produced(100, 5 * MB), buffersize=8):
            most = max(most, pool.shared_bytes)
            assert number == 5 * MB
    assert 0 < most - before <= LIMIT


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors")
@pytest.mark.parametrize("size", [40_000, 2 * MB])
def test_descriptors_stay_few_however_many_results_are_kept(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(_regions, "_MOST_LEASES", 20)
    pool = make_pool(2)
    kept = pool.map(zeros, [size] * 30)
    before = len(os.listdir("/proc/self/fd"))
    kept += pool.map(zeros, [size] * 100)
    assert len(os.listdir("/proc/self/fd")) - before <= 40
    assert all(len(view) == size for view in kept)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors")
def test_descriptors_of_a_worker_stay_few_however_many_arguments_it_keeps(make_pool: MakePool) -> None:
    pool = make_pool(1)
    counts = [pool.apply(kept_and_open, (PickleBuffer(bytearray(40_000)),)) for _ in range(100)]
    assert max(counts) - min(counts) <= 5


def test_results_that_are_kept_stay_within_the_limit(make_pool: MakePool) -> None:
    pool = make_pool(2, max_shared_bytes=LIMIT)
    before = pool.shared_bytes
    kept = pool.map(zeros, [4 * MB] * 30, chunksize=1)
    assert pool.shared_bytes - before <= LIMIT + 2 * 4 * 5 * MB, "the limit, and what is on its way"
    assert all(len(view) == 4 * MB for view in kept)
    assert pool.map(length, [PickleBuffer(bytearray(4 * MB))] * 4) == [4 * MB] * 4


@pytest.mark.parametrize("when", ["before", "while it waits"])
def test_a_view_of_memory_that_has_been_unlinked(make_pool: MakePool, tmp_path: Path, when: str) -> None:
    pool = make_pool(1)
    gate = str(tmp_path / "gate")
    mem = SharedMem.create(MB)
    mem.set_value(b"x" * MB)
    view = PickleBuffer(mem.value_ref())
    if when == "while it waits":
        pool.apply_async(wait_for, (gate,))
    else:
        mem.unlink()
        mem.close()
    result = pool.apply_async(ends, (view,))
    mem.unlink()
    mem.close()
    Path(gate).touch()
    assert result.get(60) == (memoryview, MB, 120, 120)


def test_one_argument_beyond_the_limit_is_sent_all_the_same(make_pool: MakePool) -> None:
    pool = make_pool(2, max_shared_bytes=MB)
    assert pool.map(length, [PickleBuffer(bytearray(5 * MB))] * 6, chunksize=1) == [5 * MB] * 6


def test_a_function_that_could_not_be_sent_for_want_of_room_is_sent_later(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, refused = Loader._put_in_store, []

    def refuse_at_first(self: Loader, parcel: Any) -> Any:
        if len(refused) < 4:
            refused.append(parcel)
            raise NoRoomError
        return store(self, parcel)

    monkeypatch.setattr(Loader, "_put_in_store", refuse_at_first)
    pool = make_pool(2)
    assert pool.map(length, [PickleBuffer(bytearray(MB))] * 6, chunksize=1) == [MB] * 6
    assert len(refused) == 4
    refused.clear()
    assert pool.map(length, [PickleBuffer(bytearray(MB))] * 6, chunksize=1) == [MB] * 6


def test_a_crash_over_large_data_gives_its_room_back(make_pool: MakePool, log: str) -> None:
    pool = make_pool(1, max_shared_bytes=LIMIT)
    argument = PickleBuffer(bytearray(10 * MB))
    for _ in range(6):
        Path(log).unlink(missing_ok=True)
        with pytest.raises(WorkerCrashed) as caught:
            pool.apply(add_one_and_die_once, (log, argument))
        assert len(caught.value.item[0][1].raw()) == 10 * MB
        caught.value.__traceback__ = None
    assert pool.apply(add_one, (argument,)) == (1, 1)
    assert pool.shared_bytes <= LIMIT + pool.stats()[0].shared_bytes


def available() -> int:
    """Bytes of memory that could be had."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * KB
    except OSError:
        pass
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "view"])
def test_more_than_an_int_can_count(make_pool: MakePool, kind: str) -> None:
    size = (1 << 31) + 1
    if available() < 8 * size:
        pytest.skip(f"needs {8 * size >> 30} GiB of memory")
    pool = make_pool(1)
    data = bytearray(size)
    data[0], data[-1] = 3, 4
    sent: Any = {"bytes": bytes, "bytearray": lambda same: same, "view": PickleBuffer}[kind](data)
    arrived = {"bytes": bytes, "bytearray": bytearray, "view": memoryview}[kind]
    assert pool.apply(ends, (sent,)) == (arrived, size, 3, 4)
    back = pool.apply(sent_back, (sent,))
    assert ends(back) == (arrived, size, 3, 4)
    if kind == "view":
        assert pool.apply(add_one, (sent,)) == (4, 5)
        assert (data[0], data[-1]) == (3, 4)


@pytest.mark.parametrize("kind", [bytes, bytearray, PickleBuffer])
def test_sizes_around_every_limit(make_pool: MakePool, kind: Callable[[Any], Any]) -> None:
    pool = make_pool(2)
    around = [edge + step for edge, step in itertools.product([1 << 12, 1 << 15, 1 << 16, MB, 4 * MB], [-1, 0, 1])]
    sent = [kind(bytearray(b"x" * size)) for size in around]
    expected = [(size, 120, 120) for size in around]
    assert [found[1:] for found in pool.map(ends, sent)] == expected
    assert [ends(item)[1:] for item in pool.map(sent_back, sent)] == expected


def test_the_function_of_a_map_keeps_what_its_tasks_do_to_it(make_pool: MakePool) -> None:
    """It crosses once, so in each worker it is one object; the parent's own stays as it is."""
    pool = make_pool(1)
    held = bytearray(10)
    assert pool.map(functools.partial(counted_up, held), range(5), chunksize=1) == [1, 2, 3, 4, 5]
    assert held == bytes(10)


def counted_up(data: bytearray, _: int) -> int:
    data[0] += 1
    return data[0]


@pytest.mark.skipif(not os.path.isfile("/proc/self/statm"), reason="reads this process's memory there")
@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
def test_an_endless_input_is_read_ahead_of_by_so_much_and_no_more(make_pool: MakePool, method: str) -> None:
    pool = make_pool(2)
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield bytes([read % 256]) * 20_000

    results = getattr(pool, method)(same, endless(), buffersize=50)
    for _ in range(500):  # what there has to be is there
        next(results)
    before = resident()
    for taken in range(500, 5_000):
        assert len(next(results)) == 20_000
        assert read - taken <= 51
    assert resident() - before < 30 * MB, "of 90 that have gone by, each way"


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
