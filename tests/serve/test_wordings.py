"""Entries of requests and datastores come out as they were given, are said as they ask, and are
looked at before they are put in."""

import json

import pytest

from mmrag import cli

SENTENCE = "please call priya raghavan tomorrow"
NAME = {"text": "priya raghavan", "display_as": "Priya Raghavan-Ngô"}
SHOWN = "please call Priya Raghavan-Ngô tomorrow"


@pytest.fixture(scope="module")
def file(clip):
    return clip(SENTENCE)


def entries(name):
    return f"/v1/datastores/{name}/entries"


def events(response):
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("field", ["context[]", "keywords[]"])
def test_a_request_has_its_names_written_as_it_gave_them(service, file, field):
    answer = service.transcribe(file, **{field: json.dumps(NAME)})
    assert answer.json()["text"] == SHOWN
    assert service.text(file, context="Priya Raghavan") == "please call Priya Raghavan tomorrow"
    assert service.text(file, context="priya raghavan") == SENTENCE


def test_a_name_is_written_alike_in_every_format(service, file):
    asked = {"context": json.dumps(NAME)}
    words = {"timestamp_granularities": ["word", "segment"], "response_format": "verbose_json"}
    verbose = service.transcribe(file, **asked, **words).json()
    assert verbose["text"] == SHOWN == verbose["segments"][0]["text"]
    told = verbose["words"]
    assert [one["word"] for one in told] == SHOWN.split()
    assert all(one["start"] <= one["end"] for one in told)
    for kind in ("srt", "vtt", "text"):
        assert SHOWN in service.transcribe(file, **asked, response_format=kind).text
    proof = service.transcribe(file, **asked, include="retrieval").json()["words"]
    assert [one["word"] for one in proof] == SHOWN.split()
    assert proof[2]["source"]["document"] == proof[3]["source"]["document"] == NAME["text"]


def test_words_that_become_one_keep_their_time(service, file):
    joined = {"text": "priya raghavan", "display_as": "PR"}
    how = {"response_format": "verbose_json", "timestamp_granularities": ["word"]}
    plain = service.transcribe(file, context="priya raghavan", **how).json()["words"]
    found = service.transcribe(file, context=json.dumps(joined), **how).json()
    assert found["text"] == "please call PR tomorrow"
    [own] = [one for one in found["words"] if one["word"] == "PR"]
    assert (own["start"], own["end"]) == (plain[2]["start"], plain[3]["end"])
    others = [one for one in found["words"] if one["word"] != "PR"]
    assert others == plain[:2] + plain[4:]


def test_deltas_add_up_to_what_is_done(service, file):
    told = events(service.transcribe(file, context=json.dumps(NAME), stream="true"))
    deltas = [one["delta"] for one in told if one["type"] == "transcript.text.delta"]
    assert told[-1]["type"] == "transcript.text.done" and told[-1]["text"] == SHOWN
    assert "".join(deltas) == SHOWN and len(deltas) > 1


def test_long_audio_has_its_names_written_across_segments(service, clip):
    sentences = [SENTENCE, "is imogen varga free on friday"] * 2
    text = service.text(clip(*sentences), context=json.dumps(NAME))
    assert text.count("Priya Raghavan-Ngô") == 2 and "raghavan" not in text


def test_a_datastore_has_its_entries_written_until_they_are_given_otherwise(
    service, file, datastore
):
    name = datastore()
    added = service.request("POST", entries(name), json={"entries": [NAME, "imogen varga"]})
    assert added.status_code == 200 and added.json()["added"] > 0
    assert service.text(file, datastore=name) == SHOWN
    listed = service.request("GET", entries(name)).json()["data"]
    assert {one["document"]: one.get("entry") for one in listed} == {
        NAME["text"]: NAME,
        "imogen varga": None,
    }
    again = service.request("POST", entries(name), json={"entries": [NAME]}).json()
    assert again["added"] == 0
    other = NAME | {"display_as": "Priya"}
    changed = service.request("POST", entries(name), json={"entries": [other]}).json()
    assert changed["added"] > 0 and changed["entries"] == added.json()["entries"]
    assert service.text(file, datastore=name) == "please call Priya tomorrow"
    problems = service.request("POST", f"/v1/datastores/{name}/upkeep/verify", json={}).json()
    assert problems == {"problems": []}
    mine = json.dumps(NAME | {"display_as": "P."})
    assert service.text(file, datastore=name, context=mine) == "please call P. tomorrow"


def test_what_weighs_nothing_is_not_found_and_still_written(service, file, clip, datastore):
    silent = NAME | {"weight": 0}
    alone = service.text(file)
    assert service.text(file, context=json.dumps(silent)) == alone != SENTENCE
    name = datastore()
    service.request("POST", entries(name), json={"entries": [silent, "imogen varga"]})
    assert "Raghavan" not in service.text(file, datastore=name)
    hush = json.dumps({"text": "friday", "display_as": "FRIDAY", "weight": 0})
    other = clip("is imogen varga free on friday")
    assert service.text(other, context=hush).endswith("FRIDAY")
    loud = {"entries": [NAME | {"weight": 2}]}
    service.request("POST", entries(name), json=loud)
    assert service.text(file, datastore=name) == SHOWN


