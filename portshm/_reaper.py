"""What lies about: list the regions on this machine, and remove those whose owner is gone.

An orphan is told by its owner's operating-system lock and by nothing else. Never by pid: pids come again, and lie
across containers. Only names with our prefix are looked at, and only plain files of our own user.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ._backends import search_dirs
from ._backends._system import MARKER_SUFFIX, owner_alive, remove_orphan
from ._region import PREFIX, RegionAddress

__all__ = ["RegionInfo", "clean", "list_regions"]

_LOCK_SUFFIX = ".lock"


@dataclass(frozen=True)
class RegionInfo:
    """One region as seen from outside, without attaching to it."""

    address: RegionAddress
    size: int  # bytes, header included; 0 where the system does not tell without attaching
    owner_alive: bool
    age: float  # seconds since its memory or mark was last changed in the file system


def list_regions(dirs: Iterable[str | os.PathLike[str]] = ()) -> list[RegionInfo]:
    """The regions of this user in the system's places and in `dirs`, oldest first."""
    found = []
    for path, address in _candidates(dirs):
        alive = owner_alive(path)
        if alive is None:
            continue  # gone meanwhile, or not ours
        try:
            status = os.stat(_memory_path(path))
        except OSError:
            continue
        is_memory = address.kind == "file" or _memory_path(path) != path
        found.append(
            RegionInfo(address, status.st_size if is_memory else 0, alive, max(0.0, time.time() - status.st_mtime))
        )
    return sorted(found, key=lambda info: -info.age)


def clean(dirs: Iterable[str | os.PathLike[str]] = ()) -> list[RegionAddress]:
    """Remove the regions whose owner is gone, in the system's places and in `dirs`; which ones it were."""
    dirs = list(dirs)
    removed = []
    for path, address in _candidates(dirs):
        if remove_orphan(path, segment=address.name if address.kind == "shm" else None):
            removed.append(address)
    _remove_stale_locks(dirs)
    return removed


def _candidates(dirs: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[str, RegionAddress]]:
    """Each region's address, with the path of the file that its owner locks."""
    for folder, names in _listings(dirs):
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(MARKER_SUFFIX):
                yield path, RegionAddress("shm", name.removesuffix(MARKER_SUFFIX))
            elif not name.endswith(_LOCK_SUFFIX) and not os.path.lexists(path + MARKER_SUFFIX):
                yield path, RegionAddress("file", path)


def _listings(dirs: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[str, list[str]]]:
    for folder in dict.fromkeys([*search_dirs(), *(os.path.abspath(os.fspath(d)) for d in dirs)]):
        try:
            yield folder, [name for name in os.listdir(folder) if name.startswith(PREFIX)]
        except OSError:
            continue


def _memory_path(path: str) -> str:
    bare = path.removesuffix(MARKER_SUFFIX)
    return bare if os.path.lexists(bare) else path


def _remove_stale_locks(dirs: Iterable[str | os.PathLike[str]]) -> None:
    """Remove lock files of `locked.py` whose region is gone; they are nobody's evidence."""
    for folder, names in _listings(dirs):
        for name in names:
            path = os.path.join(folder, name)
            bare = path.removesuffix(_LOCK_SUFFIX)
            if bare != path and not os.path.lexists(bare) and not os.path.lexists(bare + MARKER_SUFFIX):
                remove_orphan(path)
