from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import portshm
from portshm import RegionAddress, RegionNotFoundError, SharedMem

from .children import start_python

OWNER = """
import sys, portshm
mem = portshm.SharedMem.create(5000, backend=sys.argv[1], dir=sys.argv[2] or None)
mem.set_value(b"evidence")
print(mem.address, flush=True)
sys.stdin.read()
"""


@contextmanager
def owner_of(backend: str, folder: str | Path = "", prefix: tuple[str, ...] = ()) -> Iterator[tuple[Any, str]]:
    """Another program that owns a region, and the region's address. It ends with the block, if not before."""
    with start_python(OWNER, backend, folder, prefix=prefix) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.stdin.close()


def exists(address: str) -> bool:
    try:
        SharedMem.attach(address).close()
    except RegionNotFoundError:
        return False
    return True


def clean_until(gone: Callable[[], bool], folder: Path) -> None:
    """Clean, and again for as long as somebody else's reaper holds the lock for a moment, as ours does."""
    deadline = time.monotonic() + 10
    portshm.clean([folder])
    while not gone() and time.monotonic() < deadline:
        portshm.clean([folder])
    assert gone()


def traces(address: str) -> list[str]:
    """What lies about under the region's name, anywhere."""
    name = os.path.basename(RegionAddress.parse(address).name)
    found = []
    for folder in {*portshm._reaper.search_dirs(), os.path.dirname(RegionAddress.parse(address).name)} - {""}:
        found += [entry for entry in os.listdir(folder) if entry.startswith(name)]
    return found


def test_what_a_killed_owner_leaves_is_readable_and_then_removed(backend: str, tmp_path: Path) -> None:
    # Another run of these tests, or any pool that starts, reaps too, and may be quicker than this test where the
    # place is shared. Such a round shows nothing and is done again; files are in a folder of our own, and never are.
    folder: str | Path = tmp_path if backend == "file" else ""
    shown = 0
    for _ in range(60):
        with owner_of(backend, folder) as (process, address):
            portshm.clean([tmp_path])
            assert exists(address), "a living owner's region is never removed"
            process.send_signal(signal.SIGKILL)
            process.wait()
        try:
            with SharedMem.attach(address) as mem:
                assert mem.value_copy() == b"evidence"
        except RegionNotFoundError:
            assert backend == "named"
            continue
        clean_until(lambda: traces(address) == [], tmp_path)
        assert not exists(address)
        shown += 1
        if shown == 20:
            return
    pytest.fail(f"only {shown} of 60 killed owners left something to be read")


def test_clean_says_what_it_removed(tmp_path: Path) -> None:
    mem = SharedMem.create(10, dir=tmp_path)
    mem.close()  # an owner that closes without unlink leaves an orphan
    assert portshm.clean([tmp_path]).count(mem.address) == 1
    assert mem.address not in portshm.clean([tmp_path])
    assert os.listdir(tmp_path) == []


