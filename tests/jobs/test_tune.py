"""What is chosen on dev: by votes, by attention and by both, and never what lets a decoy harm."""

import itertools
import json
from pathlib import Path

import pytest
from transcripts import transcribed

from cluster.modes import Both, CrossAttentionRetrieval, KNNRetrieval, NoRetrieval
from cluster.stages import TranscribedUtterance
from jobs import tune
from mmrag.artifact import ArtifactError
from mmrag.config import KNN, Experiment, RetrievedAttention
from mmrag.decoding.tune import ATTENTION, BOTH, SETTINGS, chosen, chosen_attention
from mmrag.speech import tokenized

pytestmark = pytest.mark.ray

FILES = (SETTINGS, ATTENTION, BOTH)
PLAIN = 50
"""Words in a hundred that are wrong without retrieval."""


@pytest.fixture(scope="module")
def tuned(adapted) -> dict[str, dict]:
    directory = adapted.path / "tuned" / "multimodal"
    return {file: json.loads((directory / file).read_text()) for file in FILES}


def with_tune(experiment: Experiment, **changes) -> Experiment:
    settings = experiment.tune.model_copy(update=changes)
    return experiment.model_copy(update={"tune": settings})


def with_datastore(experiment: Experiment, name: str) -> Experiment:
    settings = experiment.datastore.model_copy(update={"name": name})
    return experiment.model_copy(update={"datastore": settings})


@pytest.mark.parametrize("file", FILES)
def test_what_is_chosen_was_decoded_and_does_least_harm_or_best(adapted, tuned, file):
    fields = tuned[file]
    rows, limit = fields["finalists"], (1 + adapted.experiment.tune.harm) * fields["plain_wer"]
    assert len(rows) == 2
    assert all(row["decoy_wer"] is not None and row["dev_wer"] is not None for row in rows)
    harmless = [row for row in rows if row["decoy_wer"] <= limit]
    best = min(harmless or rows, key=lambda row: row["dev_wer" if harmless else "decoy_wer"])
    settings = {k: v for k, v in best.items() if k not in ("dev_wer", "decoy_wer")}
    assert settings == {name: fields[name] for name in settings}


def test_every_way_is_compared_with_the_same_transcripts_without_retrieval(tuned):
    assert len({tuned[file]["plain_wer"] for file in FILES}) == 1
    assert len({tuned[file]["distance_scale"] for file in FILES}) == 1


def test_ways_to_read_are_those_of_the_experiment_their_gates_in_distances(adapted, tuned):
    grid, distance_scale = adapted.experiment.tune.attention, tuned[ATTENTION]["distance_scale"]
    assert [read.gate for read in grid] == [None, 1.5]
    expected = [
        {**read.model_dump(), "gate": read.gate and pytest.approx(distance_scale * read.gate)}
        for read in grid
    ]
    rows = tuned[ATTENTION]["finalists"]
    assert [
        {name: row[name] for name in RetrievedAttention.model_fields} for row in rows
    ] == expected
    directory = adapted.path / "tuned" / "multimodal"
    assert chosen_attention(directory) in [
        RetrievedAttention(**{n: row[n] for n in RetrievedAttention.model_fields}) for row in rows
    ]


def test_beside_reading_the_chosen_neighbours_vote_with_weights_of_their_own(adapted, tuned):
    directory = adapted.path / "tuned" / "multimodal"
    knn, both = chosen(directory), chosen(directory, BOTH)
    assert [row["weight"] for row in tuned[BOTH]["finalists"]] == [0.1, 0.4]
    assert both == knn.model_copy(update={"weight": both.weight})


def heard(errors: int) -> list[TranscribedUtterance]:
    """A transcript of so many wrong words in a hundred."""
    reference = ["".join(letters) for letters in itertools.product("abcdefghij", repeat=2)]
    text = ["wrong"] * errors + reference[errors:]
    return [transcribed(0, " ".join(text), " ".join(reference), entities=())]


