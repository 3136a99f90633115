"""Exit codes in words, and who was killed for memory."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from portshm.pool._engine import exit_status as _exit_status
from portshm.pool._engine.exit_status import describe_exit, oom_kills


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (None, "vanished without an exit code"),
        (0, "exited with 0"),
        (1, "exited with 1"),
        (255, "exited with 255"),
        (0xC0000005, "access violation (0xC0000005)"),
        (0xC00000FD, "stack overflow (0xC00000FD)"),
        (0xC000013A, "interrupted (0xC000013A)"),
        (-4096, "killed by signal 4096"),
    ],
)
def test_exit_codes(exitcode: int | None, words: str) -> None:
    assert describe_exit(exitcode) == words


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SIGSEGV", "segmentation fault"),
        ("SIGABRT", "aborted"),
        ("SIGKILL", "killed"),
        ("SIGBUS", "bus error"),
        ("SIGTERM", "terminated"),
        ("SIGUSR1", "killed by a signal"),
    ],
)
def test_signals(name: str, words: str) -> None:
    assert describe_exit(-getattr(signal, name)) == f"{name} ({words})"


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_out_of_memory_is_said_of_sigkill_only() -> None:
    assert describe_exit(-signal.SIGKILL, oom=True) == "SIGKILL (killed by the kernel, out of memory)"
    assert describe_exit(-signal.SIGSEGV, oom=True) == "SIGSEGV (segmentation fault)"
    assert describe_exit(1, oom=True) == "exited with 1"


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("low 0\nhigh 0\nmax 3\noom 2\noom_kill 5\noom_group_kill 1\n", 5),
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n", 7),
        ("low 0\n", None),
        ("oom_kill many\n", None),
    ],
)
def test_the_counter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, expected: int | None) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text(text)
    monkeypatch.setattr(_exit_status, "_counter_files", lambda: [str(tmp_path / "nothing"), str(counter)])
    assert oom_kills() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups")
def test_the_counter_s_place_is_told_by_the_system() -> None:
    for path in _exit_status._counter_files():
        assert path.startswith("/sys/fs/cgroup/")
        assert path.endswith(("memory.events", "memory.oom_control"))
    assert oom_kills() is None or oom_kills() >= 0  # type: ignore[operator]
