"""Inputs of maps: read, cut into chunks and queued."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import PoolError
from ._engine.coordinator import Coordinator
from ._results import IMapJob
from ._work import Chunk, MapJob

__all__ = ["feed", "submission"]


@contextlib.contextmanager
def submission(engine: Coordinator, job: MapJob) -> Iterator[None]:
    """While the elements of a job are submitted. If that is interrupted it has ended: nobody has got its results."""
    try:
        engine.add_job(job)
        yield
    except BaseException:
        job._abort(PoolError("interrupted as it was submitted"))
        raise


def feed(engine: Coordinator, job: IMapJob, iterable: Iterable[Any], chunksize: int) -> None:
    """Queue the elements of an iterable; read by a thread as we go, unless they are all there already."""
    listed = isinstance(iterable, (list, tuple)) and job._buffersize is None
    items = iter(iterable)
    with submission(engine, job):
        if listed:
            elements = list(items)
            if elements:
                engine.submit(Chunk(job, 0, elements, chunksize))
            job._input_ended(len(elements))
            return
        # A chunk larger than what may be read ahead would never be complete.
        unit = chunksize if job._buffersize is None else min(chunksize, job._buffersize)
        thread = threading.Thread(target=_feed, args=(engine, job, items, unit), name="portshm-feeder", daemon=True)
        thread.start()


def _feed(engine: Coordinator, job: IMapJob, items: Iterator[Any], unit: int) -> None:
    read, chunk, error = 0, [], None
    while job._wait_for_room():
        try:
            chunk.append(next(items))
        except StopIteration:
            break
        except BaseException as problem:  # the user's code; it is raised where its element would have been
            error = problem
            # An incomplete chunk is not executed then, and the exception comes in its place.
            read, chunk = read - len(chunk), []
            break
        read += 1
        if len(chunk) == unit:
            engine.submit(Chunk(job, read - unit, chunk, unit))
            chunk = []
    if chunk:
        engine.submit(Chunk(job, read - len(chunk), chunk, unit))
    job._input_ended(read, error or job._stopped)
