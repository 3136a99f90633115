from __future__ import annotations

import array
import contextlib
import datetime
import gc
import io
import mmap
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import portshm
from portshm import (
    GO_FUZZ_HEADER,
    PORTSHM_HEADER,
    HeaderError,
    RegionAddress,
    RegionClosedError,
    RegionExistsError,
    RegionNameError,
    RegionNotFoundError,
    RegionRefusedError,
    RegionSizeError,
    SharedMem,
    TornValueError,
    ValueTooLargeError,
)
from portshm._header import HeaderCodec

from . import children
from .children import run_python, start_python
from .fakes import HeapRegion

# Forked with the threads of a pool's management running, as the standard library itself does under this method.
ignore_fork_warning = pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")

Create = Callable[..., SharedMem]
FRAME = PORTSHM_HEADER.extend("frame", frame_id="q", stamp="d", label="8s")


def on_heap(capacity: int = 64, header: HeaderCodec = PORTSHM_HEADER, *, extra: int = 0) -> SharedMem:
    return SharedMem(HeapRegion.published(capacity, header, extra=extra), header)


@pytest.fixture(params=["heap", "file", "named"])
def mem(request: pytest.FixtureRequest) -> Iterator[SharedMem]:
    """64 bytes over each region there is: first the one that needs no operating system."""
    made = on_heap() if request.param == "heap" else SharedMem.create(64, backend=request.param)
    with contextlib.ExitStack() as stack:
        stack.callback(made.close)
        stack.callback(made.unlink)
        yield made


def raw(mem: SharedMem) -> bytes:
    """Header and value area as they are in memory."""
    return bytes(mem._region.view())


# -- values


def test_a_new_region_is_empty(mem: SharedMem) -> None:
    assert (mem.capacity, mem.size, mem.value_copy()) == (64, 64 + 192, b"")
    assert (mem.owner, mem.closed, mem.readonly, mem.superseded, mem.writing) == (True, False, False, False, False)
    header = mem.header
    assert (header.count, header.value_len, header.rand_state, header.rand_inc, header.raw_in_mem) == (0,) * 5


def _mmap(data: bytes) -> mmap.mmap:
    mapping = mmap.mmap(-1, len(data))
    mapping[:] = data
    return mapping


BYTES = bytes(range(1, 41))
BUFFERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: BYTES,
    "bytearray": lambda: bytearray(BYTES),
    "memoryview": lambda: memoryview(BYTES),
    "memoryview-2d": lambda: memoryview(BYTES).cast("B", (5, 8)),
    "memoryview-q": lambda: memoryview(BYTES).cast("q"),
    "array-i": lambda: array.array("i", BYTES),
    "array-d": lambda: array.array("d", BYTES),
    "mmap": lambda: _mmap(BYTES),
    "BytesIO": lambda: io.BytesIO(BYTES).getbuffer(),
    "empty": lambda: b"",
    "all of it": lambda: bytes(range(64)),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_stores_the_bytes_of_any_buffer(mem: SharedMem, kind: str) -> None:
    data = BUFFERS[kind]()
    expected = data[:] if isinstance(data, mmap.mmap) else bytes(data)
    mem.set_value(b"\xff" * 64)
    mem.set_value(data)
    assert mem.value_copy() == mem.stable_copy() == bytes(mem.value_ref()) == expected
    assert mem.header.value_len == len(expected)


