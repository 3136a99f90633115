"""The command line: in this process where only the output counts, as a real program for status, stderr and signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portshm import GO_FUZZ_HEADER, PORTSHM_HEADER, RegionAddress, SharedMem
from portshm._cli import main

from .children import environment, run_python

# A program that makes a region in the folder it is given and dies without giving it up.
ORPHAN = """
import os, sys
from portshm import SharedMem
mem = SharedMem.create(64, name="orphan", dir=sys.argv[1])
mem.set_value(b"last words")
mem.header.count = 41
os._exit(0)
"""


def program(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "portshm", *args],
        env=environment(), capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


@pytest.fixture
def only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ls` and `clean` see the folders they are given and nothing of what else this machine holds."""
    monkeypatch.setattr("portshm._reaper.search_dirs", list)


@pytest.fixture
def orphan(tmp_path: Path) -> Path:
    assert run_python(ORPHAN, tmp_path).returncode == 0
    return tmp_path / "portshm_orphan"


@pytest.fixture
def mem(tmp_path: Path) -> Iterator[SharedMem]:
    with SharedMem.create(64, name="living", dir=tmp_path) as mem:
        yield mem


class Report:
    """What one command printed, in words or as JSON."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self, *args: object) -> str:
        assert main([str(arg) for arg in args]) == 0
        out, err = self._capsys.readouterr()
        assert err == ""
        return out

    def json(self, *args: object) -> Any:
        return json.loads(self.text(*args, "--json"))


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    return Report(capsys)


class TestInspect:
    def test_shows_every_field_and_the_value(self, mem: SharedMem, report: Report) -> None:
        mem.set_value(bytes(range(40)))
        mem.header.count = -7
        found = report.json("inspect", mem.address)
        assert found["header"]["count"] == -7
        assert set(found["header"]) == set(PORTSHM_HEADER.fields)
        assert (found["capacity"], found["value_len"], found["head"]) == (64, 40, bytes(range(40)).hex())
        assert (found["complete"], found["superseded"], found["owner_alive"]) == (True, False, True)
        text = report.text("inspect", mem.path)
        assert "count        -7" in text
        assert "40 bytes, complete" in text
        assert "00000020  20 21 22 23 24 25 26 27" in text
        assert "| !\"#$%&'|" in text

    def test_shows_as_much_of_the_value_as_asked_for(self, mem: SharedMem, report: Report) -> None:
        mem.set_value(b"x" * 64)
        assert report.json("inspect", mem.path, "--bytes", 3)["head"] == b"xxx".hex()
        assert "the first" not in report.text("inspect", mem.path, "--bytes", 0)

    def test_shows_the_creators_own_fields_by_offset(self, tmp_path: Path, report: Report) -> None:
        layout = PORTSHM_HEADER.extend("frame", frame_id="q", stamp="d")
        with SharedMem.create(64, dir=tmp_path, header=layout) as mem:
            mem.header.frame_id = -2
            mem.header.stamp = 1.5
            words = report.json("inspect", mem.path)["user_words"]
            assert words[str(layout.fields["frame_id"].offset)] == 2**64 - 2
            assert words[str(layout.fields["stamp"].offset)] == 0x3FF8_0000_0000_0000
            text = report.text("inspect", mem.path)
        assert f"+{layout.fields['frame_id'].offset}         0xfffffffffffffffe  -2\n" in text
        assert f"+{layout.fields['stamp'].offset}         0x3ff8000000000000  4609434218613702656  1.5\n" in text

    def test_reads_what_a_dead_owner_left(self, orphan: Path, report: Report) -> None:
        found = report.json("inspect", orphan)
        assert found["owner_alive"] is False
        assert (bytes.fromhex(found["head"]), found["header"]["count"]) == (b"last words", 41)
        assert "orphan" in report.text("inspect", orphan)

    def test_says_that_a_value_is_not_complete(self, mem: SharedMem, report: Report) -> None:
        mem.set_value(b"half of it")
        mem.cell("sequence")[0] += 1  # as a writer leaves it that dies within set_value
        found = report.json("inspect", mem.path)
        assert found["complete"] is False
        assert bytes.fromhex(found["head"]) == b"half of it"
        assert "NOT complete" in report.text("inspect", mem.path)

    def test_shows_the_header_when_the_length_cannot_be(self, mem: SharedMem, report: Report) -> None:
        mem.cell("value_len")[0] = 10**12
        found = report.json("inspect", mem.path)
        assert (found["complete"], found["head"], found["header"]["value_len"]) == (False, "", 10**12)
        assert "1000000000000" in found["problem"]
        assert found["problem"] in report.text("inspect", mem.path)

    def test_names_the_successor(self, mem: SharedMem, report: Report) -> None:
        with SharedMem.attach(mem.address) as old:
            kept = mem.address.name + ".kept"
            os.link(mem.address.name, kept)  # the old generation's name goes with the resize
            mem.resize(128)
            assert old.superseded
        found = report.json("inspect", kept)
        assert found["superseded"] is True
        assert found["header"]["successor"] == os.path.basename(mem.address.name)
        assert os.path.basename(mem.address.name) in report.text("inspect", kept)

    def test_reads_the_file_of_gos_fuzzer(self, tmp_path: Path, report: Report) -> None:
        with SharedMem.create(16, dir=tmp_path, header=GO_FUZZ_HEADER) as mem:
            mem.set_value(b"seed")
            mem.header.rand_state = 2**64 - 1
            found = report.json("inspect", mem.path, "--layout", "go")
            assert (found["complete"], found["head"]) == (None, b"seed".hex())
            assert found["header"]["rand_state"] == 2**64 - 1
            assert "does not tell" in report.text("inspect", mem.path, "--layout", "go")

    def test_takes_a_file_without_our_prefix(self, mem: SharedMem, tmp_path: Path, report: Report) -> None:
        other = tmp_path / "evidence"
        other.touch(mode=0o600)
        other.write_bytes(Path(mem.address.name).read_bytes())
        assert report.json("inspect", other)["owner_alive"] is None

    def test_takes_a_named_segment(self, report: Report) -> None:
        with SharedMem.create(16, backend="named") as mem:
            mem.set_value(b"named")
            found = report.json("inspect", mem.address)
        assert (found["head"], found["owner_alive"]) == (b"named".hex(), True)

    def test_changes_nothing(self, orphan: Path, report: Report) -> None:
        before = orphan.read_bytes(), orphan.stat().st_mtime_ns
        report.text("inspect", orphan)
        assert (orphan.read_bytes(), orphan.stat().st_mtime_ns) == before


@pytest.mark.usefixtures("only_here")
class TestLsAndClean:
    def test_ls_tells_the_living_from_the_dead(
        self, tmp_path: Path, mem: SharedMem, orphan: Path, report: Report
    ) -> None:
        listed = {entry["address"]: entry for entry in report.json("ls", "--dir", tmp_path)}
        assert {address: entry["owner_alive"] for address, entry in listed.items()} == {
            str(mem.address): True,
            str(RegionAddress("file", str(orphan))): False,
        }
        assert listed[str(mem.address)]["size"] == mem.size
        assert 0 <= listed[str(mem.address)]["age"] < 60
        lines = report.text("ls", "--dir", tmp_path).splitlines()
        assert lines[0].split() == ["ADDRESS", "SIZE", "OWNER", "AGE"]
        assert {line.split()[0]: line.split()[2] for line in lines[1:]} == {
            str(mem.address): "alive",
            f"file:{orphan}": "gone",
        }

    def test_clean_removes_the_orphan_and_says_so(
        self, tmp_path: Path, mem: SharedMem, orphan: Path, report: Report
    ) -> None:
        assert report.text("clean", "--dir", tmp_path) == f"removed file:{orphan}\n"
        assert os.listdir(tmp_path) == [os.path.basename(mem.address.name)]
        assert report.text("clean", "--dir", tmp_path) == "nothing to remove\n"
        assert report.json("clean", "--dir", tmp_path) == {"removed": []}

    def test_several_folders(self, tmp_path: Path, report: Report) -> None:
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            folder.mkdir()
            assert run_python(ORPHAN, folder).returncode == 0
        options = [option for folder in folders for option in ("--dir", folder)]
        removed = report.json("clean", *options)["removed"]
        assert sorted(removed) == [f"file:{folder / 'portshm_orphan'}" for folder in folders]

    def test_nothing_there(self, report: Report) -> None:
        assert report.text("ls") == "no regions\n"
        assert report.json("ls") == []

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (86400 * 3, "3 d")]
    )
    def test_age_is_short(self, seconds: int, text: str, tmp_path: Path, mem: SharedMem, report: Report) -> None:
        then = time.time() - seconds
        os.utime(mem.address.name, (then, then))
        assert report.text("ls", "--dir", tmp_path).splitlines()[1].endswith(f" {text}")


class TestBench:
    def test_one_row(self, report: Report) -> None:
        found = report.json("bench", "--rows", "header field load", "--rounds", 2)
        assert [row["name"] for row in found["rows"]] == ["header field load"]
        (row,) = found["rows"]
        assert {name: len(samples) for name, samples in row["samples"].items()} == {"portshm": 2, "memoryview item": 2}
        assert row["ratios"]["memoryview item"] == pytest.approx(
            row["medians"]["memoryview item"] / row["medians"]["portshm"]
        )

    def test_table(self, report: Report) -> None:
        lines = report.text("bench", "--rows", "*64 KiB, *", "--rounds", 1).splitlines()
        assert lines[0].split()[:2] == ["portshm", "SharedMemory"]
        assert lines[1].startswith("create+close+unlink 64 KiB, auto, us")


class TestErrors:
    @pytest.mark.parametrize(
        "args",
        [
            ("inspect", "no/such/file"),
            ("inspect", "shm:no_such_segment"),
            ("inspect", "shm:a/b"),
            ("inspect", "."),
            ("inspect", __file__),
            ("ls", "--dir", "no/such/folder"),
            ("clean", "--dir", __file__),
        ],
        ids=" ".join,
    )
    def test_one_line_and_status_2(self, args: tuple[str, ...], tmp_path: Path) -> None:
        done = program(*args, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("portshm: ")
        assert done.stderr.count("\n") == 1

    def test_garbage_is_no_region(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        garbage = tmp_path / "garbage"
        garbage.touch(mode=0o600)
        garbage.write_bytes(b"not a region" * 100)
        assert main(["inspect", str(garbage)]) == 2
        assert "magic" in capsys.readouterr().err

    def test_usage(self) -> None:
        for args in [(), ("none-such",), ("inspect",), ("inspect", "x", "--bytes", "-1"), ("bench", "--rounds", "x")]:
            done = program(*args)
            assert done.returncode == 2, args
            assert "usage: portshm" in done.stderr
            assert "Traceback" not in done.stderr

    @pytest.mark.skipif(os.name != "posix", reason="the shell's pipes")
    def test_a_reader_that_leaves_early_is_no_error(self, tmp_path: Path) -> None:
        with SharedMem.create(1 << 20, dir=tmp_path) as mem:
            mem.set_value_len(1 << 20)
            command = [sys.executable, "-m", "portshm", "inspect", str(mem.path), "--bytes", str(1 << 20)]
            with subprocess.Popen(
                command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:  # fmt: skip
                assert process.stdout is not None
                assert process.stderr is not None
                assert process.stdout.readline().startswith("address")
                process.stdout.close()
                assert process.stderr.read() == ""
                assert process.wait(60) == 141

    @pytest.mark.skipif(os.name != "posix", reason="a signal to one process")
    def test_ctrl_c_is_one_line(self) -> None:
        source = """
