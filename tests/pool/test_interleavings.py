"""A sample of all interleavings of two threads over the pool's code; `interleaving.py` tries more of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.children import environment

WATCHDOG = 120.0  # seconds beyond the search's own time


def search(*arguments: str, seconds: float = 0.0) -> str:
    """Run it in a process of its own, which a pool that hangs takes along."""
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.pool.interleaving", *arguments],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=os.name == "posix",
    )  # fmt: skip
    try:
        output, _ = program.communicate(timeout=seconds + WATCHDOG)
    finally:
        if os.name == "posix" and program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
        program.kill()
    print(output)
    assert program.returncode == 0, output
    return output


@pytest.mark.slow
def test_a_sample_of_interleavings() -> None:
    seconds = float(os.environ.get("PORTSHM_INTERLEAVE_SECONDS", "15"))
    output = search("--seconds", str(seconds), seconds=seconds)
    assert " 0 failed" in output


@pytest.mark.slow
def test_every_interleaving() -> None:
    assert " 0 failed" in search("--all", seconds=8 * 3600.0)


def test_one_interleaving_alone() -> None:
    """As the search prints it for whoever is to look into a fault."""
    output = search("--only", "apply,terminate,caller/_pool.py:1,1")
    assert output.startswith("1 times\n1 interleavings tried, 0 of them with a thread stopped")
