"""A split transcribed in every mode, and the sums that are made of its transcripts."""

import json

import numpy as np
import pytest
from mlflow import MlflowClient
from small_datastores import store_arrays, stored_arrays

from cluster.modes import DatastoreSpotting, PhraseSpotting, open_locally
from cluster.store import tracking_uri
from jobs import evaluate, evaluation_tables, models, tune
from mmrag import artifact
from mmrag.artifact import ArtifactError
from mmrag.config import ConfigError, Experiment
from mmrag.decoding.tune import ATTENTION, BOTH, SETTINGS, chosen, chosen_attention
from mmrag.recogniser import Recogniser
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.text import normalise
from mmrag.transcribe import recognise

pytestmark = pytest.mark.ray


def results_of(workspace) -> dict:
    return json.loads((workspace.path / "evaluation" / "results.json").read_text())


def transcripts_of(workspace) -> list[dict]:
    path = workspace.path / "evaluation" / "transcripts.jsonl"
    return [json.loads(line) for line in path.open()]


@pytest.fixture(scope="module")
def results(workspace) -> dict:
    return results_of(workspace)


@pytest.fixture(scope="module")
def transcripts(workspace) -> list[dict]:
    return transcripts_of(workspace)


def with_evaluate(experiment: Experiment, **changes) -> Experiment:
    settings = experiment.evaluate.model_copy(update=changes)
    return experiment.model_copy(update={"evaluate": settings})


def of(transcripts: list[dict], row: dict) -> list[dict]:
    return [
        one
        for one in transcripts
        if (one["mode"], one["datastore"]) == (row["mode"], row["datastore"])
    ]


def edits(reference: list[str], heard: list[str]) -> int:
    """Levenshtein distance between two lists of words."""
    row = list(range(len(heard) + 1))
    for word in reference:
        corner, row[0] = row[0], row[0] + 1
        for at, other in enumerate(heard, start=1):
            corner, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, corner + (word != other))
    return row[-1]


def test_every_mode_hears_the_same_utterances(results, transcripts, workspace):
    modes = [(row["mode"], row["datastore"]) for row in results["rows"]]
    assert modes == [("none", None), ("knn", "multimodal")]
    spoken = models.select(artifact.load(workspace.path / "tokens", "tokens"), "test", "assistant")
    expected = sorted((one.utterance.id, one.utterance.text) for one in spoken)
    assert len(expected) > 1
    for row in results["rows"]:
        heard = [(one["utterance"], one["reference"]) for one in of(transcripts, row)]
        assert heard == expected
        assert row["utterances"] == len(expected)


def test_error_rates_are_those_of_the_transcripts(results, transcripts):
    for row in results["rows"]:
        pairs = [
            (normalise(one["reference"]).split(), normalise(one["text"]).split())
            for one in of(transcripts, row)
        ]
        words = sum(len(reference) for reference, _ in pairs)
        wrong = sum(edits(*pair) for pair in pairs)
        assert row["words"] == words
        assert row["substitutions"] + row["deletions"] + row["insertions"] == wrong
        assert row["wer"] == pytest.approx(wrong / words)
        assert row["wer_low"] <= row["wer"] <= row["wer_high"]


def test_recall_and_speed_are_sums_over_the_transcripts(results, transcripts):
    for row in results["rows"]:
        heard = of(transcripts, row)
        queries = sum(one["queries"] for one in heard)
        recalled = sum(one["recalled"] for one in heard)
        assert row["recall_at_k"] == (recalled / queries if queries else None)
        assert (row["recall_at_k"] is None) == (row["mode"] == "none")
        assert row["decode_seconds"] == pytest.approx(sum(one["decode_seconds"] for one in heard))


def test_without_retrieval_no_word_is_called_changed(transcripts):
    assert all(not one["changed"] for one in transcripts if one["mode"] == "none")
    assert any(one["changed"] for one in transcripts if one["mode"] == "knn")


