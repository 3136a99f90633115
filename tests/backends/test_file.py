"""Only what is special to files."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from portshm import (
    PORTSHM_HEADER,
    HeaderError,
    NotReadyError,
    RegionExistsError,
    RegionRefusedError,
    SharedMem,
)
from portshm._backends.file import FileRegion
from portshm._region import RegionAddress


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(b"precious")
    path.chmod(0o600)
    return path


def test_lies_where_it_was_asked_to(tmp_path: Path) -> None:
    with SharedMem.create(10, backend="file", dir=tmp_path, name="here") as mem:
        assert mem.path == str(tmp_path / "portshm_here")
        assert mem.name is None
        assert os.path.getsize(mem.path) == mem.size
    assert os.listdir(tmp_path) == []


def test_a_planted_link_is_neither_followed_nor_overwritten(tmp_path: Path, victim: Path) -> None:
    link = tmp_path / "portshm_link"
    for target in (victim, tmp_path / "missing"):
        link.symlink_to(target)
        with pytest.raises(RegionExistsError):
            SharedMem.create(10, dir=tmp_path, name="link")
        for readonly in (False, True):
            with pytest.raises(RegionRefusedError, match="symbolic link"):
                SharedMem.attach(link, readonly=readonly)
        assert link.is_symlink()
        link.unlink()
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "missing").exists()


def test_a_planted_fifo_does_not_hang(tmp_path: Path) -> None:
    fifo = tmp_path / "portshm_fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(RegionExistsError):
        SharedMem.create(10, dir=tmp_path, name="fifo")
    for readonly in (False, True):
        with pytest.raises(RegionRefusedError, match="regular"):
            SharedMem.attach(fifo, readonly=readonly)
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_planted_folder_and_a_device(tmp_path: Path) -> None:
    folder = tmp_path / "portshm_folder"
    folder.mkdir(mode=0o700)
    with pytest.raises(RegionExistsError):
        SharedMem.create(10, dir=tmp_path, name="folder")
    for path in (folder, Path("/dev/null"), Path("/dev/zero")):
        for readonly in (False, True):
            with pytest.raises(RegionRefusedError):
                SharedMem.attach(path, readonly=readonly)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602, 0o610])
def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    with SharedMem.create(10, dir=tmp_path) as mem:
        assert mem.path is not None
        os.chmod(mem.path, mode)
        with pytest.raises(RegionRefusedError, match=f"{mode:04o}"):
            SharedMem.attach(mem.address)


def test_somebody_elses_file_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    with SharedMem.create(10, dir=tmp_path) as mem:
        assert mem.path is not None
        os.chown(mem.path, 12345, -1)
        with pytest.raises(RegionRefusedError, match="12345"):
            SharedMem.attach(mem.address)


FORGED: dict[str, tuple[Any, type[HeaderError]]] = {
    "empty": (lambda good: b"", NotReadyError),
    "zeros": (lambda good: bytes(len(good)), NotReadyError),
    "one byte": (lambda good: good[:1], HeaderError),
    "header cut": (lambda good: good[:100], HeaderError),
    "value cut": (lambda good: good[:-1], HeaderError),
    "other program's": (lambda good: b"\x7fELF" + good[4:], HeaderError),
    "text": (lambda good: b"#!/bin/sh\n" * 50, HeaderError),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_file_that_is_no_region_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    with SharedMem.create(100, dir=tmp_path) as mem:
        good = bytes(mem._region.view())
    make, error = FORGED[kind]
    path = tmp_path / "forged"
    path.write_bytes(make(good))
    path.chmod(0o600)
    for header in (PORTSHM_HEADER, None):
        for readonly in (False, True):
            with pytest.raises(error):
                SharedMem.attach(path, header=header, readonly=readonly)
    assert path.read_bytes() == make(good)


def test_a_file_without_write_permission_is_attached_read_only(tmp_path: Path) -> None:
    with SharedMem.create(10, dir=tmp_path) as mem:
        assert mem.path is not None
        mem.set_value(b"abc")
        os.chmod(mem.path, 0o400)
        with SharedMem.attach(mem.path, readonly=True) as reader:
            assert reader.value_copy() == b"abc"


def test_a_private_mapping_is_seen_by_nobody(tmp_path: Path) -> None:
    with SharedMem.create(10, dir=tmp_path) as mem:
        mem.set_value(b"shared")
        private = FileRegion.attach(mem.address, private=True)
        view = private.view()
        start = PORTSHM_HEADER.size
        assert bytes(view[start : start + 6]) == b"shared"
        view[start : start + 6] = b"secret"
        assert mem.value_copy() == b"shared"
        private.close()


def test_where_a_mapped_file_cannot_be_removed_it_goes_at_close(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Windows: a mapped file cannot be deleted.
    region: FileRegion

    def remove(path: str) -> bool:
        if not region.closed:
            return False
        os.unlink(path)
        return True

    monkeypatch.setattr("portshm._backends.file.remove", remove)
    region = FileRegion.create(10, dir=tmp_path)
    region.unlink()
    assert os.path.exists(region.address.name)
    region.close()
    assert not os.path.exists(region.address.name)

    kept = region = FileRegion.create(10, dir=tmp_path)
    kept.close()
    assert os.path.exists(kept.address.name), "closed, and nobody asked for it to be removed"
    kept.unlink()
    assert os.listdir(tmp_path) == []


def test_a_child_does_not_inherit_the_descriptor(tmp_path: Path) -> None:
    with SharedMem.create(10, dir=tmp_path) as mem:
        for fd in os.listdir("/proc/self/fd") if sys.platform == "linux" else []:
            path = f"/proc/self/fd/{fd}"
            if os.path.lexists(path) and os.readlink(path) == mem.path:
                assert not os.get_inheritable(int(fd))


def test_an_address_names_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with SharedMem.create(10, dir=".") as mem:
        assert mem.path is not None
        assert os.path.isabs(mem.path)
        assert RegionAddress.parse(str(mem.address)) == mem.address
