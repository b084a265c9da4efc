"""/v1/datastores: what is added is heard in the very next request, until it is deleted."""

import json
import os
import re
import shutil
import threading
import time
from dataclasses import asdict
from random import Random
from signal import SIGKILL

import numpy as np
import pytest
import ray

from mmrag import cli, contents
from mmrag import recogniser as recognisers
from mmrag.corpora.synthetic import make_names
from mmrag.retrieval import datastore as stored
from mmrag.retrieval.index import index_directory, save_index
from mmrag.retrieval.phrases import WINDOW
from mmrag.retrieval.segment import Description, Segment, windows_of
from serve.access.accounting import USAGE
from serve.access.keys import SIGNING

SENTENCE = "please call priya raghavan tomorrow"
NAME = "priya raghavan"
OTHER = "is imogen varga free on friday"


@pytest.fixture(scope="module")
def file(clip):
    return clip(SENTENCE)


@pytest.fixture(scope="module")
def other(clip):
    return clip(OTHER)


def entries(name):
    return f"/v1/datastores/{name}/entries"


def test_an_added_phrase_changes_the_very_next_transcript(service, file, datastore):
    name = datastore()
    assert service.text(file, datastore=name) != SENTENCE
    added = service.request("POST", entries(name), json={"texts": [NAME]}).json()
    assert added["object"] == "datastore.entries" and added["added"] == added["entries"] > 0
    assert service.text(file, datastore=name) == SENTENCE
    path = f"{entries(name)}?document={NAME.replace(' ', '%20')}"
    assert service.request("DELETE", path).json() == {
        "object": "datastore.entries",
        "datastore": name,
        "deleted": added["added"],
        "entries": 0,
    }
    assert service.text(file, datastore=name) != SENTENCE


def test_what_is_added_twice_is_there_once(service, datastore):
    name = datastore(NAME)
    again = service.request("POST", entries(name), json={"texts": [NAME, f"  {NAME} ", NAME]})
    assert again.json()["added"] == 0
    assert service.request("GET", f"/v1/datastores/{name}").json()["documents"] == 1


def test_a_phrase_that_was_deleted_may_come_back(service, file, datastore):
    name = datastore(NAME)
    service.request("DELETE", entries(name), params={"document": NAME})
    assert service.text(file, datastore=name) != SENTENCE
    assert service.request("POST", entries(name), json={"texts": [NAME]}).json()["added"] > 0
    assert service.text(file, datastore=name) == SENTENCE


def test_a_datastore_is_described_and_listed(service, datastore):
    name = datastore(NAME, "imogen varga", "a longer text is spoken as it stands")
    shown = service.request("GET", f"/v1/datastores/{name}").json()
    assert shown["id"] == name and shown["object"] == "datastore" and shown["audio"] == "spoken"
    assert shown["documents"] == 3
    every = service.request("GET", "/v1/datastores").json()
    assert every["object"] == "list" and shown in every["data"]
    documents = service.request("GET", entries(name)).json()
    assert not documents["has_more"]
    assert sum(one["entries"] for one in documents["data"]) == shown["entries"]


def test_documents_are_listed_page_by_page(service, datastore):
    names = [f"name {chr(97 + n)}" for n in range(5)]
    name, seen, after = datastore(*names), [], 0
    while True:
        page = service.request("GET", f"{entries(name)}?limit=2&after={after}").json()
        seen += [one["document"] for one in page["data"]]
        after += len(page["data"])
        if not page["has_more"]:
            break
        assert len(page["data"]) == 2
    assert seen == names


def test_many_small_additions_do_not_end_in_many_small_segments(service, file, datastore):
    name = datastore("imogen varga")
    texts = [f"name {letter}" for letter in "bcdefg"] + [NAME]
    for text in texts:
        service.request("POST", entries(name), json={"texts": [text]})
    segments = service.directory / name / "segments"
    deadline = time.monotonic() + 30
    while len(list(segments.iterdir())) > 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(list(segments.iterdir())) <= 4, "of eight that were written"
    assert service.text(file, datastore=name) == SENTENCE
    shown = service.request("GET", f"/v1/datastores/{name}").json()
    assert shown["documents"] == 1 + len(texts)


def test_two_datastores_do_not_mix(service, file, other, datastore):
    mine, yours = datastore(NAME), datastore("imogen varga")
    assert service.text(file, datastore=mine) == SENTENCE
    assert service.text(other, datastore=yours) == OTHER
    assert "raghavan" not in service.text(file, datastore=yours)
    assert "varga" not in service.text(other, datastore=mine)


