"""The search for interleavings that break the pool: a thread stops before a line until another has done something.

Each trial is a pool of its own, something that one thread does with it (`SCENARIOS`), a line that a thread of the
parent comes to meanwhile, and what another thread does while the first stands there (`EVENTS`). Then everything has to
end, with the right values or the errors that were asked for; nothing runs twice, and nothing is left.

    python -m tests.pool.interleaving --seconds 600         # random ones, as long as that
    python -m tests.pool.interleaving --all                 # all that there are, once each
    python -m tests.pool.interleaving --only map,kill,MainThread/_pool.py:12,1 --times 20
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from portshm import PoolTerminatedError, TaskTimeoutError, WorkerCrashed
from portshm.pool import Pool
from tests.conftest import _left as left_now
from tests.conftest import _present as present
from tests.pool.lines import Line, Lines, Stop
from tests.pool.waiting import running, until
from tests.tasks import counted, hang, note

PATIENCE = 10.0  # seconds after which something hangs
STOPPED = 0.06  # seconds for which a thread stands at a line if the other cannot go on before it does
SETTLED = 0.004  # seconds more, for third threads to see what the other has done
VISITS = 3  # how often a thread may come to a line before it is stopped there
WORKERS = 2

START_METHOD = "fork" if sys.platform == "linux" else "spawn"


class Item(NamedTuple):
    """Something of a user's class: its code runs where it is pickled and unpickled."""

    log: str
    number: int


def element(log: str, number: int) -> int:
    note(log, number)
    return number * 10


def carried_element(item: Item) -> Item:
    note(item.log, item.number)
    return Item("", item.number * 10)


class Trial:
    """One pool, and what became of each call."""

    def __init__(self, log: str) -> None:
        self.log = log
        self.pool = Pool(WORKERS, context=multiprocessing.get_context(START_METHOD), on_crash="return")
        self.workers: list[int] = []
        self.kills = 0
        self.closed = self.terminated = False
        self.faults: list[str] = []
        self.results: list[tuple[str, list[int], Any]] = []
        self._numbers = itertools.count()

    def settle(self) -> None:
        until(lambda: [stats.state for stats in self.pool.stats()] == ["idle"] * WORKERS, "workers", PATIENCE)
        self.workers = [stats.pid for stats in self.pool.stats() if stats.pid is not None]

    def numbers(self, count: int) -> list[int]:
        return [next(self._numbers) for _ in range(count)]

    def attempt(self, what: str, numbers: list[int], call: Callable[[], list[Any]]) -> None:
        """Note what a call that should return ten times the numbers has come to."""
        try:
            outcome: Any = call()
        except BaseException as error:
            outcome = error
        self.results.append((what, numbers, outcome))

    def check(self) -> None:
        """Add to `faults` what is wrong with the results."""
        runs = counted(self.log)
        crashed = 0
        for number, count in runs.items():
            if count > 1:
                self.faults.append(f"element {number} ran {count} times")
        for what, numbers, outcome in self.results:
            if isinstance(outcome, BaseException):
                if not (self._expected(outcome) or self._came_too_late(numbers, outcome)):
                    told = "".join(traceback.format_exception(type(outcome), outcome, outcome.__traceback__)).rstrip()
                    self.faults.append(f"{what} raised {outcome!r}\n{told}")
                continue
            if len(outcome) != len(numbers):
                self.faults.append(f"{what}: {len(outcome)} results for {len(numbers)} elements")
            for number, value in zip(numbers, outcome, strict=False):
                if isinstance(value, WorkerCrashed):
                    crashed += 1
                elif value != number * 10:
                    self.faults.append(f"{what}: {value!r} instead of {number * 10}")
                elif not runs[number]:
                    self.faults.append(f"{what}: element {number} has a result and never ran")
        if crashed > self.kills:
            self.faults.append(f"{crashed} elements crashed with {self.kills} workers killed")

    def _came_too_late(self, numbers: list[int], error: BaseException) -> bool:
        """Whether a closed pool may have refused the call, which had begun before."""
        return self.closed and isinstance(error, PoolTerminatedError) and not set(numbers) & set(counted(self.log))

    def _expected(self, error: BaseException) -> bool:
        if isinstance(error, PoolTerminatedError):
            return self.terminated
        if type(error) is ValueError:
            return (self.terminated or self.closed) and str(error) == "Pool not running"
        return False


# -- what threads do


def apply(trial: Trial) -> None:
    (number,) = trial.numbers(1)
    trial.attempt("apply", [number], lambda: [trial.pool.apply(element, (trial.log, number))])


def apply_async(trial: Trial) -> None:
    numbers = trial.numbers(3)

    def call() -> list[Any]:
        results = [trial.pool.apply_async(element, (trial.log, number)) for number in numbers]
        return [result.get(PATIENCE) for result in results]

    trial.attempt("apply_async", numbers, call)


def whole_map(trial: Trial) -> None:
    numbers = trial.numbers(20)
    items = [(trial.log, number) for number in numbers]
    trial.attempt("starmap", numbers, lambda: trial.pool.starmap_async(element, items).get(PATIENCE))


