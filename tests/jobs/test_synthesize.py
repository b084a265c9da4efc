import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cluster.parts import Part
from cluster.rejections import Unread
from jobs import synthesize
from mmrag import artifact
from mmrag.artifact import ArtifactError
from mmrag.config import Recordings, Sentences
from mmrag.corpora import drawn, manifest, recordings, synthetic
from mmrag.corpora.recordings import Rerecorded
from mmrag.corpora.synthetic import SPLITS, Planned
from mmrag.records import Utterance

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def corpus(workspace) -> dict[str, list[Utterance]]:
    return {
        split: list(manifest.read(workspace.path / "corpus" / f"{split}.jsonl")) for split in SPLITS
    }


def test_every_split_is_as_large_as_the_experiment_says(corpus, workspace):
    wanted = workspace.experiment.synthesize
    for split in ("lm", "adapter", "dev", "test", "text"):
        assert len(corpus[split]) == getattr(wanted, split), split
    assert len(corpus["datastore"]) > 0
    ids = [one.id for utterances in corpus.values() for one in utterances]
    assert len(set(ids)) == len(ids)


def test_every_spoken_sentence_has_a_file_of_the_stated_length(corpus):
    for split, utterances in corpus.items():
        for one in utterances:
            if split == "text":
                assert one.audio is None
                continue
            header = soundfile.info(str(one.audio))
            assert (header.samplerate, header.channels, header.format) == (16_000, 1, "FLAC")
            assert header.frames / header.samplerate == pytest.approx(one.duration)
            assert one.speaker and one.words[-1].end <= one.duration + 0.01


def test_the_datastore_speaks_of_every_entity_of_the_test_split(corpus):
    known = {entity for one in corpus["datastore"] for entity in one.entities}
    asked = {entity for one in corpus["test"] for entity in one.entities}
    assert asked and asked <= known


class Alive:
    """Counts the instances of a class that there are at once."""

    now = most = made = 0

    def counting(self, kind: type) -> type:
        seen = self

        class Counted(kind):
            def __init__(self, *values, **named) -> None:
                super().__init__(*values, **named)
                seen.made += 1
                seen.now += 1
                seen.most = max(seen.most, seen.now)

            def __del__(self) -> None:
                seen.now -= 1

        return Counted


