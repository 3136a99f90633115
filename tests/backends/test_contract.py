"""What any `Region` promises, once, for each backend. `tests/fakes.py` has the simplest thing that keeps it."""

from __future__ import annotations

import gc
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import portshm
from portshm import Region, RegionClosedError, RegionExistsError, RegionFullError, RegionNotFoundError, SharedMem
from portshm._backends import attach_region, create_region
from portshm._backends._system import marker_dir, memory_dir
from portshm._region import fresh_name, name_for

from ..children import environment, run_python

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")


@pytest.fixture
def region(backend: Any) -> Iterator[Region]:
    made = create_region(5000, backend)
    yield made
    made.unlink()
    made.close()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_is_zeroed_and_as_large_as_asked(region: Region) -> None:
    view = region.view()
    assert region.size == view.nbytes >= 5000
    assert not any(view)
    assert (view.format, view.ndim, view.readonly) == ("B", 1, False)


def test_what_one_writes_the_other_reads(region: Region) -> None:
    other = attach_region(region.address)
    assert other.address == region.address
    assert other.size >= 5000
    region.view()[0:3] = b"abc"
    assert bytes(other.view()[0:3]) == b"abc"
    other.view()[4999] = 7
    assert region.view()[4999] == 7
    other.close()


def test_the_creator_owns_and_nobody_else(region: Region) -> None:
    other = attach_region(region.address)
    assert region.owner
    assert not other.owner
    other.unlink()
    other.close()
    attach_region(region.address).close()


def test_read_only_is_read_only(region: Region) -> None:
    other = attach_region(region.address, readonly=True)
    view = other.view()
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    region.view()[0] = 1
    assert view[0] == 1
    other.close()


def test_views_outlive_close_and_close_can_be_repeated(region: Region) -> None:
    other = attach_region(region.address)
    view = other.view()
    other.close()
    other.close()
    assert other.closed
    with pytest.raises(RegionClosedError):
        other.view()
    region.view()[1] = 9
    assert view[1] == 9


def test_unlink_ends_the_name_and_not_the_mapping(region: Region) -> None:
    other = attach_region(region.address)
    region.unlink()
    region.unlink()
    with pytest.raises(RegionNotFoundError):
        attach_region(region.address)
    region.view()[0] = 5
    assert other.view()[0] == 5
    other.close()


def test_only_this_user_may_reach_it(region: Region) -> None:
    path = region.address.name if region.address.kind == "file" else f"/dev/shm/{region.address.name}"
    if not os.path.exists(path):
        pytest.skip("named segments have no place in the file system here")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_name_is_taken_once(backend: Any) -> None:
    first = create_region(10, backend, name="twice")
    try:
        with pytest.raises(RegionExistsError):
            create_region(10, backend, name="twice")
        attach_region(first.address).close()
    finally:
        first.unlink()
        first.close()
    second = create_region(10, backend, name="twice")
    second.unlink()
    second.close()


# -- names


def test_names_fit_macos(region: Region) -> None:
    assert len("/" + os.path.basename(region.address.name)) <= 31


@pytest.mark.parametrize("label", ["x" * 200, "ü", "UPPER", "with space", "with.dot", "🦀" * 50, "x.owner", "x.lock"])
def test_any_label_works_and_becomes_a_name_that_fits(backend: Any, label: str) -> None:
    made = create_region(10, backend, name=label)
    try:
        name = os.path.basename(made.address.name)
        assert name.startswith("portshm_")
        assert name.isascii()
        assert len(name) <= 30
        assert name_for(name) == name
        attach_region(made.address).close()
    finally:
        made.unlink()
        made.close()


def test_labels_that_differ_late_get_names_that_differ() -> None:
    assert name_for("x" * 199 + "a") != name_for("x" * 199 + "b")
    assert name_for("File") != name_for("file")
    assert len({fresh_name() for _ in range(1000)}) == 1000


