"""Phrases that come with a request or lie in a datastore are spotted where the encoder spells: with
the models of the package, of which the small one does and the tiny one does not."""

import base64
import json

import pytest
import torch
from torchaudio.transforms import Resample
from websockets.sync.client import connect
from whole_application import whole_application

from mmrag import shipped

SENTENCE = "please call priya raghavan tomorrow"
NAME = "priya raghavan"
"""The small model gets it wrong, unless it is told."""
BOTH = "please call priya raghavan and imogen varga"
OTHER = "imogen varga"
PLAIN = "do we need to leave on friday"
TOLD = "we have to talk about the new budget before friday"
ABOUT = (
    "i spoke to priya raghavan about the budget",
    "priya raghavan called from the clinic about the results",
)
IPA = {"text": NAME, "pronunciations": ["/priːjə ræɡəvən/"]}
KEYS = """
tenants:
  acme: {keys: [{key: acme, role: admin}]}
  globex: {keys: [{key: globex, role: admin}]}
"""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def small(ray_cluster, tmp_path_factory):
    """The application of the model whose encoder spells."""
    with whole_application(shipped.DEFAULT, tmp_path_factory.mktemp("small")) as application:
        yield application


@pytest.fixture(scope="module")
def tiny(ray_cluster, tmp_path_factory):
    """The application of the one whose encoder does not."""
    with whole_application(shipped.TINY, tmp_path_factory.mktemp("tiny")) as application:
        yield application


@pytest.fixture
def file(clip):
    return clip(SENTENCE)


@pytest.fixture
def spoken(small):
    """`spoken()`: how often the synthesizer was called since the test began."""
    before = small.calls["synthesize"]
    return lambda: small.calls["synthesize"] - before


@pytest.fixture
def store(small):
    """`store(*texts)`: the name of a new datastore of the small model, which goes when the test
    ends."""
    made = []

    def make(*texts):
        made.append(f"store-{len(made)}")
        given = {"name": made[-1], "texts": texts}
        answer = small.request("POST", "/v1/datastores", json=given)
        assert answer.status_code == 201, answer.text
        return made[-1]

    yield make
    for name in made:
        small.request("DELETE", f"/v1/datastores/{name}")


def sources(answer):
    """Word by word, the document that spoke for it, and the entry of which that was."""
    assert answer.status_code == 200, answer.text
    found = [(one["word"], one["source"]) for one in answer.json()["words"]]
    return {word: source and (source["document"], source["entry"]) for word, source in found}


def test_what_can_be_asked_for_is_listed(small, tiny):
    listed = [
        application.request("GET", "/v1/models").json()["data"][0]["retrieval"]
        for application in (small, tiny)
    ]
    searched = ["knn", "cross_attention", "both"]
    assert listed == [["none", "spotting", *searched], ["none", *searched]]


@pytest.mark.parametrize("field", ["context", "keywords[]", "prompt"])
def test_phrases_of_a_request_are_spotted_and_nobody_speaks_them(small, file, spoken, field):
    assert small.text(file) != SENTENCE
    for more in ({}, {"retrieval": "spotting"}):
        assert small.text(file, **{field: NAME}, **more) == SENTENCE
    assert spoken() == 0


def test_a_phrase_that_nobody_says_changes_nothing(small, clip):
    data = clip(PLAIN)
    names = ["wojciech nowak", "buxbury", NAME, "quentin marlowe"]
    assert small.text(data, context=names) == small.text(data)


def test_where_no_encoder_spells_phrases_are_spoken_searched_and_read(tiny, file):
    before = tiny.calls["synthesize"]
    answer = tiny.transcribe(file, context=NAME, include="retrieval")
    assert answer.json()["text"] == SENTENCE and tiny.calls["synthesize"] > before
    found = answer.json()["words"][-2]["source"]
    assert found["document"] == NAME and found["entry"] >= 0 and found["attention"] > 0


def test_where_no_encoder_spells_spotting_is_refused(tiny, file, refused):
    message = refused(
        tiny.transcribe(file, context=NAME, retrieval="spotting"), 400, None, "retrieval"
    )
    assert "an encoder that spells" in message