def test_a_plan_never_holds_more_utterances_than_the_part_that_is_filled_and_the_one_before(
    experiment, tmp_path, monkeypatch
):
    rows = [{"audio_filepath": f"{n}.wav", "text": "we call it bear"} for n in range(150)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "people.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    changes = {"lm": 200, "text": 200, "test": 6}
    changes["recordings"] = Recordings(lm=str(tmp_path / "people.jsonl"), copies=2)
    settings = experiment.synthesize.model_copy(update=changes)
    whole = [one for one in synthesize.Plan(settings, 7)() if isinstance(one, Part)]
    utterances, sentences = Alive(), Alive()
    monkeypatch.setattr(synthetic, "Planned", utterances.counting(Planned))
    monkeypatch.setattr(recordings, "Rerecorded", utterances.counting(Rerecorded))
    monkeypatch.setattr(synthetic, "Sentence", sentences.counting(drawn.Sentence))
    monkeypatch.setattr(drawn, "Sentence", synthetic.Sentence)
    names = []
    for one in synthesize.Plan(settings, 7)():
        if isinstance(one, Unread):
            assert (one.of, len(one.rejected)) == ("files", 1) and names == []
        else:
            names.append((one.name, len(one.work)))
    assert names == [(one.name, len(one.work)) for one in whole]
    assert utterances.made >= sum(size for _, size in names) > 600
    assert utterances.most <= 2 * synthesize.PART_UTTERANCES + 1
    assert sentences.made > 2 * 400 and sentences.most <= 5


def test_a_changed_plan_is_refused_and_the_difference_named(workspace):
    settings = workspace.experiment.synthesize.model_copy(update={"test": 7})
    changed = workspace.experiment.model_copy(update={"synthesize": settings})
    with pytest.raises(ArtifactError, match="from something else: test was 6 and is now 7"):
        synthesize.run(changed)


@pytest.fixture(scope="module")
def mixed(ray_cluster, experiment, tmp_path_factory):
    """A corpus with real sentences and recordings of a person; one recording is broken."""
    path = tmp_path_factory.mktemp("mixed")
    lines = [f"where is my {thing} {when}" for thing in THINGS for when in ("now", "today")]
    (path / "requests.txt").write_text("\n".join(lines) + "\n--\n")
    people = path / "people"
    people.mkdir()
    tone = 0.2 * np.sin(np.arange(8000) / 9)
    soundfile.write(people / "one.wav", tone, 16_000)
    (people / "broken.wav").write_bytes(b"RIFF")
    rows = [
        {"audio_filepath": f"{name}.wav", "text": "we call it bear", "speaker": "0001"}
        for name in ("one", "broken")
    ]
    manifest_lines = [json.dumps(row) for row in rows] + ["{"]
    (people / "train.jsonl").write_text("\n".join(manifest_lines) + "\n")
    sentences = Sentences(files=(str(path / "requests.txt"),), held_out=0.25, lm=15, dev=2, test=2)
    settings = experiment.synthesize.model_copy(
        update={
            "lm": 4,
            "text": 3,
            "sentences": sentences,
            "copies": {"espeak": 2},
            "recordings": Recordings(lm=str(people / "train.jsonl"), copies=2),
        }
    )
    changes = {"workspace": path / "workspace", "synthesize": settings}
    return experiment.model_copy(update=changes)


THINGS = (
    *("card", "order", "parcel", "money", "key", "phone", "table", "train", "bag", "coat"),
    *("book", "letter", "ticket", "bill", "taxi", "lunch", "doctor", "dog", "cat", "bike"),
)


def test_real_sentences_and_people_stand_beside_the_grammar(mixed):
    made = synthesize.run(mixed)
    corpus = {
        split: list(manifest.read(made.path / f"{split}.jsonl")) for split in ("lm", "text", "dev")
    }
    domains = Counter(one.domain for one in corpus["lm"])
    assert domains["requests"] == 2 * 15 and domains["people"] == 2
    assert domains.total() == 2 * (4 + 15) + 2
    real = {one.text for split in corpus.values() for one in split if one.domain == "requests"}
    assert 15 + 2 < len(real) < 40, "what is not said is text"
    assert Counter(one.domain for one in corpus["dev"])["requests"] == 2
    first, second = (one for one in corpus["lm"] if one.domain == "people")
    assert (first.speaker, first.text, first.phones) == ("0001", "we call it bear", ())
    assert first.duration == 0.5 and soundfile.info(first.audio).frames == 8000
    assert not np.array_equal(soundfile.read(first.audio)[0], soundfile.read(second.audio)[0])

    listed = [json.loads(line) for line in (made.path / "rejected.jsonl").open()]
    assert len(listed) == 4, "the broken recording twice, the line that is no JSON, and the dashes"
    assert sum("requests.txt:41" in one["source"] for one in listed) == 1
    assert sum("broken.wav" in one["reason"] for one in listed) == 2
    assert sum("train.jsonl:3" in one["source"] for one in listed) == 1


def test_what_a_synthesizer_says_is_recorded_again_with_its_phones(mixed):
    made = synthesize.run(mixed)
    said = {one.id: one for one in manifest.read(made.path / "lm.jsonl")}
    again = {id: one for id, one in said.items() if id.endswith("-1") and one.phones}
    pairs = [(said[id.removesuffix("-1")], one) for id, one in again.items()]
    assert len(pairs) == 4 + 15
    for first, again in pairs:
        longer = again.duration / first.duration
        assert (again.text, again.speaker) == (first.text, first.speaker)
        assert [one.text for one in again.phones] == [one.text for one in first.phones]
        ends = [one.end * longer for one in first.phones]
        assert [one.end for one in again.phones] == pytest.approx(ends, rel=0.01)
        assert again.words[-1].end <= again.duration + 0.01
    assert len({round(again.duration / first.duration, 2) for first, again in pairs}) > 1


def test_what_is_missing_is_named_before_anything_is_said(mixed, tmp_path):
    def of(**changes):
        settings = mixed.synthesize.model_copy(update=changes)
        update = {"synthesize": settings, "workspace": tmp_path / "workspace"}
        return mixed.model_copy(update=update)

    nowhere = mixed.synthesize.sentences.model_copy(update={"files": (str(tmp_path / "no.txt"),)})
    with pytest.raises(ArtifactError, match=r"no such file or directory: .*no\.txt"):
        synthesize.run(of(sentences=nowhere))
    with pytest.raises(ArtifactError, match=r"no such file or directory: .*none\.jsonl"):
        synthesize.run(of(recordings=Recordings(dev=str(tmp_path / "none.jsonl"))))
    with pytest.raises((OSError, ImportError), match=r"jobs\.fetch_voices|pip install"):
        synthesize.run(of(voices={"espeak": 1, "kokoro": 1}, kokoro=str(tmp_path)))
    many = mixed.synthesize.sentences.model_copy(update={"test": 1000})
    with pytest.raises(ValueError, match=r"split test: \d+ sentences in .*, fewer than the 1000"):
        synthesize.run(of(sentences=many))
    assert not list(tmp_path.glob("workspace/corpus"))


def test_files_may_move_and_what_they_hold_may_not(mixed, tmp_path):
    made = synthesize.run(mixed)
    [file] = mixed.synthesize.sentences.files
    moved = tmp_path / "requests.txt"
    moved.write_text(Path(file).read_text())
    sentences = mixed.synthesize.sentences.model_copy(update={"files": (str(moved),)})
    settings = mixed.synthesize.model_copy(update={"sentences": sentences})
    elsewhere = mixed.model_copy(update={"synthesize": settings})
    assert synthesize.run(elsewhere).fingerprint == made.fingerprint
    moved.write_text("another sentence\n")
    with pytest.raises(ArtifactError, match="sentences/requests"):
        synthesize.run(elsewhere)


def test_text_files_of_one_name_are_inputs_of_their_own(experiment, tmp_path):
    files = []
    for folder, name in [("a", "ask"), ("b", "ask"), ("c", "ask"), ("d", "ask-2"), ("e", "tell")]:
        files.append(tmp_path / folder / f"{name}.txt")
        files[-1].parent.mkdir()
        files[-1].write_text(f"what is {folder}\n")
    sentences = Sentences(files=tuple(map(str, files)), held_out=0.25, lm=15, dev=2, test=2)
    settings = experiment.synthesize.model_copy(update={"sentences": sentences})
    roles = ("ask", "ask-3", "ask-4", "ask-2", "tell")
    inputs = synthesize._inputs(settings)
    for role, file in zip(roles, files, strict=True):
        assert inputs[f"sentences/{role}"].fingerprint == artifact.outside(file).fingerprint, role