def test_the_table_shows_the_results(results, workspace):
    table = (workspace.path / "evaluation" / "results.md").read_text()
    for row in results["rows"]:
        assert "| " + " | ".join(evaluation_tables.cells(row)) + " |" in table
    voices = {voice for by in results["speakers"] for voice in by}
    assert voices and all(f"| {voice} |" in table for voice in voices)


def test_the_plot_is_a_picture(workspace):
    picture = (workspace.path / "evaluation" / "wer.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 5_000


def test_the_tuned_settings_are_the_ones_used(results, workspace):
    for row in results["rows"][1:]:
        tuned = json.loads((workspace.path / "tuned" / row["datastore"] / SETTINGS).read_text())
        assert row["knn"] == {name: tuned[name] for name in row["knn"]}
        grid = workspace.experiment.tune
        assert tuned["k"] in grid.k and tuned["weight"] in grid.weight
        best = min(tuned["finalists"], key=lambda one: one["dev_wer"])
        assert {name: best[name] for name in row["knn"]} == row["knn"]


def test_shard_actors_and_a_local_index_give_the_same_transcripts(borrow, transcripts):
    everything = borrow("hubert", "codebook", "tokens", "lm", "datastores", "tuned")
    local = with_evaluate(everything, retriever="local", modes=("knn",), datastores=("multimodal",))
    assert everything.evaluate.retriever == "sharded"
    made = evaluate.run(local)
    heard = [json.loads(line) for line in (made.path / "transcripts.jsonl").open()]
    timed = {"decode_seconds"}
    ours = [{k: v for k, v in one.items() if k not in timed} for one in heard]
    sharded = [one for one in transcripts if one["datastore"] == "multimodal"]
    assert ours == [{k: v for k, v in one.items() if k not in timed} for one in sharded]


def disguise(experiment: Experiment, directory: str) -> str:
    """Make an artifact another one, by fingerprint; return the true one."""
    path = experiment.workspace / directory / "artifact.json"
    fields = json.loads(path.read_text())
    true, fields["fingerprint"] = fields["fingerprint"], "0123456789abcdef"
    path.write_text(json.dumps(fields))
    return true


@pytest.mark.parametrize("job", [evaluate, tune])
def test_a_datastore_keyed_by_another_language_model_is_refused(borrow, job):
    experiment = borrow("hubert", "codebook", "tokens", "lm", "datastores")
    true = disguise(experiment, "lm")
    with pytest.raises(ArtifactError) as refused:
        job.run(experiment)
    assert true in str(refused.value) and "0123456789abcdef" in str(refused.value)
    assert str(experiment.workspace / "datastores") in str(refused.value)


@pytest.mark.parametrize("job", [evaluate, tune])
def test_units_of_another_codebook_are_refused(borrow, job):
    experiment = borrow("codebook", "tokens", "lm", "datastores")
    true = disguise(experiment, "codebook")
    with pytest.raises(ArtifactError) as refused:
        job.run(experiment)
    assert true in str(refused.value) and "0123456789abcdef" in str(refused.value)


def test_settings_tuned_for_another_datastore_are_refused(borrow):
    experiment = borrow("codebook", "tokens", "lm", "datastores", "tuned")
    true = disguise(experiment, "datastores/multimodal")
    with pytest.raises(ArtifactError, match=f"tuned/multimodal was made with datastore {true}"):
        evaluate.run(experiment)


def test_a_domain_that_nobody_spoke_in_is_named(borrow):
    experiment = with_evaluate(borrow("codebook", "tokens", "lm"), domain="opera", modes=("none",))
    with pytest.raises(ArtifactError, match="tokens/test has no spoken utterance of domain opera"):
        evaluate.run(experiment)


def test_with_an_adapter_what_was_heard_is_read_as_well(adapted):
    """Text alone votes, and is not read: it has no sound that the adapter could recognise."""
    modes = [(row["mode"], row["datastore"]) for row in results_of(adapted)["rows"]]
    assert modes == [
        ("none", None),
        ("knn", "text"),
        ("knn", "multimodal"),
        ("cross_attention", "multimodal"),
        ("both", "multimodal"),
    ]


def test_each_mode_uses_what_was_chosen_for_it_and_no_other_settings(adapted):
    rows = {(row["mode"], row["datastore"]): row for row in results_of(adapted)["rows"]}
    directory = adapted.path / "tuned" / "multimodal"
    read = chosen_attention(directory).model_dump()
    expected = {
        ("none", None): (None, None),
        ("knn", "text"): (adapted.experiment.knn.model_dump(), None),
        ("knn", "multimodal"): (chosen(directory).model_dump(), None),
        ("cross_attention", "multimodal"): (None, read),
        ("both", "multimodal"): (chosen(directory, BOTH).model_dump(), read),
    }
    assert {way: (row["knn"], row["attention"]) for way, row in rows.items()} == expected
    assert expected["both", "multimodal"][0] != expected["knn", "multimodal"][0]


@pytest.mark.parametrize("mode", ["cross_attention", "both"])
def test_windows_read_from_shard_actors_give_the_transcripts_of_one_clip_after_the_other(
    adapted, mode
):
    recogniser = Recogniser.load(adapted.path)
    retriever = open_locally(adapted.path / "datastores" / "multimodal")
    directory = adapted.path / "tuned" / "multimodal"
    retrieval = Retrieval(retriever, chosen(directory, BOTH)) if mode == "both" else None
    reading = AttentionSource(
        recogniser.window_cache(retriever), chosen_attention(directory), retriever
    )
    made = artifact.load(adapted.path / "tokens", "tokens")
    alone = {}
    for one in models.select(made, "test", "assistant"):
        settings = adapted.experiment.decode
        [hypothesis] = recognise(
            recogniser, [one.units], settings, retrieval, attention_sources=[reading]
        )
        alone[one.utterance.id] = recogniser.vocabulary.decode(hypothesis.tokens)
    heard = [one for one in transcripts_of(adapted) if one["mode"] == mode]
    assert {one["utterance"]: one["text"] for one in heard} == alone


def test_neighbours_are_counted_where_they_vote_and_not_where_they_are_read(adapted):
    recalls = {row["mode"]: row["recall_at_k"] for row in results_of(adapted)["rows"]}
    assert recalls["cross_attention"] is None and recalls["none"] is None
    assert recalls["both"] is not None and recalls["knn"] is not None


def test_what_reading_changed_is_told_from_the_language_models_own_words(adapted):
    heard = [one for one in transcripts_of(adapted) if one["mode"] == "cross_attention"]
    assert any(one["changed"] for one in heard)
    plain = {o["utterance"]: o["text"] for o in transcripts_of(adapted) if o["mode"] == "none"}
    for one in heard:
        assert one["changed"] or one["text"] == plain[one["utterance"]]


def metrics_of(workspace) -> dict[str, float]:
    """What MLflow knows of the workspace's evaluation."""
    tracking = workspace.experiment.tracking
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    known = client.get_experiment_by_name(tracking.experiment)
    [run] = client.search_runs(
        [known.experiment_id],
        filter_string=f"params.workspace = '{workspace.path}' and params.stage = 'evaluation'",
    )
    return run.data.metrics


def test_a_metric_is_named_for_its_mode_and_datastore(workspace, adapted):
    plain = {"wer.none", "wer.knn.multimodal"}
    reading = {"wer.knn.text", "wer.cross_attention.multimodal", "wer.both.multimodal"}
    for one, expected in ((workspace, plain), (adapted, plain | reading)):
        measured = metrics_of(one)
        assert {name for name in measured if name.startswith("wer.")} == expected
        for row in results_of(one)["rows"]:
            name = ".".join(filter(None, ("wer", row["mode"], row["datastore"])))
            assert measured[name] == row["wer"]


@pytest.mark.parametrize("absent", [ATTENTION, BOTH])
def test_what_was_not_tuned_is_taken_from_what_was_or_from_the_experiment(adapted, borrow, absent):
    experiment = borrow("lm", "codebook", "datastores", "tuned", of=adapted)
    (experiment.workspace / "tuned" / "multimodal" / absent).unlink()
    made = evaluate._ways(experiment, models.named(experiment))
    ways = {(way.name, way.datastore): way for way in made}
    both, directory = ways["both", "multimodal"], experiment.workspace / "tuned" / "multimodal"
    if absent == ATTENTION:
        assert (
            both.attention
            == ways["cross_attention", "multimodal"].attention
            == experiment.attention
        )
        assert both.knn == chosen(directory, BOTH)
    else:
        assert both.knn == chosen(directory, SETTINGS), "what neighbours alone are weighted by"
        assert both.attention == chosen_attention(directory)


def test_an_adapter_of_another_language_model_is_refused(adapted, borrow):
    experiment = borrow("codebook", "tokens", "lm", "adapter", "datastores", of=adapted)
    file = experiment.workspace / "adapter" / "artifact.json"
    fields = json.loads(file.read_text())
    fields["inputs"]["lm"] = "0123456789abcdef"
    file.write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match="adapter was made with lm 0123456789abcdef"):
        evaluate.run(experiment)


