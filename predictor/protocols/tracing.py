"""OpenTelemetry: one span for each inference request, child of the caller's where its headers (or metadata) carry W3C trace context.

Owns what a span says. It is made when the request has ended, from the times that were measured anyway, so a server without tracing pays nothing. The
SDK and its exporters are asked for by name and need not be installed.
https://opentelemetry.io/docs/specs/otel/trace/api/
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import entry_points

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from contracts.errors import InvalidValue
from contracts.units import ms
from predictor.front import Finished

_GROUP = "opentelemetry_traces_exporter"
_propagator = TraceContextTextMapPropagator()


def context_of(finished: Finished) -> trace.SpanContext:
    """The caller's trace, invalid (all zero) where there is none."""
    return trace.get_current_span(_propagator.extract(_carrier(finished))).get_span_context()


def spans(tracer: Tracer) -> Callable[[Finished], None]:
    """Makes a span of each request."""
    # Spans carry the time of day, requests were measured by the monotonic clock.
    day_ns = time.time_ns() - time.monotonic_ns()

    def record(finished: Finished) -> None:
        parent = _propagator.extract(_carrier(finished))
        span = tracer.start_span(f"infer {finished.model}", parent, SpanKind.SERVER, _attributes(finished), start_time=finished.start_ns + day_ns)
        if finished.outcome is None:
            span.set_status(Status(StatusCode.ERROR, finished.kind))
        span.end(finished.end_ns + day_ns)

    return record


def tracer(exporter: str) -> Tracer | None:
    """A tracer that exports by the exporter of this name ("console", "otlp": what is installed), configured by OpenTelemetry's own OTEL_* variables.

    Without a name: that of the SDK if somebody has set it up in this process (`opentelemetry-instrument`), else None. InvalidValue if there is none.
    """
    if exporter:
        trace.set_tracer_provider(_provider(exporter))
    elif isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return trace.get_tracer("sluice.predictor")


def _provider(exporter: str) -> trace.TracerProvider:
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InvalidValue("needs the package opentelemetry-sdk", key="--traces", value=exporter) from None
    found = list(entry_points(group=_GROUP, name=exporter))
    if not found:
        names = ", ".join(sorted(one.name for one in entry_points(group=_GROUP)))
        raise InvalidValue(f"there is no such exporter here, only {names}", key="--traces", value=exporter)
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    return provider


def _carrier(finished: Finished) -> dict[str, str]:
    wanted = {}
    for name, value in finished.headers:
        text = name if isinstance(name, str) else name.decode("latin-1")
        if text in _propagator.fields:
            wanted[text] = value if isinstance(value, str) else value.decode("latin-1")
    return wanted


def _attributes(finished: Finished) -> dict[str, str | int | float | bool]:
    outcome = finished.outcome
    found: dict[str, str | int | float | bool] = {"sluice.function": finished.function, "sluice.outcome": finished.kind}
    if outcome is None:
        return found
    return found | {
        "sluice.queue_ms": ms(outcome.queue_ns),
        "sluice.swap_ms": ms(outcome.swap_ns),
        "sluice.run_ms": ms(outcome.run_ns),
        "sluice.cold": outcome.cold,
        "sluice.device": outcome.device,
        "sluice.batch_rows": outcome.rows,
    }
