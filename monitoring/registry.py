"""The registry that a process's metrics live in."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics

Registry = CollectorRegistry


def new_registry() -> Registry:
    """A registry with the process's own memory, CPU time and open files in it, and the version that it runs."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for every one that counts, and nobody asks for them
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Gauge("cachedattention_build_info", "1, with the version that runs", ["version"], registry=registry)
    build.labels(_version()).set(1)
    return registry


def _version() -> str:
    try:
        return version("cachedattention")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
