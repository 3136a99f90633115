"""``portshm bench``: portshm beside its alternatives, on the user's own machine.

A `Row` is one workload with its contenders, each a callable that does the work once and returns the seconds it took.
The contenders take turns within every round and the order moves on by one each round, so that a machine that
slows down meanwhile slows all of them. Figures are medians. Here is how rows are measured and told of; what they are
is in ``_bench_pool`` and ``_bench_memory``.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "OURS", "BenchError", "Contenders", "Report", "Result", "Row", "Setting", "WrongResultError", "as_dict", "as_text",
    "default_start_method", "figure", "machine_line", "measure", "select",
]  # fmt: skip

Contenders = dict[str, Callable[[], float]]

OURS: Final = "portshm"

# A contender that has worked this many seconds on a row sits out the row's other rounds. It is then so slow that one
# more sample says nothing new, and a bench of ten minutes is not run.
_ENOUGH: Final = 3.0

_SCALES: Final = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


class BenchError(Exception):
    """The bench cannot do what it was asked for; the message is for the user."""


class WrongResultError(Exception):
    """A contender returned something else than it should have."""


def default_start_method() -> str:
    """fork where there is one, on every version alike; Python's own default changed with 3.14."""
    methods = multiprocessing.get_all_start_methods()
    return "fork" if "fork" in methods else methods[0]