@pytest.mark.parametrize("mode", ["knn", "cross_attention", "both"])
def test_another_way_that_is_asked_for_is_taken(small, file, mode):
    answer = small.transcribe(file, context=NAME, retrieval=mode, include="retrieval")
    found = [source for source in sources(answer).values() if source]
    assert found and all(entry >= 0 for _, entry in found)
    assert small.calls["synthesize"] > 0


def test_a_shortlist_is_of_what_is_spoken(small, file):
    answer = small.transcribe(file, context=NAME, shortlist=2, include="retrieval")
    found = [source for source in sources(answer).values() if source]
    assert found and all(entry >= 0 for _, entry in found)


def test_a_phrase_in_ipa_is_spoken_and_all_others_with_it(small, file, spoken):
    listed = [json.dumps(IPA), OTHER]
    answer = small.transcribe(file, context=listed, include="retrieval")
    found = [source for source in sources(answer).values() if source]
    assert found and all(entry >= 0 for _, entry in found) and spoken() > 0
    assert small.text(file, context=listed, retrieval="spotting") == SENTENCE, "as it is written"


def test_the_evidence_for_a_word_is_the_phrase_that_was_spotted(small, file):
    answer = small.transcribe(file, context=[NAME, OTHER], include="retrieval")
    for word, source in sources(answer).items():
        assert source == ((NAME, -1) if word in NAME.split() else None), word
    for word in answer.json()["words"]:
        assert word["start"] < word["end"] and 0 < word["probability"] <= 1
        if word["source"]:
            shown = {name: word["source"][name] for name in ("text", "distance", "attention")}
            assert shown == {"text": NAME, "distance": None, "attention": None}


def test_a_transcript_with_a_spotted_phrase_is_no_likelier_than_certain(small, file):
    how = {"response_format": "verbose_json", "include": "logprobs", "context": NAME}
    told = small.transcribe(file, **how).json()
    assert told["text"] == SENTENCE
    assert all(segment["avg_logprob"] <= 0 for segment in told["segments"])
    logprobs = [one["logprob"] for one in told["logprobs"]]
    assert all(logprob <= 0 for logprob in logprobs)
    [segment] = told["segments"]
    assert min(logprobs) < segment["avg_logprob"] < max(logprobs)


def test_what_weighs_nothing_is_not_favoured(small, clip, file):
    alone = small.text(file)
    silent = json.dumps({"text": NAME, "weight": 0})
    assert small.text(file, context=silent) == alone
    data = clip(BOTH)
    found = small.text(data, context=[silent, OTHER])
    assert OTHER in found and NAME not in found


def test_a_spotted_phrase_is_written_as_it_is_to_be_displayed(small, file):
    shown = {"text": NAME, "display_as": "Priya Raghavan-Ngô"}
    context = json.dumps(shown)
    assert small.text(file, context=context) == "please call Priya Raghavan-Ngô tomorrow"
    told = sources(small.transcribe(file, context=context, include="retrieval"))
    assert told["Raghavan-Ngô"] == (NAME, -1)
    assert small.text(file, context="Priya Raghavan") == "please call Priya Raghavan tomorrow"


def test_the_deltas_of_a_stream_are_the_transcript(small, file):
    lines = small.transcribe(file, context="Priya Raghavan", stream="true").text.splitlines()
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    deltas = [one["delta"] for one in told if one["type"] == "transcript.text.delta"]
    assert "".join(deltas) == told[-1]["text"] == "please call Priya Raghavan tomorrow"


def test_the_phrases_of_a_datastore_are_spotted(small, file, store, spoken):
    name = store(NAME, "wojciech nowak")
    said = spoken()
    for more in ({}, {"retrieval": "spotting"}):
        answer = small.transcribe(file, datastore=name, include="retrieval", **more)
        assert answer.json()["text"] == SENTENCE
        assert sources(answer)["raghavan"] == (NAME, -1)
    assert spoken() == said, "which was done when it was made"


