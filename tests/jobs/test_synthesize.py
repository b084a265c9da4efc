import pytest
import soundfile

from jobs import synthesize
from mmrag.artifact import ArtifactError
from mmrag.corpora import manifest
from mmrag.corpora.synthetic import SPLITS
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


def test_a_changed_plan_is_refused_and_the_difference_named(workspace):
    settings = workspace.experiment.synthesize.model_copy(update={"test": 7})
    changed = workspace.experiment.model_copy(update={"synthesize": settings})
    with pytest.raises(ArtifactError, match="from something else: test was 6 and is now 7"):
        synthesize.run(changed)
