"""Process pools that survive their workers: drop-ins for the standard library's two."""

from ._engine.coordinator import WorkerStats
from ._executor import ProcessPoolExecutor
from ._pool import Pool
from ._results import AsyncResult, IMapIterator, MapResult

__all__ = ["AsyncResult", "IMapIterator", "MapResult", "Pool", "ProcessPoolExecutor", "WorkerStats"]
