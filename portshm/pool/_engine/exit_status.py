"""What a worker's exit code says, in words."""

from __future__ import annotations

import os
import signal
import sys
from typing import Final

__all__ = ["describe_exit", "oom_kills"]

_SIGNALS: Final = {
    "SIGSEGV": "segmentation fault",
    "SIGABRT": "aborted",
    "SIGBUS": "bus error",
    "SIGFPE": "arithmetic fault",
    "SIGILL": "illegal instruction",
    "SIGKILL": "killed",
    "SIGTERM": "terminated",
    "SIGINT": "interrupted",
    "SIGXCPU": "out of CPU time",
}

# What Windows makes a process exit with after a fault (ntstatus.h).
_NTSTATUS: Final = {
    0xC0000005: "access violation",
    0xC00000FD: "stack overflow",
    0xC0000409: "stack buffer overrun or abort",
    0xC000001D: "illegal instruction",
    0xC0000094: "integer division by zero",
    0xC000013A: "interrupted",
}


def describe_exit(exitcode: int | None, *, oom: bool = False) -> str:
    """The cause in words; `oom`: the cgroup's kill counter has moved since the worker was started."""
    if exitcode is None:
        return "vanished without an exit code"
    if exitcode >= 0:
        if exitcode in _NTSTATUS:
            return f"{_NTSTATUS[exitcode]} (0x{exitcode:08X})"
        return f"exited with {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        return f"killed by signal {-exitcode}"
    words = _SIGNALS.get(name, "killed by a signal")
    if name == "SIGKILL" and oom:
        words = "killed by the kernel, out of memory"
    return f"{name} ({words})"


def oom_kills() -> int | None:
    """How often the kernel has killed for memory in this process's cgroup; None where that is not to be known."""
    if sys.platform != "linux":
        return None
    for path in _counter_files():
        try:
            with open(path) as file:
                for line in file:
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
        except (OSError, ValueError):
            continue
    return None


def _counter_files() -> list[str]:
    try:
        with open("/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):  # version 1; inside a container the mount is the cgroup itself
            files += [f"/sys/fs/cgroup/memory{path}/memory.oom_control", "/sys/fs/cgroup/memory/memory.oom_control"]
        elif not controllers:  # version 2
            files += [f"/sys/fs/cgroup{os.path.normpath(path)}/memory.events", "/sys/fs/cgroup/memory.events"]
    return files
