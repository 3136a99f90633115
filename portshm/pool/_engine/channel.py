"""The coordinator's end of the pipe to one process, and the pipe by which it is asked for what it has not begun.

Who reads is said by the slot's state: the loop, or the thread of a direct call that holds the slot. Writing is done
under the engine's lock and never waits: a worker that lets its pipe run full is none of ours.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import TYPE_CHECKING

from .._wire.messages import Message
from .._wire.pipe import PipeEnd, keep_from_children
from .waiter import PipePoller

if TYPE_CHECKING:
    from .._wire.pipe import AnyConnection

__all__ = ["Channel", "open_channel"]


class Channel:
    """Made with its process, and closed when that is reaped."""

    def __init__(self, connection: AnyConnection, recall: AnyConnection) -> None:
        self._end = PipeEnd(connection)
        self._recall = PipeEnd(recall)
        self._poller: PipePoller | None = None
        self.connection = connection
        # What a direct call has read and the loop is to handle.
        self.inbox: list[Message] = []
        # Nothing is read from it any more: it said something that no worker of ours says, or its end is closed.
        self.disconnected = False

    def send(self, message: Message) -> None:
        """Send without waiting. BlockingIOError if the pipe is full, OSError if the process is gone."""
        self._end.send_nowait(message)

    def ask_back(self, message: Message) -> None:
        """Ask the worker's watching thread, which answers while an element is executing. OSError as in `send`."""
        self._recall.send_nowait(message)

    def receive(self) -> list[Message]:
        """What it has said, perhaps nothing; after what a direct call has left. Does not wait.

        Raises:
            EOFError: its end is closed.
            GarbageError: something else than a message came.
        """
        left, self.inbox = self.inbox, []
        if left:
            return left
        if sys.platform == "win32":  # reading waits there
            try:
                if not self.connection.poll(0):
                    return []
            except OSError:  # a drained pipe whose other end is closed says so here (CPython issue 85180)
                raise EOFError from None
        return self._end.receive()

    @property
    def partial(self) -> bool:
        """Whether half a frame has come."""
        return self._end.partial

    def wait_readable(self, sentinel: int) -> bool:
        """Wait until it says something or its process has ended; whether there is something to be read."""
        if self._poller is None:
            self._poller = PipePoller(self._end.fileno(), sentinel)
        return self._poller.wait()

    def close(self) -> None:
        for end in (self._end, self._recall):
            end.close()


def open_channel() -> tuple[Channel, AnyConnection, AnyConnection]:
    """A channel, and what the process gets: its end of the pipe, and the end where it is asked back."""
    ours, theirs = multiprocessing.Pipe(duplex=True)
    recall_reader, recall_writer = multiprocessing.Pipe(duplex=False)
    # Before the fork: the child's copies of our ends must go, or it would never see end-of-file.
    for end in (ours, recall_writer):
        keep_from_children(end)
        if sys.platform != "win32":
            os.set_blocking(end.fileno(), False)
    return Channel(ours, recall_writer), theirs, recall_reader
