"""Ends of which every step is tried, whatever an earlier one raised: what one leaves behind is not to be all of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

__all__ = ["try_all"]

logger = logging.getLogger("portshm")


def try_all(steps: Iterable[Callable[[], object]]) -> None:
    """Call one after the other. What one of them raises is logged."""
    for step in steps:
        try:
            step()
        except BaseException:
            logger.exception("a step of the pool's end failed")
