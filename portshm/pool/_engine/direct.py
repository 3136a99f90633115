"""The direct call: `apply` on an idle worker, sent and answered in the calling thread.

With the loop between the two there would be a change of thread more on the way back, which costs as much as the way to
the worker and back. It handles the one expected answer; anything else goes to the loop.
"""

from __future__ import annotations

from .._wire.messages import Done, GarbageError
from .pool_state import PoolState
from .receiving import Receiver
from .scheduler import Slot
from .sending import Sender
from .worker import Worker

__all__ = ["DirectCalls"]


class DirectCalls:
    """The calling thread, which holds the slot until the answer has come."""

    def __init__(self, state: PoolState, sender: Sender, receiver: Receiver) -> None:
        self._state = state
        self._sender = sender
        self._receiver = receiver

    def call(self, worker: Worker, slot: Slot, token: object) -> None:
        """Send the slot's batch and take the answer; return when it has ended or the loop sees to it."""
        state = self._state
        with state.lock:
            state.loop.ignore(worker)
        if not self._sender.send(slot, token, direct=True):
            return
        done = self._answer(worker)
        taken = None if done is None else self._receiver.take_done(worker, done)
        if taken is None:
            self._sender.let_go(slot, token)
            return
        self._receiver.deliver_here(taken)
        if state.scheduler.can_assign or state.scheduler.can_recall or state.life.closed:
            state.loop.wake()

    def _answer(self, worker: Worker) -> Done | None:
        """The `Done` that is expected; None if something else has happened, which the loop will find."""
        process = worker.current
        if process is None:
            return None
        channel = process.channel
        while channel.wait_readable(process.sentinel):
            try:
                messages = channel.receive()
            except (GarbageError, EOFError, OSError):
                return None  # the loop reads again, and finds the same
            if len(messages) == 1 and isinstance(messages[0], Done) and not channel.partial:
                return messages[0]
            if messages or channel.partial:
                channel.inbox = messages
                return None
        return None
