"""What CPython's test classes need to run against our pools instead of the standard library's.

The classes are imported from the interpreter's own `test` package at run time; nothing of them is here. For
interpreters that are installed without some of it, a folder that has a whole `test` can be put into PYTHONPATH.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import portshm.pool

# For the scripts that tests run; under tox we are installed, and this changes nothing.
PYTHONPATH = os.pathsep.join([str(Path(portshm.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])

# Tests that are not run, by class (without its start method) and name, and why. What is listed as adapted below runs.
EXCLUDED = {
    ("TestPoolNotLeakOnFailure", "test_release_unused_processes"): "its fake process has no pid (tests/pool has ours)",
    ("ProcessPoolExecutorTest", "test_killed_child"): "asks that the death of a worker breaks the whole executor",
    ("ProcessPoolExecutorTest", "test_python_finalization_error"): "fails the second thread's start; we have only one",
}


class Pool(portshm.pool.Pool):
    """Adapted: ours replaces its workers by itself, so there is nothing for a test to call.

    One that all tests of a class share must not start a thread in one of them, which would be taken for a leak.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self._engine._porter.ident is not None

    def _repopulate_pool(self) -> None:
        pass


class ProcessPoolExecutor(portshm.pool.ProcessPoolExecutor):
    """Adapted: the standard library's names for the thread and the queue that tests join."""

    @property
    def _executor_manager_thread(self) -> threading.Thread:
        return self._engine._thread

    @property
    def _call_queue(self) -> _NoQueue:
        return _NoQueue()


class _NoQueue:
    """Ours has no queue with a thread of its own."""

    def join_thread(self) -> None:
        pass


def module(name: str) -> ModuleType:
    """A module of the interpreter's `test` package; skips the importing test module where there is none."""
    try:
        return importlib.import_module(f"test.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not f"test.{name}".startswith(error.name):
            raise
        pytest.skip(f"this Python was installed without test.{name}", allow_module_level=True)


def mark_excluded(cls: type) -> None:
    """Skip what is excluded of a class, whose name has its start method before that of CPython's class."""
    for (name, test), reason in EXCLUDED.items():
        if cls.__name__.endswith(name) and hasattr(cls, test):
            setattr(cls, test, _skipped(f"excluded: {reason}"))


def _skipped(reason: str) -> Callable[..., None]:
    @pytest.mark.skip(reason=reason)
    def skipped(self: Any) -> None:
        pass

    return skipped


def ours_in_script(assert_python_ok: Callable[..., Any]) -> Callable[..., Any]:
    """`assert_python_ok` for scripts that import a pool of the standard library's: they get ours."""

    def run(*args: str, **env: str) -> Any:
        if args[0] == "-c":
            args = ("-c", ours_in(args[1]))
        else:
            file = Path(args[0])
            file.write_text(ours_in(file.read_text(encoding="utf-8")), encoding="utf-8")
        # An environment of its own also makes it leave out -I, under which the script would not find us.
        return assert_python_ok(*args, **env, PYTHONPATH=PYTHONPATH)

    return run


def ours_in(script: str) -> str:
    """The script with our pools in the place of the standard library's."""
    changed = script
    for theirs, ours in _NAMES:
        changed = changed.replace(theirs, ours)
    assert changed != script, f"no pool in this script: {script}"
    return changed


_NAMES = (
    ("from concurrent.futures import ProcessPoolExecutor", "from portshm.pool import ProcessPoolExecutor"),
    ("from multiprocessing import Pool, set_start_method",
     "from portshm.pool import Pool; from multiprocessing import set_start_method"),
    ("from multiprocessing import Pool", "from portshm.pool import Pool"),
    ("multiprocessing.Pool(", "__import__('portshm.pool').pool.Pool("),
)  # fmt: skip


def replaced(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """For fixtures: these attributes are others meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in changes:
            patch.setattr(owner, name, value)
        yield
