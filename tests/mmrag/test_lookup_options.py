"""What the command line says of phrases and datastores is what `transcribe` is given."""

import argparse
import json

import pytest
import soundfile
from plain_ctc import spelling_of

from mmrag import cli, lookup_options, recogniser, shipped
from mmrag.corpora.synthetic import assign_voices, render
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.entry_options import add_speaking
from mmrag.recogniser import Recogniser, outline
from mmrag.records import Utterance
from mmrag.retrieval import datastore
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.phrases import WINDOW, description, remember
from mmrag.retrieval.wording import Entry
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.tokenized import Tokenized

NAME = "priya raghavan"
LISTED = (Entry(NAME, "Priya R."), Entry("tomorrow", pronunciations=("too morrow",)))


@pytest.fixture(scope="module")
def small():
    """The package's model, which spells."""
    return Recogniser.load(shipped.find(shipped.DEFAULT))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "clip.wav"
    [planned] = assign_voices([f"please call {NAME} tomorrow"], seed=0)
    soundfile.write(path, render(planned, Synthesizer()).wave, SAMPLE_RATE)
    return path


@pytest.fixture
def names(tmp_path):
    """A file of entries."""

    def write(*listed):
        path = tmp_path / "names.jsonl"
        path.write_text("".join(json.dumps(one.fields()) + "\n" for one in listed))
        return path

    return write


def found(models, *arguments, name=shipped.DEFAULT):
    parser = argparse.ArgumentParser()
    lookup_options.add_lookup(parser)
    add_speaking(parser)
    options = parser.parse_args(list(map(str, arguments)))
    options.models = name
    return lookup_options.found_by(options, models)


@pytest.fixture
def mmrag(small, monkeypatch, capsys):
    """`mmrag transcribe …`, with a model that is loaded once; the status, and what is printed."""
    load = recogniser.load

    def loaded(name, *arguments):
        return small if name == shipped.DEFAULT else load(name, *arguments)

    monkeypatch.setattr(recogniser, "load", loaded)

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["transcribe", "--beams", "1", *map(str, arguments)])
        return stopped.value.code, capsys.readouterr().out

    return run


def test_phrases_are_spotted_and_written_where_they_are_said(mmrag, clip, names):
    status, printed = mmrag("--json", clip)
    plain = json.loads(printed)
    assert status == 0 and NAME not in plain["text"], "nobody would need a list"
    status, printed = mmrag("--json", "--phrases", names(*LISTED, Entry("joe bloggs")), clip)
    told = json.loads(printed)
    assert status == 0 and told["text"] == "please call Priya R. tomorrow"
    sources = [word["source"] and word["source"]["document"] for word in told["words"]]
    assert sources == [None, None, NAME, NAME, "tomorrow"]
    status, printed = mmrag("--json", "--phrases", names(Entry("joe bloggs")), clip)
    assert status == 0 and json.loads(printed) == plain, "a list that nobody says changes nothing"


def test_an_encoder_that_does_not_spell_spots_nothing(mmrag, clip, names):
    asked = ("--phrases", names(*LISTED), "--retrieval", "spotting", "--models", shipped.TINY)
    status, printed = mmrag(*asked, clip)
    told = "mmrag: --retrieval spotting needs an encoder that spells: mmrag:small has one"
    assert (status, printed) == (told, "")


def test_phrases_are_spotted_where_that_is_asked_for_and_where_nobody_says_how(small, names):
    file = names(*LISTED, Entry("joe bloggs", weight=0.0))
    for arguments in ((), ("--retrieval", "spotting")):
        given = found(small, "--phrases", file, *arguments)
        assert given.keys() == {"favoured", "display"}
        assert len(given["favoured"]) == 2
    assert found(small, "--phrases", file, "--retrieval", "none") == {}
    assert found(small, "--phrases", names(Entry("ann", weight=0.0))).keys() == {"display"}


def test_ipa_is_spotted_where_that_is_asked_for_alone(small, names):
    file = names(Entry(NAME, pronunciations=("/pɹiːjə/",)))
    assert found(small, "--phrases", file).keys() == {"display", "source", "attention"}
    given = found(small, "--phrases", file, "--retrieval", "spotting")
    assert given.keys() == {"favoured", "display"}


@pytest.mark.parametrize(
    ("flag", "value"), [("--shortlist", 0), ("--weight", 0.5), ("--voices", "espeak")]
)
def test_what_is_said_for_another_way_makes_that_the_usual(small, names, flag, value):
    given = found(small, "--phrases", names(Entry("ann")), flag, value)
    assert "attention" in given and "favoured" not in given


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("--shortlist", 5, "does not go with --retrieval spotting"),
        ("--shortlist", 0, "does not go with --retrieval spotting"),
        ("--weight", 0.5, "does not go with --retrieval spotting"),
        ("--voices", "espeak", ": goes with --retrieval knn, cross_attention, both"),
        ("--takes", 2, ": goes with --retrieval knn, cross_attention, both"),
    ],
)
def test_what_spotting_does_without_is_refused_by_name(small, names, flag, value, why):
    with pytest.raises(ValueError, match=f"^{flag}.*{why}"):
        found(small, "--phrases", names(*LISTED), "--retrieval", "spotting", flag, value)


def test_the_phrases_of_a_datastore_are_spotted_as_they_were_given(small, tmp_path):
    models = small.lm, small.vocabulary, small.keyed_by
    store = remember(tmp_path, LISTED, *models, say=None).directory
    given = found(small, "--datastore", store, "--retrieval", "spotting")
    assert given.keys() == {"favoured", "display"}
    assert len(given["favoured"]) == len(LISTED)
    heard = spelling_of("call priya raghavan too morrow", small.encoder.alphabet)
    assert {one.text: one for one in given["favoured"].spotted(heard)} == {
        one.text: one for one in LISTED
    }
    with pytest.raises(ValueError, match=r"^--weight does not go with --retrieval spotting"):
        found(small, "--datastore", store, "--retrieval", "spotting", "--weight", 0.5)


def test_a_datastore_of_sentences_is_not_spotted(small, tmp_path):
    said = Tokenized(Utterance("u0", "call priya tomorrow", document="call-17"), None)
    made = read_entries(small.lm, small.vocabulary, [said], WINDOW, "all")
    datastore.create(tmp_path / "calls", description(small.lm, small.keyed_by, None))
    datastore.write_segment(tmp_path / "calls", "only", made)
    datastore.publish(tmp_path / "calls", ["only"])
    with pytest.raises(ValueError, match=r"calls.*: its documents are no phrases"):
        found(small, "--datastore", tmp_path / "calls", "--retrieval", "spotting")


def test_models_say_before_they_are_loaded_whether_they_spell(small):
    assert small.spells and outline(shipped.find(shipped.DEFAULT)).spells
    assert not outline(shipped.find(shipped.TINY)).spells
    assert not Recogniser.load(shipped.find(shipped.TINY)).spells
