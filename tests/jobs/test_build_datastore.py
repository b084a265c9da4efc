"""What a datastore holds: of every text all tokens, or those of its entities alone."""

import json

import numpy as np
import pytest

from jobs import build_datastore, stage
from jobs.build_datastore import Texts
from mmrag import artifact
from mmrag.artifact import ArtifactError
from mmrag.config import ConfigError, Experiment
from mmrag.corpora import manifest
from mmrag.model import pretrained
from mmrag.model.states import read_states
from mmrag.model.vocabulary import EOS, Vocabulary
from mmrag.records import Rejection, Utterance
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


def utterances_of(store: Datastore) -> list[str]:
    """The utterance of each entry."""
    return [utterance for _, utterance in store.origins(np.arange(store.entries))]


def test_each_token_of_each_text_is_an_entry_and_so_is_the_end(workspace, stores, read):
    _, vocabulary = pretrained.load(workspace.path / "lm")
    expected = [t for one in read for t in (*vocabulary.encode(one.utterance.text), EOS)]
    names = [one.utterance.id for one in read for _ in (*vocabulary.encode(one.utterance.text), 0)]
    for store in stores.values():
        assert store.tokens.tolist() == expected
        assert utterances_of(store) == names


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


@pytest.fixture
def rows(workspace):
    """`rows(source, …)`: what is read of a file, with these changes of the settings."""
    vocabulary = Vocabulary.load(workspace.path / "lm")

    def read(source, **changes) -> list[Tokenized | Rejection]:
        settings = with_datastore(workspace.experiment, **changes).datastore
        return list(Texts(artifact.outside(source), settings, 0, vocabulary).rows())

    return read


def test_lines_are_read_as_they_are_spoken_and_what_cannot_be_is_rejected(rows, tmp_path):
    names = tmp_path / "names.txt"
    names.write_bytes("\ufeffRenée Dubois\r\n日本語\r\n\n---\r\nA1C\r\n".encode())
    renee, japanese, dashes, a1c = rows(names)
    assert renee.utterance == Utterance("names.txt:1", text="Renee Dubois", document="names.txt:1")
    assert a1c.utterance == Utterance("names.txt:5", text="A one C", document="names.txt:5")
    letters = "this model has no letters for '日', '本', '語'"
    assert japanese == Rejection("names.txt:2", f"'日本語' cannot be spoken: {letters}")
    assert dashes == Rejection("names.txt:4", "nothing to listen for in '---'")
    assert rows(names, utterances=2) == [renee, japanese], "no further than is wanted"


@pytest.mark.parametrize("name", ["phrases.json", "phrases.txt", "phrases.jsonl"])
def test_a_manifest_is_known_by_what_it_holds(rows, tmp_path, name):
    said = list(utterances(PHRASES[:1]))
    manifest.write(tmp_path / name, said)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf\n" + (tmp_path / name).read_bytes())
    assert [one.utterance for one in rows(tmp_path / name)] == said


def test_of_a_manifest_one_domain_is_read(rows, tmp_path):
    said = [Utterance(id=name, text=f"call {name}", domain=name) for name in ("home", "office")]
    manifest.write(tmp_path / "names.jsonl", said)
    [office] = rows(tmp_path / "names.jsonl", domain="office")
    assert office.utterance.id == "office"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "call bhavi', "not JSON"),
        ('{"entities": ["ruto"]}', "neither audio_filepath nor text"),
        ('{"text": "call ruto", "utterance": "line-1"}', "also on line 1"),
    ],
)
def test_a_damaged_line_of_a_manifest_is_named(rows, tmp_path, line, reason):
    phrases = tmp_path / "phrases.jsonl"
    phrases.write_text(json.dumps({"text": "call bhavika ruto"}) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"phrases\.jsonl:3: .*{reason}"):
        rows(phrases)


def test_of_a_source_with_a_damaged_line_nothing_is_built(borrow, tmp_path):
    phrases = tmp_path / "phrases.jsonl"
    phrases.write_text(json.dumps({"text": "call bhavika ruto"}) + "\n{\n")
    experiment = with_datastore(
        borrow("codebook", "lm"), source=str(phrases), audio="none", entries="entities"
    )
    with pytest.raises(ValueError, match=r"phrases\.jsonl:2: not JSON"):
        build_datastore.run(experiment)
    assert not (experiment.workspace / "datastores" / "multimodal").exists()


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
        assert set(store.origins(entries)) == {(entity, one.id)}
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
            assert set(store.document_names(store.documents[entries])) == {entity}
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
    assert set(store.document_names(store.documents)) == {PHRASES[0]}


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


def test_a_source_that_is_not_there_is_named(borrow, tmp_path):
    experiment = borrow("codebook", "lm")
    for audio in ("paired", "none"):
        missing = with_datastore(experiment, source=str(tmp_path / "no.txt"), audio=audio)
        with pytest.raises(ArtifactError, match=r"no such file or directory: .*no\.txt"):
            build_datastore.run(missing)


@pytest.mark.parametrize("audio", ["none", "spoken"])
def test_of_lines_those_that_can_be_used_are_and_the_others_named(borrow, tmp_path, audio):
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
    rejected = map(json.loads, (made.path / "rejected.jsonl").open(encoding="utf-8"))
    assert {one["source"]: one["reason"] for one in rejected} == left_out
    for source, reason in left_out.items():
        assert f"left out: {source}: {reason}" in said.get()
    assert made.summary["rejected"] == len(left_out)
    assert made.summary["utterances"] == 3
    store = Datastore.open(made.path)
    lm, vocabulary = pretrained.load(experiment.workspace / "lm")
    kept = {1: "call bhavika ruto", 5: "123 !!", 6: "١٢"}
    texts = [vocabulary.encode(text) for text in kept.values()]  # without a byte-order mark
    assert store.tokens.tolist() == [token for text in texts for token in (*text, EOS)]
    names = [
        f"names.txt:{number}"
        for number, text in zip(kept, texts, strict=True)
        for _ in (*text, EOS)
    ]
    assert utterances_of(store) == names
    unheard, *_ = read_states(lm, vocabulary, texts, [None] * len(texts), logits=False)
    same = np.allclose(store.keys(0, store.entries), unheard.numpy(), atol=5e-3)
    assert same == (audio == "none")


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


def test_a_json_array_is_no_text(borrow, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('["call bhavika ruto"]')
    experiment = with_datastore(borrow("codebook", "lm"), source=str(names), audio="none")
    with pytest.raises(ConfigError, match=r"names\.json is one JSON array: it takes lines of text"):
        build_datastore.run(experiment)
