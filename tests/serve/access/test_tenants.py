"""Two tenants on the real encoder, retriever and decoder: their datastores and what is kept of them
lie apart. The ingress is in this process, with keys; the deployments behind it are the session's.
"""

import json
import re
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import requests
from application import TRANSCRIBE, made, served
from ray import serve
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from serve import shelf
from serve.access.tenants import Tenant, directory_of, own_name, place_of, tenant_at, tenant_of
from serve.messages import UnknownDatastore
from serve.pronouncing import TENANTS, Pronouncing

KEYS = """
tenants:
  acme:
    keys: [{key: acme, role: admin}]
    quotas: {entries: 60, datastores: 2}
  globex:
    keys: [{key: globex, role: admin}]
"""
SENTENCE = "please call priya raghavan tomorrow"
NAME = "priya raghavan"
ACME, GLOBEX = ({"Authorization": f"Bearer {key}"} for key in ("acme", "globex"))


@pytest.fixture
def url(service, monkeypatch, tmp_path):
    """An ingress with the keys of two tenants in front of the session's deployments."""
    (tmp_path / "keys.yaml").write_text(KEYS)
    monkeypatch.setenv("MMRAG_API_KEYS_FILE", str(tmp_path / "keys.yaml"))
    monkeypatch.delenv("MMRAG_API_KEYS", raising=False)
    parts = {part: handle(part) for part in ("encoder", "retriever", "decoder")}
    with served(made(**parts, timeout_seconds=60)) as url:
        yield url
        for whose in (ACME, GLOBEX):
            for one in ask(url, "GET", "/v1/datastores", whose).json()["data"]:
                ask(url, "DELETE", f"/v1/datastores/{one['id']}", whose)


def handle(part):
    return serve.get_deployment_handle(part, "under-test")


def ask(url, method, path, whose, **more):
    return requests.request(method, url + path, headers=whose, timeout=60, **more)


def create(url, whose, *texts, name="names"):
    answer = ask(url, "POST", "/v1/datastores", whose, json={"name": name, "texts": texts})
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_what_one_tenant_adds_under_a_name_the_other_never_hears(url, service, clip):
    file = clip(SENTENCE)

    def heard(whose):
        form = {"datastore": "names", "include[]": "retrieval"}
        files = {"file": ("a.flac", file)}
        answer = ask(url, "POST", TRANSCRIBE, whose, files=files, data=form)
        assert answer.status_code == 200, answer.text
        return answer.json()["text"], answer.text

    create(url, ACME, NAME)
    create(url, GLOBEX, "olaf")
    assert sorted(one.name for one in service.directory.glob("@*/*")) == ["names", "names"]
    assert heard(ACME)[0] == SENTENCE
    text, evidence = heard(GLOBEX)
    assert text != SENTENCE and NAME not in evidence
    listed = service.request("GET", "/v1/datastores").json()["data"]
    assert "names" not in [one["id"] for one in listed]
    assert service.transcribe(file, datastore="names").status_code == 404
    # What the one deletes stays the other's.
    assert ask(url, "DELETE", "/v1/datastores/names", GLOBEX).status_code == 200
    assert heard(ACME)[0] == SENTENCE
    assert ask(url, "GET", "/v1/datastores/names", GLOBEX).status_code == 404


def test_the_whole_life_of_a_tenants_datastore(url, refused):
    create(url, ACME, NAME)
    one = "/v1/datastores/names"
    more = {"json": {"texts": ["zanab kuri"]}}
    assert ask(url, "POST", f"{one}/entries", ACME, **more).json()["datastore"] == "names"
    listed = ask(url, "GET", f"{one}/entries", ACME).json()["data"]
    assert [one["document"] for one in listed] == [NAME, "zanab kuri"]
    found = ask(url, "POST", f"{one}/search", ACME, json={"text": "call priya"})
    assert found.status_code == 200 and NAME in found.text
    for task in ("overview", "statistics", "verify", "compact"):
        told = ask(url, "POST", f"{one}/upkeep/{task}", ACME, json={})
        assert told.status_code == 200 and "acme" not in told.text, told.text
    again = ask(url, "POST", "/v1/datastores", ACME, json={"name": "names", "texts": ["a b"]})
    assert "'names'" in refused(again, 409, "datastore_exists", "name")
    gone = f"{one}/entries?document=zanab%20kuri"
    assert ask(url, "DELETE", gone, ACME).json()["deleted"] > 0


def test_a_tenant_has_so_many_datastores_and_entries_and_no_more(url, refused):
    first = create(url, ACME, NAME, name="one")["entries"]
    words = ("zanab", "imogen", "olaf", "oduya")
    more = [f"{word} {other}" for word in words for other in ("kuri", "varga", "mbeki")]
    for path, given in [
        ("/v1/datastores/one/entries", {"texts": more}),
        ("/v1/datastores", {"name": "two", "texts": more}),
    ]:
        answer = ask(url, "POST", path, ACME, json=given)
        message = refused(answer, 429, "quota_entries")
        assert message.startswith(f"{first} of 60 entries are there already")
    create(url, ACME, "olaf", name="two")
    answer = ask(url, "POST", "/v1/datastores", ACME, json={"name": "three", "texts": ["olaf"]})
    assert refused(answer, 429, "quota_datastores") == "2 datastores are there already"
    create(url, GLOBEX, "olaf", name="three")
    used = ask(url, "GET", "/v1/usage", ACME).json()
    assert used["datastores"] == 2 and first < used["entries"] <= 60


