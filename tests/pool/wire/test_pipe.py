"""The pipe's ends: no read blocks on half a message, and forked children do not keep the other end open."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest

from portshm.pool._wire.messages import Done, GarbageError, Ready, Run, Stop, encode
from portshm.pool._wire.pipe import PipeEnd, keep_from_children

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.fixture
def ends():  # type: ignore[no-untyped-def]
    ours, theirs = (PipeEnd(end) for end in multiprocessing.Pipe(duplex=True))
    yield ours, theirs
    ours.close()
    theirs.close()


Ends = tuple[PipeEnd, PipeEnd]


def test_messages_both_ways(ends: Ends) -> None:
    ours, theirs = ends
    ours.send(Run(1, 2, 3, "file:/x"))
    ours.send(Stop())
    received = theirs.receive()
    while len(received) < 2:
        received += theirs.receive()
    assert received == [Run(1, 2, 3, "file:/x"), Stop()]
    theirs.send(Ready(5))
    assert ours.receive() == [Ready(5)]


@pytest.mark.skipif(sys.platform == "win32", reason="messages come whole there")
def test_half_a_message_does_not_block(ends: Ends) -> None:
    ours, theirs = ends
    frame = encode(Done(1, 2, 3, 0, "4"))
    os.write(theirs.fileno(), frame[:20])
    assert ours.receive() == []
    os.write(theirs.fileno(), frame[20:] + frame[:5])
    assert ours.receive() == [Done(1, 2, 3, 0, "4")]
    os.write(theirs.fileno(), frame[5:])
    assert ours.receive() == [Done(1, 2, 3, 0, "4")]


@pytest.mark.skipif(sys.platform == "win32", reason="messages come whole there")
def test_garbage(ends: Ends) -> None:
    ours, theirs = ends
    os.write(theirs.fileno(), b"print went astray\n" * 10)
    with pytest.raises(GarbageError):
        ours.receive()


def test_end_of_file_comes_after_what_was_said(ends: Ends) -> None:
    ours, theirs = ends
    theirs.send(Ready(1))
    theirs.close()
    assert ours.receive() == [Ready(1)]
    with pytest.raises(EOFError):
        ours.receive()


def test_sending_to_nobody_is_an_os_error(ends: Ends) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(OSError):
        for _ in range(3):
            ours.send(Stop())


def test_is_open_tells_whether_somebody_closed_the_descriptor(ends: Ends) -> None:
    ours, _ = ends
    assert ours.is_open()
    if sys.platform == "win32":
        return
    copy = os.dup(ours.fileno())
    os.close(ours.fileno())
    assert not ours.is_open()
    os.dup2(copy, ours.fileno())
    os.close(copy)
    assert ours.is_open()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.parametrize("kept", [True, False])
def test_a_forked_child_does_not_keep_the_other_end(ends: Ends, kept: bool) -> None:
    """Only of the ends that were named: without that, end-of-file waits for the child."""
    ours, theirs = ends
    if kept:
        keep_from_children(theirs.connection)
    release_reader, release = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(release)
        os.read(release_reader, 1)
        os._exit(0)
    try:
        theirs.close()
        assert ours.connection.poll(60 if kept else 0.05) is kept, "end-of-file"
    finally:
        os.close(release)
        os.close(release_reader)
        os.waitpid(child, 0)
    assert ours.connection.poll(60)
