"""CPython's tests of what workers see as `__main__`, run with our pool in the scripts."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

import pytest

from . import cpython

pytestmark = pytest.mark.filterwarnings("default")

theirs = cpython.module("test_multiprocessing_main_handling")

for name, cls in list(vars(theirs).items()):
    if isinstance(cls, type) and issubclass(cls, unittest.TestCase) and hasattr(cls, "start_method"):
        # The variants with compiled files are about imports, and take as long as all others together.
        unwanted = [test for test in unittest.defaultTestLoader.getTestCaseNames(cls) if test.endswith("_compiled")]
        globals()[name] = type(name, (cls,), {"__module__": __name__, **dict.fromkeys(unwanted)})
    del cls


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts get our pool where they are written to files."""
    for name in ("make_script", "make_zip_pkg"):
        monkeypatch.setattr(theirs, name, _with_our_pool(getattr(theirs, name)))
    monkeypatch.setattr(theirs, "assert_python_ok", _with_our_path(theirs.assert_python_ok))


def _with_our_pool(make: Callable[..., Any]) -> Callable[..., Any]:
    def write(*args: Any) -> Any:
        return make(*(cpython.ours_in(arg) if " import Pool" in str(arg) else arg for arg in args))

    return write


def _with_our_path(run: Callable[..., Any]) -> Callable[..., Any]:
    # A variable of ours keeps it from running the script with -E, under which it would not find us.
    return lambda *args, **env: run(*args, **env, PYTHONPATH=cpython.PYTHONPATH)