@pytest.mark.parametrize("label", ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\\b", "c:x", "nul\0"])
def test_a_label_that_is_no_plain_name_is_refused(backend: Any, label: str) -> None:
    with pytest.raises(portshm.RegionNameError):
        create_region(10, backend, name=label)


# -- descriptors


@linux_only
def test_an_open_region_costs_one_descriptor_at_most(backend: Any) -> None:
    before = descriptors()
    owned = [create_region(5000, backend) for _ in range(10)]
    # A named one before 3.13 has two with its owner's mark: the standard library's mmap keeps a duplicate.
    most = 2 if backend == "named" and sys.version_info < (3, 13) else 1
    assert descriptors() - before <= most * 10
    attached = [attach_region(region.address) for region in owned]
    assert descriptors() - before <= (most + 1) * 10
    if sys.version_info >= (3, 13):
        assert descriptors() - before <= 10, "attaching costs none at all"
    for region in [*attached, *owned]:
        region.unlink()
        region.close()
    assert descriptors() == before


@linux_only
def test_2000_regions_closed_with_live_views(backend: Any) -> None:
    before = descriptors()
    views = []
    for number in range(1000):
        owner = create_region(4096, backend)
        other = attach_region(owner.address)
        views += [owner.view(), other.view()]
        views[-1][0] = number % 251
        owner.unlink()
        for region in (owner, other):
            region.close()
    # mmap.mmap keeps a duplicate of its descriptor for as long as it maps; only from 3.13 it can be told not to
    # (trackfd=False). So one per mapping before, none since.
    allowed = 0 if sys.version_info >= (3, 13) else len(views)
    del owner, other, region
    assert descriptors() - before <= allowed
    assert all(views[2 * number][0] == views[2 * number + 1][0] == number % 251 for number in range(1000))
    views.clear()
    assert descriptors() == before


@linux_only
def test_failures_cost_no_descriptor(backend: Any) -> None:
    before = descriptors()
    taken = create_region(10, backend, name="taken")
    held = descriptors()
    for _ in range(5):
        for attempt in (
            lambda: create_region(10, backend, name="taken"),
            lambda: create_region(sys.maxsize - 5000, backend),
            lambda: SharedMem.attach(taken.address),  # zeros: not ready
            lambda: attach_region(portshm.RegionAddress(taken.address.kind, taken.address.name + "x")),
        ):
            with pytest.raises(portshm.PortShmError):
                attempt()
    assert descriptors() == held
    taken.unlink()
    taken.close()
    assert descriptors() == before


# -- forked children


@pytest.mark.parametrize("action", ["unlink", "close", "collect"])
def test_a_forked_child_never_owns(region: Region, action: str) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert not region.owner
            if action == "unlink":
                region.unlink()
            elif action == "close":
                region.close()
                region.unlink()
            else:
                region.__dict__.clear()
                gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert region.owner
    attach_region(region.address).close()


# -- room

# Everything that needs a full file system happens in a program of its own, in a mount namespace where /dev/shm has
# 1 MB. `_small` says whether there can be one.
SMALL = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" "$@"'
IN_SMALL = ("unshare", "-Urm", "sh", "-c", SMALL)


def _small(program: str, **options: Any) -> Any:
    import shutil
    import subprocess

    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    if subprocess.run([*IN_SMALL, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not make a mount namespace here")
    return run_python(program, prefix=IN_SMALL, **options)


@pytest.mark.parametrize("where", ["backend='file', dir='/dev/shm'", "backend='named'"])
def test_a_full_shared_memory_is_an_error_that_names_the_mount(where: str) -> None:
    done = _small(
        "import os, portshm, errno\n"
        f"try: portshm.SharedMem.create(64 << 20, {where})\n"
        "except portshm.RegionFullError as error:\n"
        "    assert isinstance(error, OSError) and error.errno == errno.ENOSPC\n"
        "    assert error.filename == '/dev/shm', error.filename\n"
        "    assert str((64 << 20) + 192) in str(error) and '1048576 are free' in str(error), error\n"
        "assert os.listdir('/dev/shm') == [], os.listdir('/dev/shm')\n"
        # The last page is there as well: not one store ends in SIGBUS.
        f"mem = portshm.SharedMem.create(900_000, {where})\n"
        "mem.set_value(b'x' * 900_000)\n"
        "try: mem.resize(500_000)\n"
        "except ValueError: pass\n"
        "mem.set_value_len(10)\n"
        "try: mem.resize(500_000)\n"
        "except portshm.RegionFullError: pass\n"
        "assert mem.value_copy() == b'x' * 10 and not mem.superseded\n"
        "assert portshm.max_capacity('named') < 1 << 20\n"
        "print('alive')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_auto_falls_back_to_a_temporary_file() -> None:
    done = _small(
        "import portshm, tempfile, os\n"
        "small = portshm.SharedMem.create(1000)\n"
        "large = portshm.SharedMem.create(8 << 20)\n"
        "assert os.path.dirname(small.path) == '/dev/shm', small\n"
        "assert os.path.dirname(large.path) == tempfile.gettempdir(), large\n"
        "large.set_value(bytes(8 << 20))\n"
        "assert portshm.max_capacity() > 8 << 20\n"
        "print('alive')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_without_shared_memory_auto_is_a_temporary_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Android: no /dev/shm, and a Python built without shm_open.
    monkeypatch.setattr("portshm._backends.memory_dir", lambda: None)
    monkeypatch.setitem(sys.modules, "portshm._backends.named", None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RegionNotFoundError, match="no named shared memory"):
        SharedMem.create(10, backend="named")
    with SharedMem.create(10) as mem:
        assert mem.path is not None
        assert os.path.dirname(mem.path) == str(tmp_path)


def test_on_a_system_whose_memory_is_no_folder_auto_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portshm._backends.memory_dir", lambda: None)  # macOS
    with SharedMem.create(10) as mem:
        assert mem.address.kind == "shm"


# -- what other systems do


def test_a_file_may_be_sized_once_only(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # macOS: the second ftruncate of a shared-memory object is EINVAL.
    sized: set[int] = set()
    real = os.ftruncate

    def once(fd: int, length: int) -> None:
        inode = os.fstat(fd).st_ino
        if inode in sized:
            raise OSError(22, "Invalid argument")
        sized.add(inode)
        real(fd, length)

    monkeypatch.setattr(os, "ftruncate", once)
    with SharedMem.create(100, backend=backend) as mem, SharedMem.attach(mem.address) as other:
        mem.set_value(b"kept")
        for capacity in (100_000, 10, 5_000):
            mem.resize(capacity)
            assert other.refresh()
            assert other.value_copy() == b"kept"


@pytest.mark.parametrize("number", [22, 95, 19, 38])
def test_where_space_cannot_be_reserved_it_is_written(
    backend: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with SharedMem.create(3 << 20, backend=backend) as mem:
        path = mem.path or f"/dev/shm/{mem.name}"
        if os.path.exists(path):
            assert os.stat(path).st_size == mem.size
            assert os.stat(path).st_blocks * 512 >= mem.size, "sparse: a later store could be a SIGBUS"
        mem.set_value(bytes(3 << 20))
    monkeypatch.delattr(os, "posix_fallocate")  # macOS
    with SharedMem.create(10, backend=backend) as mem:
        mem.set_value(b"x")


def test_space_is_reserved(backend: Any) -> None:
    with SharedMem.create(3 << 20, backend=backend) as mem:
        path = mem.path or f"/dev/shm/{mem.name}"
        if not os.path.exists(path):
            pytest.skip("named segments have no place in the file system here")
        assert os.stat(path).st_blocks * 512 >= mem.size


def test_a_file_system_without_room_while_writing(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = set(os.listdir(memory_dir() or marker_dir()))
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(RegionFullError) as caught:
        create_region(10_000, backend, name="noroom")
    assert os.path.ismount(caught.value.filename)
    assert "portshm_noroom" not in set(os.listdir(memory_dir() or marker_dir())) - before


def test_environment_finds_this_package() -> None:
    # The programs above would otherwise test an installed portshm instead of this one.
    done = run_python("import portshm; print(portshm.__file__)")
    assert done.stdout.strip() == portshm.__file__
    assert environment()["PYTHONPATH"]
