"""What pools are made with, checked: one place for both."""

from __future__ import annotations

import numbers
import operator
import os

from ._engine.waiter import MAX_WORKERS
from ._work import OnCrash, TaskOptions

__all__ = ["check_options", "default_processes", "task_options"]


def default_processes() -> int:
    """As many as this process may use processors, as the standard library's pool of this Python counts them."""
    count = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    return min(count, MAX_WORKERS or count)


def check_options(
    processes: int, initializer: object, *, task_timeout: float | None, retries: int, on_crash: OnCrash,
    start_timeout: float, max_shared_bytes: int | None,
) -> TaskOptions:  # fmt: skip
    """What all calls have in common. ValueError or TypeError for what no pool can be made with."""
    if processes < 1:
        raise ValueError("Number of processes must be at least 1")
    if MAX_WORKERS is not None and processes > MAX_WORKERS:
        raise ValueError(f"{processes} processes: this system can wait for at most {MAX_WORKERS}")
    _check_timeout("task_timeout", task_timeout)
    if start_timeout is None:
        raise TypeError("start_timeout must be seconds, not None; math.inf is no limit")
    _check_timeout("start_timeout", start_timeout)
    if operator.index(retries) < 0:
        raise ValueError(f"retries must be 0 or more, not {retries!r}")
    if max_shared_bytes is not None and operator.index(max_shared_bytes) < 1:
        raise ValueError(f"max_shared_bytes must be positive or None, not {max_shared_bytes!r}")
    if on_crash not in ("raise", "return"):
        raise ValueError(f"on_crash must be 'raise' or 'return', not {on_crash!r}")
    if initializer is not None and not callable(initializer):
        raise TypeError("initializer must be a callable")
    return TaskOptions(task_timeout, retries, on_crash)


def task_options(default: TaskOptions, timeout: float | None) -> TaskOptions:
    """Of a call that may bring its own time limit."""
    if timeout is None:
        return default
    _check_timeout("timeout", timeout)
    return default._replace(timeout=timeout)


def _check_timeout(name: str, seconds: float | None) -> None:
    """TypeError or ValueError if it is no time limit."""
    if seconds is None:
        return
    if not isinstance(seconds, numbers.Real):
        raise TypeError(f"{name} must be seconds or None, not {seconds!r}")
    if not seconds > 0:
        raise ValueError(f"{name} must be positive seconds or None, not {seconds!r}")