def test_phrases_of_a_datastore_and_of_a_request_are_spotted_together(small, clip, store, spoken):
    data, name = clip(BOTH), store(NAME)
    said = spoken()
    answer = small.transcribe(data, datastore=name, context=OTHER, include="retrieval")
    assert answer.json()["text"] == BOTH
    told = sources(answer)
    assert (told["priya"], told["varga"]) == ((NAME, -1), (OTHER, -1))
    assert spoken() == said
    mine = json.dumps({"text": NAME, "display_as": "Priya"})
    assert small.text(data, datastore=name, context=[mine, OTHER]).startswith(
        "please call Priya and"
    )
    silent = json.dumps({"text": NAME, "weight": 0})
    assert NAME not in small.text(data, datastore=name, context=silent), "the request's counts"


def test_what_is_added_and_deleted_is_seen_by_the_next_request(small, file, store):
    name = store("wojciech nowak")
    entries = f"/v1/datastores/{name}/entries"
    assert small.text(file, datastore=name) == small.text(file)
    for _ in range(2):
        assert small.request("POST", entries, json={"texts": [NAME]}).status_code == 200
        assert small.text(file, datastore=name) == SENTENCE
        assert small.request("DELETE", entries, params={"document": NAME}).status_code == 200
        assert small.text(file, datastore=name) == small.text(file)
    shown = {"entries": [{"text": NAME, "display_as": "PR"}]}
    small.request("POST", entries, json=shown)
    assert small.text(file, datastore=name) == "please call PR tomorrow"


def test_a_datastore_with_a_phrase_in_ipa_is_searched_and_read(small, file, store):
    name = store(OTHER)
    small.request("POST", f"/v1/datastores/{name}/entries", json={"entries": [IPA]})
    for more in ({}, {"context": "wojciech nowak"}):
        told = sources(small.transcribe(file, datastore=name, include="retrieval", **more))
        found = [source for source in told.values() if source]
        assert found and all(entry >= 0 for _, entry in found)


def test_a_datastore_of_sentences_is_searched_beside_phrases_that_are_spotted(
    small, file, store, spoken, refused
):
    name = store(TOLD)
    before = spoken()
    told = sources(small.transcribe(file, datastore=name, context=NAME, include="retrieval"))
    assert told["priya"] == told["raghavan"] == (NAME, -1) and spoken() == before
    assert any(source is not None and source[1] >= 0 for source in told.values())
    answer = small.transcribe(file, datastore=name, context="gwendolyn ashby", retrieval="both")
    assert answer.status_code == 200 and spoken() > before, "asked for, all of it is searched"
    answer = small.transcribe(file, datastore=name, retrieval="spotting")
    assert "neither phrases nor unusual words" in refused(answer, 400, None, "retrieval")


def test_unusual_words_of_a_datastores_sentences_are_spotted(small, file, clip, store, spoken):
    name = store(*ABOUT)
    said = spoken()
    for more in ({}, {"retrieval": "spotting"}):
        answer = small.transcribe(file, datastore=name, include="retrieval", **more)
        assert answer.json()["text"] == SENTENCE
        told = sources(answer)
        assert told["priya"] == told["raghavan"] == (ABOUT[0], -1) and told["call"] is None
        assert answer.json()["words"][-2]["source"]["text"] == ABOUT[0], "what is said there"
    both = clip(BOTH)
    answer = small.transcribe(both, datastore=name, context=OTHER, include="retrieval")
    assert answer.json()["text"] == BOTH
    told = sources(answer)
    assert (told["raghavan"], told["varga"]) == ((ABOUT[0], -1), (OTHER, -1))
    shown = json.dumps({"text": NAME, "display_as": "PR"})
    assert small.text(file, datastore=name, context=shown) == "please call PR tomorrow"
    assert spoken() == said
    entries = f"/v1/datastores/{name}/entries"
    assert small.request("DELETE", entries, params={"document": ABOUT[0]}).status_code == 200
    told = sources(small.transcribe(file, datastore=name, include="retrieval"))
    assert told["raghavan"] == (ABOUT[1], -1)


@pytest.mark.parametrize("mode", ["knn", "both"])
def test_a_datastore_of_unusual_words_is_searched_where_that_is_asked_for(small, file, store, mode):
    answer = small.transcribe(file, datastore=store(*ABOUT), retrieval=mode, include="retrieval")
    found = [source for source in sources(answer).values() if source]
    assert found and all(entry >= 0 for _, entry in found)


