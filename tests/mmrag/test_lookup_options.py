"""What the command line says of phrases and datastores is what `transcribe` is given."""

import argparse
import json

import pytest
import soundfile
from plain_ctc import spelling_of

from mmrag import cli, contents, lookup_options, recogniser, shipped
from mmrag.corpora.synthetic import assign_voices, render
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.entry_options import add_speaking
from mmrag.recogniser import Recogniser, outline
from mmrag.records import Utterance, Word
from mmrag.retrieval import datastore
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.index import save_index
from mmrag.retrieval.phrases import WINDOW, description, remember
from mmrag.retrieval.wording import Entry
from mmrag.speech.audio import SAMPLE_RATE
from mmrag.speech.tokenized import Tokenized

NAME = "priya raghavan"
OTHER = "imogen varga"
SENTENCE = f"please call {NAME} tomorrow"
TOLD = f"i spoke to {NAME} about the budget"
PLAIN = "do we need to leave on friday"
LISTED = (Entry(NAME, "Priya R."), Entry("tomorrow", pronunciations=("too morrow",)))


@pytest.fixture(scope="module")
def small():
    """The package's model, which spells."""
    return Recogniser.load(shipped.find(shipped.DEFAULT))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "clip.wav"
    [planned] = assign_voices([SENTENCE], seed=0)
    soundfile.write(path, render(planned, Synthesizer()).wave, SAMPLE_RATE)
    return path


@pytest.fixture(scope="module")
def calls(small, tmp_path_factory):
    """A datastore of a call about NAME, and of one about nobody."""
    directory = tmp_path_factory.mktemp("datastores") / "calls"
    said = [
        Tokenized(Utterance(f"u{number}", text, document=f"call-{number}"), None)
        for number, text in ((16, PLAIN), (17, TOLD))
    ]
    datastore.create(directory, description(small.lm, small.keyed_by, None))
    save_index(directory)
    made = read_entries(small.lm, small.vocabulary, said, WINDOW, "all")
    datastore.write_segment(directory, "only", made)
    datastore.publish(directory, ["only"])
    return directory


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):
    """A datastore without unusual words."""
    directory = tmp_path_factory.mktemp("datastores") / "plain"
    contents.create(directory, [PLAIN], small, spoken=False)
    return directory


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
    ("flag", "value", "way"),
    [
        ("--shortlist", 0, "attention"),
        ("--weight", 0.5, "retrieval"),
        ("--voices", "espeak", "attention"),
    ],
)
def test_what_is_said_for_another_way_makes_that_the_usual(small, names, flag, value, way):
    given = found(small, "--phrases", names(Entry("ann")), flag, value)
    assert given.keys() & {"attention", "retrieval", "favoured"} == {way}


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


@pytest.mark.parametrize(
    ("flag", "value", "mode"),
    [
        ("--weight", 0.5, "none"),
        ("--weight", 0.5, "cross_attention"),
        ("--shortlist", 5, "none"),
    ],
)
@pytest.mark.parametrize("source", ["--phrases", "--datastore"])
def test_what_a_way_has_no_use_for_is_refused_by_name(small, names, flag, value, mode, source):
    with pytest.raises(ValueError, match=f"^{flag} does not go with --retrieval {mode}$"):
        found(small, source, names(*LISTED), "--retrieval", mode, flag, value)


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


def heard_in(small, text):
    return spelling_of(text, small.encoder.alphabet)


def test_unusual_words_of_a_datastores_sentences_are_spotted(small, calls):
    for arguments in ((), ("--retrieval", "spotting")):
        given = found(small, "--datastore", calls, *arguments)
        assert given.keys() == {"favoured", "display"}
        spotted = given["favoured"].spotted(heard_in(small, SENTENCE))
        assert Entry(NAME) in spotted
        told = given["favoured"].evidence(
            [Word(one, 0.5, 0.5) for one in SENTENCE.split()], heard_in(small, SENTENCE)
        )
        sources = [one.source and (one.source.document, one.source.text) for one in told]
        assert sources == [None, None, *[("call-17", TOLD)] * 2, None]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (("--retrieval", "knn"), {"retrieval"}),
        (("--retrieval", "cross_attention"), {"attention"}),
        (("--retrieval", "both"), {"retrieval", "attention"}),
        (("--weight", 0.5), {"retrieval"}),
    ],
)
def test_a_datastore_of_sentences_is_searched_where_that_is_asked_for(
    small, calls, arguments, given
):
    asked = found(small, "--datastore", calls, *arguments)
    assert asked.keys() == {"source", "display", *given}
    assert found(small, "--datastore", calls, "--retrieval", "none") == {}


def test_a_datastore_without_unusual_words_is_searched_and_not_spotted(small, plain):
    assert found(small, "--datastore", plain).keys() == {"source", "retrieval", "display"}
    why = r"^--retrieval spotting: .*plain has neither phrases nor unusual words to spot"
    with pytest.raises(ValueError, match=why):
        found(small, "--datastore", plain, "--retrieval", "spotting")


