"""What a datastore holds: of every text all tokens, or those of its entities alone."""

import json

import numpy as np
import pytest

from jobs import build_datastore, stage
from mmrag import artifact
from mmrag.artifact import ArtifactError
from mmrag.config import ConfigError, Experiment
from mmrag.corpora import manifest
from mmrag.model import pretrained
from mmrag.model.states import read_states
from mmrag.model.vocabulary import EOS
from mmrag.records import Utterance
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import saved_shards
from mmrag.retrieval.phrases import Phrases, utterances
from mmrag.retrieval.segment import DatastoreError
from mmrag.speech import tokenized
from mmrag.speech.tokenized import Tokenized

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def stores(workspace) -> dict[str, Datastore]:
    return {
        name: Datastore.open(workspace.path / "datastores" / name)
        for name in ("text", "multimodal")
    }


@pytest.fixture(scope="module")
def read(workspace) -> list[Tokenized]:
    return list(tokenized.read(workspace.path / "tokens" / "datastore"))


def with_datastore(experiment: Experiment, **changes) -> Experiment:
    settings = experiment.datastore.model_copy(update=changes)
    return experiment.model_copy(update={"datastore": settings})


def test_each_token_of_each_text_is_an_entry_and_so_is_the_end(workspace, stores, read):
    _, vocabulary = pretrained.load(workspace.path / "lm")
    expected = [t for one in read for t in (*vocabulary.encode(one.utterance.text), EOS)]
    names = [one.utterance.id for one in read for _ in (*vocabulary.encode(one.utterance.text), 0)]
    for store in stores.values():
        assert store.tokens.tolist() == expected
        assert [store.utterance_name(entry) for entry in range(store.entries)] == names


@pytest.mark.parametrize(("name", "heard"), [("text", False), ("multimodal", True)])
def test_keys_made_in_parts_and_batches_equal_those_of_one_utterance(
    workspace, stores, read, name, heard
):
    lm, vocabulary = pretrained.load(workspace.path / "lm")
    assert len(stores[name].segments) > 1
    start = 0
    for one in read:
        text = vocabulary.encode(one.utterance.text)
        speech = vocabulary.encode_units(one.units) if heard else None
        keys, *_ = read_states(lm, vocabulary, [text], [speech], logits=False)
        stored = stores[name].keys(start, start + len(keys))
        assert np.allclose(stored, keys.numpy(), atol=5e-3), one.utterance.id
        start += len(keys)
    assert start == stores[name].entries


def test_keys_over_speech_are_not_those_over_text(stores):
    keys = [store.keys(0, store.entries) for store in stores.values()]
    assert not np.allclose(*keys, atol=5e-2)


def test_a_datastore_says_what_keyed_it_and_how_it_is_sharded(workspace, stores):
    lm = artifact.load(workspace.path / "lm", "lm")
    codebook = artifact.load(workspace.path / "codebook", "codebook")
    for name, store in stores.items():
        identity = {"lm": lm.fingerprint, "codebook": codebook.fingerprint}
        assert store.description.identity == identity
        store.require(identity)
        assert store.description.audio == {"text": "none", "multimodal": "paired"}[name]
        shards = saved_shards(store.directory)
        assert len(shards) == workspace.experiment.datastore.index.shards
        made = artifact.load(store.directory, "datastore")
        assert made.summary["entries"] == store.entries
        assert made.summary["shards"] == len(shards)