def test_a_datastore_without_unusual_words_is_searched_and_not_spotted(small, file, store, refused):
    name = store(PLAIN)
    told = sources(small.transcribe(file, datastore=name, include="retrieval"))
    found = [source for source in told.values() if source]
    assert found and all(entry >= 0 for _, entry in found)
    answer = small.transcribe(file, datastore=name, retrieval="spotting")
    message = refused(answer, 400, None, "retrieval")
    assert f"'{name}' has neither phrases nor unusual words to spot" in message


def test_a_datastore_of_sentences_is_no_shortlist(small, file, store, refused):
    for name in (store(*ABOUT), store(PLAIN)):
        answer = small.transcribe(file, datastore=name, shortlist=2)
        assert f"'{name}' are no phrases" in refused(answer, 400, None, "shortlist")


def test_an_empty_datastore_has_nothing_to_spot(small, file, store, spoken):
    name = store()
    for more in ({}, {"retrieval": "spotting"}):
        assert small.text(file, datastore=name, **more) == small.text(file)
        assert small.text(file, datastore=name, context=NAME, **more) == SENTENCE
    assert spoken() == 0
    assert small.text(file, datastore=name, shortlist=2) == small.text(file)


def test_spotting_takes_no_shortlist_and_needs_something_to_spot(small, file, refused):
    for most in (0, 5):
        answer = small.transcribe(file, context=NAME, retrieval="spotting", shortlist=most)
        assert "all phrases" in refused(answer, 400, None, "shortlist")
    nothing = small.transcribe(file, retrieval="spotting")
    assert "context" in refused(nothing, 400, None, "retrieval")


def test_two_tenants_spot_each_their_own(small, file, tmp_path, monkeypatch):
    (tmp_path / "keys.yaml").write_text(KEYS)
    monkeypatch.setenv("MMRAG_API_KEYS_FILE", str(tmp_path / "keys.yaml"))
    with small.another() as application:
        for key, text in (("acme", NAME), ("globex", OTHER)):
            given = {"name": "names", "texts": [text]}
            headers = {"Authorization": f"Bearer {key}"}
            made = application.request("POST", "/v1/datastores", json=given, headers=headers)
            assert made.status_code == 201
        alone = application.text(file, key="acme")
        for _ in range(2):
            assert application.text(file, key="acme", datastore="names") == SENTENCE
            assert application.text(file, key="globex", datastore="names") == alone
            shown = json.dumps({"text": NAME, "display_as": "PR"})
            assert application.text(file, key="acme", context=shown).endswith("PR tomorrow")
            assert application.text(file, key="globex", context=NAME) == SENTENCE


@pytest.mark.parametrize("retrieval", ["spotting", None])
def test_a_session_spots_as_a_request_does(small, wave, spoken, retrieval):
    transcription = {"context": [NAME], "retrieval": retrieval}
    given = {"turn_detection": None, "transcription": transcription}
    session = {"type": "transcription", "audio": {"input": given}}
    raised = Resample(16_000, 24_000)(torch.from_numpy(wave(SENTENCE))).numpy()
    data = base64.b64encode((raised * 32767).clip(-32768, 32767).astype("<i2").tobytes()).decode()
    url = small.url.replace("http", "ws") + "/v1/realtime?intent=transcription"
    with connect(url, max_size=None) as socket:
        for event in (
            {"type": "session.update", "session": session},
            {"type": "input_audio_buffer.append", "audio": data},
            {"type": "input_audio_buffer.commit"},
        ):
            socket.send(json.dumps(event))
        told = {}
        while "conversation.item.done" not in told:
            event = json.loads(socket.recv(timeout=60))
            assert event["type"] != "error", event
            told[event["type"]] = event
    asked = told["session.updated"]["session"]["audio"]["input"]["transcription"]
    assert asked.get("retrieval") == retrieval and asked["context"] == [NAME]
    completed = told["conversation.item.input_audio_transcription.completed"]
    assert completed["transcript"] == SENTENCE and spoken() == 0
