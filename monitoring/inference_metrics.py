"""Metrics of an inference process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class InferenceMetrics:
    """All metric families of an inference process, on the registry given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.prefill_seconds = Histogram(
            "cachedattention_inference_prefill_seconds",
            "Admission of a turn to its first token (the paper's TTFT), as the inference process sees it",
            buckets=_SECONDS,
            registry=registry,
        )
        self.load_seconds = Histogram(
            "cachedattention_load_seconds",
            "Time that loading a turn's history into working KV took, waiting for the SSD included, by slowest tier",
            ["tier"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.save_seconds = Histogram(
            "cachedattention_save_seconds",
            "Time to copy and commit one chunk",
            buckets=_SECONDS,
            registry=registry,
        )
        self.overlap_ratio = Histogram(
            "cachedattention_overlap_ratio",
            "Part of a turn's loading time that ran under computation",
            buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0),
            registry=registry,
        )
        self.load_or_compute = Counter(
            "cachedattention_load_or_compute",
            "Histories found in the store, by what was done: load, compute, or both from its two ends",
            ["choice"],
            registry=registry,
        )
        self.load_or_compute_seconds = Counter(
            "cachedattention_load_or_compute_estimated_seconds",
            "Estimated time to the first token of the histories above: as chosen, had all been loaded, all computed",
            ["option"],
            registry=registry,
        )
        self.prefill_seconds_saved = Counter(
            "cachedattention_prefill_seconds_saved",
            "Estimated computing time of the reused tokens at the measured prefill rate, less the time to load them",
            registry=registry,
        )
        self.saved_tokens = Counter(
            "cachedattention_saved_tokens", "Tokens whose KV was handed to the store", registry=registry
        )
        self.unsaved_turns = Counter(
            "cachedattention_unsaved_turns", "Turns whose KV could not be saved in time", registry=registry
        )
        self.load_failures = Counter(
            "cachedattention_load_failures", "Histories that did not arrive, by reason", ["reason"], registry=registry
        )
        self._step_seconds = Histogram(
            "cachedattention_engine_step_seconds",
            "Time of one step of the engine, by what was in it: decode, prefill or both (mixed)",
            ["kind"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._step_tokens = Counter(
            "cachedattention_engine_step_tokens", "Tokens computed in steps, by phase", ["phase"], registry=registry
        )
        self._steps_by_kind = {kind: self._step_seconds.labels(kind) for kind in ("decode", "prefill", "mixed")}
        self._tokens_by_phase = {phase: self._step_tokens.labels(phase) for phase in ("decode", "prefill")}
        # A rate over a series that appears with its first event misses that event.
        for tier in ("dram", "ssd"):
            self.load_seconds.labels(tier)
        for choice in ("load", "both", "compute"):
            self.load_or_compute.labels(choice)
        for option in ("chosen", "load", "compute"):
            self.load_or_compute_seconds.labels(option)
        for reason in ("load_failed", "revoked", "corrupt"):
            self.load_failures.labels(reason)
        self.admission_seconds = Histogram(
            "cachedattention_admission_seconds",
            "Time that turns waited for working KV",
            buckets=_SECONDS,
            registry=registry,
        )
        self.preemptions = Counter(
            "cachedattention_preemptions",
            "Times that a turn gave its working KV to one earlier in order, and went on later",
            registry=registry,
        )
        self.truncations = Counter(
            "cachedattention_context_truncations", "Times that a full context lost its oldest part", registry=registry
        )
        self.dropped_tokens = Counter(
            "cachedattention_dropped_tokens", "Tokens that full contexts lost", registry=registry
        )
        self._running = Gauge(
            "cachedattention_engine_running_jobs",
            "Turns in the engine, loading, in prefill or in decode",
            registry=registry,
        )
        self._waiting = Gauge(
            "cachedattention_admission_waiting_jobs", "Turns that wait for working KV", registry=registry
        )
        self._working_kv = Gauge(
            "cachedattention_working_kv_bytes",
            "Working KV in use: of running turns, retained ones and the write buffer",
            registry=registry,
        )
        self._working_kv_capacity = Gauge(
            "cachedattention_working_kv_capacity_bytes", "Bound of the working KV, --working-kv", registry=registry
        )
        self._backlog = Gauge(
            "cachedattention_save_backlog", "Finished turns that wait in the write buffer", registry=registry
        )
        self._write_buffer = Gauge(
            "cachedattention_write_buffer_bytes",
            "Working KV of finished turns that are not saved yet",
            registry=registry,
        )
        self._link = Gauge(
            "cachedattention_load_bytes_per_second",
            "Measured rate of loading KV, rotation of keys included, by tier; 0: not measured",
            ["tier"],
            registry=registry,
        )
        self._prefill_token = Gauge(
            "cachedattention_prefill_token_seconds",
            "Measured time to compute a token without a past",
            registry=registry,
        )
        self._prefill_pair = Gauge(
            "cachedattention_prefill_pair_seconds",
            "Measured further time for each earlier token that a token attends to",
            registry=registry,
        )
        self._prefill_step = Gauge(
            "cachedattention_prefill_step_seconds", "Measured time of a step, however few its tokens", registry=registry
        )
        self._retained = Gauge(
            "cachedattention_retained_bytes", "Working KV of finished turns kept on the device", registry=registry
        )
        self._spare = Gauge(
            "cachedattention_spare_buffer_bytes", "Device memory kept ready for the next turns", registry=registry
        )
        self._store_up = Gauge(
            "cachedattention_store_connected", "Whether the KV store is connected", registry=registry
        )

    def observe_step(self, decodes: int, prefill_tokens: int, seconds: float) -> None:
        """A step of the engine: how many jobs decoded a token in it, and prompt tokens."""
        kind = ("mixed" if decodes else "prefill") if prefill_tokens else "decode"
        self._steps_by_kind[kind].observe(seconds)
        self._tokens_by_phase["decode"].inc(decodes)
        self._tokens_by_phase["prefill"].inc(prefill_tokens)

    def watch(self, sources: Mapping[str, Callable[[], float]]) -> None:
        """Read gauges from `sources` at scrape time, by their names here."""
        self._running.set_function(sources["running"])
        self._waiting.set_function(sources["waiting"])
        self._working_kv.set_function(sources["working_kv_bytes"])
        self._working_kv_capacity.set_function(sources["working_kv_capacity_bytes"])
        self._backlog.set_function(sources["backlog"])
        self._write_buffer.set_function(sources["write_buffer_bytes"])
        for tier in ("dram", "ssd"):
            self._link.labels(tier).set_function(sources[f"{tier}_bytes_per_s"])
        self._prefill_token.set_function(sources["prefill_token_s"])
        self._prefill_step.set_function(sources["prefill_step_s"])
        self._prefill_pair.set_function(sources["prefill_pair_s"])
        self._retained.set_function(sources["retained_bytes"])
        self._spare.set_function(sources["spare_bytes"])
        self._store_up.set_function(sources["store_connected"])