def test_of_an_empty_datastore_nothing_is_spotted(small, tmp_path, names):
    contents.create(tmp_path / "empty", [], small, spoken=False)
    asked = ("--datastore", tmp_path / "empty", "--retrieval", "spotting")
    assert len(found(small, *asked)["favoured"]) == 0
    assert len(found(small, *asked, "--phrases", names(*LISTED))["favoured"]) == 2


def test_what_a_datastore_has_is_written_with_the_document_that_has_it(mmrag, clip, calls):
    status, printed = mmrag("--json", "--datastore", calls, clip)
    told = json.loads(printed)
    assert status == 0 and told["text"] == SENTENCE
    sources = [word["source"] and word["source"]["document"] for word in told["words"]]
    assert sources == [None, None, "call-17", "call-17", None]


def test_a_datastore_and_phrases_are_spotted_together_and_the_wording_of_the_phrases_counts(
    small, calls, names
):
    file = names(Entry(NAME, "Priya R."), Entry(OTHER, "Imogen"))
    given = found(small, "--datastore", calls, "--phrases", file)
    assert given.keys() == {"favoured", "display"}
    said = f"call {NAME} and {OTHER}"
    spotted = given["favoured"].spotted(heard_in(small, said))
    assert {Entry(NAME, "Priya R."), Entry(OTHER, "Imogen")} <= set(spotted)
    assert given["display"].of_text(said) == "call Priya R. and Imogen"
    told = given["favoured"].evidence(
        [Word(one, 0.5, 0.5) for one in said.split()], heard_in(small, said)
    )
    sources = [one.source and one.source.document for one in told]
    assert sources == [None, "call-17", "call-17", None, OTHER, OTHER]
    silent = found(small, "--datastore", calls, "--phrases", names(Entry(NAME, weight=0.0)))
    assert len(silent["favoured"]) == len(found(small, "--datastore", calls)["favoured"]) - 1
    assert found(small, "--datastore", calls, "--phrases", file, "--retrieval", "none") == {}


def test_phrases_of_a_datastore_are_written_as_it_says_unless_the_file_does(small, tmp_path, names):
    models = small.lm, small.vocabulary, small.keyed_by
    store = remember(tmp_path, (*LISTED, Entry("ann", "Ann L.")), *models, say=None).directory
    file = names(Entry("ann", "Ann Lee"), Entry("tomorrow", "TOM"), Entry(OTHER))
    given = found(small, "--datastore", store, "--phrases", file)
    assert len(given["favoured"]) == 4
    assert given["display"].of_text(f"{NAME} ann tomorrow") == "Priya R. Ann Lee TOM"
    assert given["favoured"].spotted(heard_in(small, "tomorrow")) == [Entry("tomorrow", "TOM")]


def test_a_datastore_votes_beside_phrases_that_are_spotted(small, mmrag, calls, plain, clip, names):
    file = names(Entry(OTHER), Entry(NAME, "Priya R."))
    for asked in (("--datastore", calls, "--retrieval", "knn"), ("--datastore", plain)):
        given = found(small, *asked, "--phrases", file)
        assert given.keys() == {"source", "retrieval", "favoured", "display"}
        assert len(given["favoured"]) == 2
        status, printed = mmrag("--json", *asked, "--phrases", file, clip)
        told = json.loads(printed)
        assert status == 0 and told["text"] == "please call Priya R. tomorrow"
        assert told["words"][2]["source"]["document"] == NAME


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("--shortlist", 5, "^--datastore and --phrases go together .* without --shortlist and"),
        ("--weight", 0.5, "^--datastore and --phrases go together .* without --shortlist and"),
        ("--voices", "espeak", "^--voices: goes with --phrases alone"),
        ("--takes", 2, "^--takes: goes with --phrases alone"),
    ],
)
@pytest.mark.parametrize("mode", [(), ("--retrieval", "knn")])
def test_what_does_not_go_with_a_datastore_and_phrases_is_refused_by_name(
    small, calls, names, flag, value, why, mode
):
    with pytest.raises(ValueError, match=why):
        found(small, "--datastore", calls, "--phrases", names(*LISTED), *mode, flag, value)


def test_beside_a_datastore_no_phrase_is_in_ipa_and_somebody_spells(small, calls, names):
    asked = ("--datastore", calls, "--phrases")
    with pytest.raises(ValueError, match=r"go together .* none of them in IPA"):
        found(small, *asked, names(Entry(NAME, pronunciations=("/pɹiːjə/",))))
    tiny = Recogniser.load(shipped.find(shipped.TINY))
    with pytest.raises(ValueError, match=r"go together .* an encoder that spells \(mmrag:small\)"):
        found(tiny, *asked, names(*LISTED), name=shipped.TINY)


def test_models_say_before_they_are_loaded_whether_they_spell(small):
    assert small.spells and outline(shipped.find(shipped.DEFAULT)).spells
    assert not outline(shipped.find(shipped.TINY)).spells
    assert not Recogniser.load(shipped.find(shipped.TINY)).spells
