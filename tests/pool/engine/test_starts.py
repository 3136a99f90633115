"""When processes are started, and when no more; without any process."""

from __future__ import annotations

import time
from typing import Any

import pytest

from portshm import WorkerStartError
from portshm.pool._engine.starts import Starts
from portshm.pool._engine.worker import ExitReport

OBITUARY = ExitReport(1, -9, "SIGKILL (killed)", "the trace")


class FakeWorker:
    def __init__(self) -> None:
        self.process: object = None
        self.start_error = ""
        self.started_at = time.monotonic()


class System:
    """Starts processes, or not."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.problem: BaseException | None = None
        self.given_up: list[WorkerStartError] = []
        self.starts = Starts(self.launch, self.given_up.append)

    def launch(self, worker: Any) -> None:
        if self.problem is not None:
            raise self.problem
        worker.process = object()
        self.started.append(worker)

    def in_seconds(self) -> list[float]:
        return [moment - time.monotonic() for moment in self.starts.moments]


@pytest.fixture
def system() -> System:
    return System()


@pytest.fixture
def worker() -> Any:
    return FakeWorker()


def test_before_any_was_ready_five_failures_are_enough(system: System, worker: Any) -> None:
    for _ in range(4):
        system.starts.failed(worker, OBITUARY)
    assert system.started == [worker] * 4
    assert not system.given_up
    system.starts.failed(worker, OBITUARY)
    assert system.started == [worker] * 4
    assert [(error.reason, error.detail) for error in system.given_up] == [
        ("5 workers in a row died before they were ready", "the last one: pid 1, SIGKILL (killed)\nthe trace")
    ]


def test_later_failures_are_waited_for_ever_longer(system: System, worker: Any) -> None:
    system.starts.ready()
    distances = []
    for _ in range(19):
        system.starts.failed(worker, OBITUARY)
        distances += system.in_seconds()
    assert not system.started
    assert not system.given_up
    assert distances == sorted(distances[:6]) + distances[6:], "they grow"
    assert 0.9 < distances[-1] <= 1.0
    system.starts.failed(worker, OBITUARY)
    assert system.given_up


def test_one_that_is_ready_makes_up_for_all_failures(system: System, worker: Any) -> None:
    for _ in range(10):
        for _ in range(4):
            system.starts.failed(worker, OBITUARY)
        system.starts.ready()
    assert not system.given_up


def test_an_initializer_that_fails_is_not_tried_again(system: System, worker: Any) -> None:
    system.starts.ready()
    worker.start_error = "Traceback"
    system.starts.failed(worker, OBITUARY)
    assert [error.detail for error in system.given_up] == ["Traceback"]
    assert not system.started
    assert not system.starts.moments


def test_one_that_died_over_a_task_is_replaced_at_once(system: System, worker: Any) -> None:
    system.starts.again(worker, was_idle=False)
    assert system.started == [worker]


def test_one_that_died_idle_just_after_its_start_is_replaced_later(system: System, worker: Any) -> None:
    system.starts.again(worker, was_idle=True)
    assert not system.started
    assert 0.4 < system.in_seconds()[0] <= 0.5
    system.starts.those_due()
    assert not system.started
    system.starts.cancel()
    assert not system.starts.moments


def test_one_that_died_idle_long_after_its_start_is_replaced_at_once(system: System, worker: Any) -> None:
    worker.started_at -= 1
    system.starts.again(worker, was_idle=True)
    assert system.started == [worker]


def test_where_the_system_starts_none_it_is_tried_again_a_few_times(system: System, worker: Any) -> None:
    system.problem = OSError("no more processes")
    for _ in range(4):
        system.starts.now(worker)
    assert 0.4 < system.in_seconds()[0] <= 0.5
    system.starts.now(worker)
    assert [error.reason for error in system.given_up] == ["workers cannot be started"]


def test_on_demand(system: System) -> None:
    workers: list[Any] = [FakeWorker() for _ in range(3)]
    system.starts.hold_back(workers)
    system.starts.more(0)
    assert not system.started
    system.starts.more(2)
    assert system.started == [workers[2], workers[1]]
    system.starts.more(5)
    assert system.started == workers[::-1]
    assert not system.starts.some_held_back


def test_an_interrupted_start_on_demand_is_left_to_the_loop(system: System) -> None:
    workers: list[Any] = [FakeWorker() for _ in range(2)]
    system.starts.hold_back(workers)
    system.problem = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        system.starts.more(1)
    system.problem = None
    system.starts.leave_to_the_loop()
    assert not system.starts.some_held_back
    system.starts.those_due()
    assert system.started == workers


def test_none_is_started_on_demand_after_the_end(system: System, worker: Any) -> None:
    system.starts.hold_back([worker])
    system.starts.end()
    system.starts.more(1)
    assert not system.started