def test_nothing_is_read_without_an_adapter(adapted, borrow):
    experiment = borrow("codebook", "tokens", "lm", "datastores", of=adapted)
    with pytest.raises(ArtifactError, match=r"/adapter .*\(made by: python -m jobs\.train\)"):
        evaluate.run(experiment)


def test_with_lists_the_phrases_of_each_utterance_are_spotted(workspace):
    heard_by = models.named(workspace.experiment)
    listed = with_evaluate(workspace.experiment, modes=("none", "spotting"), lists=True)
    _, way = evaluate._ways(listed, heard_by)
    assert (way.name, way.title, way.artifact) == ("spotting", "spotting: its own list", None)
    own = {"u0": ["anna smith"]}
    assert evaluate._mode(way, own, {}) == PhraseSpotting(listed.spotting, own)
    assert evaluate._datastores([way]) == []


def expected(experiment, nats):
    """The multimodal datastore, each of whose tokens surprises so much."""
    place = experiment.workspace / "datastores" / "multimodal"
    for name in Datastore.open(place).segments:
        arrays = stored_arrays(place, name)
        store_arrays(place, name, arrays | {"surprisals": np.full_like(arrays["surprisals"], nats)})
    return place


def test_without_lists_what_a_datastore_has_is_spotted_and_not_searched(borrow):
    experiment = borrow("codebook", "tokens", "lm", "datastores", "tuned")
    heard_by, place = models.named(experiment), expected(experiment, 20)
    both = with_evaluate(experiment, modes=("knn", "spotting"), lists=False)
    searched, way = evaluate._ways(both, heard_by)
    assert (way.name, way.title) == ("spotting", "spotting: multimodal")
    assert way.artifact == searched.artifact and (way.knn, way.attention) == (None, None)
    assert evaluate._mode(way, None, {}) == DatastoreSpotting(place, both.spotting)
    assert evaluate._datastores([searched, way]) == [place]
    assert evaluate._datastores([way]) == [] == evaluate._shards(both, [way])
    assert evaluate._shards(both, [searched, way]) == evaluate._shards(both, [searched]) != []


def test_a_datastore_with_nothing_to_spot_is_named(borrow):
    experiment = borrow("codebook", "tokens", "lm", "datastores", "tuned")
    expected(experiment, 0)
    asked = with_evaluate(experiment, modes=("none", "spotting"))
    with pytest.raises(ConfigError, match=r"nothing to spot in .*datastores/multimodal, which"):
        evaluate._ways(asked, models.named(asked))