def _numpy_arrays() -> dict[str, Callable[[Any], Any]]:
    simple = {t: lambda np, t=t: np.arange(4).astype(t) for t in ["?", "i1", "u8", "f2", "f4", "f8", "c16", "U3", "S5"]}
    return {
        **simple,
        "other byte order": lambda np: np.arange(4, dtype=">i4"),
        "F order": lambda np: np.asfortranarray(np.arange(6, dtype="i2").reshape(2, 3)),
        "empty": lambda np: np.empty((0, 3), dtype="f8"),
        "empty F order": lambda np: np.empty((3, 0), dtype="f8", order="F"),
        "no dimension": lambda np: np.array(5, dtype="i8"),
        "scalar": lambda np: np.float64(2.5),
        "read-only": lambda np: np.frombuffer(BYTES, dtype="i8"),
        "structured": lambda np: np.array([(1, 2.0)], dtype=[("a", "i2"), ("b", "f8")]),
        "structured, field with an O": lambda np: np.array([(1, 2)], dtype=[("Offset", "i4"), ("O", "i4")]),
        "datetime64": lambda np: np.array([datetime.datetime(2024, 1, 2)], dtype="M8[us]"),
        "datetime64 F order": lambda np: np.asfortranarray(np.zeros((2, 3), dtype="M8[s]")),
        "timedelta64": lambda np: np.arange(3).astype("m8[ns]"),
        "datetime64 in a structure": lambda np: np.zeros(2, dtype=[("t", "M8[s]"), ("v", "f8")]),
        "void": lambda np: np.zeros(2, dtype="V7"),
    }


@pytest.mark.parametrize("kind", _numpy_arrays())
def test_stores_the_bytes_of_any_array(mem: SharedMem, kind: str) -> None:
    np = pytest.importorskip("numpy")
    data = _numpy_arrays()[kind](np)
    mem.set_value(data)
    assert mem.value_copy() == data.tobytes(order="A")
    assert mem.header.value_len == data.nbytes
    if data.size:
        assert np.frombuffer(mem.value_ref(), dtype=data.dtype).tobytes() == data.tobytes(order="A")


@pytest.mark.parametrize("dtype", ["O", [("n", "i8"), ("o", "O")], [("t", "M8[s]"), ("o", "O")]])
def test_refuses_arrays_of_objects(mem: SharedMem, dtype: Any) -> None:
    np = pytest.importorskip("numpy")
    before = raw(mem)
    with pytest.raises(TypeError):
        mem.set_value(np.zeros(2, dtype=dtype))
    assert raw(mem) == before


@pytest.mark.parametrize("make", [lambda np: np.arange(8)[::2], lambda np: np.zeros((4, 4), "M8[s]")[:, 1]])
def test_refuses_arrays_with_gaps(mem: SharedMem, make: Callable[[Any], Any]) -> None:
    data = make(pytest.importorskip("numpy"))
    before = raw(mem)
    with pytest.raises(BufferError, match="not contiguous"):
        mem.set_value(data)
    assert raw(mem) == before


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (memoryview(BYTES)[::2], BufferError),
        (memoryview(BYTES)[::-1], BufferError),
        ("text", TypeError),
        (None, TypeError),
        (7, TypeError),
        ([1, 2], TypeError),
        (object(), TypeError),
    ],
)
def test_refuses_what_has_no_plain_bytes(mem: SharedMem, data: Any, error: type[Exception]) -> None:
    mem.set_value(b"kept")
    before = raw(mem)
    with pytest.raises(error):
        mem.set_value(data)
    assert raw(mem) == before


@pytest.mark.parametrize("data", [bytes(65), array.array("q", range(9)), bytearray(1 << 20)], ids=len)
def test_a_value_too_large_touches_nothing(mem: SharedMem, data: Any) -> None:
    mem.set_value(b"kept")
    before = raw(mem)
    with pytest.raises(ValueTooLargeError) as caught:
        mem.set_value(data)
    assert (caught.value.length, caught.value.capacity) == (memoryview(data).nbytes, 64)
    assert raw(mem) == before
    with pytest.raises(ValueTooLargeError):
        mem.set_value_len(65)
    assert raw(mem) == before


@pytest.mark.parametrize("length", [-1, -(2**70), 1.0, "1", None])
def test_a_length_that_is_none_touches_nothing(mem: SharedMem, length: Any) -> None:
    before = raw(mem)
    with pytest.raises(HeaderError, match="value_len"):
        mem.set_value_len(length)
    assert raw(mem) == before


def test_the_value_may_be_set_from_itself(mem: SharedMem) -> None:
    mem.set_value(bytes(range(40)))
    mem.set_value(mem.value_ref()[8:])
    assert mem.value_copy() == bytes(range(8, 40))