def errors(mode) -> int:
    """The farther retrieval is trusted, the more it helps, and the more a decoy harms."""
    match mode:
        case NoRetrieval():
            return PLAIN
        case KNNRetrieval(source=source, knn=KNN(weight=weight)):
            return {("decoy", 0.2): PLAIN, ("decoy", 0.6): 70}.get(
                (role(source), weight), round(PLAIN - 40 * weight)
            )
        case CrossAttentionRetrieval(source=source, attention=RetrievedAttention(k=k)):
            return {("decoy", 2): 60, ("decoy", 4): PLAIN, ("right", 2): 10, ("right", 4): 20}[
                role(source), k
            ]
        case Both(
            modes=(KNNRetrieval(source=source, knn=knn), CrossAttentionRetrieval(attention=read))
        ):
            assert read.k == 4
            return {
                ("decoy", 0.4): 51,
                ("decoy", 0.1): PLAIN,
                ("right", 0.4): 5,
                ("right", 0.1): 9,
            }[role(source), knn.weight]
    raise AssertionError(mode)


def role(source: Path) -> str:
    return "decoy" if source.name == "wrong" else "right"


@pytest.fixture
def decoded(monkeypatch) -> list[list[str]]:
    """Transcripts made up by `errors`; the utterances of each time that some were asked for."""
    asked: list[list[str]] = []

    def transcribe(
        models, settings, modes, spoken, workers, language
    ) -> dict[str, list[TranscribedUtterance]]:
        asked.append([one.utterance.id for one in spoken])
        return {name: heard(errors(mode)) for name, mode in modes.items()}

    monkeypatch.setattr(tune, "transcribe_modes", transcribe)
    return asked


@pytest.fixture
def copied(adapted, borrow) -> Experiment:
    """One finalist for each weight: the grid's gates and certainties are not of interest."""
    made = borrow("codebook", "tokens", "lm", "adapter", "datastores", of=adapted)
    return with_tune(made, gate=(None,))


def test_settings_that_let_a_decoy_do_harm_are_passed_over(copied, decoded):
    made = tune.run(copied)
    files = {file: json.loads((made.path / file).read_text()) for file in FILES}
    assert files[SETTINGS]["weight"] == 0.2  # 0.6 mends more, and spoils more
    assert files[ATTENTION]["k"] == 4
    assert {file: fields["plain_wer"] for file, fields in files.items()} == dict.fromkeys(
        FILES, 0.5
    )
    harmful = [row for row in files[SETTINGS]["finalists"] if row["weight"] == 0.6]
    assert [(row["dev_wer"], row["decoy_wer"]) for row in harmful] == [(0.26, 0.7)]
    assert (made.summary["dev_wer"], made.summary["attention_dev_wer"]) == (0.42, 0.2)


def test_more_harm_is_allowed_where_the_experiment_says_so(copied, decoded):
    allowing = with_tune(copied, harm=0.02)
    assert json.loads((tune.run(copied).path / BOTH).read_text())["weight"] == 0.1
    assert json.loads((tune.run(allowing, force=True).path / BOTH).read_text())["weight"] == 0.4


def test_without_a_decoy_the_best_is_chosen_whatever_it_would_do(copied, decoded):
    made = tune.run(with_tune(copied, decoy=None, attention=()))
    fields = json.loads((made.path / SETTINGS).read_text())
    assert fields["weight"] == 0.6
    assert all(row["decoy_wer"] is None for row in fields["finalists"])
    assert not (made.path / ATTENTION).exists() and not (made.path / BOTH).exists()


def test_dev_utterances_are_decoded_and_as_many_as_the_experiment_says(copied, decoded):
    tune.run(with_tune(copied, utterances=1))
    dev = [one.utterance.id for one in tokenized.read(copied.workspace / "tokens" / "dev")]
    assert decoded and all(len(asked) == 1 and asked[0] in dev for asked in decoded)


def test_windows_that_nobody_spoke_are_not_read(copied, decoded):
    made = tune.run(with_datastore(copied, "text"))
    assert (made.path / SETTINGS).exists()
    assert chosen_attention(made.path) is None
    assert "adapter" not in made.inputs


def test_reading_cannot_be_tuned_without_an_adapter(adapted, borrow, decoded):
    experiment = borrow("codebook", "tokens", "lm", "datastores", of=adapted)
    with pytest.raises(ArtifactError, match=r"/adapter .*\(made by: python -m jobs\.train\)"):
        tune.run(experiment)


def test_a_decoy_keyed_by_another_language_model_is_refused(copied, decoded):
    file = copied.workspace / "datastores" / "wrong" / "artifact.json"
    fields = json.loads(file.read_text())
    fields["inputs"]["lm"] = "0123456789abcdef"
    file.write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match="datastores/wrong was made with lm 0123456789abcdef"):
        tune.run(copied)