def test_a_file_of_lines_becomes_a_datastore_keyed_by_synthetic_speech(borrow, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("call bhavika ruto\n\nport darnby is closed\n")
    experiment = with_datastore(
        borrow("hubert", "codebook", "lm"), name="names", source=str(names), audio="spoken"
    )
    made = build_datastore.run(experiment)
    assert made.summary["utterances"] == 2
    store = Datastore.open(made.path)
    lm, vocabulary = pretrained.load(experiment.workspace / "lm")
    texts = [vocabulary.encode(line) for line in ("call bhavika ruto", "port darnby is closed")]
    assert store.tokens.tolist() == [*texts[0], EOS, *texts[1], EOS]
    unheard, *_ = read_states(lm, vocabulary, texts, [None, None], logits=False)
    assert not np.allclose(store.keys(0, store.entries), unheard.numpy(), atol=5e-2)
    assert store.utterance_name(store.entries - 1) == "names.txt:3"


def test_a_synthesizer_whose_files_are_not_there_is_named(borrow, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("call bhavika ruto\n")
    experiment = with_datastore(
        borrow("hubert", "codebook", "lm"),
        source=str(names),
        audio="spoken",
        voices={"espeak": 1.0, "kokoro": 1.0},
        kokoro=str(tmp_path),
    )
    with pytest.raises((OSError, ImportError), match=r"jobs\.fetch_voices|pip install"):
        build_datastore.run(experiment)


PHRASES = ("bhavika ruto", "port darnby", "ruto")


@pytest.mark.parametrize("audio", ["none", "spoken"])
def test_of_a_manifest_entities_alone_become_entries_each_a_document(borrow, tmp_path, audio):
    said = [
        *utterances(PHRASES),
        Utterance(id="two", text="bhavika ruto met ruto", entities=("ruto", "bhavika ruto")),
        Utterance(id="none", text="the ferry was late"),
        Utterance(id="unsaid", text="nobody was there", entities=("port darnby",)),
    ]
    manifest.write(tmp_path / "phrases.jsonl", said)
    copied = borrow("hubert", "codebook", "lm")
    experiment = with_datastore(
        copied,
        name="phrases",
        source=str(tmp_path / "phrases.jsonl"),
        audio=audio,
        entries="entities",
        part_utterances=4,
    )
    made = build_datastore.run(experiment)
    assert made.summary["utterances"] == len(said)
    store = Datastore.open(made.path)
    assert len(store.segments) == 3
    lm, vocabulary = pretrained.load(copied.workspace / "lm")
    stretches = [
        (one, entity, place)
        for one in said
        for entity in one.entities
        if (place := vocabulary.find(entity, vocabulary.encode(one.text)))
    ]
    # By hand: one stretch an entity, but for the one that its sentence does not speak of.
    assert len(stretches) == 3 * len(PHRASES) + 2
    start = 0
    for one, entity, place in stretches:
        text = vocabulary.encode(one.text)
        entries = np.arange(start, start + place.stop - place.start)
        assert vocabulary.decode(store.tokens[entries]) == entity
        assert store.tokens[entries].tolist() == text[place]
        assert store.positions[entries].tolist() == list(range(place.start, place.stop))
        assert {store.utterance_name(entry) for entry in entries} == {one.id}
        assert {store.document_name(store.documents[entry]) for entry in entries} == {entity}
        unheard, *_ = read_states(lm, vocabulary, [text], [None], logits=False)
        same = np.allclose(store.keys_of(entries), unheard.numpy()[place], atol=5e-3)
        assert same == (audio == "none"), entity
        start = entries[-1] + 1
    assert start == store.entries == made.summary["entries"]


def test_a_window_around_an_entity_holds_the_entity_and_nothing_else(adapted):
    store = Datastore.open(adapted.path / "datastores" / "phrases")
    _, vocabulary = pretrained.load(adapted.path / "lm")
    phrases = Phrases(store)
    assert len(phrases.names) > 1
    for name in phrases.names:
        for window in store.windows(np.array(phrases.mentions(name))):
            assert vocabulary.decode(window[window > 0]) == name
        found = store.passages(np.array(phrases.mentions(name)))
        for tokens_, present in zip(found.tokens, found.present, strict=True):
            assert vocabulary.decode(tokens_[present]) == name


def test_of_spoken_utterances_every_entity_is_a_document_keyed_by_its_speech(adapted):
    store = Datastore.open(adapted.path / "datastores" / "phrases")
    lm, vocabulary = pretrained.load(adapted.path / "lm")
    start = 0
    for one in tokenized.read(adapted.path / "tokens" / "datastore"):
        text = vocabulary.encode(one.utterance.text)
        speech = vocabulary.encode_units(one.units)
        keys, *_ = read_states(lm, vocabulary, [text], [speech], logits=False)
        assert one.utterance.entities
        for entity in one.utterance.entities:
            place = vocabulary.find(entity, text)
            entries = np.arange(start, start := start + place.stop - place.start)
            assert np.allclose(store.keys_of(entries), keys.numpy()[place], atol=5e-3)
            assert {store.document_name(store.documents[entry]) for entry in entries} == {entity}
    assert start == store.entries


def test_of_a_manifest_without_the_setting_every_token_is_an_entry(borrow, tmp_path):
    said = list(utterances(PHRASES[:1]))
    manifest.write(tmp_path / "phrases.jsonl", said)
    experiment = with_datastore(
        borrow("codebook", "lm"), source=str(tmp_path / "phrases.jsonl"), audio="none"
    )
    store = Datastore.open(build_datastore.run(experiment).path)
    _, vocabulary = pretrained.load(experiment.workspace / "lm")
    assert store.tokens.tolist() == [t for one in said for t in (*vocabulary.encode(one.text), EOS)]
    assert {store.document_name(document) for document in store.documents} == {PHRASES[0]}


def test_lines_that_cannot_be_spoken_are_reported_and_the_others_read(borrow, tmp_path):
    names = tmp_path / "names.txt"
    names.write_bytes("\ufeffRenée Dubois\r\n日本語\r\n---\r\nA1C\r\n".encode())
    experiment = with_datastore(
        borrow("codebook", "lm"), name="names", source=str(names), audio="none"
    )
    made = build_datastore.run(experiment)
    assert (made.summary["utterances"], made.summary["rejected"]) == (2, 2)
    store = Datastore.open(made.path)
    _, vocabulary = pretrained.load(experiment.workspace / "lm")
    texts = [vocabulary.encode(line) for line in ("Renée Dubois", "A1C")]
    assert store.tokens.tolist() == [*texts[0], EOS, *texts[1], EOS]
    assert [vocabulary.decode(text) for text in texts] == ["renee dubois", "a one c"]
    lines = (made.path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    assert [one["source"] for one in told] == ["names.txt:2", "names.txt:3"]
    assert "no letters for '日', '本', '語'" in told[0]["reason"]
    assert "nothing to listen for" in told[1]["reason"]


def test_entities_are_found_as_they_are_spoken_and_named_as_written(borrow, tmp_path):
    said = Utterance(id="one", text="Renée Dubois took 2 tests", entities=("Renée Dubois", "2"))
    manifest.write(tmp_path / "phrases.jsonl", [said])
    experiment = with_datastore(
        borrow("codebook", "lm"),
        source=str(tmp_path / "phrases.jsonl"),
        audio="none",
        entries="entities",
    )
    store = Datastore.open(build_datastore.run(experiment).path)
    _, vocabulary = pretrained.load(experiment.workspace / "lm")
    assert Phrases(store).names == ["Renée Dubois", "2"]
    assert vocabulary.decode(store.tokens) == "renee dubois two"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "call bhavi', "not JSON"),
        ('{"entities": ["ruto"]}', "neither audio_filepath nor text"),
        ('{"text": "call ruto", "utterance": "line-1"}', "also on line 1"),
    ],
)
def test_a_damaged_line_of_a_manifest_is_named(borrow, tmp_path, line, reason):
    phrases = tmp_path / "phrases.jsonl"
    phrases.write_text(json.dumps({"text": "call bhavika ruto"}) + "\n\n" + line + "\n")
    experiment = with_datastore(
        borrow("codebook", "lm"), source=str(phrases), audio="none", entries="entities"
    )
    with pytest.raises(ValueError, match=rf"phrases\.jsonl:3: .*{reason}"):
        build_datastore.run(experiment)
    assert not (experiment.workspace / "datastores" / "multimodal").exists()


@pytest.mark.parametrize("name", ["names.txt", "names.jsonl"])
def test_text_has_no_speech_to_pair_with(borrow, tmp_path, name):
    names = tmp_path / name
    names.write_text(json.dumps({"text": "call bhavika ruto"}) + "\n")
    experiment = with_datastore(borrow("codebook", "lm"), source=str(names), audio="paired")
    with pytest.raises(ConfigError, match=rf"{name} is text: datastore\.audio must be"):
        build_datastore.run(experiment)


def test_a_source_without_an_utterance_is_an_error_that_says_what_was_looked_for(borrow, tmp_path):
    experiment = borrow("tokens", "lm", "codebook")
    nothing = with_datastore(experiment, name="mine", domain="nobody's")
    with pytest.raises(DatastoreError, match=r"has no utterance to build .* domain nobody's"):
        build_datastore.run(nothing)
    (tmp_path / "empty.txt").write_text("\n\n")
    empty = with_datastore(experiment, name="e", source=str(tmp_path / "empty.txt"), audio="none")
    with pytest.raises(DatastoreError, match=r"empty\.txt: holds no text"):
        build_datastore.run(empty)
    mistyped = with_datastore(experiment, name="s", splits=("datastore", "trian"))
    with pytest.raises(ConfigError, match=r"datastore\.splits: .*tokens has no trian; it has "):
        build_datastore.run(mistyped)


def test_of_a_manifest_one_domain_is_read(borrow, tmp_path):
    source = tmp_path / "names.jsonl"
    source.write_text(
        "".join(
            json.dumps({"utterance": domain, "text": f"call {domain}", "domain": domain}) + "\n"
            for domain in ("home", "office")
        )
    )
    experiment = with_datastore(
        borrow("codebook", "lm"), source=str(source), audio="none", domain="office"
    )
    store = Datastore.open(build_datastore.run(experiment).path)
    assert {store.utterance_name(entry) for entry in range(store.entries)} == {"office"}


def test_a_source_that_is_not_there_is_named(borrow, tmp_path):
    experiment = borrow("codebook", "lm")
    for audio in ("paired", "none"):
        missing = with_datastore(experiment, source=str(tmp_path / "no.txt"), audio=audio)
        with pytest.raises(ArtifactError, match=r"no such file or directory: .*no\.txt"):
            build_datastore.run(missing)


def rejected(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "rejected.jsonl").open()]