def test_value_ref_aliases_memory_and_is_writable(mem: SharedMem) -> None:
    mem.set_value(b"abcdef")
    view = mem.value_ref()
    view[0:2] = b"XY"
    assert mem.value_copy() == b"XYcdef"
    mem.set_value(b"123456")
    assert bytes(view) == b"123456"


def test_value_copy_is_a_copy(mem: SharedMem) -> None:
    mem.set_value(b"before")
    copy = mem.value_copy()
    mem.set_value(b"after!")
    assert copy == b"before"


def test_after_set_value_len_a_new_ref_has_that_many_bytes(mem: SharedMem) -> None:
    mem.set_value(b"abcdef")
    old = mem.value_ref()
    for length in (3, 0, 64, 6):
        mem.set_value_len(length)
        assert len(mem.value_ref()) == mem.header.value_len == length
    assert bytes(old) == mem.value_copy() == b"abcdef"


@pytest.mark.parametrize("length", [-1, 65, 2**62, -(2**63)])
def test_a_length_forged_in_memory_is_refused(mem: SharedMem, length: int) -> None:
    PORTSHM_HEADER.store(mem._region.view(), "value_len", length if length >= 0 else 0)
    if length < 0:
        mem.cell("value_len")[0] = length
    for read in (mem.value_ref, mem.value_copy, mem.stable_copy):
        with pytest.raises(HeaderError, match="value_len") as caught:
            read()
        assert caught.value.found == length
    mem.set_value(b"whole again")
    assert mem.value_copy() == b"whole again"


def test_a_mapping_rounded_up_to_pages_keeps_the_capacity_asked_for() -> None:
    mem = on_heap(10, extra=16384)
    assert mem.capacity == 10
    assert mem.size == 202
    mem.set_value_len(10)
    assert mem.value_ref().nbytes == 10
    with pytest.raises(ValueTooLargeError):
        mem.set_value(bytes(11))
    assert SharedMem(mem._region, PORTSHM_HEADER).capacity == 10
    mem.close()


def test_fields_of_ones_own_live_on_the_header(mem: SharedMem) -> None:
    own = SharedMem.create(8, header=FRAME)
    with own:
        own.header.frame_id += 3
        own.header.label = b"left"
        with SharedMem.attach(own.address, header=FRAME) as other:
            assert (other.header.frame_id, other.header.label) == (3, b"left\0\0\0\0")
        with SharedMem.attach(own.address, header=None) as unknown:
            assert unknown.layout.size == FRAME.size
            again = pickle.loads(pickle.dumps(unknown))
            with again:
                assert again.layout == unknown.layout
        with pytest.raises(HeaderError, match="header_size"):
            SharedMem.attach(own.address)


def test_the_seeds_layout_is_a_file_of_exactly_header_and_value(tmp_path: Path) -> None:
    with SharedMem.create(100, header=GO_FUZZ_HEADER, dir=tmp_path) as mem:
        assert mem.path is not None
        assert os.path.getsize(mem.path) == 140
        mem.set_value(b"fuzz")
        mem.header.count = 7
        assert Path(mem.path).read_bytes() == GO_FUZZ_HEADER.pack({"count": 7, "value_len": 4}) + b"fuzz" + bytes(96)
        with SharedMem.attach(mem.path, header=GO_FUZZ_HEADER) as other:
            assert (other.capacity, other.value_copy()) == (100, b"fuzz")
        with pytest.raises(HeaderError, match="sequence"):
            mem.stable_copy()
        mem.resize(200)
        assert (mem.capacity, mem.value_copy(), mem.header.count) == (200, b"fuzz", 7)
    with pytest.raises(RegionNameError, match="file"):
        SharedMem.create(100, header=GO_FUZZ_HEADER, backend="named")


# -- the end of it