import sys, time
import portshm._cli as cli
def slow(dirs):
    print("started", flush=True)
    time.sleep(60)
cli.list_regions = slow
sys.exit(cli.main(["ls"]))
"""
        with subprocess.Popen(
            [sys.executable, "-c", source],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("", "portshm: interrupted\n")
            assert process.returncode == 130


class TestHelp:
    @pytest.mark.parametrize("command", ["inspect", "ls", "clean", "bench"])
    def test_each_command_has_an_example(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert f"example:\n  portshm {command} " in capsys.readouterr().out

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["--version"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith("portshm ")

    @pytest.mark.parametrize("argument", ["--help", "--version"])
    def test_as_a_module(self, argument: str) -> None:
        done = program(argument)
        assert (done.returncode, done.stderr) == (0, "")
        assert "portshm" in done.stdout


def test_a_path_that_is_no_text_is_shown_escaped(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/not-\xff-text"
    with contextlib.suppress(OSError):  # some file systems take text only
        os.mkdir(folder)
    if not os.path.isdir(folder):
        pytest.skip("this file system takes no such name")
    name = os.fsdecode(folder)
    with SharedMem.create(16, dir=name) as mem:
        done = subprocess.run(
            [sys.executable, "-m", "portshm", "inspect", str(mem.path)],
            env={**environment(), "PYTHONIOENCODING": "utf-8"}, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"not-\\udcff-text" in done.stdout


def test_without_filelock_the_import_error_names_the_extra() -> None:
    done = run_python("import sys; sys.modules['filelock'] = None; import portshm; import portshm.locked")
    assert done.returncode == 1
    assert done.stderr.endswith("pip install 'portshm[sync]'\n")