def test_a_deleted_datastore_is_gone_and_so_is_what_it_knew(service, file, refused):
    service.create("brief", NAME)
    assert service.text(file, datastore="brief") == SENTENCE
    gone = service.request("DELETE", "/v1/datastores/brief")
    assert gone.json() == {"id": "brief", "object": "datastore", "deleted": True}
    known = ("datastore_not_found", "datastore")
    refused(service.transcribe(file, datastore="brief"), 404, *known)
    refused(service.request("GET", "/v1/datastores/brief"), 404, *known)
    refused(service.request("DELETE", "/v1/datastores/brief"), 404, *known)
    refused(service.request("GET", entries("brief")), 404, *known)
    refused(service.request("POST", entries("brief"), json={"texts": ["a"]}), 404, *known)
    service.create("brief", "imogen varga")
    assert "raghavan" not in service.text(file, datastore="brief")
    service.request("DELETE", "/v1/datastores/brief")
    hidden = {path.name for path in service.directory.iterdir() if path.name[0] == "."}
    assert hidden <= {USAGE, SIGNING}


def test_a_name_is_taken_once(service, datastore, refused):
    name = datastore(NAME)
    again = service.request("POST", "/v1/datastores", json={"name": name})
    assert name in refused(again, 409, "datastore_exists", "name")
    assert service.request("GET", f"/v1/datastores/{name}").json()["documents"] == 1


def test_the_same_name_at_once_is_given_to_one(service, at_once):
    def make(_):
        return service.request("POST", "/v1/datastores", json={"name": "race", "texts": ["a b"]})

    answers = [made.status_code for made in at_once(make, list(range(4)))]
    assert sorted(answers) == [201, 409, 409, 409]
    service.request("DELETE", "/v1/datastores/race")


def test_recordings_with_what_is_said_in_them_are_as_good_as_texts(service, file, clip):
    """The sentence to be heard is another one about the same person."""
    files = [("file", (f"{n}.flac", clip(s))) for n, s in enumerate(SPOKEN)]
    form = {"name": "recorded", "text": list(SPOKEN)}
    made = service.request(
        "POST", "/v1/datastores", files=files[:1], data=form | {"text": SPOKEN[0]}
    )
    assert made.status_code == 201, made.text
    assert made.json()["documents"] == 1 and made.json()["entries"] > 0
    path = entries("recorded")
    added = service.request("POST", path, files=files[1:], data={"text": list(SPOKEN[1:])})
    assert added.status_code == 200, added.text
    told = service.transcribe(
        file, datastore="recorded", retrieval="knn", include=["retrieval"]
    ).json()
    sources = [word["source"] for word in told["words"] if word["source"]]
    assert sources and {source["document"] for source in sources} <= set(SPOKEN)
    assert told["text"] == SENTENCE
    service.request("DELETE", "/v1/datastores/recorded")


SPOKEN = ("is priya raghavan free on friday", "please call priya raghavan tomorrow")


def test_recordings_and_texts_must_match(service, file, write, datastore, refused):
    name = datastore()

    def add(files, texts):
        files = [("file", ("a.flac", data)) for data in files]
        return service.request("POST", entries(name), files=files, data={"text": texts})

    assert "2 recordings and 1 texts" in refused(add([file, file], ["one"]), 400, None, "text")
    silence = write(np.zeros(32_000, np.float32))
    assert "nobody speaks" in refused(add([silence], ["one"]), 400)
    refused(add([b"no audio"], ["one"]), 400, "unreadable_audio", "file")
    long = write(np.zeros(16_000 * 10, np.float32))
    assert "longer than 4 s" in add([long], ["one"]).json()["error"]["message"]
    assert service.request("GET", f"/v1/datastores/{name}").json()["entries"] == 0


