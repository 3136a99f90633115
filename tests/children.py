"""What runs in other processes: importable functions, and `run_python` for whole programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """This process's environment, in which a child finds the same portshm and these tests."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


def run_python(
    source: str, *args: object, prefix: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with warnings as errors; the caller looks at what it left and printed."""
    return subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", source, *map(str, args)],
        env=environment(), capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


def start_python(source: str, *args: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a program that is talked to by its standard input and output, and killed at will."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-W", "error", "-c", source, *map(str, args)],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def answer_in_memory(mem: Any) -> None:
    """Answer the value with its reverse, in place, and count."""
    with mem:
        mem.set_value(mem.value_copy()[::-1])
        mem.header.count += 1


def reversed_value(mem: Any) -> bytes:
    with mem:
        return mem.value_copy()[::-1]


def count_up(locked: Any, rounds: int) -> None:
    """Add one so many times, each under a hold of its own."""
    for _ in range(rounds):
        with locked as m:
            m.header.count += 1
