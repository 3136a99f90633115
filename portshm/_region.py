"""What every backend provides (`Region`: raw bytes with a lifetime) and what you send instead (`RegionAddress`).

A region knows nothing of headers or values. It synchronises nothing: whoever was told by message that the memory
is his may touch it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from .errors import RegionNameError

__all__ = ["PREFIX", "Region", "RegionAddress", "fresh_name", "name_for"]

# Everything that portshm creates in a shared place starts with this, so that `clean` touches nothing else.
PREFIX: Final = "portshm_"

# macOS: PSHMNAMLEN is 31 bytes with the leading slash (sys/posix_shm.h). Used for every backend on every
# platform, so that a name which works on one works on all.
_MAX_NAME: Final = 30


class Region(Protocol):
    """Raw bytes with a lifetime.

    The process that created a region owns it: it holds an operating-system lock for as long as it lives, and
    only it unlinks. A forked child never owns. `close()` never fails because a view is alive and never
    invalidates one: it gives up what this process holds, and the mapping goes with the last view.
    """

    @property
    def address(self) -> RegionAddress: ...
    @property
    def size(self) -> int:
        """Mapped bytes. May be rounded up to whole pages, so it is no capacity."""

    @property
    def owner(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    def view(self) -> memoryview:
        """All of the bytes; the caller's view keeps the mapping alive. `RegionClosedError` after `close()`."""

    def close(self) -> None: ...
    def unlink(self) -> None:
        """Remove the name, by the owner only. Mappings that exist stay valid; nobody can attach any more."""


@dataclass(frozen=True)
class RegionAddress:
    """Where a region is: ``file:PATH`` or ``shm:NAME``. Holds nothing open, pickles, and parses back from its text.

    It can travel as an argument, in a message or in an environment variable.
    """

    kind: Literal["file", "shm"]
    name: str

    def __post_init__(self) -> None:
        if self.kind not in ("file", "shm"):
            raise RegionNameError(f"address of kind {self.kind!r}: expected 'file' or 'shm'")
        if not self.name or "\0" in self.name or (self.kind == "shm" and "/" in self.name):
            raise RegionNameError(f"{self.name!r} names no region of kind {self.kind!r}")

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | RegionAddress) -> RegionAddress:
        """Read an address; text without ``file:`` or ``shm:`` is the path of a file."""
        if isinstance(text, RegionAddress):
            return text
        path = os.fspath(text)
        if not isinstance(path, str) or "\0" in path:
            raise RegionNameError(f"address {path!r}: expected text such as 'file:/tmp/portshm_x' or 'shm:portshm_x'")
        kind, _, name = path.partition(":")
        if kind == "shm":
            return cls("shm", name_for(name))
        if kind == "file":
            path = name
        if not path:
            raise RegionNameError(f"address {str(text)!r} names nothing; expected 'file:PATH', 'shm:NAME' or a path")
        return cls("file", os.path.abspath(path))


def fresh_name() -> str:
    """A name that nobody else has: the prefix and 80 random bits. Never made of a pid, which comes again."""
    return PREFIX + secrets.token_hex(10)


def name_for(label: str) -> str:
    """The name in the operating system for a user's label: prefixed, and hashed where it would be too long.

    Idempotent, so a name can be given where a label is expected. Longer labels than macOS allows, and such with
    characters that not every file system keeps apart, become a BLAKE2 hash: never cut, which would make two
    labels one.
    """
    if not isinstance(label, str) or not label or label in (".", "..") or any(c in label for c in "/\\:\0"):
        raise RegionNameError(
            f"name {label!r}: expected a plain name without '/', '\\', ':' or NUL; folders go in dir="
        )
    name = label if label.startswith(PREFIX) else PREFIX + label
    plain = name.isascii() and name == name.lower() and name.replace("_", "").replace("-", "").isalnum()
    if plain and len(name) <= _MAX_NAME:
        return name
    digest = hashlib.blake2b(label.removeprefix(PREFIX).encode("utf-8", "surrogatepass"), digest_size=11)
    return PREFIX + digest.hexdigest()