NAMES = ["../outside", "a/b", "/etc", "", ".", "..", "UPPER", "a b", "é", "a" * 64, ".hidden"]
NAMES += ["-a", "_a", "a\n", "a\0", "%2e%2e", "a;b", "\\", "~"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_touches_no_file(service, file, refused, name):
    before = written(service)
    as_json = service.request("POST", "/v1/datastores", json={"name": name, "texts": [NAME]})
    refused(as_json, 422, "string_pattern_mismatch", "name")
    files, form = {"file": ("a.flac", file)}, {"name": name, "text": NAME}
    as_form = service.request("POST", "/v1/datastores", files=files, data=form)
    assert as_form.status_code == 422, as_form.text
    asked = service.transcribe(file, datastore=name)
    # An empty field of a form is one that was not filled in.
    assert asked.status_code == (422 if name else 200)
    assert written(service) == before


def written(service):
    """Every file of the service, but for what it has used."""
    files = service.directory.parent.rglob("*")
    return sorted(one for one in files if one.parent != service.directory / USAGE)


@pytest.mark.parametrize(
    "name", ["..%2foutside", "%2e%2e", "%2e%2e%2f%2e%2e", "UPPER", "a%00b", "a%0a"]
)
def test_a_path_that_is_no_name_finds_nothing(service, name):
    (service.directory.parent / "outside").mkdir(exist_ok=True)
    (service.directory.parent / "outside" / "datastore.json").touch()
    for method, path in [
        ("GET", f"/v1/datastores/{name}"),
        ("GET", f"/v1/datastores/{name}/entries"),
        ("DELETE", f"/v1/datastores/{name}/entries?document=a"),
        ("DELETE", f"/v1/datastores/{name}"),
    ]:
        # Not every client leaves dots alone; this one does.
        answer = service.request(method, path)
        assert answer.status_code in (404, 405), (method, path, answer.text)
    assert (service.directory.parent / "outside" / "datastore.json").exists()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (b'{"texts": ["a"]}', "name"),
        (b'{"name": "x", "texts": "a"}', "texts"),
        (b'{"name": "x", "texts": [1]}', "texts.0"),
        (b'{"name": "x", "text": ["a"]}', "text"),
        (b'{"name": 7}', "name"),
        (rb'{"name": "x", "texts": ["\ud800"]}', None),
    ],
)
def test_a_body_of_another_shape_is_refused_by_its_field(service, refused, body, param):
    headers = {"Content-Type": "application/json"}
    made = service.request("POST", "/v1/datastores", data=body, headers=headers)
    refused(made, 422, made.json()["error"]["code"], param)


def test_texts_have_their_limits(service, datastore, refused):
    name, most = datastore(), service.settings.limits.texts

    def add(*texts):
        return service.request("POST", entries(name), json={"texts": texts})

    assert "51 are too many" in refused(add(*map(str, range(most + 1))), 400, None, "texts")
    assert "at most 500" in refused(add("a" * 501), 400, None, "texts")
    assert "nothing to listen for" in refused(add("a", "?!"), 400, None, "texts")
    assert add("", "  ").json()["added"] == 0
    for strange in ("a\0b c", "\x1b[31m red", "𝔘𝔫𝔦", "日本", "1234567890 " * 5, "x" * 500):
        assert add(strange).status_code in (200, 400), strange
    assert service.request("GET", entries(name)).status_code == 200


def test_a_text_is_spoken_as_it_is_read_and_listed_as_it_was_written(service, datastore, refused):
    written = ["Renée Dubois", "A1C", "the 2nd of 3 tests on this & that"]
    name = datastore(*written)
    listed = service.request("GET", entries(name)).json()["data"]
    assert [one["document"] for one in listed] == written
    added = service.request("POST", entries(name), json={"texts": ["rome", "日本語"]})
    assert "'日本語' cannot be spoken" in refused(added, 400, None, "texts")
    assert service.request("GET", entries(name)).json()["data"] == listed


def test_a_datastore_of_another_model_is_refused_and_the_others_work(
    service, file, datastore, refused
):
    strange = service.directory / "strange"
    stored.create(strange, Description(8, 20, "l2", "spoken", {"codebook": "x", "lm": "y"}))
    save_index(strange)
    name = datastore(NAME)
    message = refused(service.transcribe(file, datastore="strange"), 503, "unusable")
    assert message == "the datastore cannot be used with this model"
    added = service.request("POST", entries("strange"), json={"texts": ["a b"]})
    refused(added, 503, "unusable")
    assert service.text(file, datastore=name) == SENTENCE
    assert service.request("DELETE", "/v1/datastores/strange").status_code == 200


def test_a_damaged_datastore_is_refused_and_the_others_are_listed(
    service, file, datastore, refused
):
    good, broken = datastore(NAME), "broken"
    service.create(broken, NAME)
    (service.directory / broken / "segments.json").write_text("{")
    refused(service.transcribe(file, datastore=broken), 503, "unusable")
    refused(service.request("GET", f"/v1/datastores/{broken}"), 503, "unusable")
    for task in ("overview", "compact", "index"):
        tended = service.request("POST", f"/v1/datastores/{broken}/upkeep/{task}", json={})
        refused(tended, 503, "unusable")
    every = service.request("GET", "/v1/datastores")
    assert every.status_code == 200, every.text
    assert good in [one["id"] for one in every.json()["data"]]
    assert service.text(file, datastore=good) == SENTENCE
    assert service.request("DELETE", f"/v1/datastores/{broken}").status_code == 200


