"""The bench's picture: a bar for each contender of each row, as a multiple of portshm's time, on a logarithmic scale.

matplotlib comes with an extra and is imported when a picture is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, Final

from ._bench import OURS, BenchError, Report, Result, figure, machine_line

__all__ = ["check", "draw"]

_TYPES: Final = (".svg", ".png")
_UNITS: Final = {"s": (1.0, "s"), "ms": (1e-3, "ms"), "us": (1e-6, "µs"), "ns": (0.0, "ns")}

# Inches.
_WIDTH: Final = 10.0
_BAR: Final = 0.2
_GAP: Final = 0.5
_LETTER: Final = 0.075  # of a row's name, which stands on the left
_MARGINS: Final = (0.75, 0.85)  # above and below the bars

_LIMIT_COLOUR: Final = "#ffffff"
# One sober colour each, in the order of the columns, with the standard library's the darkest.
_COLOURS: Final = ("#4a5568", "#7b8794", "#a3b1bf", "#8fa68e", "#c2b280", "#b39a94", "#9d94b3")
_INK: Final = "#2d3748"
_OURS_COLOUR: Final = "#c05621"


def check(path: str) -> None:
    """BenchError for a picture that could not be written after the measuring."""
    if os.path.splitext(path)[1].lower() not in _TYPES:
        raise BenchError(f"--plot {path}: expected a name that ends in {' or '.join(_TYPES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'portshm[bench]'")
    if not os.access(os.path.dirname(path) or os.curdir, os.W_OK):
        raise BenchError(f"--plot {path}: no folder that can be written to")


def draw(report: Report, path: str) -> None:
    """Write the picture of a report. BenchError if there is nothing to compare in it."""
    results = [result for result in report.results if result.ratios]
    if not results:
        raise BenchError("--plot: nothing was measured that could be drawn")
    # Of pyplot nothing is used: it would look for a display.
    picture = importlib.import_module("matplotlib.figure").Figure
    rivals = list(dict.fromkeys(name for r in results for name in r.ratios if name != r.row.limit))
    colours = dict(zip(rivals, _COLOURS * (len(rivals) // len(_COLOURS) + 1), strict=False))
    inches = sum(_BAR * len(result.ratios) + _GAP for result in results)
    height = inches + sum(_MARGINS)
    with importlib.import_module("matplotlib").rc_context(
        # Text stays text: smaller, to be searched, and in the reader's font. No hash changes from run to run.
        {"svg.fonttype": "none", "svg.hashsalt": "portshm", "font.size": 8.5, "text.color": _INK}
    ):
        figure_ = picture(figsize=(_WIDTH, height))
        left = 0.2 + _LETTER * max(len(result.row.name) for result in results)
        axes = figure_.add_axes((left / _WIDTH, _MARGINS[1] / height, 0.98 - left / _WIDTH, inches / height))
        _draw_bars(axes, results, colours, left)
        _label(figure_, axes, report, results, colours, height)
        figure_.savefig(path, dpi=150, metadata={"Date": None} if path.lower().endswith(".svg") else None)


def _time(seconds: float) -> str:
    unit, (_, sign) = next(item for item in _UNITS.items() if seconds >= item[1][0])
    return f"{figure(seconds, unit)} {sign}"


def _draw_bars(axes: Any, results: Sequence[Result], colours: dict[str, str], left: float) -> None:
    axes.set_xscale("log")
    ratios = [ratio for result in results for ratio in result.ratios.values()]
    # Room on the right for the figures, which stand behind their bars.
    axes.set_xlim(min(0.25, *ratios) / 1.6, max(10.0, *ratios) * 6)
    at = 0.0
    for result in results:
        row = result.row
        at += _GAP
        axes.annotate(
            row.name, (0, at - 0.1), xycoords=axes.get_yaxis_transform(), xytext=((0.2 - left) * 72, 0),
            textcoords="offset points", weight="bold", va="bottom", annotation_clip=False,
        )  # fmt: skip
        axes.annotate(
            f"portshm {_time(result.medians[OURS])}", (1, at - 0.1), xytext=(4, 0), textcoords="offset points",
            color=_OURS_COLOUR, weight="bold", va="bottom",
        )  # fmt: skip
        for name, ratio in result.ratios.items():
            limit = name == row.limit
            axes.barh(
                at + _BAR / 2, ratio - 1, left=1, height=_BAR * 0.8,
                color=_LIMIT_COLOUR if limit else colours[name], edgecolor=_INK if limit else "none", linewidth=0.6,
            )  # fmt: skip
            times = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
            axes.annotate(
                f"{name} {_time(result.medians[name])}, {times} ×",
                (max(ratio, 1), at + _BAR / 2), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=7.5,
            )  # fmt: skip
            at += _BAR
    axes.set_ylim(at + 0.1, 0)
    axes.axvline(1, color=_OURS_COLOUR, linewidth=1.2)


def _label(
    figure_: Any, axes: Any, report: Report, results: Sequence[Result], colours: dict[str, str], height: float
) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g} ×"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_yticks([])
    axes.grid(axis="x", color="#e2e8f0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", which="both", colors=_INK, length=0)
    for side in ("top", "left", "right", "bottom"):
        axes.spines[side].set_visible(False)
    figure_.text(
        0.02, 1 - 0.25 / height, "Time as a multiple of portshm's: further right is slower",
        fontsize=11, weight="bold", va="center",
    )  # fmt: skip
    patch = importlib.import_module("matplotlib.patches").Patch
    keys = [patch(facecolor=colour, label=name) for name, colour in colours.items()]
    if any(result.row.limit for result in results):
        keys.append(patch(facecolor=_LIMIT_COLOUR, edgecolor=_INK, linewidth=0.6, label="what cannot be avoided"))
    figure_.legend(
        handles=keys, loc="upper left", bbox_to_anchor=(0.012, 1 - 0.38 / height), ncols=len(keys), frameon=False,
        handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
    names = [name for name in report.names if not name.startswith(OURS)]
    notes = [f"Medians of up to {report.setting.rounds} rounds. {machine_line(report.setting)}", "; ".join(names)]
    if report.setting.scale != 1:
        notes[0] = f"NOT TO BE COMPARED: sizes and counts times {report.setting.scale:g}. {notes[0]}"
    figure_.text(0.02, 0.15 / height, "\n".join(notes), fontsize=7.5, va="bottom", linespacing=1.5)