def test_list_regions_tells_size_and_owner(backend: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dir": tmp_path} if backend == "file" else {}
    with SharedMem.create(5000, backend=backend, **options) as mem:  # type: ignore[arg-type]
        (info,) = [info for info in portshm.list_regions([tmp_path]) if info.address == mem.address]
        assert info.owner_alive
        assert info.size >= mem.size
        assert info.age >= 0
    assert mem.address not in [info.address for info in portshm.list_regions([tmp_path])]
    orphan = SharedMem.create(10, dir=tmp_path)
    orphan.close()
    (info,) = [info for info in portshm.list_regions([tmp_path]) if info.address == orphan.address]
    assert not info.owner_alive
    orphan.unlink()


def test_looking_removes_nothing_and_locks_nobody_out(tmp_path: Path) -> None:
    mem = SharedMem.create(10, dir=tmp_path)
    mem.close()
    for _ in range(3):
        portshm.list_regions([tmp_path])
    assert exists(str(mem.address))
    assert mem.address in portshm.clean([tmp_path])


def test_the_oldest_comes_first(tmp_path: Path) -> None:
    with (
        SharedMem.create(10, dir=tmp_path, name="young") as young,
        SharedMem.create(10, dir=tmp_path, name="old") as old,
    ):
        assert young.path is not None
        assert old.path is not None
        os.utime(old.path, (1, 1))
        order = [info.address for info in portshm.list_regions([tmp_path]) if str(tmp_path) in info.address.name]
        assert order == [old.address, young.address]


def test_only_what_is_ours_is_touched(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "portshm_link").symlink_to(victim)
    (tmp_path / "portshm_dangling").symlink_to(tmp_path / "missing")
    (tmp_path / "portshm_folder").mkdir()
    os.mkfifo(tmp_path / "portshm_fifo", 0o600)
    (tmp_path / "portshm_public").write_bytes(b"x")
    (tmp_path / "portshm_public").chmod(0o644)
    (tmp_path / "other_program").write_bytes(b"x")
    (tmp_path / "other_program").chmod(0o600)
    if os.geteuid() == 0:
        (tmp_path / "portshm_foreign").write_bytes(b"x")
        (tmp_path / "portshm_foreign").chmod(0o600)
        os.chown(tmp_path / "portshm_foreign", 12345, -1)
    before = sorted(os.listdir(tmp_path))
    assert not [address for address in portshm.clean([tmp_path]) if str(tmp_path) in address.name]
    assert not [info for info in portshm.list_regions([tmp_path]) if str(tmp_path) in info.address.name]
    assert sorted(os.listdir(tmp_path)) == before
    assert victim.read_bytes() == b"precious"


def test_folders_that_are_missing_or_closed_are_passed_over(tmp_path: Path) -> None:
    assert isinstance(portshm.clean([tmp_path / "missing", "/proc/1/fd", __file__]), list)


def test_a_mark_whose_segment_is_gone_is_removed(tmp_path: Path) -> None:
    # The owner died between mark and segment.
    folder = portshm._reaper.search_dirs()[0]
    mark = Path(folder, "portshm_lonely.owner")
    mark.touch(mode=0o600)
    clean_until(lambda: not mark.exists(), tmp_path)


def test_lock_files_go_once_their_region_is_gone_and_not_before(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("filelock")
    locked = pytest.importorskip("portshm.locked")
    with SharedMem.create(10, backend=backend) as mem:  # type: ignore[arg-type]
        with locked.LockedSharedMem(mem):
            pass
        path = Path(locked.lock_path(mem.address))
        portshm.clean()
        assert path.exists(), "while the region lives, removing the lock would let two in"
        mem.unlink()
        with locked.LockedSharedMem(mem):
            portshm.clean()
            assert path.exists(), "somebody holds it"
        clean_until(lambda: not path.exists(), tmp_path)


# The child speaks, so that it is past the hooks that run in it after the fork.
FORK = """
import os, signal
if os.fork() == 0:
    print(os.getpid(), mem.address, flush=True)
    signal.pause()
"""


def test_a_forked_child_does_not_keep_the_owners_lock(backend: str, tmp_path: Path) -> None:
    if backend == "file" and sys.version_info < (3, 13):
        pytest.skip("before 3.13 the mapping, which the child has too, is made from the locked descriptor")
    program = OWNER.replace("print(mem.address, flush=True)", FORK)
    with start_python(program, backend, tmp_path if backend == "file" else "") as process:
        assert process.stdout is not None
        pid, address = process.stdout.readline().split()
        try:
            portshm.clean([tmp_path])
            assert exists(address)
            process.kill()
            process.wait()
            os.kill(int(pid), 0)  # the child lives
            clean_until(lambda: not exists(address), tmp_path)
        finally:
            os.kill(int(pid), signal.SIGKILL)


def test_an_owner_in_another_pid_namespace_is_alive(backend: str, tmp_path: Path) -> None:
    prefix = ("unshare", "-Urpf", "--kill-child")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("may not make a pid namespace here")
    with owner_of(backend, tmp_path if backend == "file" else "", prefix=prefix) as (_, address):
        for _ in range(3):
            removed = portshm.clean([tmp_path])
            assert RegionAddress.parse(address) not in removed
            assert exists(address)


def test_many_reapers_at_once_beside_living_owners(tmp_path: Path) -> None:
    # Files that come and go under one name, while others reap as fast as they can: no owner may lose its region
    # between making the file and locking it.
    reaper = "import sys, portshm\nprint(flush=True)\nwhile True: portshm.clean([sys.argv[1]])"
    reapers = [start_python(reaper, tmp_path) for _ in range(2)]
    try:
        for process in reapers:
            assert process.stdout is not None
            process.stdout.readline()
        for number in range(300):
            with SharedMem.create(100, dir=tmp_path, name="busy") as mem:
                mem.set_value(b"%d" % number)
                with SharedMem.attach(mem.address) as other:
                    assert other.value_copy() == b"%d" % number
    finally:
        for process in reapers:
            process.kill()
            process.communicate()


def test_a_reaper_never_takes_the_segment_of_a_new_owner_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # A reaper that has found the mark of a dead owner, and is overtaken by another reaper and a new owner.
    orphan = SharedMem.create(10, backend="named", name="contested")
    orphan.close()
    from portshm import _reaper

    real = _reaper.remove_orphan
    successors: list[SharedMem] = []

    def overtaken(path: str, *, segment: str | None = None) -> bool:
        if segment == orphan.address.name and not successors:
            assert real(path, segment=segment)
            successors.append(SharedMem.create(10, backend="named", name="contested"))
        return real(path, segment=segment)

    monkeypatch.setattr(_reaper, "remove_orphan", overtaken)
    portshm.clean()
    (successor,) = successors
    with successor:
        assert exists(str(successor.address))


def test_an_orphan_that_cannot_be_removed_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owner_of("file", tmp_path) as (process, address):
        process.kill()
        process.wait()
    unlink = os.unlink

    def refused(path: str) -> None:  # root may write to every folder
        if os.fspath(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        assert RegionAddress.parse(address) not in portshm.clean([tmp_path])
    assert RegionAddress.parse(address) in portshm.clean([tmp_path])
