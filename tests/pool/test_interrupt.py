"""Ctrl-C in the main thread while it is inside a pool's methods: no lock stays taken, nothing of others' is lost, and
the pool can be used and ended as before. What Ctrl-C does to a whole program is in `test_lifetime.py`."""

from __future__ import annotations

import ast
import functools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

import portshm.pool
from portshm.pool import Pool, ProcessPoolExecutor
from tests.pool.waiting import PATIENCE
from tests.tasks import inc

if TYPE_CHECKING:
    from typing_extensions import Self

PACKAGE = str(Path(portshm.pool.__file__).parent)

LARGE = bytes(300_000)


def size(data: bytes) -> int:
    return len(data)


def numbers() -> Iterator[int]:
    yield from range(100)


@functools.cache
def without_interrupts(path: str) -> frozenset[int]:
    """Lines at which no interrupt comes, though tracing stops there too.

    Those that enter or leave a `with`: there are no more bytecodes between the call that takes a lock (in C) and the
    block that gives it back than the interpreter executes before it looks for signals. And `try`, which is nothing that
    is executed: what is raised there goes past the blocks around it (3.11 to 3.13).
    """
    return frozenset(
        line
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8")))
        if isinstance(node, (ast.With, ast.Try))
        for line in range(node.lineno, node.body[0].lineno)
    )


class Interrupt:
    """Ctrl-C in this thread before the n-th line of the pool's code that it comes to."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.raised = False

    def __enter__(self) -> Self:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and frame.f_lineno not in without_interrupts(frame.f_code.co_filename):
            self.left -= 1
            if self.left < 0:
                self.raised = True
                signal.raise_signal(signal.SIGINT)
        return self._line


def talk(pool: Any) -> None:
    pool.apply(inc, (1,))


def call(pool: Any) -> None:
    pool.apply_async(inc, (1,)).get()


def large_call(pool: Any) -> None:
    pool.apply_async(size, (LARGE,)).get()


def whole_map(pool: Any) -> None:
    pool.map(inc, range(100))


def one_by_one(pool: Any) -> None:
    list(pool.imap(inc, range(3)))


def ahead(pool: Any) -> None:
    for _ in pool.imap_unordered(inc, numbers(), buffersize=2):
        break


def submit(executor: Any) -> None:
    executor.submit(inc, 1).result()


def executor_map(executor: Any) -> None:
    list(executor.map(inc, range(3)))


def bounded_map(executor: Any) -> None:
    list(executor.map(inc, range(3), buffersize=2))


POOL = [talk, call, large_call, whole_map, one_by_one, ahead]
EXECUTOR = [submit, executor_map, bounded_map]

# The engine is the same whatever the start method is.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def make(work: Callable[[Any], None]) -> Any:
    return make_face(Pool if work in POOL else ProcessPoolExecutor)


def make_face(face: Any) -> Any:
    return Pool(2, context=CONTEXT) if face is Pool else ProcessPoolExecutor(2, CONTEXT)


def begin(pool: Any, count: int) -> Callable[[], list[int]]:
    """Have so many calls executed; their results."""
    if isinstance(pool, Pool):
        results = [pool.apply_async(inc, (number,)) for number in range(count)]
        return lambda: [result.get(PATIENCE) for result in results]
    futures = [pool.submit(inc, number) for number in range(count)]
    return lambda: [future.result(PATIENCE) for future in futures]


def finish(pool: Any) -> None:
    """End it as one does who waits for everything that was submitted."""
    if isinstance(pool, Pool):
        pool.close()
        pool.join()
    else:
        pool.shutdown()


@pytest.mark.parametrize("work", [*POOL, *EXECUTOR], ids=lambda work: work.__name__)
def test_before_any_line(work: Callable[[Any], None]) -> None:
    at = 0
    interrupted = True
    while interrupted:
        pool = make(work)
        begin(pool, 10)()
        for _ in range(20):
            others = begin(pool, at % 3)
            try:
                with Interrupt(at) as interrupt:
                    work(pool)
            except KeyboardInterrupt:
                pass
            assert others() == list(range(1, at % 3 + 1)), at
            assert begin(pool, 10)() == list(range(1, 11)), at
            interrupted = interrupt.raised
            at += 1
        finish(pool)
    assert at > 40, "it has been everywhere"


def interrupted(work: Callable[[], object], delay: float) -> None:
    """Do this over and over, until an interrupt comes so many seconds after the beginning."""
    over = threading.Event()

    def interrupt() -> None:
        time.sleep(delay)
        # Again if need be: Python drops what is raised in a destructor.
        while not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            over.wait(1.0)

    def handle(signum: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise KeyboardInterrupt

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, handle)
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            while True:
                work()
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def interrupted_beside_others(work: Callable[[Any], None], pool: Any, delay: float) -> list[Any]:
    """As `interrupted`, while another thread uses the pool too; what it found wrong."""
    wrong: list[Any] = []
    over = threading.Event()

    def use() -> None:
        while not over.is_set():
            found = begin(pool, 20)()
            if found != list(range(1, 21)):
                wrong.append(found)

    user = threading.Thread(target=use)
    user.start()
    try:
        interrupted(lambda: work(pool), delay)
    finally:
        over.set()
        user.join()
    return wrong


at_random = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
needs_signals = pytest.mark.skipif(os.name != "posix", reason="a signal that this process sends to itself")


@at_random
@needs_signals
@pytest.mark.parametrize("work", [*POOL, *EXECUTOR], ids=lambda work: work.__name__)
def test_at_any_time_while_others_use_it(work: Callable[[Any], None]) -> None:
    chance = random.Random(work.__name__)
    for _ in range(4):
        pool = make(work)
        begin(pool, 10)()
        for _ in range(15):
            assert interrupted_beside_others(work, pool, chance.random() * 0.005) == []
        finish(pool)


@at_random
@needs_signals
@pytest.mark.parametrize("face", [Pool, ProcessPoolExecutor])
def test_while_it_is_made(face: Any) -> None:
    def make_and_end() -> None:
        with make_face(face) as pool:
            begin(pool, 1)()

    chance = random.Random(face.__name__)
    for _ in range(60):
        interrupted(make_and_end, chance.random() * 0.01)
