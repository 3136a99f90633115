"""`portshm bench`: every row at a small scale, in this process where its report counts, as a program for Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portshm import _bench, _bench_contenders, _bench_memory, _bench_plot, _bench_pool
from portshm._bench import OURS, Report, Result, Row, Setting
from portshm._bench_contenders import CONTENDERS, AnyPool, Contender
from portshm._cli import main

from .children import environment, run_python

ROWS = (*_bench_pool.ROWS, *_bench_memory.ROWS)
STANDARD = "mp.Pool,futures"
SMALL = ("--quick", "--scale", "0.001", "--contenders", STANDARD)

HAS_NUMPY = importlib.util.find_spec("numpy") is not None


def bench(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> str:
    assert main(["bench", *args]) == status
    out, err = capsys.readouterr()
    assert err == ""
    return out


def run_bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "portshm", "bench", *args],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["bench", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("portshm: ")
    assert err.count("\n") == 1
    return err


def row(contenders: _bench.Contenders, name: str = "row", **options: Any) -> Row:
    return Row("group", name, "ms", lambda setting: contextlib.nullcontext(contenders), **options)


class TestRows:
    def test_every_row_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = json.loads(bench(capsys, *SMALL, "--json"))
        measured = {row["name"]: row for row in found["rows"]}
        assert list(measured) == [row.name for row in ROWS if HAS_NUMPY or row.needs is None]
        assert (found["rounds"], found["workers"], found["scale"]) == (1, 2, 0.001)
        for row in ROWS:
            if row.name not in measured:
                assert "numpy" in found["left_out"][row.name]
                continue
            one = measured[row.name]
            assert one["errors"] == {}
            assert all(len(samples) == 1 and samples[0] > 0 for samples in one["samples"].values())
            expected = {OURS, *([row.limit] if row.limit else [])}
            assert expected <= set(one["medians"])
            assert row.group != "pool" or set(one["medians"]) == {*expected, "mp.Pool", "futures"}
            assert set(one["ratios"]) == set(one["medians"]) - {OURS}

    @pytest.mark.parametrize("method", [m for m in multiprocessing.get_all_start_methods() if m != "fork"])
    def test_other_start_methods(self, method: str, capsys: pytest.CaptureFixture[str]) -> None:
        args = ("--rows", "16 bytes of 8 MiB out", "--start-method", method, "--json", "-j", "1")
        found = json.loads(bench(capsys, *SMALL[:-1], "mp.Pool", *args))
        assert (found["start_method"], found["workers"]) == (method, 1)
        assert set(found["rows"][0]["medians"]) == {"one plain copy", OURS, "mp.Pool"}

    def test_without_numpy_the_array_rows_are_left_out(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "numpy", None)
        found = json.loads(bench(capsys, *SMALL, "--rows", "12 arrays*", "--json"))
        assert found["rows"] == []
        assert len(found["left_out"]) == 3
        assert "left out: 12 arrays of 32 MiB in: needs numpy" in bench(capsys, *SMALL, "--rows", "12 arrays*")

    def test_a_group_is_a_pattern_too(self) -> None:
        assert _bench.select(ROWS, "pool") == list(_bench_pool.ROWS)
        assert _bench.select(ROWS, "set_v*") == [ROWS[len(_bench_pool.ROWS)]]


class TestContenders:
    @pytest.mark.slow
    @pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
    def test_each_that_is_installed_can_do_its_rows(self, contender: Contender) -> None:
        # As a program: some leave threads and helpers until their interpreter ends.
        if importlib.util.find_spec(contender.module) is None:
            pytest.skip("not installed")
        args = ("--rows", "pool", "--quick", "--scale", "0.001", "--contenders", contender.name, "--json")
        done = run_bench(*args)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = json.loads(done.stdout)["rows"]
        assert sum(contender.name in row["medians"] for row in rows) >= 3

    def test_one_that_is_not_installed_takes_no_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        absent = Contender("absent", "no_such_module_here", CONTENDERS[0].start)
        monkeypatch.setattr(_bench_contenders, "CONTENDERS", (*CONTENDERS, absent))
        assert "absent" not in [contender.name for contender in _bench_contenders.installed(Setting())]

    def test_ours_is_never_missing(self) -> None:
        asked = _bench_contenders.installed(Setting(contenders=frozenset({"futures"})))
        assert [contender.name for contender in asked] == [OURS, "futures"]

    def test_unknown(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no contender none-such here" in refused(capsys, "--contenders", "mp.Pool,none-such")


class _Wrong:
    """A pool whose every result is wrong."""

    def map(self, function: Any, items: Any, chunksize: Any) -> list[Any]:
        return [None for _ in items]

    def submit(self, function: Any, items: Any) -> list[Any]:
        return []

    def apply(self, function: Any, item: Any) -> Any:
        return None


@contextlib.contextmanager
def start_wrong(setting: Setting) -> Iterator[AnyPool]:
    yield _Wrong()


@contextlib.contextmanager
def fail_to_start(setting: Setting) -> Iterator[AnyPool]:
    raise RuntimeError("no room\nfor it")
    yield


class TestFailures:
    def test_a_wrong_result_is_an_error_and_no_figure(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rivals = (
            Contender("liar", "os", start_wrong, long_name="liar"),
            Contender("dud", "os", fail_to_start, long_name="dud"),
        )
        monkeypatch.setattr(_bench_contenders, "CONTENDERS", (CONTENDERS[0], *rivals))
        args = ("--quick", "--scale", "0.001")
        for name in [row.name for row in _bench_pool.ROWS if HAS_NUMPY or row.needs is None]:
            (one,) = json.loads(bench(capsys, *args, "--rows", name, "--json", status=1))["rows"]
            assert set(one["medians"]) - {one["limit"]} == {OURS}, name
            assert one["errors"]["liar"].startswith("WrongResultError: "), name
            assert one["errors"]["dud"] == "RuntimeError: no room for it"
        text = bench(capsys, *args, "--rows", "apply(inc), per call", status=1)
        assert text.splitlines()[1].split()[-2:] == ["error", "error"]
        assert "ERROR: apply(inc), per call: dud: RuntimeError: no room for it" in text.splitlines()

    def test_a_slow_contender_sits_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0

        def work(seconds: float) -> float:
            nonlocal now
            now += seconds
            return seconds

        monkeypatch.setattr(_bench.time, "perf_counter", lambda: now)
        contenders = {OURS: lambda: work(0.01), "slow": lambda: work(1.0), "slower": lambda: work(10.0)}
        (result,) = _bench.measure([row(contenders)], Setting(rounds=5)).results
        assert {name: len(samples) for name, samples in result.samples.items()} == {OURS: 5, "slow": 2, "slower": 1}
        assert list(result.samples) == list(contenders)

    def test_the_order_moves_on(self) -> None:
        turns: list[str] = []

        def contender(name: str) -> Any:
            return lambda: turns.append(name) or 1.0

        _bench.measure([row({name: contender(name) for name in "abc"})], Setting(rounds=2))
        assert "".join(turns) == "abc" + "bca" + "cab"


class TestText:
    def test_the_limit_stands_first_and_multiples_are_of_ours(self) -> None:
        rows = [row({}, "one", limit="bare"), row({}, "two")]
        results = [
            Result(rows[0], {"bare": [0.001], OURS: [0.003, 0.002, 0.009], "other": [0.3]}),
            Result(rows[1], {OURS: [0.5], "other": [0.25]}, {"third": "ValueError: no"}),
        ]
        lines = _bench.as_text(Report(Setting(), results, ["a name"], {"three": "why"})).splitlines()
        assert lines[0].split() == ["limit", OURS, "of", "limit", "other", "third"]
        assert lines[1].split() == ["one,", "ms", "1", "3", "3", "x", "300", "(100", "x)"]
        assert lines[2].split() == ["two,", "ms", "500", "250", "(0.5", "x)", "error"]
        assert {"limit: bare", "a name", "left out: three: why", "ERROR: two: third: ValueError: no"} <= set(lines)


class TestPlot:
    ARGS = (*SMALL, "--rows", "*apply*")

    @pytest.mark.parametrize("name", ["picture.svg", "picture.PNG"])
    def test_svg_and_png(self, name: str, tmp_path: Path) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            pytest.skip("no matplotlib")
        # As a program: matplotlib keeps its fonts open.
        done = run_bench(*self.ARGS, "--plot", str(tmp_path / name))
        assert (done.returncode, done.stderr) == (0, "")
        if name.endswith("svg"):
            text = "".join(xml.etree.ElementTree.parse(tmp_path / name).getroot().itertext())
            assert "apply(inc), per call" in text
            assert "mp.Pool" in text
        else:
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")

    def test_with_nothing_to_compare(self, tmp_path: Path) -> None:
        with pytest.raises(_bench.BenchError, match="nothing"):
            _bench_plot.draw(Report(Setting(), [], [], {}), str(tmp_path / "picture.svg"))

    @pytest.fixture
    def never_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_bench, "measure", None)

    @pytest.mark.usefixtures("never_measured")
    def test_without_matplotlib_the_extra_is_named(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        error = refused(capsys, *self.ARGS, "--plot", "picture.svg")
        assert error == "portshm: --plot needs matplotlib: pip install 'portshm[bench]'\n"

    @pytest.mark.usefixtures("never_measured")
    def test_what_cannot_be_written_is_refused_before_measuring(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "svg or .png" in refused(capsys, *self.ARGS, "--plot", "picture.gif")
        if importlib.util.find_spec("matplotlib") is not None:
            assert "no folder" in refused(capsys, *self.ARGS, "--plot", str(tmp_path / "none" / "picture.svg"))


class TestUsage:
    @pytest.mark.parametrize("args", [("--rounds", "0"), ("--scale", "0"), ("--scale", "x"), ("-j", "0")], ids=" ".join)
    def test_refused(self, args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *args])
        assert stopped.value.code == 2
        assert "expected a" in capsys.readouterr().err

    def test_unknown_row(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "12 arrays of 32 MiB in; " in refused(capsys, "--rows", "none such")


@pytest.mark.skipif(os.name != "posix", reason="a signal to a process group")
@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_ctrl_c_is_one_line_and_leaves_no_process(delay: float) -> None:
    # To the whole group, as a terminal sends it. At once after the first fork, and within a row.
    source = """
