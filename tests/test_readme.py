"""The README is true: its programs run as written and print what it says, and so do its commands."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from portshm import PORTSHM_HEADER, SharedMem

from .children import ROOT, environment, run_python

README = (ROOT / "README.md").read_text(encoding="utf-8")

NOT_RUN = "<!-- not run -->"


class Block(NamedTuple):
    language: str
    text: str
    line: int
    skipped: bool
    prints: str | None  # the block of language `text` that follows it


def _blocks() -> Iterator[Block]:
    pattern = re.compile(r"^(<!--[^\n]*-->\n)?```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.M | re.S)
    for match in pattern.finditer(README):
        marker, language, text, prints = match.groups()
        line = README.count("\n", 0, match.start(2)) + 1
        yield Block(language, text, line, (marker or "").strip() == NOT_RUN, prints)


BLOCKS = list(_blocks())


def _of(language: str) -> list[Any]:
    return [pytest.param(b, id=f"line {b.line}") for b in BLOCKS if b.language == language and not b.skipped]


def test_few_blocks_are_not_run() -> None:
    assert sum(block.skipped for block in BLOCKS) <= 2
    assert README.count("```") == 2 * sum(1 + (block.prints is not None) for block in BLOCKS)


@pytest.mark.parametrize("block", _of("python"))
def test_a_program_prints_what_the_readme_says(block: Block, tmp_path: Path) -> None:
    if "portshm.locked" in block.text and importlib.util.find_spec("filelock") is None:
        pytest.skip("needs filelock")
    program, folder = tmp_path / "example.py", tmp_path / "empty"
    program.write_text(block.text, encoding="utf-8")
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", program],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    if block.prints is not None:
        assert done.stdout == block.prints
    assert list(folder.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the README's commands are typed: a region with its owner alive, and an orphan."""
    orphan = "import os, sys; from portshm import SharedMem; m = SharedMem.create(9, dir='.', name='old'); os._exit(0)"
    assert run_python(orphan, cwd=tmp_path).returncode == 0
    layout = PORTSHM_HEADER.extend("frame", frame_id="q")
    with SharedMem.create(1 << 20, name="demo", dir=tmp_path, header=layout) as mem:
        mem.set_value(b"HELLO")
        mem.header.count, mem.header.frame_id = 1, 17
        yield tmp_path


@pytest.mark.parametrize("block", _of("console"))
def test_a_command_prints_what_the_readme_says(block: Block, folder: Path) -> None:
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        command, *shown = part.splitlines()
        python, *args = shlex.split(command)
        assert python == "python", command
        done = subprocess.run(
            [sys.executable, "-W", "error", *args],
            cwd=folder, env=environment(), capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        # `map` ends with its summary there.
        assert (done.returncode, done.stderr) == (0, "1 ok, 0 failed, 0 crashed\n" if args[2] == "map" else ""), command
        # The README shows some of the lines, with … for what differs from one machine to the next.
        lines = iter(done.stdout.splitlines())
        for line in shown:
            wanted = re.compile(".*".join(map(re.escape, re.split(" *… *", line))))
            assert any(wanted.fullmatch(found) for found in lines), (
                f"{line!r} not (or not in its place) in:\n{done.stdout}"
            )


def test_ci_runs_the_command_of_the_readme() -> None:
    commands = [block.text.strip() for block in BLOCKS if block.language == "sh"]
    assert [command.count("\n") for command in commands] == [0, 0]
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == commands[1]
