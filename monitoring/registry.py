"""The registry that a process's metrics live in."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, ProcessCollector

Registry = CollectorRegistry


def new_registry() -> Registry:
    """A registry with the process's own memory, CPU time and open files in it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