import os, sys
os.register_at_fork(after_in_parent=lambda: print("forked", flush=True))
from portshm._cli import main
sys.exit(main(["bench", "--rows", "20 000*", "--rounds", "1000", "--contenders", "mp.Pool,futures"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", source], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        try:
            # What is left would keep the pipes open.
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "portshm: interrupted\n")
    assert set(out.split()) <= {"forked"}


@pytest.mark.parametrize(("interrupted", "status", "said"), [(False, 0, ""), (True, 130, "portshm: interrupted\n")])
def test_a_contender_that_never_ends_does_not_keep_the_bench(interrupted: bool, status: int, said: str) -> None:
    source = """
import sys, threading, _thread
from concurrent.futures import ProcessPoolExecutor
from portshm import _bench_contenders, _bench_tasks
from portshm._cli import main
_bench_contenders._END_SECONDS = 0.1
def hang(executor, **options):
    threading.Thread(target=threading.Event().wait).start()
    threading.Event().wait()
ProcessPoolExecutor.shutdown = hang
if sys.argv[1:] == ["True"]:
    def submit(executor, *args):
        _thread.interrupt_main()
    _bench_contenders._ExecutorLike.submit = submit
rows = ["--rows", "2 000*", "--rounds", "1", "--scale", "0.01", "--contenders", "futures", "-j", "1"]
sys.exit(main(["bench", *rows]))
"""
    done = run_python(source, interrupted)
    assert (done.returncode, done.stderr) == (status, said)
    assert ("futures" in done.stdout) is not interrupted