def test_an_entry_is_heard_as_its_pronunciations_say(service, clip):
    spoken = clip("please call priya raghavan tomorrow")
    for said in ("priya raghavan", "/priːjə ræɡəvən/"):
        one = {"text": "quentin", "display_as": "Q.", "pronunciations": [said]}
        found = service.text(spoken, context=json.dumps(one), retrieval="knn")
        assert found != service.text(spoken, context="quentin", retrieval="knn")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "a", "weight": 3}, "context[0]: weight: a number from 0 to 2"),
        ({"text": "a", "sound": "b"}, "'sound' is no field of an entry"),
        ({"text": "北京"}, "no letters for '北', '京'; write it in letters that it has"),
        ({"text": "北京", "pronunciations": ["bay jing"]}, "and in display_as as it is to be read"),
        ({"text": "a", "pronunciations": ["/ʘ/"]}, "pronunciations[0]: 'ʘ' in 'ʘ'"),
        ({"text": "a", "pronunciations": ["北"]}, "pronunciations[0]: '北': write it in Latin"),
        ({"text": "a", "language": "fr"}, "language 'fr': this model understands en"),
        ({"display_as": "a"}, "text: an entry needs one"),
    ],
)
def test_what_is_no_entry_is_refused_by_its_field(
    service, file, refused, given, message, datastore
):
    answer = service.transcribe(file, context=json.dumps(given))
    refused(answer, 400, answer.json()["error"]["code"], "context[]")
    assert message in answer.json()["error"]["message"]
    name = datastore()
    for place in (entries(name), f"/v1/datastores/{name}/preview"):
        answer = service.request("POST", place, json={"entries": [given]})
        refused(answer, 400, answer.json()["error"]["code"], "entries")
    assert service.request("GET", f"/v1/datastores/{name}").json()["documents"] == 0


@pytest.mark.parametrize("given", ["{", "{}", '{"text": 1}', '{"text": "\\ud800"}', '{"a":' * 9999])
def test_a_field_that_begins_with_a_brace_is_an_object_or_refused(service, file, refused, given):
    answer = service.transcribe(file, context=given)
    refused(answer, 400, answer.json()["error"]["code"], "context[]")


def test_a_preview_tells_what_an_entry_would_do_and_changes_nothing(service, datastore):
    name = datastore("priya raghavan", "imogen varga")
    before = service.request("GET", f"/v1/datastores/{name}").json()
    asked = [{"text": "maya raghavan"}, {"text": "column", "pronunciations": ["collum", "/kɒl/"]}]
    answer = service.request("POST", f"/v1/datastores/{name}/preview", json={"entries": asked})
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["data"]
    assert first["writes"] == "maya raghavan" == first["shows"]
    near = {one["text"]: one for one in first["confused_with"]}
    assert near["priya raghavan"]["kind"] == "entry" and near["priya raghavan"]["sound"] > 0.6
    assert 0 <= near["priya raghavan"]["takes"] <= 1
    assert [one["pronunciation"] for one in second["heard"]] == ["collum", "/kɒl/"]
    assert all(one["heard"].startswith("please call") for one in first["heard"])
    assert service.request("GET", f"/v1/datastores/{name}").json() == before


def test_the_command_puts_entries_in_and_previews_them(service, file, datastore, tmp_path, capsys):
    name = datastore()
    lines = tmp_path / "entries.jsonl"
    lines.write_text(json.dumps(NAME) + "\nimogen varga\n")

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments)])
        assert not ended.value.code, ended.value.code
        return capsys.readouterr().out

    call("datastore", "add", name, lines, "--url", service.url)
    assert service.text(file, datastore=name) == SHOWN
    worded = ("--text", NAME["text"], "--display-as", "Priya", "--weight", "1.5")
    call("datastore", "add", name, *worded, "--url", service.url)
    assert service.text(file, datastore=name) == "please call Priya tomorrow"
    told = call("datastore", "search", name, "maya raghavan", "--hear", "--url", service.url)
    assert "priya raghavan" in told and "please call" in told
    clip = tmp_path / "clip.flac"
    clip.write_bytes(file)
    said = call("transcribe", clip, "--phrases", lines, "--url", service.url, "--json")
    assert json.loads(said)["text"] == SHOWN


WRITTEN = {"A1C": "a one c", "O'Brien-Smith": "o'brien smith", "Zoë": "zoe", "5-HTP": "five htp"}
SAID = {"A1C": "eigh one C", "O'Brien-Smith": "O'Brien-Smith", "Zoë": "Zoe", "5-HTP": "five-HTP"}


def test_digits_capitals_hyphens_apostrophes_and_accents_are_said_found_and_written(
    service, clip, datastore
):
    name = datastore(*WRITTEN)
    asked = {"entries": list(WRITTEN)}
    previews = service.request("POST", f"/v1/datastores/{name}/preview", json=asked).json()["data"]
    for one in previews:
        assert (one["writes"], one["shows"]) == (WRITTEN[one["text"]], one["text"])
        assert one["heard"][0]["sentence"] == f"please call {SAID[one['text']]} today"
    for given in WRITTEN:
        query = {"text": f"please call {given} today", "k": 1}
        found = service.request("POST", f"/v1/datastores/{name}/search", json=query).json()["data"]
        assert given in {near["document"] for one in found for near in one["neighbours"]}
    for given in WRITTEN:
        answer = service.transcribe(clip("send a message to Zoe now"), context=given)
        assert answer.status_code == 200, answer.text
        assert (given in answer.json()["text"].split()) == (given == "Zoë")
