"""The gateway's metrics, DESIGN.md section 9."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_TIERS = ("hbm", "dram", "ssd", "computed")
_OUTCOMES = ("done", "failed", "cancelled")
_MISSES = (  # as messages.TurnUsage lists them
    *("evicted", "unknown", "no_capacity", "manifest_lost", "daemon_unavailable", "corrupt", "revoked"),
    *("load_failed", "text_changed", "reuse_off", "computing_was_cheaper"),
)
_PREFIX = "cachedattention"


class GatewayMetrics:
    """All metrics of one gateway, in the registry passed in. Safe from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", what, buckets=_SECONDS, registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", what, registry=registry)

        self.ttft = histogram("ttft_seconds", "Arrival of the request to its first token, queueing included")
        self.prefill = histogram("prefill_seconds", "Admission at inference to the first token")
        self.tpot = histogram("tpot_seconds", "Mean time per token after the first, one sample a turn")
        self.queue_wait = histogram("queue_wait_seconds", "Time in the queue before the first dispatch")
        self.queue_depth = gauge("queue_depth", "Turns that wait")
        self.queue_limit = gauge("queue_limit", "Turns that may wait; further ones are refused")
        self.running_jobs = gauge("running_jobs", "Turns at inference")
        self.conversations = gauge("conversations", "Conversations in the journal")
        self.inference_workers = gauge("inference_workers", "Inference processes that there should be")
        self.inference_connected = gauge("inference_connected", "Those of them that answer and serve the model")
        self.kvdaemon_connected = gauge("kvdaemon_connected", "1 while kvdaemon answers")
        self._prompt_tokens = counter("prompt_tokens_total", "Prompt tokens by where their KV came from", "source")
        self._missed_tokens = counter(
            "missed_tokens_total", "Prompt tokens computed again although an earlier turn had computed them", "reason"
        )
        self._completion_tokens = counter("completion_tokens_total", "Tokens generated")
        self._turns = counter("turns_total", "Turns by how they ended", "status")
        self._retries = counter("turn_retries_total", "Turns that were run again because inference went away")
        self._requests = counter("requests_total", "HTTP requests", "route", "code")
        self._tenant_turns = counter("tenant_turns_total", "Turns by tenant and how they ended", "tenant", "status")
        self._tenant_tokens = counter(
            "tenant_tokens_total",
            "Tokens by tenant: cached and computed ones of prompts, and generated",
            "tenant",
            "kind",
        )
        for tier in _TIERS:  # a rate over a series that appears with its first event misses that event
            self._prompt_tokens.labels(tier)
        for reason in _MISSES:
            self._missed_tokens.labels(reason)
        for status in _OUTCOMES:
            self._turns.labels(status)

    def observe_prompt(self, sources: Mapping[str, int], missed: Mapping[str, int]) -> None:
        """Tokens of one prompt by source, and those missed by reason. Missed ones count as computed too."""
        for source, tokens in sources.items():
            self._prompt_tokens.labels(source).inc(tokens)
        for reason, tokens in missed.items():
            self._missed_tokens.labels(reason).inc(tokens)
            self._prompt_tokens.labels("computed").inc(tokens)

    def observe_completion(self, tokens: int) -> None:
        self._completion_tokens.inc(tokens)

    def observe_turn(self, status: str) -> None:
        self._turns.labels(status).inc()

    def observe_tenant(self, tenant: str, status: str, cached: int = 0, computed: int = 0, generated: int = 0) -> None:
        """tenant: its name in the API keys, which bounds how many there are; empty where there are no keys."""
        name = tenant or "anonymous"
        self._tenant_turns.labels(name, status).inc()
        for kind, tokens in (("cached", cached), ("computed", computed), ("generated", generated)):
            self._tenant_tokens.labels(name, kind).inc(tokens)

    def observe_retry(self) -> None:
        self._retries.inc()

    def observe_request(self, route: str, code: int) -> None:
        """route: the route's pattern, never a path that a client chose."""
        self._requests.labels(route, str(code)).inc()

    def render(self) -> tuple[str, bytes]:
        """Content type and body of /metrics."""
        return CONTENT_TYPE_LATEST, generate_latest(self._registry)
