"""One slot and its processes, with no coordinator: what is sent, what comes back, and what is left."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from typing import Any

import pytest

from portshm._backends import Backend
from portshm._payload import read_payload, unpack
from portshm.pool._engine.regions import RegionStore
from portshm.pool._engine.worker import Worker, WorkerProcess, WorkerSettings
from portshm.pool._wire.messages import Done, Forget, Grant, Message, Need, Ready, Run, StartFailed
from portshm.pool._wire.pipe import keep_from_children
from portshm.pool._wire.slot_memory import Entry, Mode, Phase, Reference
from tests import tasks
from tests.pool.waiting import gone

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")

Make = Callable[..., Worker]


@pytest.fixture
def make(context: BaseContext, backend: Backend) -> Iterator[Make]:
    """A worker whose process has been started."""
    life, writer = multiprocessing.Pipe(duplex=False)
    keep_from_children(writer)
    made: list[Worker] = []

    def start(initializer: Any = None, initargs: tuple[Any, ...] = ()) -> Worker:
        worker = Worker(0, WorkerSettings(context, backend, initializer, initargs, "TestWorker"), life)
        made.append(worker)
        worker.start()
        return worker

    yield start
    writer.close()
    for worker in made:
        if worker.current is not None:
            worker.current.kill()
        worker.close_left()
    life.close()


def process_of(worker: Worker) -> WorkerProcess:
    assert worker.current is not None
    return worker.current


def answers(worker: Worker, kind: type[Message]) -> Any:
    """The next message, which has to be one of this kind."""
    channel = process_of(worker).channel
    assert channel.connection.poll(60)
    (message,) = channel.receive()
    assert type(message) is kind, message
    return message


def send(worker: Worker, batch: int, items: list[Any], function: Any = None, function_id: int = 1) -> None:
    """A batch of calls, or of a map if there is a function."""
    if function is None:
        worker.load(batch, len(items), pickle.dumps(items), b"", 0)
        worker.send_run(process_of(worker), Run(batch, Mode.CALLS))
    else:
        head = pickle.dumps((function_id, None if function == "known" else pickle.dumps(function), 0, ""))
        worker.load(batch, len(items), pickle.dumps(items), head, 0)
        worker.send_run(process_of(worker), Run(batch, Mode.MAP))


def results(worker: Worker, count: int) -> list[Any]:
    numbers, entries = worker.memory.outcomes(count, count)
    return [*numbers, *(pickle.loads(data) for _, data in entries)]


def test_batches_of_calls_and_maps(make: Make) -> None:
    worker = make()
    assert worker.pid is not None
    assert answers(worker, Ready).pid == worker.pid
    send(worker, 1, [(tasks.inc, (1,), {}), (tasks.add, (1, 2), {"times": 3}), (tasks.same, ("x",), {})])
    assert answers(worker, Done)[:2] == (1, 3)
    assert results(worker, 3) == [2, 9, "x"]
    send(worker, 2, [1, 2, 3], tasks.inc)
    assert answers(worker, Done)[:2] == (2, 3)
    assert results(worker, 3) == [2, 3, 4]
    send(worker, 3, [5], "known")
    assert answers(worker, Done)[:2] == (3, 1)
    assert results(worker, 1) == [6]
    process_of(worker).send(Forget(1))
    send(worker, 4, [5], "known")
    assert answers(worker, Done).finished == -1, "it has been told to forget this function"


def test_stop_is_an_orderly_end(make: Make) -> None:
    worker = make()
    answers(worker, Ready)
    pid = worker.pid
    process_of(worker).stop()
    assert multiprocessing.connection.wait([process_of(worker).sentinel], 60)
    assert worker.reap() == (pid, 0, "exited with 0", "")
    assert worker.pid is None
    assert worker.current is None


def test_the_slot_outlives_its_process(make: Make, log: str) -> None:
    worker = make()
    answers(worker, Ready)
    address = worker.memory.mem.address
    steps = [tasks.Step(log, number, "SIGKILL" if number == 2 else "") for number in range(5)]
    send(worker, 1, steps, tasks.run)
    assert multiprocessing.connection.wait([process_of(worker).sentinel], 60)
    report = worker.reap()
    assert (report.exitcode, report.cause) == (-signal.SIGKILL, "SIGKILL (killed)")
    assert worker.memory.progress(1) == (2, Phase.RUNNING)
    assert results(worker, 2) == [0, 10]
    assert pickle.loads(worker.memory.mem.value_copy()) == steps, "what it was given is there still"
    worker.start()
    assert answers(worker, Ready).pid == worker.pid != report.pid
    assert worker.memory.mem.address == address
    send(worker, 2, [(tasks.inc, (1,), {})])
    answers(worker, Done)
    assert results(worker, 1) == [2]
    assert worker.starts == 2


def test_an_exit_code_is_known_also_when_another_thread_reaps(make: Make, context: BaseContext) -> None:
    if context.get_start_method() == "forkserver":
        pytest.skip("its exit codes come through a pipe, and who loses the race for it is told 255 (popen_forkserver)")
    worker = make()
    over = threading.Event()

    def reap() -> None:
        while not over.is_set():
            multiprocessing.active_children()

    reapers = [threading.Thread(target=reap) for _ in range(3)]
    try:
        for reaper in reapers:
            reaper.start()
        for _ in range(10):
            process_of(worker).kill()
            assert worker.reap().exitcode == -signal.SIGKILL
            worker.start()
    finally:
        over.set()
        for reaper in reapers:
            reaper.join()


def test_the_memory_grows_and_the_worker_moves_with_it(make: Make) -> None:
    worker = make()
    answers(worker, Ready)
    capacity = worker.memory.mem.capacity
    payload = bytes(3 * capacity)
    send(worker, 1, [(len, (payload,), {})])
    answers(worker, Done)
    assert results(worker, 1) == [len(payload)]
    assert worker.memory.mem.capacity > capacity
    send(worker, 2, [(tasks.inc, (1,), {})])
    answers(worker, Done)
    assert results(worker, 1) == [2]


def test_a_large_result_asks_for_a_region(make: Make, backend: Backend) -> None:
    worker = make()
    answers(worker, Ready)
    store = RegionStore(backend, None)
    try:
        send(worker, 1, [(tasks.filled, ((3, 1_000_000),), {})] * 2)
        stored = store.acquire(answers(worker, Need).size)
        process_of(worker).send(Grant(stored.id, stored.size, stored.address))
        answers(worker, Need)
        process_of(worker).send(Grant(0, 0, "there is no room"))
        answers(worker, Done)
        _, (good, bad) = worker.memory.outcomes(2, 2)
        assert good.kind is Entry.REGION
        assert Reference.unpack(good.data).region == stored.id
        assert unpack(read_payload(stored.view)) == bytes([3]) * 1_000_000
        assert bad.kind is Entry.ERROR
        assert "there is no room" in pickle.loads(bad.data).text
    finally:
        store.close()


def test_a_payload_that_cannot_be_unpickled(make: Make) -> None:
    worker = make()
    answers(worker, Ready)
    worker.load(1, 3, b"no pickle", b"", 0)
    worker.send_run(process_of(worker), Run(1, Mode.CALLS))
    assert answers(worker, Done).finished == -1
    _, (entry,) = worker.memory.outcomes(1, 1)
    assert "UnpicklingError" in pickle.loads(entry.data).text
    send(worker, 2, [(tasks.inc, (1,), {})])
    assert answers(worker, Done).finished == 1


def test_the_initializer(make: Make) -> None:
    worker = make(tasks.remember, ("given",))
    answers(worker, Ready)
    send(worker, 1, [(tasks.remembered, (), {})])
    answers(worker, Done)
    assert results(worker, 1) == [["given"]]


def test_an_initializer_that_raises_tells_its_traceback(make: Make, log: str) -> None:
    worker = make(tasks.start_badly, (log, "raise"))
    message = answers(worker, StartFailed)
    assert "no database" in message.text
    assert "start_badly" in message.text
    assert multiprocessing.connection.wait([process_of(worker).sentinel], 60)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_it_leaves_when_nobody_holds_its_life(context: BaseContext, backend: Backend, log: str) -> None:
    life, writer = multiprocessing.Pipe(duplex=False)
    keep_from_children(writer)
    worker = Worker(0, WorkerSettings(context, backend, None, (), "TestWorker"), life)
    worker.start()
    try:
        answers(worker, Ready)
        send(worker, 1, [(tasks.noted_hang, (log,), {})])
        pid = worker.pid
        assert pid is not None
        writer.close()
        print(f"gone after {gone([pid], 10.0):.3f} s, in the midst of a task")
        assert worker.reap().exitcode in (70, -signal.SIGKILL), "by its own thread, or on Linux by the kernel"
    finally:
        worker.close()
        life.close()


def test_names_and_flags(make: Make) -> None:
    worker = make()
    answers(worker, Ready)
    process = process_of(worker).process
    assert "TestWorker-" in process.name
    assert process.daemon
    send(worker, 1, [(tasks.pid, (), {})])
    answers(worker, Done)
    assert results(worker, 1) == [worker.pid]
    assert worker.pid != os.getpid()