def test_views_outlive_close(mem: SharedMem) -> None:
    mem.set_value(b"still here")
    view, header = mem.value_ref(), mem.header
    mem.close()
    gc.collect()
    assert bytes(view) == b"still here"
    assert header.value_len == 10
    view[:5] = b"STILL"
    assert bytes(view) == b"STILL here"


def test_use_after_close_is_an_error_that_says_so(mem: SharedMem) -> None:
    mem.close()
    mem.close()
    assert mem.closed
    assert "closed" in repr(mem)
    for use in (
        lambda: mem.header,
        mem.value_ref,
        mem.value_copy,
        mem.stable_copy,
        lambda: mem.set_value(b""),
        lambda: mem.set_value_len(0),
        lambda: mem.cell("count"),
        lambda: mem.superseded,
        lambda: mem.resize(10),
        mem.refresh,
        mem.__enter__,
    ):
        with pytest.raises(RegionClosedError):
            use()
    mem.unlink()


def test_leaving_the_block_unlinks_and_closes(create: Create) -> None:
    with create() as mem, SharedMem.attach(mem.address):
        pass  # the attached one has not unlinked anything
    assert mem.closed
    with pytest.raises(RegionNotFoundError):
        SharedMem.attach(mem.address)


def test_closing_without_unlink_leaves_the_region_to_others(create: Create) -> None:
    mem = create()
    mem.set_value(b"evidence")
    mem.close()
    with SharedMem.attach(mem.address) as other:
        assert other.value_copy() == b"evidence"
        assert not other.owner
        other.unlink()  # not the owner: nothing happens
    with SharedMem.attach(mem.address):
        pass


def test_unlink_leaves_the_attached_ones_in_peace(create: Create) -> None:
    mem = create()
    with SharedMem.attach(mem.address) as other:
        mem.unlink()
        mem.unlink()
        mem.set_value(b"message")
        assert other.value_copy() == b"message"


def test_an_owner_that_is_collected_removes_its_region(backend: Any) -> None:
    mem = SharedMem.create(64, backend=backend)
    address, view = mem.address, mem.value_ref()
    del mem
    gc.collect()
    with pytest.raises(RegionNotFoundError):
        SharedMem.attach(address)
    del view


def test_read_only_attachment(create: Create) -> None:
    mem = create()
    mem.set_value(b"abc")
    with SharedMem.attach(mem.address, readonly=True) as reader:
        assert reader.readonly
        view = reader.value_ref()
        assert view.readonly
        with pytest.raises(TypeError):
            view[0] = 1
        with pytest.raises(HeaderError, match="read-only"):
            reader.header.count = 1
        with pytest.raises(RegionRefusedError):
            reader.set_value(b"x")
        with pytest.raises(RegionRefusedError):
            reader.set_value_len(1)
        mem.set_value(b"new")
        assert reader.value_copy() == reader.stable_copy() == b"new"
        copy = pickle.loads(pickle.dumps(reader))
        with copy:
            assert copy.readonly
    assert mem.value_copy() == b"new"


# -- addresses and names


def test_address_as_text_and_back(create: Create) -> None:
    mem = create()
    text = str(mem.address)
    assert RegionAddress.parse(text) == mem.address == pickle.loads(pickle.dumps(mem.address))
    assert (mem.path is None) != (mem.name is None)
    attachable = [text, mem.address, *([mem.path, Path(mem.path)] if mem.path else [])]
    for address in attachable:
        with SharedMem.attach(address) as other:
            assert other.address == mem.address


@pytest.mark.parametrize("text", ["", "file:", "shm:", "shm:/x", "shm:a/b", "file:a\0b", b"/tmp/x", "shm:.."])
def test_text_that_is_no_address(text: Any) -> None:
    with pytest.raises(RegionNameError):
        RegionAddress.parse(text)


def test_a_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert RegionAddress.parse("x") == RegionAddress.parse("file:x") == RegionAddress("file", str(tmp_path / "x"))