@pytest.mark.timeout(120)
def test_datastores_that_come_and_go_disturb_nobody_who_looks_on(service, file, at_once):
    def come_and_go(number):
        name = f"brief-{number}"
        for _ in range(2):
            service.create(name, NAME)
            yield service.request("GET", "/v1/datastores")
            yield service.transcribe(file, datastore=name)
            yield service.request("DELETE", f"/v1/datastores/{name}")

    def look_on(_):
        for _ in range(15):
            yield service.request("GET", "/v1/datastores")

    def run(number):
        return [a.status_code for a in (look_on if number > 1 else come_and_go)(number)]

    assert {status for seen in at_once(run, list(range(4))) for status in seen} == {200}
    assert service.request("GET", "/v1/datastores").json()["data"] == []


def test_what_was_added_survives_the_retriever(service, file, datastore):
    name = datastore()
    service.request("POST", entries(name), json={"texts": [NAME]})
    assert service.text(file, datastore=name) == SENTENCE
    [process] = service.processes("retriever")
    os.kill(process.pid, SIGKILL)
    process.wait(10)
    service.ready()
    assert service.text(file, datastore=name) == SENTENCE
    service.request("POST", entries(name), json={"texts": ["imogen varga"]})
    shown = service.request("GET", f"/v1/datastores/{name}").json()
    assert shown["documents"] == 2


def test_what_somebody_else_adds_to_the_directory_is_heard(service, file, datastore):
    """The directory is the truth; another process is played by a copy."""
    name = datastore(NAME)
    shutil.copytree(service.directory / name, service.directory / "copied")
    assert service.text(file, datastore="copied") == SENTENCE
    service.request("DELETE", "/v1/datastores/copied")
    assert service.text(file, datastore=name) == SENTENCE


LONG = "quentin ashdown"
"""Of a long list, the name that is said."""


@pytest.fixture
def contacts(service):
    """Some hundred names, more than any model reads whole: LONG as it is read, and others whose
    keys say nothing, which takes less time than reading them."""
    made = make_names(1)
    families = sorted(name for group in made.family.values() for name in group)
    draw, models = Random(0), recognisers.load(service.settings.model)
    names = sorted({f"{draw.choice(made.first)} {draw.choice(families)}" for _ in range(400)})
    directory = service.directory / "contacts"
    contents.create(directory, [LONG], models, spoken=False)
    said = [np.array(models.vocabulary.encode(name)) for name in names]
    counts = [len(tokens) for tokens in said]
    others = Segment(
        keys=np.random.default_rng(0).normal(0, 9, (sum(counts), models.lm.width)),
        tokens=np.concatenate(said),
        windows=np.concatenate([windows_of(tokens, WINDOW) for tokens in said]),
        positions=np.concatenate([np.arange(count) for count in counts]),
        utterances=np.repeat(np.arange(len(said)), counts),
        names=[(name, name) for name in names],
    )
    stored.write_segment(directory, "others", others)
    stored.publish(directory, ["others"])
    yield "contacts"
    service.request("DELETE", "/v1/datastores/contacts")


def test_of_many_phrases_those_are_read_that_may_have_been_said(
    service, file, clip, contacts, datastore, refused
):
    call = clip(f"please call {LONG} tomorrow")
    assert LONG not in service.text(call)
    for asked in ({}, {"shortlist": 3}, {"retrieval": "knn"}):
        told = service.transcribe(call, datastore=contacts, include=["retrieval"], **asked)
        assert told.status_code == 200, told.text
        assert told.json()["text"] == f"please call {LONG} tomorrow"
        changed = [word["source"]["document"] for word in told.json()["words"] if word["changed"]]
        assert set(changed) == {LONG}
    assert service.transcribe(call, datastore=contacts, shortlist=0).status_code == 200
    added = service.request("POST", entries(contacts), json={"texts": ["tamsin pryce"]})
    assert added.json()["added"] > 0
    assert LONG in service.text(call, datastore=contacts), "the list is another one now"
    few = datastore(NAME)
    assert service.text(file, datastore=few, shortlist=1) == SENTENCE
    assert LONG in service.text(call, context=[LONG, "imogen varga"], shortlist=1)
    both = service.transcribe(file, datastore=few, context=[NAME], shortlist=1)
    assert "not of both" in refused(both, 400, None, "shortlist")
    alone = service.transcribe(file, shortlist=1)
    assert "nothing to look up" in refused(alone, 400, None, "shortlist")
    negative = service.transcribe(file, datastore=few, shortlist=-1)
    refused(negative, 422, "greater_than_equal", "shortlist")
    sentences = datastore("please call priya raghavan tomorrow at noon or in the evening")
    no_list = service.transcribe(file, datastore=sentences, shortlist=2)
    assert "are no phrases" in refused(no_list, 400, None, "shortlist")


