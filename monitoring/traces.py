"""OpenTelemetry traces: one tree of spans for each turn, across the processes. Off unless an endpoint is configured.

A context travels in messages as the text of W3C's `traceparent`; empty text: not traced. Spans get times that are taken
anyway (time.monotonic), so that what is off costs a call that does nothing, and imports nothing.

    turn                            gateway, from the request's arrival to its answer; under the caller's span, if any
    ├── queue                       waiting for a place
    └── dispatch                    an attempt at a worker
        └── inference               the worker's part
            ├── get_manifest        kvdaemon
            ├── admission           waiting for working KV
            ├── acquire             kvdaemon
            ├── load, prefill, decode
            └── save                may end after the turn
                └── commit, save_manifest       kvdaemon
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer

Attributes = Mapping[str, str | int | float | bool]

_EXPORT_S = 3.0  # a collector that does not answer holds up a process's end no longer

# The traceparent that the HTTP request being answered came with.
caller: ContextVar[str] = ContextVar("caller", default="")

_tracer: Tracer | None = None


class Span:
    """A span that nobody traces: it takes everything and keeps nothing. Safe from any thread."""

    traceparent = ""

    @property
    def trace_id(self) -> str:
        """For log lines, 32 hexadecimal digits; empty where nobody traces."""
        return self.traceparent[3:35]

    def child(self, name: str, began_s: float) -> Span:
        """began_s: monotonic, as all times here."""
        return self

    def record(self, name: str, began_s: float, ended_s: float, attributes: Attributes | None = None) -> None:
        """A child that is over."""

    def end(self, attributes: Attributes | None = None, *, error: str = "", ended_s: float | None = None) -> None:
        """error: why it failed; ended_s: now, if not given."""


NOTHING = Span()


def configure(service: str, endpoint: str | None) -> None:
    """Export this process's spans over OTLP/HTTP, for the rest of its life. endpoint: a base URL; None: no traces.

    OpenTelemetry's own variables (OTEL_TRACES_SAMPLER, OTEL_BSP_...) are heeded.
    """
    global _tracer
    if endpoint is None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {
            "service.namespace": "cachedattention",
            "service.name": service.partition("-")[0],
            "service.instance.id": service,
        }
    )
    provider = TracerProvider(resource=resource)  # at the process's end it exports what is left
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, export_timeout_millis=_EXPORT_S * 1e3))
    _tracer = provider.get_tracer("cachedattention")


def is_on() -> bool:
    return _tracer is not None


def begin(name: str, traceparent: str, began_s: float) -> Span:
    """A span under the one that `traceparent` names, or the root of a new trace."""
    if _tracer is None:
        return NOTHING
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    return _Traced(_tracer, _tracer.start_span(name, context, start_time=_wall_ns(began_s)))


class _Traced(Span):
    def __init__(self, tracer: Tracer, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def child(self, name: str, began_s: float) -> Span:
        from opentelemetry.trace import set_span_in_context

        under = set_span_in_context(self._span)
        return _Traced(self._tracer, self._tracer.start_span(name, under, start_time=_wall_ns(began_s)))

    def record(self, name: str, began_s: float, ended_s: float, attributes: Attributes | None = None) -> None:
        self.child(name, began_s).end(attributes, ended_s=ended_s)

    def end(self, attributes: Attributes | None = None, *, error: str = "", ended_s: float | None = None) -> None:
        if attributes:
            self._span.set_attributes(attributes)
        if error:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, error)
        self._span.end(_wall_ns(time.monotonic() if ended_s is None else ended_s))


def _wall_ns(monotonic_s: float) -> int:
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