def test_an_address_travels_in_an_environment_variable(create: Create) -> None:
    mem = create()
    mem.set_value(b"hello")
    os.environ["PORTSHM_TEST_ADDRESS"] = str(mem.address)
    try:
        done = run_python(
            "import os, portshm\n"
            "with portshm.SharedMem.attach(os.environ['PORTSHM_TEST_ADDRESS']) as mem: mem.set_value(b'there')"
        )
    finally:
        del os.environ["PORTSHM_TEST_ADDRESS"]
    assert (done.returncode, done.stderr) == (0, "")
    assert mem.value_copy() == b"there"


@pytest.mark.parametrize("capacity", [0, -1, -sys.maxsize, sys.maxsize, 2**64])
def test_a_capacity_that_cannot_be(create: Create, capacity: int) -> None:
    with pytest.raises(RegionSizeError):
        create(capacity)


def test_a_capacity_beyond_what_can_be_reserved(create: Create) -> None:
    with pytest.raises(portshm.RegionFullError) as caught:
        create(sys.maxsize - 4096)
    assert caught.value.errno == 28


def test_max_capacity_is_what_is_free(backend: Any) -> None:
    free = portshm.max_capacity(backend)
    assert 0 < free < sys.maxsize
    assert portshm.max_capacity() >= free - (64 << 20)  # others allocate meanwhile
    with pytest.raises(RegionNotFoundError):
        portshm.max_capacity(dir="/nowhere/at/all")


def test_creation_is_exclusive_and_harms_nobody(create: Create) -> None:
    mem = create(name=f"test-{os.getpid()}")
    mem.set_value(b"mine")
    with pytest.raises(RegionExistsError):
        create(name=f"test-{os.getpid()}")
    with SharedMem.attach(mem.address) as other:
        assert other.value_copy() == b"mine"


def test_unknown_backend_and_folder_for_a_named_one(tmp_path: Path) -> None:
    with pytest.raises(RegionNameError, match="auto"):
        SharedMem.create(1, backend="heap")  # type: ignore[arg-type]
    with pytest.raises(RegionNameError, match="dir="):
        SharedMem.create(1, backend="named", dir=tmp_path)
    with pytest.raises(RegionNameError, match="folder"):
        SharedMem.create(1, dir=tmp_path / "missing")


def test_attaching_to_nothing(backend: str, tmp_path: Path) -> None:
    address = f"file:{tmp_path}/x" if backend == "file" else "shm:portshm_nobody_has_this"
    with pytest.raises(RegionNotFoundError):
        SharedMem.attach(address)


# -- resize


@pytest.mark.parametrize("capacity", [6, 64, 100_000])
def test_resize_carries_everything_over(create: Create, capacity: int) -> None:
    mem = create(64, header=FRAME)
    mem.set_value(b"abcdef")
    header = mem.header
    header.count, header.rand_state, header.rand_inc, header.raw_in_mem = -3, 2**64 - 1, 5, True
    header.frame_id, header.stamp, header.label = 9, 0.5, b"label"
    before = {name: value for name, value in header if name not in ("capacity", "generation")}
    old_address, old_view = mem.address, mem.value_ref()
    with SharedMem.attach(mem.address, header=FRAME) as other, SharedMem.attach(mem.address, header=FRAME) as late:
        mem.resize(capacity)
        assert (mem.capacity, mem.value_copy(), mem.owner, mem.superseded) == (capacity, b"abcdef", True, False)
        assert {name: value for name, value in mem.header if name not in ("capacity", "generation")} == before
        assert mem.header.generation == 1
        assert mem.address != old_address
        with pytest.raises(RegionNotFoundError):
            SharedMem.attach(old_address, header=FRAME)

        assert bytes(old_view) == b"abcdef"
        assert other.superseded
        assert other.refresh()
        assert (other.address, other.capacity, other.value_copy()) == (mem.address, capacity, b"abcdef")
        assert not other.superseded
        assert not other.refresh()

        mem.resize(capacity + 1)  # past one that `late` has not seen: it needs the address that came by message
        with pytest.raises(RegionNotFoundError):
            late.refresh()
        assert late.value_copy() == b"abcdef", "a failed refresh loses nothing"
        assert late.refresh(mem.address)
        mem.set_value(b"all")
        assert late.value_copy() == b"all"


