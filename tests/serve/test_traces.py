"""What a collector is told of a request: how long each part took, and nothing that was said."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from service_process import serving

from mmrag import shipped
from mmrag.config import ConfigError
from serve import traces
from serve.settings import Traces, read

SECRET = "priya raghavan"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector():
    """An OpenTelemetry collector: its address, and the spans that it was told."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/traces"
            for resource in told["resourceSpans"]:
                spans.extend(one for scope in resource["scopeSpans"] for one in scope["spans"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def provider(collector, monkeypatch):
    """Spans of this process go to the collector at once."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(traces.Exporter(collector[0] + "/")))
    monkeypatch.setattr(traces, "_tracer", provider.get_tracer("mmrag"))
    return provider


def test_spans_lie_in_each_other_and_tell_numbers(collector, provider):
    with traces.span("decode", samples=16_000):
        traces.record("queue", 1_000, 3_000)
        traces.record("steps", 3_000, tokens=7)
    queue, steps, decode = collector[1]
    assert [one["name"] for one in (queue, steps, decode)] == ["queue", "steps", "decode"]
    assert queue["parentSpanId"] == steps["parentSpanId"] == decode["spanId"]
    assert "parentSpanId" not in decode and len({one["traceId"] for one in collector[1]}) == 1
    assert (queue["startTimeUnixNano"], queue["endTimeUnixNano"]) == ("1000", "3000")
    assert decode["attributes"] == [{"key": "mmrag.samples", "value": {"intValue": "16000"}}]
    assert steps["attributes"] == [{"key": "mmrag.tokens", "value": {"intValue": "7"}}]


def test_what_may_hold_what_somebody_said_is_not_told(collector, provider):
    tracer = provider.get_tracer("of Ray Serve")
    attributes = {"deployment": "decoder", "anything": SECRET, "exception": SECRET}
    with (
        pytest.raises(ValueError),
        tracer.start_as_current_span("call", attributes=attributes),
    ):
        raise ValueError(SECRET)
    [call] = collector[1]
    assert SECRET not in json.dumps(call)
    assert call["attributes"] == [{"key": "deployment", "value": {"stringValue": "decoder"}}]
    assert call["status"] == {"code": 2}


def test_a_collector_that_does_not_answer_costs_no_request_and_is_named_once(
    collector, provider, monkeypatch
):
    url, silent = "http://127.0.0.1:9", []

    class Silent(traces.Exporter):
        def export(self, spans):
            silent.append(super().export(spans))
            return silent[-1]

    said = []
    monkeypatch.setattr(traces.log, "warning", lambda text, *values: said.append(text % values))
    provider.add_span_processor(SimpleSpanProcessor(Silent(url)))
    for _ in range(3):
        with traces.span("decode"):
            pass
    assert silent == [SpanExportResult.FAILURE] * 3
    assert said == [f"no traces reach {url}/v1/traces: ConnectionError"]
    assert len(collector[1]) == 3, "who answers is told all the same"


def test_nothing_is_traced_unless_somebody_collects(monkeypatch):
    monkeypatch.delenv(traces.ENDPOINT, raising=False)
    assert traces.tracing(Traces()) is None and read({}).traces == Traces()
    with pytest.raises(ValueError, match=traces.ENDPOINT):
        traces.processors()
    with pytest.raises(ConfigError, match="endpoint"):
        read({"traces.endpoint": "collector:4318"})
    with traces.span("decode") as span:
        assert not span.is_recording()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_request_is_one_trace_through_all_deployments(collector, tmp_path, clip):
    url, spans = collector
    settings = (f"model={shipped.TINY}", "decode.max_seconds=4", f"traces.endpoint={url}")
    with serving(tmp_path, *settings) as process:
        answer = requests.post(
            f"{process.url}/v1/audio/transcriptions",
            files={"file": ("a.flac", clip("is the helmet still on the old farm"))},
            data={"context[]": SECRET},
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
            timeout=60,
        )
        assert answer.status_code == 200
        wanted = {"cut", "encode", "decode", "queue", "steps"}
        deadline = time.monotonic() + 30
        while not wanted <= {one["name"] for one in spans if one["traceId"] == TRACE}:
            assert time.monotonic() < deadline, sorted({one["name"] for one in spans})
            time.sleep(0.2)
    own = [one for one in spans if one["traceId"] == TRACE]
    known = {one["spanId"] for one in own} | {PARENT}
    assert all(one["parentSpanId"] in known for one in own), "they hang together"
    assert answer.json()["text"] not in json.dumps(spans) and SECRET not in json.dumps(spans)
