"""`portshm map`, as a real program over real files, with workers that really die."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import Any

import pytest

from portshm import Pool
from portshm._map_job import Progress, find_files, run_map

from .children import ROOT, environment
from .map_functions import act

ACT = "tests.map_functions:act"


def run_map_command(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "portshm", "map", *map(str, args)],
        env=environment(), capture_output=True, text=True, timeout=100, check=False, **options,
    )  # fmt: skip


def printed(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str]]:
    return [(path, text) for path, _, text in (line.partition("\t") for line in done.stdout.splitlines())]


def summary(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1]


def write(folder: Path, **files: str) -> list[Path]:
    paths = []
    for name, text in files.items():
        path = folder / name
        path.write_text(text)
        paths.append(path)
    return paths


def test_checksums_of_the_standard_library_are_zlibs_own() -> None:
    stdlib = sysconfig.get_path("stdlib")
    done = run_map_command("zlib:crc32", "-j", 2, stdlib)
    found = printed(done)
    files = find_files([stdlib])
    assert len(files) > 1000
    assert [path for path, _ in found] == files
    assert [(p, int(crc)) for p, crc in found] == [(p, zlib.crc32(Path(p).read_bytes())) for p in files]
    assert done.stderr == f"{len(files)} ok, 0 failed, 0 crashed\n"
    assert done.returncode == 0


@pytest.mark.parametrize("backend", ["auto", "file", "named"])
def test_each_death_costs_its_file_and_leaves_its_bytes(start_method: str, backend: str, tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    write(
        folder,
        a="fine",
        b="segfault",
        c="abort",
        d="exit 3",
        e="kill",
        f="raise two\nlines",
        g="fine too",
        h="scribble",
    )
    crashers = tmp_path / "crashers"
    done = run_map_command(
        ACT, folder, "-j", 2, "--start-method", start_method, "--backend", backend, "--crashers", crashers
    )
    assert printed(done) == [
        (str(folder / "a"), "(4, 'memoryview')"),
        (str(folder / "b"), "CRASHED SIGSEGV (segmentation fault)"),
        (str(folder / "c"), "CRASHED SIGABRT (aborted)"),
        (str(folder / "d"), "CRASHED exited with 3"),
        (str(folder / "e"), "CRASHED SIGKILL (killed)"),
        (str(folder / "f"), "ERROR ValueError: two lines"),
        (str(folder / "g"), "(8, 'memoryview')"),
        (str(folder / "h"), "CRASHED exited with 1"),
    ]
    assert done.returncode == 1
    assert summary(done) == "2 ok, 1 failed, 5 crashed"
    # Read back from the dead workers' memory: the last one had changed it.
    saved = [b"segfault", b"abort", b"exit 3", b"kill", b"SCRIBBLE"]
    assert {path.name: path.read_bytes() for path in crashers.iterdir()} == {
        hashlib.sha256(data).hexdigest()[:16]: data for data in saved
    }


def test_a_timeout_costs_the_file_that_took_too_long(tmp_path: Path) -> None:
    write(tmp_path, a="fine", b="hang", c="fine")
    done = run_map_command(ACT, tmp_path, "-j", 2, "--timeout", 0.5, "--crashers", tmp_path / "crashers")
    assert [text for _, text in printed(done)] == [
        "(4, 'memoryview')",
        "CRASHED deadline of 0.5 s passed",
        "(4, 'memoryview')",
    ]
    assert (tmp_path / "crashers" / hashlib.sha256(b"hang").hexdigest()[:16]).read_bytes() == b"hang"


def test_retries_run_a_crasher_again(tmp_path: Path) -> None:
    write(tmp_path, a=f"once {tmp_path / 'marker'}", b="exit 1")
    done = run_map_command(ACT, tmp_path / "a", tmp_path / "b", "--retries", 1, "--crashers", tmp_path / "crashers")
    assert [text.split()[0] for _, text in printed(done)] == [f"({(tmp_path / 'a').stat().st_size},", "CRASHED"]


def test_the_memory_grows_with_the_values(tmp_path: Path) -> None:
    small, large, huge = tmp_path / "small", tmp_path / "large", tmp_path / "huge"
    small.write_bytes(b"x")
    large.write_bytes(os.urandom(3 << 20))
    huge.write_bytes(os.urandom(40 << 20))
    paths = [small, large, small, huge, large, tmp_path / "empty"]
    paths[-1].write_bytes(b"")
    done = run_map_command("zlib:adler32", *paths, "-j", 2)
    assert printed(done) == [(str(path), str(zlib.adler32(path.read_bytes()))) for path in paths]
    assert done.returncode == 0


def test_whatever_a_file_makes_the_function_raise_is_its_own_error(tmp_path: Path) -> None:
    write(tmp_path, a="exit", b="interrupt", c="generator", d="pool", e="text", f="rebuild", g="fine")
    done = run_map_command("tests.map_functions:raise_odd", tmp_path, "-j", 2)
    assert [text for _, text in printed(done)][:5] == [
        "ERROR SystemExit: 3",
        "ERROR KeyboardInterrupt: ",
        "ERROR GeneratorExit: ",
        "ERROR PoolError: not the pool's own",
        "ERROR BadText: <BadText whose str raised ValueError>",
    ]
    assert printed(done)[5][1].startswith("ERROR TransportError: the task raised NeedsTwo")
    assert printed(done)[6][1] == "one, two"
    assert summary(done) == "1 ok, 6 failed, 0 crashed"
    assert done.returncode == 1


def test_crashers_that_cannot_be_saved_are_told_of_all_the_same(tmp_path: Path) -> None:
    no_folder, *_ = write(tmp_path, a="exit 1", b="fine")
    done = run_map_command(ACT, tmp_path, "-j", 2, "--crashers", no_folder)
    assert [text for _, text in printed(done)] == ["CRASHED exited with 1", "(4, 'memoryview')"]
    assert "were not saved" in done.stderr
    assert summary(done) == "1 ok, 0 failed, 1 crashed"


def test_a_folder_that_cannot_be_read_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "b"
    closed.mkdir()
    first, last = write(tmp_path, a="1", c="2")
    scan = os.scandir

    def refused(path: str) -> Any:  # root may read everything
        if path == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert sorted(find_files([str(tmp_path)])) == sorted(map(str, [first, closed, last]))


def test_a_large_crasher_is_saved_whole(tmp_path: Path) -> None:
    data = b"segfault " + os.urandom(5 << 20)
    (tmp_path / "big").write_bytes(data)
    done = run_map_command(ACT, tmp_path / "big", "--crashers", tmp_path / "crashers")
    assert done.returncode == 1
    assert [path.read_bytes() == data for path in (tmp_path / "crashers").iterdir()] == [True]


def test_a_file_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path) -> None:
    first, gone, last = write(tmp_path, a="1", b="22", c="333")
    gone.unlink()
    with Pool(1) as pool:
        results = list(run_map(act, [str(first), str(gone), str(last)], "unused", pool, jobs=1))
    assert [(r.status, r.text) for r in results] == [
        ("ok", "(1, 'memoryview')"),
        ("failed", "ERROR FileNotFoundError: No such file or directory"),
        ("ok", "(3, 'memoryview')"),
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense", "."], "names no function"),
        (["no_such_module:f", "."], "cannot be imported"),
        (["zlib:no_such_function", "."], "has no 'no_such_function'"),
        (["tests.map_functions:not_callable", "."], "cannot be called"),
        (["zlib:crc32", "no/such/path"], "No such file"),
    ],
)
def test_what_cannot_be_begun_is_one_line(arguments: list[str], complaint: str) -> None:
    done = run_map_command(*arguments, cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("portshm: ")
    assert complaint in line


@pytest.mark.parametrize("option", [["-j", "0"], ["--timeout", "-1"], ["--timeout", "nan"], ["--retries", "x"]])
def test_options_that_make_no_sense_are_refused(option: list[str]) -> None:
    done = run_map_command("zlib:crc32", ".", *option)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_interrupt_ends_it_in_one_line_with_nobody_left(start_method: str, tmp_path: Path) -> None:
    write(tmp_path, a="fine", **{f"b{n}": "hang" for n in range(5)})
    process = subprocess.Popen(
        # One worker under forkserver: there a second one that is just starting prints what the forkserver's own
        # children print.
        [sys.executable, "-u", "-m", "portshm", "map", ACT, tmp_path, "--start-method", start_method,
         "-j", "1" if start_method == "forkserver" else "2"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert "memoryview" in process.stdout.readline()  # the first is done, so the workers are in the others
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error == "portshm: interrupted\n"
    assert process.returncode == 130


def test_the_progress_line_is_for_terminals_only() -> None:
    class Terminal:
        def __init__(self, tty: bool) -> None:
            self.tty, self.text = tty, ""

        def isatty(self) -> bool:
            return self.tty

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

    from portshm._map_job import MapJobResult

    for tty in (True, False):
        terminal: Any = Terminal(tty)
        progress = Progress(10, terminal)
        progress.count(MapJobResult("a", "ok", "1"))
        assert ("1/10  1 ok, 0 failed, 0 crashed" in terminal.text) is tty
        assert str(progress) == "1 ok, 0 failed, 0 crashed"