def test_resize_too_small_changes_nothing(create: Create) -> None:
    mem = create()
    mem.set_value(b"abcdef")
    before, address = raw(mem), mem.address
    with pytest.raises(ValueTooLargeError):
        mem.resize(5)
    for capacity in (0, -1):
        with pytest.raises(RegionSizeError):
            mem.resize(capacity)
    assert (raw(mem), mem.address) == (before, address)


def test_only_the_owner_resizes(create: Create) -> None:
    with SharedMem.attach(create().address) as other, pytest.raises(RegionRefusedError):
        other.resize(100)


def test_resize_keeps_a_torn_value_torn(create: Create) -> None:
    mem = create()
    mem.set_value(b"half")
    mem.cell("sequence")[0] |= 1
    mem.resize(100)
    assert mem.writing
    with pytest.raises(TornValueError):
        mem.stable_copy(0)


@pytest.mark.parametrize("name", [b"", b"../../etc/passwd", b"portshm_/x", b"x", b"\xff\xfe"])
def test_a_forged_successor_is_not_followed(create: Create, name: bytes) -> None:
    mem = create()
    with SharedMem.attach(mem.address) as other:
        PORTSHM_HEADER.store(mem._region.view(), "successor", name)
        PORTSHM_HEADER.store(mem._region.view(), "superseded", True)
        with pytest.raises((HeaderError, RegionNameError)):
            other.refresh()
        assert not other.closed


# -- a complete value or none


def test_stable_copy_waits_for_a_writer_and_then_gives_up(mem: SharedMem) -> None:
    mem.set_value(b"old")
    sequence = mem.cell("sequence")
    sequence[0] += 1
    assert mem.writing
    start = time.monotonic()
    with pytest.raises(TornValueError):
        mem.stable_copy(timeout=0.05)
    assert time.monotonic() - start >= 0.05
    mem.set_value(b"whole")  # by somebody else, after the writer died
    assert mem.stable_copy(0) == b"whole"
    assert sequence[0] % 2 == 0


def test_every_write_moves_the_sequence_word(mem: SharedMem) -> None:
    seen = [mem.header.sequence]
    for write in (lambda: mem.set_value(b"x"), lambda: mem.set_value(b"x"), lambda: mem.set_value_len(0)):
        write()
        seen.append(mem.header.sequence)
    assert len(set(seen)) == len(seen)
    assert not any(number & 1 for number in seen)


def test_the_sequence_word_wraps(mem: SharedMem) -> None:
    mem.cell("sequence")[0] = 2**64 - 1  # a writer died at the very end of the numbers
    mem.set_value(b"x")
    assert mem.header.sequence == 2
    assert mem.stable_copy(0) == b"x"


KILLS = 200
PATTERN_SIZE = 64 << 20


