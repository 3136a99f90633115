"""Being there before each line of the pool's code that any thread of this process executes.

What is found at one line in a thousand runs by chance is found every time by a thread that is stopped there. Nothing
here names anything of the pool's but its folder: which lines there are is seen by running it.
"""

from __future__ import annotations

import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import portshm.pool

if TYPE_CHECKING:
    from typing_extensions import Self

POOL = Path(portshm.pool.__file__).parent

# What the parent's threads never execute, or execute in one system call.
NOT_OURS = (f"{POOL}{os.sep}_child{os.sep}", f"{POOL}{os.sep}_wire{os.sep}")

# sys.monitoring (3.12) stops at lines at a hundredth of what settrace costs, and in threads that are there already.
_MONITORING: Any = getattr(sys, "monitoring", None)
_TOOL = 4


class Line(NamedTuple):
    """A line of the pool's, as a thread came to it."""

    thread: str  # its name, without numbers
    file: str  # below the pool's folder
    number: int

    def __str__(self) -> str:
        return f"{self.thread}/{self.file}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> Line:
        thread, _, place = text.partition("/")
        file, _, number = place.rpartition(":")
        return cls(thread, file, int(number))


def thread_name() -> str:
    return re.sub(r"[\d/]+", "", threading.current_thread().name)


_active: list[Lines] = []


class Lines:
    """While entered, `visit` is called before each line of the parent's side, by the thread that comes to it.

    One at a time. Forked children are not disturbed. Before 3.12 only threads are seen that were started under one.

    Args:
        instructions: before each bytecode instead, so that a thread can be stopped in the midst of a line.
    """

    def __init__(self, visit: Callable[[Line], object], *, instructions: bool = False) -> None:
        self._visit = visit
        self._instructions = instructions
        self._ours: dict[str, str | None] = {}

    def __enter__(self) -> Self:
        _active.append(self)
        if _MONITORING is not None:
            events = _MONITORING.events
            _MONITORING.use_tool_id(_TOOL, "portshm's tests")
            event = events.INSTRUCTION if self._instructions else events.LINE
            _MONITORING.register_callback(_TOOL, event, self._monitored)
            _MONITORING.set_events(_TOOL, event)
            _MONITORING.restart_events()
        else:
            threading.settrace(_called)
            sys.settrace(_called)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        if _MONITORING is not None:
            _MONITORING.set_events(_TOOL, 0)
            _MONITORING.free_tool_id(_TOOL)
        else:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _file(self, path: str) -> str | None:
        if path not in self._ours:
            ours = path.startswith(f"{POOL}{os.sep}") and not path.startswith(NOT_OURS)
            self._ours[path] = path[len(str(POOL)) + 1 :] if ours else None
        return self._ours[path]

    def _monitored(self, code: CodeType, place: int) -> Any:
        file = self._file(code.co_filename)
        if file is None:
            return _MONITORING.DISABLE
        if self in _active:
            self._visit(Line(thread_name(), file, place))
        return None

    def local(self, frame: FrameType) -> Any:
        """What traces the lines of this frame, if any does."""
        if self._file(frame.f_code.co_filename) is None:
            return None
        frame.f_trace_opcodes = self._instructions
        return self._traced

    def _traced(self, frame: FrameType, event: str, arg: Any) -> Any:
        if self not in _active:
            return None
        if event == ("opcode" if self._instructions else "line"):
            file = self._file(frame.f_code.co_filename)
            assert file is not None
            self._visit(Line(thread_name(), file, frame.f_lineno))
        return self._traced


def _called(frame: FrameType, event: str, arg: Any) -> Any:
    # A thread keeps this from the `Lines` under which it was started, and is seen by those that come later.
    return _active[-1].local(frame) if _active else None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_active.clear)


class Stop:
    """Has a thread stop when it comes to a line for the n-th time, until `let_go`, or for so many seconds at most."""

    def __init__(self, line: Line, visit: int, longest: float) -> None:
        self.line = line
        self.reached = threading.Event()
        self._left = visit
        self._longest = longest
        self._gone = threading.Event()

    def __call__(self, line: Line) -> None:
        if self._left and line == self.line:
            self._left -= 1
            if not self._left:
                self.reached.set()
                self._gone.wait(self._longest)

    def let_go(self) -> None:
        self._gone.set()


class HoldUps:
    """Holds up whoever comes to a line, one time in so many, for some milliseconds.

    All threads alike, or only one for as long as `victim` names it: who is behind all others finds what they never see.
    """

    def __init__(self, one_in: int, chance: random.Random, seconds: float = 0.003) -> None:
        self.one_in = one_in
        self.victim: str | None = None
        self.threads: set[str] = set()  # those that have come by
        self.count = 0
        self._chance = chance
        self._seconds = seconds

    def __call__(self, line: Line) -> None:
        self.threads.add(line.thread)
        if self.victim in (None, line.thread) and self._chance.random() * self.one_in < 1:
            self.count += 1
            time.sleep(self._seconds)
