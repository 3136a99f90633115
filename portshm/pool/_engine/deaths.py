"""What a death means: memory and exit -> finished, blamed, the rest. Pure: looks, changes nothing.

Whoever dies leaves its slot's memory, and there stands how far it was (`slot_memory.py`). A task may have overwritten
any of that, so nothing is believed that does not fit.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from .._wire.slot_memory import Mode, Phase, Record, RecordError, SlotMemory
from .._work import Batch

__all__ = ["Death", "examine"]


class Death(NamedTuple):
    """What is to become of the elements of the batch that a process died over.

    The first `finished` are delivered from `record`; those up to `began` are blamed; the others have not run.
    """

    finished: int = 0
    began: int = 0
    unpickling: bool = False  # nothing ran, but one of the elements may be the cause
    record: Record = Record()
    item: Any = None  # the value that it was working on, where that was in the memory itself
    note: str = ""  # what was wrong, where the exit status does not tell


def examine(memory: SlotMemory, batch: Batch, *, loaded: bool, note: str = "", cause: str = "") -> Death:
    """What a process that died has left of `batch`.

    Args:
        loaded: the batch had been put into the memory; if not, it holds an older one.
        note: what the process is known to have done wrong.
        cause: its exit status in words.
    """
    item = _value(memory) if batch.mode is Mode.VALUE and loaded else None
    finished, phase = memory.progress(batch.id)
    finished = min(finished, len(batch))
    spoilt = loaded and not memory.tells_of(batch.id)
    if spoilt:
        note = note or f"{cause}, and its memory was overwritten"
    if spoilt or (note and len(batch) == 1):
        # Any of them may have run, and none must run twice. One that did wrong has failed, whatever it has on record.
        return Death(0, len(batch), item=item, note=note)
    if phase is Phase.SENT:
        return Death(item=item, note=note)
    if phase is Phase.UNPICKLING:
        return Death(unpickling=True, item=item, note=note)
    # All finished and no `Done`: it died between two batches, and nobody is to blame.
    began = min(finished + 1, len(batch))
    try:
        return Death(finished, began, record=memory.outcomes(finished, len(batch)), item=item, note=note)
    except RecordError as error:
        return Death(0, began, item=item, note=f"left a record that makes no sense: {error}")


def _value(memory: SlotMemory) -> bytes | None:
    with contextlib.suppress(Exception):  # the header may hold anything
        return memory.mem.value_copy()
    return None