@pytest.mark.parametrize("audio", ["none", "spoken"])
def test_a_line_that_cannot_be_used_is_named_and_the_others_are_used(borrow, tmp_path, audio):
    names = tmp_path / "names.txt"
    names.write_bytes(
        b"\xef\xbb\xbfcall bhavika ruto\r\n----\r\n" + "\n日本語\n123 !!\n١٢\n".encode()
    )
    experiment = with_datastore(
        borrow("hubert", "codebook", "lm"),
        name="names",
        source=str(names),
        audio=audio,
        part_utterances=1,
    )
    with stage.console.capture() as said:
        made = build_datastore.run(experiment)
    left_out = {
        "names.txt:2": "nothing to listen for in '----'",
        "names.txt:4": "'日本語' cannot be spoken: this model has no letters for '日', '本', '語'",
    }
    assert {one["source"]: one["reason"] for one in rejected(made.path)} == left_out
    for source, reason in left_out.items():
        assert f"left out: {source}: {reason}" in said.get()
    assert made.summary["rejected"] == len(left_out)
    assert made.summary["utterances"] == 3
    store = Datastore.open(made.path)
    kept = [f"names.txt:{number}" for number in (1, 5, 6)]
    assert list(dict.fromkeys(map(store.utterance_name, range(store.entries)))) == kept
    _, vocabulary = pretrained.load(experiment.workspace / "lm")
    first = vocabulary.encode("call bhavika ruto")
    assert store.tokens[: len(first)].tolist() == first, "a byte-order mark is no part of a line"


