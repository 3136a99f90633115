"""CPython's tests of its process pool, run against ours. Which are not, and why: `cpython.EXCLUDED`."""

from __future__ import annotations

import multiprocessing
import unittest
from collections.abc import Iterator
from typing import Any

import pytest

from . import cpython

pytestmark = pytest.mark.filterwarnings("default")

theirs = cpython.module("_test_multiprocessing")
script_helper = cpython.module("support.script_helper")

# Test classes that are about other things as well.
_ABOUT_POOLS = {
    "TestInitializers": ["test_pool_initializer"],
    "TestStdinBadfiledescriptor": ["test_pool_in_process"],
    "TestPoolNotLeakOnFailure": ["test_release_unused_processes"],
    "MiscTestCase": ["test_large_pool"],
}


class _Ours:
    """What all classes here have besides what they come with."""

    start_method: str
    Pool = staticmethod(cpython.Pool)

    @classmethod
    def setUpClass(cls: Any) -> None:
        before = multiprocessing.get_start_method(allow_none=True)
        multiprocessing.set_start_method(cls.start_method, force=True)
        cls.addClassCleanup(multiprocessing.set_start_method, before, force=True)
        super().setUpClass()  # type: ignore[misc]
        if hasattr(cls, "pool"):
            # The thread for callbacks stays as long as the pool, which is the whole class's and not one test's.
            cls.pool.apply_async(int, callback=int).wait()

    def tearDown(self) -> None:
        super().tearDown()  # type: ignore[misc]
        # A proxy keeps its socket, and the test object stays for as long as the session.
        vars(self).pop("ns", None)


def _classes() -> Iterator[tuple[str, tuple[Any, ...], list[str]]]:
    """Name, bases, and tests that are not wanted, of each class about pools."""
    for name, cls in vars(theirs).items():
        if name.startswith("_TestPool") and issubclass(cls, theirs.BaseTestCase) and "processes" in cls.ALLOWED_TYPES:
            if "Pool" in cls.__name__ and cls.__name__ != "_TestPoll":
                yield name[1:], (_Ours, cls, theirs.ProcessesMixin, unittest.TestCase), []
        elif name in _ABOUT_POOLS:
            tests = unittest.defaultTestLoader.getTestCaseNames(cls)
            yield name, (_Ours, cls), [test for test in tests if test not in _ABOUT_POOLS[name]]


for name, bases, unwanted in _classes():
    for method in multiprocessing.get_all_start_methods():
        body = {"__module__": __name__, "start_method": method, **dict.fromkeys(unwanted)}
        cls = type(f"{method.capitalize()}{name}", bases, body)
        cpython.mark_excluded(cls)
        globals()[cls.__name__] = cls
        del cls


def pool_in_process() -> None:
    """Theirs, in a child that has not been told to take our pool."""
    for _ in cpython.replaced([(multiprocessing, "Pool", cpython.Pool)]):
        _pool_in_process()


_pool_in_process = theirs.pool_in_process


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    """The tests name the class in their bodies too, and in the scripts that they run."""
    yield from cpython.replaced(
        [
            (multiprocessing, "Pool", cpython.Pool),
            (theirs, "pool_in_process", pool_in_process),
            (script_helper, "assert_python_ok", cpython.ours_in_script(script_helper.assert_python_ok)),
        ]
    )
