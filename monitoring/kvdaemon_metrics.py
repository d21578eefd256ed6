"""Prometheus metrics of the storage daemon. Names: docs of the project, prefix cachedattention_, base units."""

from __future__ import annotations

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class KvDaemonMetrics:
    """Methods may be called from any thread and cost about a microsecond."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._tier_gauges: dict[str, Gauge] = {}
        self._evictions = Counter(
            "cachedattention_evictions_total", "Chunks that left a tier", ["tier", "reason"], registry=registry
        )
        self._prefetch = Counter(
            "cachedattention_prefetch_total",
            "Chunks fetched from SSD on a hint: started, then used, wasted or failed",
            ["outcome"],
            registry=registry,
        )
        self._written = Counter(
            "cachedattention_written_bytes_total", "KV bytes written to a tier", ["tier"], registry=registry
        )
        self._disk_written = Counter(
            "cachedattention_ssd_disk_written_bytes_total",
            "Bytes that the SSD worker wrote to files: KV, records, logs, and files rewritten for their space",
            registry=registry,
        )
        self._reused = Counter(
            "cachedattention_reused_bytes_total",
            "KV bytes handed out, by the tier that they came from",
            ["tier"],
            registry=registry,
        )
        self._declined = Counter(
            "cachedattention_declined_bytes_total",
            "KV bytes that were not written to the SSD, for its write budget",
            registry=registry,
        )
        self._ssd_written_bytes = self._ssd_reused_bytes = 0
        self.watch(
            "ssd_written_bytes_per_reused_byte",
            "Bytes written to the SSD for each KV byte that was used from it; infinite: none was",
            self._written_per_reused,
        )
        self._corrupt = Counter(
            "cachedattention_corrupt_total",
            "Damaged things found and put aside",
            ["where"],
            registry=registry,
        )
        self._scrubbed = Counter(
            "cachedattention_scrubbed_bytes_total",
            "KV bytes read by the scrub and compared with their checksums",
            ["tier"],
            registry=registry,
        )
        self._revoked = Counter(
            "cachedattention_lease_revoked_total", "Leases ended by time or by their holder's death", registry=registry
        )
        self._worker_starts = Counter(
            "cachedattention_ssd_worker_starts_total", "Starts of the SSD worker process", registry=registry
        )
        self._rpc = Histogram(
            "cachedattention_rpc_seconds",
            "Time to answer a request",
            ["method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._load = Histogram(
            "cachedattention_load_seconds",
            "Time to bring the chunks of one request into DRAM",
            ["tier"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._save = Histogram(
            "cachedattention_save_seconds", "Time to write one chunk to SSD", buckets=_SECONDS, registry=registry
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A rate over a series that appears with its first event misses that event."""
        for tier in ("dram", "ssd"):
            for counter in (self._written, self._reused, self._scrubbed):
                counter.labels(tier)
        for reason in ("fetch", "save", "unsaved", "declined"):
            self._evictions.labels("dram", reason)
        self._evictions.labels("ssd", "capacity")
        for outcome in ("started", "used", "wasted", "failed"):
            self._prefetch.labels(outcome)
        for where in ("dram", "ssd", "adoption", "arena", "ssd_database", "ssd_record"):
            self._corrupt.labels(where)
        self._load.labels("ssd")

    def evicted(self, tier: str, reason: str) -> None:
        self._evictions.labels(tier, reason).inc()

    def prefetched(self, outcome: str) -> None:
        self._prefetch.labels(outcome).inc()

    def written(self, tier: str, size_bytes: int) -> None:
        self._written.labels(tier).inc(size_bytes)

    def written_to_disk(self, size_bytes: int) -> None:
        """To the SSD tier's files, by whatever."""
        self._disk_written.inc(size_bytes)
        self._ssd_written_bytes += size_bytes

    def reused(self, tier: str, size_bytes: int) -> None:
        self._reused.labels(tier).inc(size_bytes)
        if tier == "ssd":
            self._ssd_reused_bytes += size_bytes

    def declined(self, size_bytes: int) -> None:
        self._declined.inc(size_bytes)

    def _written_per_reused(self) -> float:
        if self._ssd_reused_bytes == 0:
            return math.inf if self._ssd_written_bytes else 0.0
        return self._ssd_written_bytes / self._ssd_reused_bytes

    def corrupt(self, where: str, count: int = 1) -> None:
        """where: "dram", "ssd", "adoption", "arena", "ssd_database" or "ssd_record"."""
        self._corrupt.labels(where).inc(count)

    def scrubbed(self, tier: str, size_bytes: int) -> None:
        self._scrubbed.labels(tier).inc(size_bytes)

    def lease_revoked(self, count: int) -> None:
        self._revoked.inc(count)

    def worker_started(self) -> None:
        self._worker_starts.inc()

    def answered(self, method: str, seconds: float) -> None:
        self._rpc.labels(method).observe(seconds)

    def loaded_from_ssd(self, seconds: float) -> None:
        self._load.labels("ssd").observe(seconds)

    def saved_to_ssd(self, seconds: float) -> None:
        self._save.observe(seconds)

    def watch_tier(
        self, tier: str, chunks: Callable[[], float], used_bytes: Callable[[], float], capacity: Callable[[], float]
    ) -> None:
        """Gauges of a tier, read when scraped, from the scraping thread."""
        for name, text, read in (
            ("chunks", "Chunks in a tier", chunks),
            ("bytes", "Bytes used in a tier", used_bytes),
            ("capacity_bytes", "Bytes a tier may use", capacity),
        ):
            self._tier_gauge(name, text).labels(tier).set_function(read)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge without labels, read when scraped, from the scraping thread."""
        Gauge(f"cachedattention_{name}", text, registry=self.registry).set_function(read)

    def _tier_gauge(self, name: str, text: str) -> Gauge:
        if name not in self._tier_gauges:
            self._tier_gauges[name] = Gauge(f"cachedattention_{name}", text, ["tier"], registry=self.registry)
        return self._tier_gauges[name]
