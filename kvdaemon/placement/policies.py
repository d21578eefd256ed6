"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable

from kvdaemon.placement.anticipating import Anticipating
from kvdaemon.placement.lru import FirstInFirstOut, LeastRecentlyUsed, SchedulerAware
from kvdaemon.placement.policy import Policy

POLICIES: dict[str, Callable[[], Policy]] = {
    "fifo": FirstInFirstOut,
    "lru": LeastRecentlyUsed,
    "scheduler-aware": SchedulerAware,
    "anticipating": Anticipating,
}
