"""Traces of requests by OpenTelemetry, told to a collector where the settings name one.

Ray Serve makes a span of a request at the ingress and of each call to a deployment, and takes the
trace's identity from the caller's `traceparent` along. `span` and `record` add what happens in
between. What a span tells is numbers and names of parts: whatever may hold what somebody said, or
asked for, stays here. Spans go out as OTLP in JSON over HTTP, behind the answers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import requests
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from serve.settings import Traces

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""Environment variable, OpenTelemetry's own, that every machine of the cluster needs."""
PATH = "/v1/traces"
SECONDS = 10
OURS = "mmrag."
"""Begins the names of our attributes, which are numbers."""
SERVES = frozenset(
    {"deployment", "app", "replica_id", "call_method", "route", "is_streaming", "request_id"}
)
"""Serve's attributes that are told."""
KINDS = {kind: number for number, kind in enumerate(trace.SpanKind, start=1)}
FAILED = 2
"""OTLP's status of a span that ended in an error."""
_tracer = trace.get_tracer("mmrag")
log = logging.getLogger("ray.serve")


def span(name: str, **numbers: float) -> AbstractContextManager[trace.Span]:
    """A span of the block below the one that is current, and current itself meanwhile."""
    return _tracer.start_as_current_span(
        name, attributes=_named(numbers), record_exception=False, set_status_on_exception=False
    )


def record(name: str, start: int | None, end: int | None = None, **numbers: float) -> None:
    """A span of something that is over; nanoseconds since the epoch, None for now."""
    _tracer.start_span(name, start_time=start, attributes=_named(numbers)).end(end)


def tracing(settings: Traces) -> dict[str, Any] | None:
    """What `serve.start` is told; None where nothing is traced. To be called before Ray starts:
    its processes have the environment of this one."""
    if settings.endpoint is None:
        return None
    os.environ[ENDPOINT] = settings.endpoint
    path = f"{processors.__module__}:{processors.__name__}"
    return {"enabled": True, "exporter_import_path": path, "sampling_ratio": settings.share}


def processors() -> list[SpanProcessor]:
    """What Serve hands spans to, in each replica; ValueError where no collector is named."""
    endpoint = os.environ.get(ENDPOINT)
    if not endpoint:
        raise ValueError(f"traces are on, and {ENDPOINT} names no collector on this machine")
    return [BatchSpanProcessor(Exporter(endpoint))]


class Exporter(SpanExporter):
    """Sends spans to a collector. One that does not answer costs their spans, and no request."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is `http://host:4318`: the path of traces is appended."""
        self._url = endpoint.rstrip("/") + PATH
        self._session = requests.Session()
        self._silent = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send them."""
        try:
            self._session.post(self._url, json=told(spans), timeout=SECONDS).raise_for_status()
        except requests.RequestException as error:
            if not self._silent:
                log.warning("no traces reach %s: %s", self._url, type(error).__name__)
            self._silent = True
            return SpanExportResult.FAILURE
        self._silent = False
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the connection."""
        self._session.close()


def told(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    """Spans as OTLP has them in JSON, without events, messages and foreign attributes."""
    service = {"key": "service.name", "value": {"stringValue": "mmrag"}}
    scope = {"scope": {"name": "mmrag"}, "spans": [_span(one) for one in spans]}
    return {"resourceSpans": [{"resource": {"attributes": [service]}, "scopeSpans": [scope]}]}


def _span(one: ReadableSpan) -> dict[str, Any]:
    context = one.get_span_context()
    attributes = [
        {"key": key, "value": _value(value)}
        for key, value in (one.attributes or {}).items()
        if key in SERVES or key.startswith(OURS)
    ]
    more = {"parentSpanId": f"{one.parent.span_id:016x}"} if one.parent else {}
    if one.status.status_code == trace.StatusCode.ERROR:
        more["status"] = {"code": FAILED}
    return {
        "traceId": f"{context.trace_id:032x}",
        "spanId": f"{context.span_id:016x}",
        "name": one.name,
        "kind": KINDS[one.kind],
        "startTimeUnixNano": str(one.start_time),
        "endTimeUnixNano": str(one.end_time),
        "attributes": attributes,
        **more,
    }


def _value(value: object) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
    return {"stringValue": str(value)}


def _named(numbers: dict[str, float]) -> dict[str, float]:
    return {f"{OURS}{name}": number for name, number in numbers.items()}
