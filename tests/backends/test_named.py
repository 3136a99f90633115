"""Only what is special to named segments: the standard library's class under them, and the owner's mark."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from typing import Any, NoReturn

import pytest

from portshm import (
    NotReadyError,
    RegionExistsError,
    RegionFullError,
    RegionNotFoundError,
    RegionRefusedError,
    SharedMem,
)
from portshm._backends import named
from portshm._backends._system import marker_dir

from ..children import run_python

visible = pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="segments have no place in the file system here")


@pytest.fixture
def mem() -> Iterator[SharedMem]:
    with SharedMem.create(64, backend="named") as made:
        yield made


def listing() -> set[str]:
    return {entry for entry in os.listdir(marker_dir()) if entry.startswith("portshm_")}


def test_is_a_segment_of_the_standard_library(mem: SharedMem) -> None:
    assert mem.name is not None
    assert mem.path is None
    mem.set_value(b"abc")
    options: dict[str, Any] = {"track": False} if sys.version_info >= (3, 13) else {}
    theirs = shared_memory.SharedMemory(mem.name, **options)
    try:
        assert bytes(theirs.buf[192:195]) == b"abc"
    finally:
        theirs.close()
        if not options:
            resource_tracker.unregister("/" + mem.name, "shared_memory")


def test_the_owners_mark_comes_and_goes_with_it(mem: SharedMem) -> None:
    assert f"{mem.name}.owner" in listing()
    other = SharedMem.attach(mem.address)
    other.close()
    assert f"{mem.name}.owner" in listing()
    mem.unlink()
    assert f"{mem.name}.owner" not in listing()


def test_an_attach_that_fails_unlinks_nothing(mem: SharedMem, monkeypatch: pytest.MonkeyPatch) -> None:
    # CPython issue 153279: the constructor answers a failed mmap by unlinking, whoever's segment it is.
    class Broken:
        @staticmethod
        def mmap(*_: object, **__: object) -> NoReturn:
            raise OSError(12, "Cannot allocate memory")

    mem.set_value(b"mine")
    with monkeypatch.context() as patch:
        patch.setitem(named._Segment._init.__globals__, "mmap", Broken)
        with pytest.raises(RegionFullError):
            SharedMem.attach(mem.address)
        with pytest.raises(RegionFullError):
            SharedMem.create(10, backend="named", name="broken")
    with SharedMem.attach(mem.address) as other:
        assert other.value_copy() == b"mine"
    assert not {"portshm_broken", "portshm_broken.owner"} & listing()


def test_the_standard_library_is_not_patched() -> None:
    done = run_python(
        "import multiprocessing.shared_memory as s, multiprocessing.resource_tracker as r\n"
        "state = lambda: (dict(vars(s)), dict(vars(s.SharedMemory)), dict(vars(r)))\n"
        "before = state()\n"
        "import portshm\n"
        "portshm.SharedMem.create(10, backend='named').unlink()\n"
        "assert state() == before\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_tracker_process_is_started(mem: SharedMem) -> None:
    done = run_python(
        "import sys, portshm; from multiprocessing import resource_tracker as r\n"
        "a = portshm.SharedMem.create(10, backend='named'); b = portshm.SharedMem.attach(sys.argv[1])\n"
        "a.unlink(); assert r._resource_tracker._pid is None\n",
        mem.address,
    )
    assert (done.returncode, done.stderr) == (0, "")


@visible
def test_a_planted_link_is_neither_followed_nor_overwritten(tmp_path: Any) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for entry in ("portshm_planted", "portshm_planted.owner"):
        link = f"/dev/shm/{entry}"
        os.symlink(victim, link)
        try:
            with pytest.raises(RegionExistsError):
                SharedMem.create(10, backend="named", name="planted")
            with pytest.raises((RegionRefusedError, RegionNotFoundError)):
                SharedMem.attach("shm:planted")
            assert os.path.islink(link)
        finally:
            os.unlink(link)
    assert victim.read_bytes() == b"precious"


@visible
@pytest.mark.parametrize("make", [lambda p: os.mkfifo(p, 0o600), lambda p: os.mkdir(p, 0o700)], ids=["fifo", "folder"])
def test_a_planted_something_is_refused(make: Any) -> None:
    path = "/dev/shm/portshm_planted"
    make(path)
    try:
        with pytest.raises(RegionExistsError):
            SharedMem.create(10, backend="named", name="planted")
        with pytest.raises(RegionRefusedError):
            SharedMem.attach("shm:planted")
        assert os.path.exists(path)
        assert not os.path.exists(path + ".owner")
    finally:
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)


@visible
def test_a_segment_open_to_others_is_refused(mem: SharedMem) -> None:
    os.chmod(f"/dev/shm/{mem.name}", 0o644)
    with pytest.raises(RegionRefusedError, match="0644"):
        SharedMem.attach(mem.address)


@visible
def test_somebody_elses_segment_is_refused(mem: SharedMem) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a segment away")
    os.chown(f"/dev/shm/{mem.name}", 12345, -1)
    with pytest.raises(RegionRefusedError, match="12345"):
        SharedMem.attach(mem.address)


@visible
def test_a_segment_that_is_not_sized_yet_is_not_ready() -> None:
    path = "/dev/shm/portshm_unsized"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with pytest.raises(NotReadyError):
            SharedMem.attach("shm:unsized")
        os.truncate(path, 4096)
        with pytest.raises(NotReadyError):
            SharedMem.attach("shm:unsized")
        assert os.path.exists(path)
    finally:
        os.unlink(path)
