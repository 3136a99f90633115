"""The command line, over portshm's public API.

A subcommand is two functions: `_add_NAME` makes its parser and sets ``run``, which does the work and returns the exit
status. `_SUBCOMMANDS` lists the first of each pair, in the order of ``--help``.

Exit status: 0 done, 1 done but with failures to report, 2 an error (one line on stderr, no traceback), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from ._header import GO_FUZZ_HEADER, PORTSHM_HEADER, HeaderCodec
from ._reaper import RegionInfo, clean, list_regions
from ._region import RegionAddress
from ._shared_mem import SharedMem
from .errors import HeaderError, PortShmError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["main"]

_LAYOUTS: Final[dict[str, HeaderCodec | None]] = {"portshm": None, "go": GO_FUZZ_HEADER}  # None: as found in memory

_INTERRUPTED: Final = "portshm: interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    _let_stdout_print_any_path()
    args = _parser().parse_args(argv)
    if sys.stdout is None:  # `>&-`
        print("portshm: standard output is closed", file=sys.stderr)
        return 2
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        status = run(args)
        sys.stdout.flush()  # here, where a reader that has gone can still be caught
        return status
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has what it wanted (`| head`). The interpreter flushes once more at exit; give it somewhere to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for SIGPIPE
    except (PortShmError, OSError) as error:
        print(f"portshm: {_one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portshm",
        description="Shared memory between processes, and jobs over it in which a crash costs one item only.",
        epilog="`portshm COMMAND --help` has an example for each command.",
    )
    parser.add_argument("--version", action="version", version=f"portshm {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _SUBCOMMANDS:
        add(commands)
    return parser


def _add(commands: Commands, name: str, summary: str, text: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_dirs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir",
        dest="dirs",
        metavar="DIR",
        action="append",
        default=[],
        help="look here too, besides the temporary folder and the system's shared memory; may be repeated",
    )


# -- map


def _add_map(commands: Commands) -> None:
    parser = _add(
        commands,
        "map",
        "call a function with the bytes of many files, in worker processes",
        "Call MODULE:FUNCTION(memoryview) with the bytes of each file, in worker processes, and print the path, a tab\n"
        "and the result's repr, in the order of the files. Folders are walked. A worker that dies, by whatever death,\n"
        "costs the file it was at: that is reported as CRASHED, and the bytes are saved under --crashers. Exit status\n"
        "1 if a file failed or crashed.",
        "portshm map zlib:crc32 -j 4 /usr/share/doc",
    )
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="what to call, for instance zlib:crc32")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="files and folders")
    parser.add_argument("-j", "--jobs", type=_positive, metavar="N", help="worker processes (one per processor)")
    parser.add_argument(
        "--start-method",
        choices=multiprocessing.get_all_start_methods(),
        help="how workers are started (the default of this Python)",
    )
    parser.add_argument("--backend", choices=("auto", "file", "named"), default="auto", help="where their memory is")
    parser.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="limit for each file, from its own start")
    parser.add_argument(
        "--retries", type=_count, default=0, metavar="N", help="run a file that crashed again, alone, N times (0)"
    )
    parser.add_argument("--crashers", metavar="DIR", default="crashers", help="where crashers' bytes go (crashers/)")
    parser.set_defaults(run=_run_map)


def _run_map(args: argparse.Namespace) -> int:
    from . import _map_job as job  # here, because the other commands need no pool
    from .pool import Pool

    try:
        function = job.load_function(args.function)
        files = job.find_files(args.paths)
    except job.JobError as error:
        print(f"portshm: {_one_line(error)}", file=sys.stderr)
        return 2
    progress = job.Progress(len(files), sys.stderr)
    jobs = args.jobs or os.cpu_count() or 1
    pool = Pool(
        min(jobs, max(1, len(files))),
        context=multiprocessing.get_context(args.start_method),
        backend=args.backend,
        task_timeout=args.timeout,
        retries=args.retries,
    )
    try:
        with pool:
            for result in job.run_map(function, files, args.crashers, pool, jobs=jobs):
                progress.clear()
                print(f"{result.path}\t{result.text}")
                if result.saved is not None:
                    print(f"portshm: saved {result.saved}", file=sys.stderr)
                if result.problem is not None:
                    print(f"portshm: {result.problem}", file=sys.stderr)
                progress.count(result)
    finally:
        progress.clear()
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdout.flush()
    print(progress, file=sys.stderr)
    return 0 if progress.counts["ok"] == len(files) else 1


# -- inspect


def _add_inspect(commands: Commands) -> None:
    parser = _add(
        commands,
        "inspect",
        "show a region's header and the head of its value",
        "Show the header fields of a region, whether its value is complete, and a hexdump of the value's head.\n"
        "Attaches read-only, changes nothing and unpickles nothing, so it also serves for what a dead worker left.\n"
        "Fields that the creator added to the header are shown by offset, as words of 8 bytes.",
        "portshm inspect /dev/shm/portshm_0123456789abcdef0123",
    )
    parser.add_argument("address", metavar="ADDRESS|FILE", help="file:PATH, shm:NAME, or the path of a file")
    parser.add_argument("--bytes", type=_count, default=256, metavar="N", help="bytes of the value shown (256)")
    parser.add_argument(
        "--layout",
        choices=sorted(_LAYOUTS),
        default="portshm",
        help="the header's layout; 'go' is the 40 bytes of Go's fuzzer",
    )
    _add_json(parser)
    parser.set_defaults(run=_run_inspect)


def _run_inspect(args: argparse.Namespace) -> int:
    mem = SharedMem.attach(args.address, readonly=True, header=_LAYOUTS[args.layout])
    try:
        report = _report(mem, args.bytes)
    finally:
        mem.close()
    if args.json:
        _print_json({**report, "head": report["head"].hex()})
    else:
        for line in _report_lines(report):
            print(line)
    return 0


def _report(mem: SharedMem, limit: int) -> dict[str, Any]:
    """What there is to say of a region, on one look at it."""
    before = mem.header.sequence if mem.layout.describes_itself else None
    head, problem = b"", None
    try:
        head = bytes(mem.value_ref()[:limit])
    except HeaderError as error:  # a length that cannot be; the rest is still worth showing
        problem = str(error)
    header = dict(mem.header)
    if problem is not None:
        complete: bool | None = False
    elif before is None:
        complete = None
    else:
        complete = header["sequence"] == before and not mem.writing
    return {
        "address": str(mem.address),
        "layout": mem.layout.name,
        "size": mem.size,
        "capacity": mem.capacity,
        "owner_alive": _owner_alive(mem.address),
        "complete": complete,
        "problem": problem,
        "superseded": mem.superseded,
        "header": {name: _text(value) for name, value in header.items()},
        "user_words": dict(_user_words(mem)),
        "value_len": header["value_len"],
        "head": head,
    }


def _user_words(mem: SharedMem) -> Iterator[tuple[int, int]]:
    """Offset and value of each 8-byte word of the header that belongs to a layout we do not know."""
    if not mem.layout.describes_itself or mem.layout.size == PORTSHM_HEADER.size:
        return
    # A slice of memory knows what it is a slice of: the whole mapping.
    everything = memoryview(mem.cell("sequence").obj).toreadonly()
    words = everything[PORTSHM_HEADER.size : mem.layout.size].cast("Q")
    for index, word in enumerate(words):
        yield PORTSHM_HEADER.size + 8 * index, word


def _owner_alive(address: RegionAddress) -> bool | None:
    """Whether the owner lives; None for a file that does not bear our prefix, which nobody locks."""
    folder, name = os.path.split(address.name)
    known = {info.address: info.owner_alive for info in list_regions([folder] if folder else [])}
    # A named segment that was addressed by its file in /dev/shm is listed by its name.
    return known.get(address, known.get(RegionAddress("shm", name)))


def _report_lines(report: dict[str, Any]) -> Iterator[str]:
    yield f"address     {report['address']}"
    yield f"layout      {report['layout']}"
    yield f"size        {report['size']} bytes, capacity {report['capacity']}"
    yield f"owner       {_OWNER[report['owner_alive']]}"
    if report["superseded"]:
        yield f"superseded  yes, by {report['header']['successor']}"
    yield f"value       {report['value_len']} bytes, {_COMPLETE[report['complete']]}"
    if report["problem"]:
        yield f"            {report['problem']}"
    yield "header"
    width = max(map(len, report["header"]))
    for name, value in report["header"].items():
        yield f"  {name:{width}}  {value}"
    if report["user_words"]:
        yield "header, the creator's own fields by offset: hexadecimal, signed, as a float"
        for offset, word in report["user_words"].items():
            raw = word.to_bytes(8, sys.byteorder)
            signed, number = memoryview(raw).cast("q")[0], memoryview(raw).cast("d")[0]
            # Few integers are sensible floats, so a float is shown only where it is one.
            as_float = f"  {number:.15g}" if 1e-100 < abs(number) < 1e100 else ""
            yield f"  +{offset:<{width - 1}}  0x{word:016x}  {signed}{as_float}"
    if report["head"]:
        yield f"value, the first {len(report['head'])} bytes"
        yield from _hexdump(report["head"])


_OWNER: Final = {True: "alive", False: "gone: an orphan, `portshm clean` removes it", None: "unknown"}
_COMPLETE: Final = {
    True: "complete",
    False: "NOT complete: being written, or its writer died over it",
    None: "complete or not: this layout does not tell",
}


def _hexdump(data: bytes) -> Iterator[str]:
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        octets = row[:8].hex(" ") + "  " + row[8:].hex(" ")
        yield f"  {start:08x}  {octets:48}  |{''.join(chr(b) if 32 <= b < 127 else '.' for b in row)}|"


# -- ls


def _add_ls(commands: Commands) -> None:
    parser = _add(
        commands,
        "ls",
        "list the regions on this machine",
        "List this user's regions: address, size with the header, whether the owner lives, time since the last change.",
        "portshm ls --dir /var/tmp",
    )
    _add_dirs(parser)
    _add_json(parser)
    parser.set_defaults(run=_run_ls)


def _run_ls(args: argparse.Namespace) -> int:
    regions = list_regions(_checked(args.dirs))
    if args.json:
        _print_json([_as_dict(info) for info in regions])
        return 0
    if not regions:
        print("no regions")
        return 0
    rows = [("ADDRESS", "SIZE", "OWNER", "AGE")] + [
        (str(r.address), str(r.size), "alive" if r.owner_alive else "gone", _age(r.age)) for r in regions
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for address, size, owner, age in rows:
        print(f"{address:{widths[0]}}  {size:>{widths[1]}}  {owner:{widths[2]}}  {age:>{widths[3]}}")
    return 0


def _as_dict(info: RegionInfo) -> dict[str, Any]:
    return {
        "address": str(info.address),
        "size": info.size,
        "owner_alive": info.owner_alive,
        "age": round(info.age, 3),
    }


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


# -- clean


def _add_clean(commands: Commands) -> None:
    parser = _add(
        commands,
        "clean",
        "remove the regions whose owner is gone",
        "Remove this user's orphans, the regions whose owner was killed, and say which. The region of a living owner\n"
        "is never removed: owners hold a lock of the operating system for as long as they live.",
        "portshm clean --dir /var/tmp",
    )
    _add_dirs(parser)
    _add_json(parser)
    parser.set_defaults(run=_run_clean)


def _run_clean(args: argparse.Namespace) -> int:
    removed = [str(address) for address in clean(_checked(args.dirs))]
    if args.json:
        _print_json({"removed": removed})
    elif removed:
        for address in removed:
            print(f"removed {address}")
    else:
        print("nothing to remove")
    return 0


# -- bench


def _add_bench(commands: Commands) -> None:
    parser = _add(
        commands,
        "bench",
        "measure portshm beside its alternatives, on this machine",
        "Measure portshm's pool beside the standard library's, and beside joblib, loky, pebble, mpire and ray where\n"
        "they are installed; and its memory beside the standard library's. The first column is what cannot be\n"
        "avoided: one plain copy of the same bytes, a bare pipe, a plain loop. The contenders take turns within every\n"
        "round, with pools that were started before; the figures are medians. Needs up to 3 GiB of memory. Exit\n"
        "status 1 if a contender failed or its result was wrong. The rows with arrays need numpy, and --plot needs\n"
        "matplotlib: pip install 'portshm[bench]'.",
        "portshm bench --rows pool --quick --plot bench.svg",
    )
    parser.add_argument(
        "--rows", metavar="PATTERN", default="*", help="only rows of that name, as in a shell; or 'pool' or 'memory'"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=7, metavar="N", help="rounds, of which the median is taken (7)"
    )
    parser.add_argument("--quick", action="store_const", const=1, dest="rounds", help="one round")
    parser.add_argument("-j", "--jobs", type=_positive, default=2, metavar="N", help="workers of each pool (2)")
    parser.add_argument(
        "--start-method",
        choices=multiprocessing.get_all_start_methods(),
        help="how workers are started (fork, where there is one)",
    )
    parser.add_argument(
        "--contenders", metavar="NAME,...", help="only these beside portshm, by the names of their columns"
    )
    parser.add_argument(
        "--scale", type=_factor, default=1.0, metavar="FACTOR", help="factor on all sizes and counts, to try it out (1)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the figures too, into a file of type svg or png")
    _add_json(parser)
    parser.set_defaults(run=_run_bench)


def _run_bench(args: argparse.Namespace) -> int:
    # Here, because nobody else needs what these import.
    from . import _bench, _bench_contenders, _bench_memory, _bench_plot, _bench_pool

    try:
        known = (*_bench_pool.ROWS, *_bench_memory.ROWS)
        rows = _bench.select(known, args.rows)
        if not rows:
            raise _bench.BenchError(f"no row {args.rows!r}; rows: {'; '.join(row.name for row in known)}")
        asked = None if args.contenders is None else frozenset(args.contenders.split(","))
        setting = _bench.Setting(
            args.rounds, args.jobs, args.start_method or _bench.default_start_method(), args.scale, asked
        )
        taking_part = _bench_contenders.installed(setting)
        if missing := (asked or frozenset()) - {contender.name for contender in taking_part}:
            raise _bench.BenchError(f"no contender {', '.join(sorted(missing))} here: not known or not installed")
        if args.plot is not None:
            _bench_plot.check(args.plot)  # now, and not after minutes
        has_pools = any(row.group == "pool" for row in rows)
        report = _bench.measure(rows, setting, [str(contender) for contender in taking_part] if has_pools else [])
        if args.json:
            _print_json(_bench.as_dict(report))
        else:
            print(_bench.as_text(report))
        if args.plot is not None:
            _bench_plot.draw(report, args.plot)
        status = 1 if report.failed else 0
        _bench_contenders.leave_if_stuck(status)
        return status
    except KeyboardInterrupt:
        _bench_contenders.leave_if_stuck(130, _INTERRUPTED)
        raise
    except _bench.BenchError as error:
        print(f"portshm: {_one_line(error)}", file=sys.stderr)
        return 2


_SUBCOMMANDS: Final[tuple[Callable[[Commands], None], ...]] = (_add_map, _add_inspect, _add_ls, _add_clean, _add_bench)


# -- what they share


def _checked(dirs: Iterable[str]) -> list[str]:
    # The listing passes over folders that it cannot read; one that was asked for by name is an error.
    for folder in (checked := list(dirs)):
        os.scandir(folder).close()
    return checked


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, not {text!r}")
    return int(text)


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number, more than 0, not {text!r}")
    return factor


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, not {text!r}")
    return seconds


def _text(value: object) -> object:
    """A header field as JSON can hold it and a terminal can show it."""
    return value.rstrip(b"\0").decode("ascii", "backslashreplace") if isinstance(value, bytes) else value


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _let_stdout_print_any_path() -> None:
    # A file name need not be text in the terminal's encoding; show it escaped rather than stop at it.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _version() -> str:
    try:
        return importlib.metadata.version("portshm")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
