"""The store: regions are made once, come back when their last user has gone, and are never lost."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest

from portshm import RegionClosedError
from portshm._backends import Backend
from portshm.pool._engine import regions as _regions
from portshm.pool._engine.regions import RegionStore, StoreFullError

MB = 1 << 20


@pytest.fixture
def store(backend: Backend) -> Iterator[RegionStore]:
    store = RegionStore(backend, None)
    yield store
    store.close()


def test_a_region_comes_back_and_is_used_again(store: RegionStore) -> None:
    first = store.acquire(MB)
    assert first.size >= MB
    assert store.bytes == first.size
    address = first.address
    store.release(first.id)
    again = store.acquire(MB - 1000)
    assert again.address == address
    assert store.bytes == again.size


def test_two_in_use_are_two(store: RegionStore) -> None:
    one, two = store.acquire(MB), store.acquire(MB)
    assert one.address != two.address
    assert one.id != two.id
    one.view[:4] = b"one!"
    two.view[:4] = b"two!"
    assert one.view[:4] == b"one!"


def test_every_user_counts(store: RegionStore) -> None:
    stored = store.acquire(MB)
    store.add_user(stored.id)
    store.add_user(stored.id)
    for _ in range(2):
        store.release(stored.id)
        assert store.acquire(MB).address != stored.address
    store.release(stored.id)
    assert store.acquire(MB).address == stored.address


def test_a_region_that_is_far_too_large_is_left_for_others(store: RegionStore) -> None:
    large = store.acquire(16 * MB)
    store.release(large.id)
    assert store.acquire(1000).address != large.address


@pytest.mark.parametrize("size", [0, 1, (1 << 16) - 1, 1 << 16, MB, MB + 1, 5 * MB + 12345])
def test_a_region_is_as_large_as_was_asked_for(store: RegionStore, size: int) -> None:
    stored = store.acquire(size)
    assert size <= stored.size <= max(1 << 16, size + size // 4 + (1 << 16))
    assert len(stored.view) >= stored.size


def test_a_lease_keeps_its_region_from_being_used_again(store: RegionStore) -> None:
    stored = store.acquire(MB)
    stored.view[:5] = b"hello"
    lease = store.lease(stored, MB)
    part = lease[1:4]
    del lease
    store.release(stored.id)
    gc.collect()
    other = store.acquire(MB)
    assert other.address != stored.address, "a slice of the view is alive"
    assert part == b"ell"
    del part
    gc.collect()
    assert store.acquire(MB).address == stored.address


def test_a_lease_outlives_the_store(backend: Backend) -> None:
    store = RegionStore(backend, None)
    stored = store.acquire(MB)
    stored.view[:5] = b"hello"
    lease = store.lease(stored, MB)
    store.close()
    assert lease[:5] == b"hello"
    lease[:5] = b"HELLO"
    assert lease[:5] == b"HELLO"


def leased(store: RegionStore, size: int) -> tuple[memoryview, bool]:
    """What a user would have of a result, and whether it lies in shared memory."""
    stored = store.acquire(size, force=True)
    view = store.lease(stored, size)
    store.release(stored.id)
    return view, not isinstance(view.obj, bytearray)


def test_small_results_are_copied_out(store: RegionStore) -> None:
    kept = [leased(store, MB - 1) for _ in range(20)]
    assert not any(in_place for _, in_place in kept)
    assert store.bytes < 2 * MB, "one region was enough"


def test_many_results_are_copied_out(store: RegionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_regions, "_MOST_LEASES", 3)
    kept = [leased(store, MB) for _ in range(6)]
    assert [in_place for _, in_place in kept] == [True] * 3 + [False] * 3
    del kept[0]
    gc.collect()
    assert leased(store, MB)[1], "one has gone"


def test_leases_leave_half_of_the_limit_to_others(backend: Backend) -> None:
    store = RegionStore(backend, 4 * MB)
    try:
        kept = [leased(store, MB) for _ in range(10)]
        assert [in_place for _, in_place in kept] == [True] * 2 + [False] * 8
        assert store.bytes <= 4 * MB
        store.acquire(MB)
        kept.clear()
        gc.collect()
        assert leased(store, MB)[1]
    finally:
        store.close()


def test_few_free_regions_are_kept(store: RegionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_regions, "_MOST_FREE", 2)
    for stored in [store.acquire(1) for _ in range(10)]:
        store.release(stored.id)
    store.release(store.acquire(1).id)
    store.acquire(1)
    assert len(store._free) <= 2


def test_the_limit(backend: Backend) -> None:
    store = RegionStore(backend, 4 * MB)
    try:
        regions = [store.acquire(MB) for _ in range(3)]
        with pytest.raises(StoreFullError, match="max_shared_bytes"):
            store.acquire(3 * MB)
        forced = store.acquire(3 * MB, force=True)
        assert store.bytes > 4 * MB
        for stored in (*regions, forced):
            store.release(stored.id)
        assert store.acquire(int(3.5 * MB)).size <= 4 * MB
        assert store.bytes <= 4 * MB, "free regions made way"
    finally:
        store.close()


def test_close_removes_everything(backend: Backend) -> None:
    store = RegionStore(backend, None)
    used, free = store.acquire(MB), store.acquire(MB)
    store.release(free.id)
    paths = [stored.address.partition(":")[2] for stored in (used, free)]
    store.close()
    assert store.bytes == 0
    assert not any(map(os.path.exists, paths))
    with pytest.raises(RegionClosedError):
        store.acquire(MB)


def test_releasing_what_is_not_there_does_no_harm(store: RegionStore) -> None:
    store.release(12345)
    stored = store.acquire(MB)
    store.release(stored.id)
    store.release(stored.id)
    one, two = store.acquire(MB), store.acquire(MB)
    assert one.address != two.address


def test_many_threads(store: RegionStore) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(100):
            stored = store.acquire(1 << 16)
            stored.view[:1] = bytes([number])
            if stored.view[0] != number:
                wrong.append(number)
            store.release(stored.id)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.bytes <= 9 << 16