def test_each_tenants_phrases_are_pronounced_for_it_alone():
    pronouncing = Pronouncing()
    acme = pronouncing.of("acme")
    assert pronouncing.of("acme") is acme is not pronouncing.of("globex")
    for other in range(TENANTS):
        pronouncing.of(f"tenant {other}")
    assert pronouncing.of("acme") is not acme, "not of all of them for ever"


def test_nobodys_load_drops_what_another_has_met():
    kept = {
        "acme": OrderedDict.fromkeys(range(10), "segment"),
        "globex": OrderedDict.fromkeys("ab", "segment"),
    }
    shelf.forget(kept, 6)
    assert list(kept["acme"]) == [6, 7, 8, 9] and list(kept["globex"]) == ["a", "b"]
    shelf.forget(kept, 6)
    assert sum(map(len, kept.values())) == 6


def test_usage_is_counted_by_whatever_replica_and_told_at_once(service, clip, duration):
    """Through the real ingress, and the ledger's actor behind it."""

    def used():
        told = service.request("GET", "/v1/usage").json()
        assert told["tenant"] == "default"
        [today, *_] = [*told["data"], dict.fromkeys(("requests", "audio_seconds", "tokens"), 0)]
        return today

    file, before = clip(SENTENCE), used()
    service.text(file)
    after = used()
    assert after["requests"] == before["requests"] + 2, "each question counts too"
    assert after["audio_seconds"] - before["audio_seconds"] == pytest.approx(duration(file))
    assert after["tokens"] > before["tokens"]
    [kept] = (service.directory / ".usage").glob("*.json")
    assert kept.name == "default.json" and after["day"] in kept.read_text()


def test_an_answer_has_its_id_once_and_so_has_every_line_of_the_log(service, second):
    """In whatever process it is written, and without the words of the request."""
    [retriever] = service.processes("retriever")
    logs = [Path(one.path) for one in retriever.open_files() if one.path.endswith(".log")]
    given = {"data": {"datastore": "never-was-there"}, "files": second}
    answer = service.request("POST", TRANSCRIBE, headers={"X-Request-ID": "order-7"}, **given)
    assert answer.status_code == 404 and "never-was-there" in answer.text
    assert answer.raw.headers.getlist("x-request-id") == ["order-7"]
    text = "".join(log.read_text() for log in logs)
    lines = [line for line in text.splitlines() if "order-7" in line]
    assert any("Request failed" in line for line in lines)
    assert "UnknownDatastore" in text and "never-was-there" not in text


def test_a_page_elsewhere_opens_no_websocket_and_is_told_why(service):
    """Over HTTP, through whatever Ray Serve puts in front."""
    address = service.url.replace("http", "ws") + "/v1/realtime"
    with pytest.raises(InvalidStatus) as refused_with, connect(address, origin="https://a.b"):
        pass
    response = refused_with.value.response
    assert response.status_code == 403
    assert json.loads(response.body)["error"]["code"] == "origin_not_allowed"


def test_the_service_tells_its_metrics_of_no_tenant(url, service, second):
    create(url, ACME, NAME, name="nowhere-else")
    ask(url, "POST", TRANSCRIBE, ACME, files=second, data={"datastore": "nowhere-else"})
    before = service.metric("requests_total", status="405")
    assert ask(url, "PATCH", "/v1/usage", ACME).status_code == 405
    deadline = time.monotonic() + 30
    while service.metric("requests_total", status="405") <= before:  # what came before it, too
        assert time.monotonic() < deadline, "the metrics are not reported"
        time.sleep(0.2)
    metrics = service.request("GET", "/metrics").text
    assert not re.search("acme|globex|nowhere-else", metrics)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../names", "@globex/names", "globex/names", "A", "a" * 64, "a\n"],
)
def test_nothing_that_a_caller_sends_leads_to_another_tenant(tmp_path, name):
    for tenant in (Tenant("acme"), Tenant()):
        with pytest.raises(UnknownDatastore):
            tenant.datastore(name)
    with pytest.raises(UnknownDatastore):
        place_of(tmp_path, f"acme/{name}")


def test_a_datastores_place_tells_whose_it_is(tmp_path):
    assert place_of(tmp_path, Tenant().datastore("names")) == tmp_path / "names"
    assert place_of(tmp_path, Tenant("acme").datastore("names")) == tmp_path / "@acme" / "names"
    assert directory_of(tmp_path, "default") == tmp_path
    for tenant in ("acme", "default"):
        name = Tenant(tenant).datastore("names")
        assert (tenant_of(name), own_name(name)) == (tenant, "names")
        assert tenant_at(tmp_path, place_of(tmp_path, name)) == tenant