def test_a_source_of_which_nothing_can_be_used_fails_and_says_why(borrow, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("----\n日本語\n", encoding="utf-8")
    experiment = with_datastore(
        borrow("hubert", "codebook", "lm"), name="names", source=str(names), audio="spoken"
    )
    why = r"names\.txt:1: nothing to listen for in '----'; names\.txt:2: '日本語' cannot be spoken"
    with pytest.raises(ValueError, match=f"nothing of {names} can be used: {why}"):
        build_datastore.run(experiment)
    assert not (experiment.workspace / "datastores" / "names").exists()


@pytest.mark.parametrize("name", ["phrases.json", "phrases.txt", "phrases.jsonl"])
def test_a_manifest_is_known_by_what_it_holds(borrow, tmp_path, name):
    said = list(utterances(PHRASES[:1]))
    manifest.write(tmp_path / name, said)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf\n" + (tmp_path / name).read_bytes())
    experiment = with_datastore(
        borrow("codebook", "lm"), source=str(tmp_path / name), audio="none", entries="entities"
    )
    store = Datastore.open(build_datastore.run(experiment).path)
    assert {store.document_name(document) for document in store.documents} == {PHRASES[0]}


def test_a_json_array_is_no_text(borrow, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('["call bhavika ruto"]')
    experiment = with_datastore(borrow("codebook", "lm"), source=str(names), audio="none")
    with pytest.raises(ConfigError, match=r"names\.json is one JSON array: it takes lines of text"):
        build_datastore.run(experiment)
