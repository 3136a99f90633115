"""The job behind ``portshm map``: one function over the bytes of many files, in workers that may die.

Each file's bytes are put into a worker's shared memory as its value (`Pool.imap_values`). That memory belongs to the
slot, so when a worker dies over a file, the bytes are read back from there and saved.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import queue
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from typing import Any, Final, TextIO

from .errors import TransportError, WorkerCrashed
from .pool import IMapIterator, Pool

__all__ = ["JobError", "MapJobResult", "Progress", "find_files", "load_function", "run_map"]

# Files read ahead of the one whose result is printed next, per worker.
_READ_AHEAD: Final = 4

# Seconds between two updates of the progress line.
_UPDATE: Final = 0.1


class JobError(Exception):
    """The job cannot be begun: a function or a file that is not there."""


@dataclass(frozen=True)
class MapJobResult:
    """What became of one file."""

    path: str
    status: str  # "ok", "failed" or "crashed"
    text: str  # what is printed after the path
    saved: str | None = None  # where the crasher's bytes are
    problem: str | None = None  # why they are nowhere


def load_function(name: str) -> Callable[[memoryview], Any]:
    """The function that ``MODULE:FUNCTION`` names. JobError says what is wrong with the name."""
    module_name, _, attributes = name.partition(":")
    if not module_name or not attributes:
        raise JobError(f"{name!r} names no function: expected MODULE:FUNCTION, for instance zlib:crc32")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it; the installed script has not
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise JobError(f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}") from error
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except Exception as error:  # a module's `__getattr__` is its own code
            known = "" if isinstance(error, AttributeError) else f": {type(error).__name__}: {error}"
            raise JobError(f"module {module_name!r} has no {attributes!r}{known}") from None
    if not callable(found):
        raise JobError(f"{name} is of type {type(found).__name__} and cannot be called")
    try:
        pickle.dumps(found)
    except Exception as error:
        raise JobError(f"{name} cannot be sent to a worker: {error}") from error
    return found  # type: ignore[no-any-return]


def find_files(paths: Sequence[str]) -> list[str]:
    """The files at `paths`, in their order; folders stand for all plain files below. JobError if one is not there.

    A folder that cannot be read stands for itself, to be told of in its place.
    """
    files: list[str] = []

    def unreadable(error: OSError) -> None:
        files.append(error.filename)

    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            raise JobError(f"{path}: {error.strerror}") from error
        if stat.S_ISDIR(mode):
            for folder, folders, names in os.walk(path, onerror=unreadable):
                folders.sort()
                files += (file for name in sorted(names) if os.path.isfile(file := os.path.join(folder, name)))
        else:
            files.append(path)
    return files


def run_map(
    function: Callable[[memoryview], Any], files: Sequence[str], crashers: str, pool: Pool, *, jobs: int
) -> Iterator[MapJobResult]:
    """One result per file, in their order; the bytes of crashers are saved in the folder `crashers`."""
    # What became of reading each file, told by the thread of the pool that reads ahead: None, or why not.
    read: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

    def contents() -> Iterator[bytes]:
        for path in files:
            try:
                with open(path, "rb") as file:
                    data = file.read()
            except OSError as error:
                read.put(error)
            else:
                read.put(None)
                yield data

    results = pool.imap_values(function, contents(), buffersize=_READ_AHEAD * jobs)
    for path in files:
        problem = read.get()
        if problem is not None:
            yield MapJobResult(path, "failed", f"ERROR {type(problem).__name__}: {problem.strerror}")
        else:
            yield _next_result(results, path, crashers)


def _next_result(results: IMapIterator, path: str, crashers: str) -> MapJobResult:
    try:
        return MapJobResult(path, "ok", _one_line(repr, next(results)))
    except WorkerCrashed as crash:
        text = f"CRASHED {crash.cause}"
        try:
            return MapJobResult(path, "crashed", text, _save(crash.item, crashers))
        except OSError as error:
            problem = f"the bytes of {path} were not saved: {error.filename}: {error.strerror}"
            return MapJobResult(path, "crashed", text, problem=problem)
    except BaseException as error:
        # What came out of the worker is about this file, SystemExit and the like too. The rest is about us.
        if not isinstance(error.__cause__, RemoteTraceback) and not isinstance(error, TransportError):
            raise
        return MapJobResult(path, "failed", f"ERROR {type(error).__name__}: {_one_line(str, error)}")


def _one_line(text_of: Callable[[Any], str], obj: Any) -> str:
    """The object's text, which is its own code, as one line."""
    try:
        return " ".join(line.strip() for line in text_of(obj).splitlines())
    except Exception as error:
        return f"<{type(obj).__name__} whose {text_of.__name__} raised {type(error).__name__}>"


def _save(data: bytes, folder: str) -> str:
    """Save a crasher under its hash, whole or not at all; the same one twice is one file."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, hashlib.sha256(data).hexdigest()[:16])
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
    return path


class Progress:
    """A line on a terminal that says how far the job is, and the summary at its end."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream
        self._shown = stream.isatty()
        self._next = 0.0
        self.counts: Counter[str] = Counter()

    def count(self, result: MapJobResult) -> None:
        self.counts[result.status] += 1
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + _UPDATE
            self._stream.write(f"\r\x1b[K{self.counts.total()}/{self._total}  {self}")
            self._stream.flush()

    def clear(self) -> None:
        """Take the line away, before something else is written."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def __str__(self) -> str:
        return f"{self.counts['ok']} ok, {self.counts['failed']} failed, {self.counts['crashed']} crashed"
