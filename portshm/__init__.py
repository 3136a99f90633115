"""Shared memory between processes, and process pools in which a crash costs one task.

A **region** is raw bytes with a lifetime; a `SharedMem` is a header and a value over a region. See the README for
the pools, and `portshm.locked` (needs the extra ``sync``) for the same memory under a lock.
"""

from ._header import GO_FUZZ_HEADER, PORTSHM_HEADER, Header, HeaderCodec, region_size
from ._reaper import RegionInfo, clean, list_regions
from ._region import Region, RegionAddress
from ._shared_mem import SharedMem, max_capacity
from .errors import (
    HeaderError,
    LockNotHeldError,
    LockTimeoutError,
    NotReadyError,
    PoolError,
    PoolTerminatedError,
    PortShmError,
    RegionClosedError,
    RegionError,
    RegionExistsError,
    RegionFullError,
    RegionNameError,
    RegionNotFoundError,
    RegionRefusedError,
    RegionSizeError,
    TaskTimeoutError,
    TornValueError,
    TransportError,
    ValueTooLargeError,
    WorkerCrashed,
    WorkerStartError,
)
from .pool import Pool, ProcessPoolExecutor, WorkerStats

__all__ = [
    "GO_FUZZ_HEADER",
    "Header",
    "HeaderCodec",
    "HeaderError",
    "LockNotHeldError",
    "LockTimeoutError",
    "NotReadyError",
    "PORTSHM_HEADER",
    "Pool",
    "PoolError",
    "PoolTerminatedError",
    "PortShmError",
    "ProcessPoolExecutor",
    "Region",
    "RegionAddress",
    "RegionClosedError",
    "RegionError",
    "RegionExistsError",
    "RegionFullError",
    "RegionInfo",
    "RegionNameError",
    "RegionNotFoundError",
    "RegionRefusedError",
    "RegionSizeError",
    "SharedMem",
    "TaskTimeoutError",
    "TornValueError",
    "TransportError",
    "ValueTooLargeError",
    "WorkerCrashed",
    "WorkerStartError",
    "WorkerStats",
    "clean",
    "list_regions",
    "max_capacity",
    "region_size",
]
