from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

from portshm.pool import Pool


@pytest.fixture
def context(start_method: str) -> BaseContext:
    return multiprocessing.get_context(start_method)


@pytest.fixture
def log(tmp_path: Path) -> str:
    """Path of an execution log that nobody has written to yet."""
    return str(tmp_path / "log")


@pytest.fixture
def make_pool(context: BaseContext) -> Iterator[Callable[..., Pool]]:
    """`Pool` with the start method of this run; terminated afterwards."""
    with ExitStack() as stack:

        def make(processes: int = 2, *args: Any, **options: Any) -> Pool:
            return stack.enter_context(Pool(processes, *args, context=context, **options))

        yield make
