"""Pipe ends: raw reads that never block on half a message, and ends that forked children give up.

A worker notices its coordinator's death by end-of-file, and end-of-file comes only when *nobody* holds the other
end any more. Under fork every child inherits every descriptor: later workers, workers of other pools, and whatever
the user forks. So all ends that belong to the parent's side are closed in every forked child.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from .messages import Message, decode, encode

if TYPE_CHECKING:
    from multiprocessing.connection import _ConnectionBase

    # Connection or, on Windows, PipeConnection.
    AnyConnection: TypeAlias = _ConnectionBase[Any, Any]

__all__ = ["PIPE_CLOSED", "PipeEnd", "ask", "keep_from_children"]

# A worker whose pipe was closed by a task leaves with this, before it puts the task's result on record.
PIPE_CLOSED: Final = 71

_CHUNK: Final = 1 << 16

# Seconds for which one asks again and again before one sleeps: to be woken costs 20 to 50 us where the processor has
# gone to sleep too, as much as a small task takes there and back. 84 us instead of 135 for a call and its answer where
# the parent asks, 50 where the worker does so as well.
_ASK_FOR: Final = 0.0001

# In between whoever else wants this processor gets it, above all the one that is to answer.
_let_others_run: Callable[[], object] = getattr(os, "sched_yield", lambda: None)

_not_for_children: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_from_children(connection: Any) -> None:
    """Have `connection` (anything with `close`) closed in every child that is forked from now on."""
    _not_for_children.add(connection)


def _close_in_child() -> None:
    for connection in list(_not_for_children):
        with contextlib.suppress(OSError):
            connection.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def ask(poll: Any) -> list[tuple[int, int]]:
    """What a `select.poll` object finds within the time for which it is better to ask than to sleep."""
    ready: list[tuple[int, int]] = poll.poll(0)
    until = time.monotonic() + _ASK_FOR
    while not ready and time.monotonic() < until:
        _let_others_run()
        ready = poll.poll(0)
    return ready


class PipeEnd:
    """One end of a duplex pipe that carries messages.

    The connection is multiprocessing's, so it travels to a child under every start method; its own framing is not
    used on POSIX, because `recv_bytes` blocks for the rest of a message whose length a wild task made up.
    """

    def __init__(self, connection: AnyConnection) -> None:
        self.connection = connection
        self._buffer = bytearray()
        self._poll: Any = None

    def fileno(self) -> int:
        return self.connection.fileno()

    def is_open(self) -> bool:
        """Whether the descriptor is still there. Costs a fraction of a microsecond."""
        if sys.platform == "win32":
            return True
        try:
            os.get_inheritable(self.connection.fileno())
        except OSError:
            return False
        return True

    def send(self, message: Message) -> None:
        """Send; OSError if the other side is gone. Frames are far smaller than any pipe's buffer."""
        data = memoryview(encode(message))
        if sys.platform == "win32":
            self.connection.send_bytes(data)
        else:
            while data:
                data = data[os.write(self.connection.fileno(), data) :]

    def send_nowait(self, message: Message) -> None:
        """Send; BlockingIOError if the other side does not read, OSError if it is gone."""
        data = encode(message)
        if sys.platform == "win32":
            self.connection.send_bytes(data)
        elif os.write(self.connection.fileno(), data) < len(data):
            raise BrokenPipeError("half a frame written")

    @property
    def partial(self) -> bool:
        """Whether half a frame has come."""
        return bool(self._buffer)

    def ask(self) -> None:
        """Wait a little for something to read, without sleeping. Returns after that in any case."""
        if sys.platform == "win32":
            return  # a pipe's end is no descriptor that could be polled
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.connection.fileno(), select.POLLIN)
        ask(self._poll)

    def receive(self) -> list[Message]:
        """All whole messages after one read, which blocks only if there is nothing at all.

        Raises:
            EOFError: the other side is gone.
            GarbageError: something else than a message came.
        """
        if sys.platform == "win32":
            data = self.connection.recv_bytes(_CHUNK * 2)
        else:
            try:
                data = os.read(self.connection.fileno(), _CHUNK)
            except BlockingIOError:
                return []
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError
        self._buffer += data
        messages = []
        while (message := decode(self._buffer)) is not None:
            messages.append(message)
        return messages

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()