def test_a_writer_killed_at_any_instant_never_leaves_a_mixture(create: Create, backend: str) -> None:
    """200 kills, half of them on each backend, of writers inside or beside a `set_value` of 64 MiB.

    What the observer gets afterwards is the old value, the new one or none; and a value left half written is made
    whole by whoever writes next.
    """
    mem = create(PATTERN_SIZE)
    values = [b"A" * PATTERN_SIZE, b"B" * (PATTERN_SIZE - 4096)]
    mem.set_value(values[0])
    write_time = _time_of_a_write(mem, values[0])
    chance = random.Random(backend)
    outcomes = {"old": 0, "new": 0, "torn": 0}
    current = 0  # the value that was whole when this round began; none if the last writer left it torn
    for _ in range(KILLS // 2):
        if mem.writing and chance.random() < 0.5:  # the other half of them are left to the next child
            mem.set_value(values[current])
            assert not mem.writing, "the next writer makes it whole"
        whole = not mem.writing
        pid, started = _fork_writer(mem, values[1 - current])
        end = time.monotonic() + chance.uniform(0, 1.3 * write_time)
        while time.monotonic() < end:  # the instant is what is tested; nothing is waited for
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(started)
        try:
            copy = mem.stable_copy(timeout=0)
        except TornValueError:
            outcomes["torn"] += 1
            continue
        if copy == values[1 - current]:
            outcomes["new"] += 1
            current = 1 - current
        else:
            outcomes["old"] += 1
            assert whole
            assert copy == values[current]
    assert sum(outcomes.values()) == KILLS // 2
    assert outcomes["torn"]
    assert outcomes["old"] + outcomes["new"]


def _time_of_a_write(mem: SharedMem, value: bytes) -> float:
    """How long a fresh child takes, which has to map every page anew; the longest of a few."""
    times = []
    for _ in range(3):
        pid, started = _fork_writer(mem, value)
        start = time.monotonic()
        os.read(started, 1)
        times.append(time.monotonic() - start)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(started)
    return max(times)


def _fork_writer(mem: SharedMem, value: bytes) -> tuple[int, int]:
    """A child that stores `value` once and stays; it has begun when this returns, and says when it is through."""
    started, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(begin, b"!")
        mem.set_value(value)
        os.write(begin, b"!")
        while True:
            signal.pause()
    os.close(begin)
    os.read(started, 1)
    return pid, started


def test_an_observer_beside_a_living_writer_never_sees_a_mixture(create: Create) -> None:
    size = 1 << 20
    mem = create(size)
    values = [bytes([65]) * size, bytes([66]) * (size // 2)]
    mem.set_value(values[0])
    pid = os.fork()
    if pid == 0:
        while True:
            for value in values:
                mem.set_value(value)
                time.sleep(0.001)  # the rhythm of the writer: without a pause nobody ever gets a whole value
    try:
        lengths = set()
        for _ in range(200):
            with contextlib.suppress(TornValueError):
                copy = mem.stable_copy(timeout=0.2)
                assert copy in values
                lengths.add(len(copy))
        assert lengths
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# -- other processes


@ignore_fork_warning
def test_travels_as_the_argument_of_a_process(create: Create, start_method: str) -> None:
    mem = create()
    mem.set_value(b"abc")
    process = multiprocessing.get_context(start_method).Process(target=children.answer_in_memory, args=(mem,))
    process.start()
    process.join()
    assert process.exitcode == 0
    process.close()
    assert (mem.value_copy(), mem.header.count) == (b"cba", 1)
    with SharedMem.attach(mem.address):
        pass  # the child has left its block, and is no owner


@ignore_fork_warning
def test_travels_through_the_standard_librarys_pools(create: Create, start_method: str) -> None:
    mem = create()
    mem.set_value(b"abc")
    context: Any = multiprocessing.get_context(start_method)
    with context.Pool(1) as pool:
        assert pool.map(children.reversed_value, [mem] * 3) == [b"cba"] * 3
        pool.close()
        pool.join()
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        assert list(executor.map(children.reversed_value, [mem] * 3)) == [b"cba"] * 3
    assert mem.value_copy() == b"abc"


@pytest.mark.parametrize("way", ["exit", "collect", "os._exit", "exception"])
def test_a_forked_child_never_unlinks(create: Create, way: str) -> None:
    mem = create()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert not mem.owner
            mem.unlink()
            if way == "collect":
                mem.close()
            elif way == "exit":
                mem._finalizer()  # type: ignore[misc]  # what weakref.finalize does at exit
            elif way == "exception":
                with contextlib.suppress(ZeroDivisionError), mem:
                    raise ZeroDivisionError
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    with SharedMem.attach(mem.address) as other:
        assert other.value_copy() == b""
    assert mem.owner


def test_a_forked_child_that_exits_normally_never_unlinks(backend: str) -> None:
    # Whole programs, because only a normal exit runs atexit, collection at shutdown and the standard library's own.
    done = run_python(
        "import os, sys, portshm\n"
        f"mem = portshm.SharedMem.create(10, backend={backend!r})\n"
        "mem.set_value(b'parent')\n"
        "for way in ('exit', 'collect'):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        if way == 'collect':\n"
        "            mem = None\n"
        "        sys.exit()\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "    assert portshm.SharedMem.attach(mem.address).value_copy() == b'parent'\n"
        "print(mem.address)\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(RegionNotFoundError):
        SharedMem.attach(done.stdout.strip())  # the owner's own exit has removed it


@pytest.mark.parametrize("way", ["pass", "mem.close()", "mem.unlink()", "os._exit(0)", "view = mem.value_ref()"])
def test_the_exit_of_a_stranger_destroys_nothing(create: Create, way: str) -> None:
    mem = create()
    mem.set_value(b"mine")
    done = run_python(f"import os, sys, portshm\nmem = portshm.SharedMem.attach(sys.argv[1])\n{way}", mem.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with SharedMem.attach(mem.address) as other:
        assert other.value_copy() == b"mine"


@pytest.mark.parametrize(
    "program",
    [
        "mem = create()",
        "mem = create(); view = mem.value_ref(); header = mem.header",
        "mem = create(); view = mem.value_ref(); mem.close(); mem.unlink()",
        "mem = create(); other = attach(mem.address); view = other.value_ref(); mem.unlink()",
        "mem = create(); other = attach(mem.address); other.close(); mem.unlink(); mem.close()",
        "mem = create(); view = mem.value_ref(); mem.resize(100); mem.resize(10)",
        "mem = create(); mem.cycle = mem; other = attach(mem.address); other.cycle = other",
        "address = create().address\ntry: attach(address)\nexcept portshm.RegionNotFoundError: pass",
        # The standard library's own, tracked, beside ours.
        "from multiprocessing.shared_memory import *; s = SharedMemory(None, True, 1); create(); s.close(); s.unlink()",
    ],
)
def test_nothing_reaches_stderr_at_any_exit(backend: str, program: str) -> None:
    # Views, cycles and regions die in whatever order the interpreter's end takes them.
    done = run_python(
        "import functools, portshm\n"
        f"create = functools.partial(portshm.SharedMem.create, 64, backend={backend!r})\n"
        f"attach = portshm.SharedMem.attach\n{program}"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_owner_that_exits_while_others_are_attached(backend: str) -> None:
    owner = start_python(
        "import sys, portshm\n"
        f"mem = portshm.SharedMem.create(64, backend={backend!r})\n"
        "mem.set_value(b'legacy'); print(mem.address, flush=True); sys.stdin.read()"
    )
    with owner:
        assert owner.stdout is not None
        with SharedMem.attach(owner.stdout.readline().strip()) as mem:
            owner.communicate()
            assert mem.value_copy() == b"legacy"
            with pytest.raises(RegionNotFoundError):
                SharedMem.attach(mem.address)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"capacity": "5"}, RegionSizeError),
        ({"name": 5}, RegionNameError),
        ({"dir": ""}, RegionNameError),
        ({"dir": "a\0b"}, RegionNameError),
        ({"dir": "/tmp/" + "x" * 300}, RegionNameError),
        ({"dir": ".", "backend": "none"}, RegionNameError),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        SharedMem.create(**{"capacity": 5, **arguments})


@pytest.mark.parametrize(("kind", "name"), [("none", "x"), ("shm", "a/b"), ("shm", ""), ("file", "a\0b")])
def test_addresses_that_make_no_sense(kind: Any, name: str) -> None:
    with pytest.raises(RegionNameError):
        RegionAddress(kind, name)


def test_the_owner_keeps_to_its_own_memory(create: Create) -> None:
    mem, other = create(), create()
    with pytest.raises(RegionRefusedError, match="owner"):
        mem.refresh(other.address)
    assert mem.owner
    assert mem.address != other.address


@pytest.mark.skipif(not hasattr(os, "statvfs"), reason="asks the file system")
def test_more_than_there_is_is_not_even_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: tried.append(args), raising=False)
    with pytest.raises(OSError, match="no room for"):
        SharedMem.create(1 << 60, dir=tmp_path)
    assert not tried
    assert not os.listdir(tmp_path)
