"""Waiting for what other processes do: polled with a generous deadline, because nobody here is told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 60.0  # seconds after which something is called hung


def until(probe: Callable[[], T], what: str, patience: float = PATIENCE) -> T:
    """Call `probe` until it returns something true, and return that."""
    deadline = time.monotonic() + patience
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience:g} s for {what}")
        time.sleep(0.005)
    return found


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        # The main thread may be a zombie while others still have the process's files open, for a moment.
        return state not in ("Z", "X") or len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        pass
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids: list[int], patience: float = PATIENCE) -> float:
    """Wait until none of the processes runs; how many seconds that took."""
    began = time.monotonic()
    until(lambda: not any(map(running, pids)), f"the end of {pids}", patience)
    return time.monotonic() - began