def carried_map(trial: Trial) -> None:
    numbers = trial.numbers(6)
    items = [Item(trial.log, number) for number in numbers]
    trial.attempt("map", numbers, lambda: _numbers(trial.pool.map_async(carried_element, items).get(PATIENCE)))


def _numbers(results: list[Any]) -> list[Any]:
    return [result.number if isinstance(result, Item) else result for result in results]


def one_by_one(trial: Trial) -> None:
    numbers = trial.numbers(6)
    items = [Item(trial.log, number) for number in numbers]

    def call() -> list[Any]:
        results = trial.pool.imap(carried_element, items)
        return _numbers([results.next(PATIENCE) for _ in items])

    trial.attempt("imap", numbers, call)


def deadline(trial: Trial) -> None:
    """A call that is never done within its time."""
    try:
        outcome: Any = trial.pool.apply_async(hang, timeout=0.02).get(PATIENCE)
    except BaseException as error:
        outcome = error
    # A killed worker is replaced: it is the deadline's death, or the one that was asked for besides.
    if not isinstance(outcome, WorkerCrashed) and not trial._expected(outcome):
        trial.faults.append(f"no deadline, but {outcome!r}")
    if isinstance(outcome, WorkerCrashed) and not isinstance(outcome, TaskTimeoutError) and not trial.kills:
        trial.faults.append(f"no deadline, but {outcome!r}")


def _kill(trial: Trial, victims: list[int]) -> None:
    trial.kills += len(victims)
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(running, victims)), "deaths", PATIENCE)


def kill(trial: Trial) -> None:
    _kill(trial, trial.workers[:1])


def kill_all(trial: Trial) -> None:
    _kill(trial, trial.workers)


def death(trial: Trial) -> None:
    """Work that begins as a worker dies."""
    kill(trial)
    carried_map(trial)
    apply_async(trial)


def terminate(trial: Trial) -> None:
    trial.terminated = True
    trial.pool.terminate()


def terminate_with_work(trial: Trial) -> None:
    numbers = trial.numbers(40)
    trial.terminated = True
    result = trial.pool.starmap_async(element, [(trial.log, number) for number in numbers])
    trial.pool.terminate()
    trial.attempt("starmap", numbers, lambda: result.get(PATIENCE))


def close(trial: Trial) -> None:
    trial.closed = True
    trial.pool.close()


def close_with_work(trial: Trial) -> None:
    numbers = trial.numbers(40)
    trial.closed = True

    def call() -> list[Any]:
        result = trial.pool.starmap_async(element, [(trial.log, number) for number in numbers])
        trial.pool.close()
        trial.pool.join()
        return result.get(PATIENCE)

    trial.attempt("starmap", numbers, call)


Action = Callable[[Trial], None]
SCENARIOS: dict[str, Action] = {
    "apply": apply,
    "apply_async": apply_async,
    "map": whole_map,
    "carried": carried_map,
    "imap": one_by_one,
    "death": death,
    "terminate": terminate_with_work,
    "close": close_with_work,
}
EVENTS: dict[str, Action] = {
    "kill": kill,
    "kill_all": kill_all,
    "terminate": terminate,
    "close": close,
    "apply": apply,
    "apply_async": apply_async,
    "map": whole_map,
    "deadline": deadline,
}
CALLER, OTHER = "caller", "other"


class Interleaving(NamedTuple):
    scenario: str
    event: str
    line: Line | None  # none is stopped at any
    visit: int = 1

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Interleaving:
        scenario, event, line, visit = text.split(",")
        return cls(scenario, event, None if line == "None" else Line.parse(line), int(visit))