@dataclass(frozen=True)
class Setting:
    """How to measure: what `measure` and the rows are told.

    Args:
        rounds: how often each contender has its turn, after one turn that is not counted.
        scale: factor on sizes and counts. Other than 1, for little memory or for tests, the figures say little.
        contenders: names of those to measure beside ours; all that are installed if None.
    """

    rounds: int = 7
    workers: int = 2
    start_method: str = field(default_factory=default_start_method)
    scale: float = 1.0
    contenders: frozenset[str] | None = None

    def scaled(self, size: int) -> int:
        """A size or count under `scale`; a multiple of 8, as sizes of float64 arrays have to be, or as it is."""
        return size if self.scale == 1 else max(8, int(size * self.scale) // 8 * 8)


@dataclass(frozen=True)
class Row:
    """One workload.

    Args:
        group: rows of one group share a table.
        name: what is done, as it stands in the table and as ``--rows`` matches it.
        unit: of the figures shown: s, ms, us or ns.
        open: a context manager that sets the workload up and gives contender -> callable returning seconds.
        limit: the contender that does only what cannot be avoided; it gets the first column.
        needs: a module without which the row is left out.
    """

    group: str
    name: str
    unit: str
    open: Callable[[Setting], AbstractContextManager[Contenders]]
    limit: str | None = None
    needs: str | None = None


@dataclass(frozen=True)
class Result:
    """A row's samples in seconds: contender -> one per round; and what went wrong: contender -> why."""

    row: Row
    samples: dict[str, list[float]]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(samples) for name, samples in self.samples.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """Each contender's time as a multiple of ours: more than 1 where portshm is the quicker one."""
        medians = self.medians
        ours = medians.get(OURS)
        return {name: m / ours for name, m in medians.items() if name != OURS} if ours else {}


@dataclass(frozen=True)
class Report:
    """What was measured, and under which conditions.

    Args:
        names: what the contenders' names stand for, one line each.
        left_out: row -> why it was not measured.
    """

    setting: Setting
    results: list[Result]
    names: list[str]
    left_out: dict[str, str]

    @property
    def failed(self) -> bool:
        return any(result.errors for result in self.results)


def select(rows: Sequence[Row], pattern: str) -> list[Row]:
    """The rows whose name matches a shell pattern, or all of the group of that name."""
    return [row for row in rows if row.group == pattern or fnmatch.fnmatchcase(row.name, pattern)]


def measure(rows: Sequence[Row], setting: Setting, names: Sequence[str] = ()) -> Report:
    """Measure each row, with a line of progress on stderr where that is a terminal."""
    left_out = {row.name: f"needs {row.needs}, which is not installed" for row in rows if not _is_there(row.needs)}
    rows = [row for row in rows if row.name not in left_out]
    results = []
    with _interrupts() as interrupted, _Progress() as progress:
        for number, row in enumerate(rows, 1):
            progress.prefix = f"[{number}/{len(rows)}] {row.name}: "
            results.append(_measure_row(row, setting, progress.show, interrupted))
    return Report(setting, results, list(names), left_out)


def _is_there(module: str | None) -> bool:
    return module is None or importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Tell whether Ctrl-C was pressed. Its exception alone may be lost: Python drops what is raised in a finalizer,
    and large results have one."""
    pressed = False

    def handle(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or somebody else's
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _measure_row(row: Row, setting: Setting, show: Callable[[str], None], interrupted: Callable[[], bool]) -> Result:
    samples: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    show("starting")
    with row.open(setting) as contenders:
        order = list(contenders)
        worked = dict.fromkeys(order, 0.0)
        for turn in range(setting.rounds + 1):
            which = f"round {turn}/{setting.rounds}" if turn else "first turns"
            for name in order:
                if name in errors or worked[name] >= _ENOUGH:
                    continue
                show(f"{which}, {name}")
                start = time.perf_counter()
                try:
                    seconds = contenders[name]()
                except Exception as error:  # a rival's failure is something to report, and no reason to stop
                    errors[name] = " ".join(f"{type(error).__name__}: {error}".split())
                    samples.pop(name, None)
                    continue
                if interrupted():
                    raise KeyboardInterrupt
                worked[name] += time.perf_counter() - start
                # The first turn is for nothing: first touch, imports, processes that start. Beside a work of
                # seconds that is nothing, and doing it again would be.
                if turn or worked[name] >= _ENOUGH:
                    samples.setdefault(name, []).append(seconds)
            order.append(order.pop(0))
    # In the order of the row, whoever was the first to be done.
    return Result(row, {name: samples[name] for name in contenders if name in samples}, errors)


class _Progress:
    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._shown = False
        self.prefix = ""

    def show(self, text: str) -> None:
        if self._on:
            self._shown = True
            print(f"\r\x1b[K{(self.prefix + text)[:78]}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# -- reports


def as_dict(report: Report) -> dict[str, Any]:
    """What was measured, in seconds, for JSON."""
    setting = report.setting
    return {
        "machine": _machine(),
        "rounds": setting.rounds,
        "workers": setting.workers,
        "start_method": setting.start_method,
        "scale": setting.scale,
        "contenders": report.names,
        "rows": [
            {
                "group": result.row.group,
                "name": result.row.name,
                "limit": result.row.limit,
                "medians": result.medians,
                "ratios": result.ratios,
                "samples": result.samples,
                "errors": result.errors,
            }
            for result in report.results
        ],
        "left_out": report.left_out,
    }


def as_text(report: Report) -> str:
    """A table per group: the limit first, then portshm, then the others; the multiples are of portshm's time."""
    lines: list[str] = []
    for _, results in groupby(report.results, key=lambda result: result.row.group):
        lines += [*_table(list(results)), ""]
    limits = sorted({result.row.limit for result in report.results if result.row.limit})
    setting = report.setting
    notes = [
        f"medians of {setting.rounds} rounds, fewer for a contender that worked {_ENOUGH:.0f} s and more on a row",
        "in brackets: that contender's time as a multiple of portshm's",
        *([f"limit: {', '.join(limits)}"] if limits else []),
        *(["; ".join(report.names)] if report.names else []),
        machine_line(setting),
        *([f"NOT TO BE COMPARED: sizes and counts times {setting.scale:g}"] if setting.scale != 1 else []),
        *(f"left out: {name}: {why}" for name, why in report.left_out.items()),
        *(f"ERROR: {result.row.name}: {who}: {why}" for result in report.results for who, why in result.errors.items()),
    ]
    return "\n".join([*lines, *notes])


def _table(results: Sequence[Result]) -> list[str]:
    limits = any(result.row.limit for result in results)
    rivals = list(
        dict.fromkeys(
            name for r in results for name in (*r.samples, *r.errors) if name != OURS and name != r.row.limit
        )
    )  # fmt: skip
    table = [["", *(["limit"] if limits else []), OURS, *(["of limit"] if limits else []), *rivals]]
    for result in results:
        ratios, row = result.ratios, result.row
        line = [f"{row.name}, {row.unit}"]
        if limits:
            line.append(_cell(result, row.limit))
        line.append(_cell(result, OURS))
        if limits:
            line.append(f"{_multiple(1 / ratios[row.limit])} x" if row.limit and row.limit in ratios else "")
        for rival in rivals:
            line.append(_cell(result, rival) + (f" ({_multiple(ratios[rival])} x)" if rival in ratios else ""))
        table.append(line)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return [
        (
            f"{line[0]:{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))
        ).rstrip()
        for line in table
    ]


def _cell(result: Result, name: str | None) -> str:
    if name is None or name not in result.samples:
        return "error" if name in result.errors else ""
    return figure(result.medians[name], result.row.unit)


def figure(seconds: float, unit: str) -> str:
    """Seconds in that unit, with three digits that count."""
    value = seconds * _SCALES[unit]
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _multiple(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def machine_line(setting: Setting) -> str:
    """The conditions in one line."""
    machine = _machine()
    return (
        f"Python {machine['python']}, {machine['system']}, {machine['cpus']} CPUs, "
        f"{setting.workers} workers, {setting.start_method}"
    )


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
    }
