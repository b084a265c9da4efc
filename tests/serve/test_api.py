"""What the service says of itself, and what it says where there is nothing to say."""

import re
import time

import pytest
import schemathesis

OUTSIDE = re.compile(r"""(?:src|href|action|url|import)\s*[=(]?\s*["']?(?:https?:)?//[^\s"')]+""")
"""Something that a browser would fetch from another host."""
REPORTED_SECONDS = 1
"""How often Ray reports what is measured: tests/conftest.py has told it."""


def test_openais_client_finds_the_model(service, client):
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("mmrag", "model", "mmrag")
    assert model.languages == ["en"] and time.time() - model.created < 3600
    assert model.retrieval == ["none", "knn", "cross_attention", "both"]
    assert model.fingerprints.keys() == {"hubert", "codebook", "lm", "adapter"}


def test_the_service_is_alive_and_ready(service):
    for path in ("/healthz", "/readyz"):
        answer = service.request("GET", path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def until_reported(missing, seconds=30):
    """Wait until no metric is missing: Ray reports them every few seconds."""
    deadline = time.monotonic() + seconds
    while left := missing():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_metrics_count_what_is_done(service, clip):
    transcribed = {"path": "/v1/audio/transcriptions", "status": "200"}
    counters = [
        ("requests_total", transcribed),
        ("requests_total", {"status": "404"}),
        ("request_seconds_count", {"path": transcribed["path"]}),
        ("audio_seconds_total", {}),
        ("decoder_clips_total", {}),
        ("decoder_tokens_total", {}),
        ("decoder_steps_total", {}),
        ("encoder_busy_seconds_total", {}),
    ]
    before = [service.metric(name, **labels) for name, labels in counters]

    def not_grown():
        counted = zip(counters, before, strict=True)
        return [one for one, was in counted if service.metric(one[0], **one[1]) <= was]

    service.text(clip("please call maria tomorrow"))
    service.request("GET", "/v1/nothing")
    until_reported(not_grown)


def test_metrics_are_what_prometheus_reads(service, clip):
    names = ("requests_total", "request_seconds", "decoder_decoding")
    expected = {f"ray_mmrag_{name}" for name in names}
    sample = re.compile(r'ray_mmrag_\w+(\{(\w+="[^"]*",?)*\})? [-+0-9.eE]+(Inf|NaN)?$')

    def not_helped():
        lines = service.request("GET", "/metrics").text.splitlines()
        assert all(line.startswith(("# HELP ", "# TYPE ")) or sample.match(line) for line in lines)
        helped = [line.split()[2] for line in lines if line.startswith("# HELP")]
        assert len(helped) == len(set(helped))
        return expected.difference(helped)

    service.text(clip("please call maria tomorrow"))
    until_reported(not_helped)


def test_a_gauge_keeps_its_value_where_nothing_happens(service, clip):
    """Ray itself tells nothing more of it two reports later."""

    def untold():
        lines = service.request("GET", "/metrics").text.splitlines()
        return not any(line.startswith("ray_mmrag_decoder_decoding{") for line in lines)

    service.text(clip("please call maria tomorrow"))
    until_reported(untold)
    time.sleep(4 * REPORTED_SECONDS)
    assert not untold()


def test_nothing_comes_from_another_host(service):
    """The page and the documentation work where there is no internet."""
    seen, left = set(), ["/", "/docs"]
    while left:
        path = left.pop()
        seen.add(path)
        answer = service.request("GET", path)
        assert answer.status_code == 200, path
        if path.endswith((".js", ".css")) and "/page/" not in path:
            continue  # Swagger's own, which speaks of many addresses and fetches none
        assert not OUTSIDE.findall(answer.text), path
        linked = re.findall(r'(?:src|href)="(/[^"#]*)"', answer.text)
        left += [one for one in linked if one not in seen and one not in left]
    assert {"/page/page.js", "/page/page.css", "/page/icon.svg"} <= seen
    assert any("swagger" in path for path in seen)


def test_the_description_of_the_api_is_valid_and_has_every_route(service):
    description = service.request("GET", "/openapi.json").json()
    schemathesis.openapi.from_dict(description).validate()
    assert description["paths"].keys() == {
        "/healthz",
        "/readyz",
        "/metrics",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/realtime/client_secrets",
        "/v1/datastores",
        "/v1/datastores/{name}",
        "/v1/datastores/{name}/entries",
        "/v1/datastores/{name}/preview",
        "/v1/datastores/{name}/search",
        "/v1/datastores/{name}/upkeep/{task}",
        "/v1/usage",
    }


def test_a_path_that_leads_nowhere_is_told_like_any_other_error(service, refused):
    for path in ("/nothing", "/v1", "/v1/nothing", "/page/nothing.js", "/page/"):
        refused(service.request("GET", path), 404)
    refused(service.request("GET", "/v1/models/x"), 404, "model_not_found", "model")
    for path in (
        "/page/../api.py",
        "/page/%2e%2e/api.py",
        "/page/..%2fapi.py",
        "/page//etc/passwd",
    ):
        assert service.request("GET", path).status_code == 404, path


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/audio/transcriptions", {"POST"}),
        ("PUT", "/v1/datastores", {"GET", "POST"}),
        ("PATCH", "/v1/datastores/a", {"GET", "DELETE"}),
        ("PUT", "/v1/datastores/a/entries", {"GET", "POST", "DELETE"}),
        ("DELETE", "/v1/models", {"GET"}),
        ("DELETE", "/v1/models/mmrag", {"GET"}),
        ("DELETE", "/healthz", {"GET"}),
    ],
)
def test_a_method_that_is_not_there_is_refused_with_those_that_are(
    service, refused, method, path, allowed
):
    answer = service.request(method, path)
    refused(answer, 405)
    more = {"OPTIONS", "HEAD"} if "GET" in allowed else {"OPTIONS"}
    assert set(re.split(r",\s*", answer.headers["Allow"])) == allowed | more
