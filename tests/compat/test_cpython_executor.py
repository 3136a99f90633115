"""CPython's tests of its process-pool executor, run against ours. Which are not, and why: `cpython.EXCLUDED`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import unittest
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from . import cpython

pytestmark = pytest.mark.filterwarnings("default")

# One module up to the patch releases of 2023, a package since.
_PARTS = ("as_completed", "deadlock", "init", "process_pool", "shutdown", "wait")


def _modules() -> list[ModuleType]:
    package = cpython.module("test_concurrent_futures")
    if not hasattr(package, "__path__"):
        return [package]
    return [cpython.module(f"test_concurrent_futures.test_{part}") for part in _PARTS]


def _is_about_processes(cls: type) -> bool:
    return hasattr(cls, "executor_type") and any(base.__name__.startswith("ProcessPool") for base in cls.__mro__)


@contextlib.contextmanager
def _assert_told(self: Any, text: str) -> Iterator[None]:
    # Adapted: an initializer's traceback comes with the error, and not by the workers' "concurrent.futures" logger.
    yield
    assert text in self.executor._broken
    # The test's queue was for that logger, and would stay open for as long as the test object is there.
    self.log_queue.close()
    self.log_queue = self.executor_kwargs = None


MODULES = _modules()

for module in MODULES:
    for name, cls in list(vars(module).items()):
        if not (isinstance(cls, type) and issubclass(cls, unittest.TestCase) and cls.__module__ == module.__name__):
            continue
        if _is_about_processes(cls):
            cls.executor_type = cpython.ProcessPoolExecutor  # type: ignore[attr-defined]
            cpython.mark_excluded(cls)
            if hasattr(cls, "_assert_logged"):
                cls._assert_logged = _assert_told
            globals()[name] = cls
        elif name == "FailingInitializerResourcesTest":  # runs classes from above
            globals()[name] = cls


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    """The tests name the class in their bodies too, and in the scripts that they run."""
    changes: list[tuple[Any, str, Any]] = [(concurrent.futures, "ProcessPoolExecutor", cpython.ProcessPoolExecutor)]
    for module in MODULES:
        if hasattr(module, "assert_python_ok"):
            changes.append((module, "assert_python_ok", cpython.ours_in_script(module.assert_python_ok)))
    yield from cpython.replaced(changes)