class _Thread(threading.Thread):
    """One that may hang, and hands on what it raises."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self._action = action
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self.error = error


def ended(thread: _Thread, faults: list[str]) -> bool:
    """Wait for a thread; what is wrong with its end goes to `faults`."""
    thread.join(PATIENCE + 2.0)
    if thread.is_alive():
        faults.append(f"the thread {thread.name!r} hangs\n{stacks()}")
        return False
    if thread.error is not None:
        faults.append("".join(traceback.format_exception(thread.error)).rstrip())
    return True


def stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def try_out(interleaving: Interleaving, log: str, seen: Callable[[Line], object]) -> tuple[list[str], bool]:
    """What was wrong, and whether the thread was stopped."""
    before = present()
    faults, stopped, fine = _try_out(interleaving, log, seen)
    if fine:
        faults += leftovers(before)
    else:
        kill_children(before)
    return faults, stopped


def _try_out(interleaving: Interleaving, log: str, seen: Callable[[Line], object]) -> tuple[list[str], bool, bool]:
    """The same, and whether everything has ended."""
    scenario, event, line, visit = interleaving
    trial = Trial(log)
    stop = Stop(line, visit, PATIENCE) if line is not None else None
    armed = threading.Event()

    def come_to(line: Line) -> None:
        if armed.is_set() and line.thread != OTHER:
            seen(line)
            if stop is not None:
                stop(line)

    caller = _Thread(CALLER, lambda: SCENARIOS[scenario](trial))
    other = _Thread(OTHER, lambda: EVENTS[event](trial))
    faults = trial.faults
    with Lines(come_to):
        trial.settle()
        armed.set()
        caller.start()
        if stop is not None:
            until(lambda: stop.reached.is_set() or not caller.is_alive(), "the line", 2 * PATIENCE)
        other.start()
        if stop is not None:
            other.join(STOPPED)
            stop.reached.wait(SETTLED) and time.sleep(SETTLED)
            stop.let_go()
        fine = ended(caller, faults) & ended(other, faults)
        end = _Thread("end", trial.pool.join if trial.closed and not trial.terminated else trial.pool.terminate)
        end.start()
        fine &= ended(end, faults)
    trial.check()
    return faults, stop is not None and stop.reached.is_set(), fine


def leftovers(before: dict[tuple[str, str], str]) -> list[str]:
    until_when = time.monotonic() + PATIENCE
    while True:
        multiprocessing.active_children()
        gc.collect()
        left = left_now(before, present())
        if not left:
            return []
        if time.monotonic() > until_when:
            kill_children(before)
            return [f"left behind: {left}"]
        time.sleep(0.002)


def kill_children(before: dict[tuple[str, str], str]) -> None:
    for kind, name in set(present()) - set(before):
        if kind == "child":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(name), signal.SIGKILL)


class Search:
    """Tries interleavings, and learns from each which lines there are to stop at."""

    def __init__(self, chance: random.Random, folder: str) -> None:
        self._chance = chance
        self._folder = folder
        self._visits: dict[tuple[str, str], dict[Line, int]] = {}
        self._tried: set[Interleaving] = set()
        self.count = self.stopped = 0
        self.failed: dict[Interleaving, list[str]] = {}

    def run(self, interleaving: Interleaving) -> list[str]:
        visits: dict[Line, int] = {}

        def seen(line: Line) -> None:
            visits[line] = visits.get(line, 0) + 1

        log = os.path.join(self._folder, str(self.count))
        try:
            faults, stopped = try_out(interleaving, log, seen)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            faults, stopped = ["".join(traceback.format_exception(error))], False
        self.count += 1
        self.stopped += stopped
        self._tried.add(interleaving)
        known = self._visits.setdefault(interleaving[:2], {})
        for line, count in visits.items():
            known[line] = max(min(count, VISITS), known.get(line, 0))
        if faults:
            self.failed[interleaving] = faults
            print(f"FAILED {interleaving}", *faults, sep="\n    ", flush=True)
        return faults

    def look_around(self) -> None:
        for scenario, event in itertools.product(SCENARIOS, EVENTS):
            self.run(Interleaving(scenario, event, None))

    def known(self, pair: tuple[str, str]) -> list[Interleaving]:
        """Those of a pair that have not been tried."""
        found = [
            Interleaving(*pair, line, visit)
            for line, visits in self._visits.get(pair, {}).items()
            for visit in range(1, visits + 1)
        ]
        return [interleaving for interleaving in found if interleaving not in self._tried]

    def at_random(self, until_when: float) -> None:
        pairs = list(self._visits)
        while time.monotonic() < until_when and pairs:
            pair = self._chance.choice(pairs)
            candidates = self.known(pair)
            if candidates:
                self.run(self._chance.choice(candidates))
            else:
                pairs.remove(pair)

    def everything(self) -> None:
        for pair in list(self._visits):
            while candidates := self.known(pair):
                for interleaving in candidates:
                    self.run(interleaving)

    def report(self) -> str:
        left = sum(len(self.known(pair)) for pair in self._visits)
        return (
            f"{self.count} interleavings tried, {self.stopped} of them with a thread stopped at its line; "
            f"{left} that are known of were not; {len(self.failed)} failed"
        )


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("PORTSHM_INTERLEAVE_SECONDS", "15")))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", metavar="SCENARIO,EVENT,THREAD/FILE:LINE,VISIT")
    parser.add_argument("--times", type=int, default=1)
    options = parser.parse_args(None if arguments is None else list(arguments))
    began = time.monotonic()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
    with tempfile.TemporaryDirectory() as folder:
        search = Search(random.Random(seed), folder)
        if options.only:
            for _ in range(options.times):
                search.run(Interleaving.parse(options.only))
            print(f"{options.times} times")
        else:
            print(f"seed {seed}", flush=True)
            gc.collect()
            gc.freeze()
            search.look_around()
            if options.all:
                search.everything()
            else:
                search.at_random(began + options.seconds)
    print(search.report())
    for interleaving in search.failed:
        print(f"again: python -m tests.pool.interleaving --only '{interleaving}' --times 20")
    return 1 if search.failed else 0


if __name__ == "__main__":
    # The module under its own name, or its tasks would be `__main__`'s.
    from tests.pool import interleaving

    status = interleaving.main()
    sys.stdout.flush()
    os._exit(status)  # a pool that hangs would have the interpreter wait for it