def test_an_index_that_is_built_anew_is_taken_up_while_everybody_is_answered(
    service, file, datastore
):
    """First by hand, then behind the answer to an addition that left it behind."""
    name = datastore(NAME)
    assert service.text(file, datastore=name) == SENTENCE
    directory, stop, heard = service.directory / name, threading.Event(), []

    def listen():
        while not stop.is_set():
            heard.append(service.transcribe(file, datastore=name))

    def searched():
        """The indexes whose shards have actors."""
        named = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
        found = (re.search(r"mmrag-shard-\w+-(index-\w{8})-\d-\d$", one) for one in named)
        return {one[1] for one in found if one}

    def until(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        place = f"/v1/datastores/{name}/upkeep/index"
        built = service.request("POST", place, json={"shards": 2})
        assert built.status_code == 200, built.text
        assert [one["chosen"].split(":")[0] for one in built.json()["shards"]] == ["flat"] * 2
        by_hand = index_directory(directory).name
        until(lambda: by_hand in searched())
        texts = ["please call Imogen Varga today", "my meeting with Odalys Brandt is at noon"]
        added = service.request("POST", entries(name), json={"texts": texts})
        assert added.status_code == 200, added.text
        until(lambda: index_directory(directory).name != by_hand)
        until(lambda: index_directory(directory).name in searched())
    finally:
        stop.set()
        listener.join()
    assert {one.status_code for one in heard} == {200}
    assert {one.json()["text"] for one in heard} == {SENTENCE}
    assert service.text(file, datastore=name) == SENTENCE
    near = service.request("POST", f"/v1/datastores/{name}/search", json={"text": texts[0]})
    assert texts[0] in {one["document"] for t in near.json()["data"] for one in t["neighbours"]}


def test_a_recording_is_looked_up_as_it_is_in_a_directory(
    service, file, clip, write, wave, datastore, refused, tmp_path
):
    name = datastore(NAME, "imogen varga")

    def search(data, **form):
        place = f"/v1/datastores/{name}/search"
        return service.request("POST", place, files={"file": ("a", data)}, data=form)

    def compared(found):
        """Token, and of each neighbour what does not hang on rounding."""
        return [
            (one["token"], [(n["entry"], n["document"], n["window"]) for n in one["neighbours"]])
            for one in found
        ]

    (tmp_path / "clip").write_bytes(file)
    settings = service.settings.decode
    recogniser = recognisers.load(service.settings.model)
    own = contents.look_up(service.directory / name, recogniser, tmp_path / "clip", 3, settings)
    answer = search(file, k=3)
    assert answer.status_code == 200, answer.text
    found = answer.json()["data"]
    assert compared(found) == compared([asdict(one) for one in own]) and len(found) > 5
    apart = [n["distance"] for one in found for n in one["neighbours"]]
    np.testing.assert_allclose(apart, [n.distance for o in own for n in o.neighbours], rtol=1e-3)
    ogg = search(write(wave(SENTENCE), "OGG", subtype="VORBIS"))
    assert ogg.status_code == 200 and len(ogg.json()["data"][0]["neighbours"]) == 4
    silent = write(np.zeros(16_000, np.float32), "WAV")
    assert "nobody speaks" in refused(search(silent), 400, None, "file")
    refused(search(clip(SENTENCE, SENTENCE, SENTENCE)), 413, "too_long", "file")
    refused(search(b"no audio"), 400, "unreadable_audio", "file")
    refused(search(file, k=0), 422, "greater_than_equal", "k")
    refused(search(file, text="a"), 400, "unknown", "text")
    place = f"/v1/datastores/{name}/search"
    empty = service.request("POST", place, json={"text": "  "})
    assert "nothing to look up" in refused(empty, 400, None, "text")
    none = service.request("POST", place, files={"k": (None, "3")})
    refused(none, 422, "value_error", "file")


def test_the_command_line_looks_after_an_endpoints_datastores(
    service, file, tmp_path, capsys, request
):
    """`mmrag datastore … --url`, as a person at another machine calls it."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["datastore", *map(str, arguments), "--url", service.url])
        said = capsys.readouterr()
        code = ended.value.code
        return (code, said.out) if not isinstance(code, str) else (1, code)

    request.addfinalizer(lambda: service.request("DELETE", "/v1/datastores/afar"))
    names, more = tmp_path / "names.txt", tmp_path / "more.txt"
    names.write_text("imogen varga\n")
    more.write_text(f"{NAME}\n")
    assert call("create", "afar", names)[0] == 0
    assert call("add", "afar", more, "--json")[0] == 0
    assert service.text(file, datastore="afar") == SENTENCE
    status, out = call("list", "--json")
    [listed] = [one for one in map(json.loads, out.splitlines()) if one["id"] == "afar"]
    assert status == 0 and listed["documents"] == 2
    assert "afar" in call("list")[1]
    shown = json.loads(call("show", "afar", "--json")[1])
    assert shown["documents"] == 2 and NAME in shown["largest_documents"]
    assert "spoken" in call("show", "afar")[1]
    assert json.loads(call("stats", "afar", "--json")[1])["segments"] == 2
    assert call("verify", "afar")[1] == f"afar of {service.url} is whole\n"
    found = [json.loads(line) for line in call("search", "afar", NAME, "--json")[1].splitlines()]
    assert {near["document"] for one in found for near in one["neighbours"]} >= {NAME}
    assert NAME in call("search", "afar", NAME)[1]
    assert "--models goes without --url" in call("search", "afar", NAME, "--models", "x")[1]
    recording = tmp_path / "call.flac"
    recording.write_bytes(file)
    status, out = call("search", "afar", recording, "-k", 2, "--json")
    looked_up = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and all(len(one["neighbours"]) == 2 for one in looked_up)
    assert {near["document"] for one in looked_up for near in one["neighbours"]} >= {NAME}
    assert "answers 400: uploaded audio" in call("search", "afar", names)[1]
    assert call("search", "afar", "東京")[0] == 1
    assert call("snapshot", "create", "afar", "both")[0] == 0
    assert json.loads(call("compact", "afar", "--all", "--json")[1])["merged"] == 2
    status, out = call("index", "afar", "--shards", 2)
    assert (status, out.count("flat: "), len(out.splitlines())) == (0, 2, 2)
    assert len(json.loads(call("show", "afar", "--json")[1])["index"]) == 2
    status, out = call("delete", "afar", "imogen varga")
    assert status == 0 and out.startswith("imogen varga: ") and "entries deleted" in out
    status, said = call("create", "afar", names)
    assert status == 1 and "there is a datastore 'afar' already" in said
    status, said = call("add", "nowhere", names)
    assert status == 1 and "nowhere" in said
    assert json.loads(call("show", "afar", "--json")[1])["documents"] == 1
    assert call("snapshot", "rollback", "afar", "both") == (
        *(0, "snapshot both: is what the datastore is again\n"),
    )
    assert json.loads(call("snapshot", "list", "afar", "--json")[1])["name"] == "both"
    assert json.loads(call("show", "afar", "--json")[1])["documents"] == 2
    assert service.text(file, datastore="afar") == SENTENCE
    assert call("snapshot", "drop", "afar", "both")[0] == 0
    status, said = call("snapshot", "drop", "afar", "both")
    assert status == 1 and said.endswith("answers 400: afar has no snapshot both")
    status, said = call("snapshot", "create", "afar", "A B")
    assert status == 1 and "snapshot name 'A B'" in said
    assert call("verify", "nowhere")[0] == 1


@pytest.mark.parametrize(
    ("task", "given", "status", "param"),
    [
        ("index", {"shards": 0}, 422, "shards"),
        ("index", {"shards": 65}, 422, "shards"),
        ("index", {"shards": 64}, 400, "shards"),
        ("index", {"everything": True}, 400, "everything"),
        ("polish", {}, 422, "task"),
        ("verify", {"everything": True}, 400, "everything"),
        ("compact", {"everything": "perhaps"}, 422, "everything"),
        ("compact", {"gently": True}, 422, "gently"),
        ("create_snapshot", {}, 422, "name"),
    ],
)
def test_a_task_with_something_else_is_refused_by_name(
    service, datastore, task, given, status, param
):
    place = f"/v1/datastores/{datastore(NAME)}/upkeep/{task}"
    answer = service.request("POST", place, json=given)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
