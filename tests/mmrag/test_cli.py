import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from mmrag import artifact, cli, datastore, pretrained
from mmrag.audio import SAMPLE_RATE
from mmrag.config import KNN, Hubert, Index, LanguageModel, as_dict
from mmrag.datastore import Datastore, Description, Segment
from mmrag.hubert import HubertEncoder
from mmrag.index import IndexShard, shard_directory
from mmrag.lm import LM
from mmrag.tune import SETTINGS
from mmrag.units import Codebook
from mmrag.vocabulary import EOS, SentencePieces, Vocabulary

ENCODER = Hubert(
    conv_channels=8,
    norm="layer_norm",
    width=16,
    layers=1,
    heads=2,
    feed_forward=16,
    layer=1,
)
SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=2, feed_forward=24, tied=False)
NAME = "maria"


def write_models(directory):
    """hubert, codebook and lm artifacts with random weights, each made from the one before."""
    torch.manual_seed(0)
    with artifact.create(directory / "hubert", "hubert", {}, {}) as draft:
        HubertEncoder.create(ENCODER, seed=0).save(draft.path)
    hubert = artifact.load(directory / "hubert", "hubert")
    with artifact.create(directory / "codebook", "codebook", {}, {"hubert": hubert}) as draft:
        centroids = np.random.default_rng(0).standard_normal((12, 16))
        Codebook(centroids, frame_seconds=0.02).save(draft.path)
    codebook = artifact.load(directory / "codebook", "codebook")
    with artifact.create(directory / "lm", "lm", {}, {"codebook": codebook}) as draft:
        vocabulary = Vocabulary(SentencePieces.train(["turn on the light", NAME], 60), units=12)
        lm = LM(SHAPE, vocabulary.size)
        with torch.no_grad():  # it would say nothing but the end
            lm.head.weight[EOS] = -lm.head.weight.sum(0)
        tensors = [(name, t + torch.randn_like(t) / 3) for name, t in lm.state_dict().items()]
        pretrained.save(draft.path, SHAPE, vocabulary, tensors)


def write_datastore(models, name, identity=None):
    """Entries that all say the last piece of `NAME`, or another identity than the models'."""
    vocabulary = Vocabulary.load(models / "lm")
    token = vocabulary.encode(NAME)[-1]
    made = {role: artifact.load(models / role, role).fingerprint for role in ("lm", "codebook")}
    directory = models / "datastores" / name
    description = Description(
        width=16, window=3, metric="l2", audio="none", identity={**made, **(identity or {})}
    )
    segment = Segment(
        keys=np.random.default_rng(0).standard_normal((8, 16)),
        tokens=np.full(8, token),
        windows=np.full((8, 3), token),
        positions=np.zeros(8),
        utterances=np.zeros(8),
        names=[("u", "contacts [home]")],
    )
    with artifact.create(directory, "datastore", {}, {}) as draft:
        datastore.create(draft.path, description)
        datastore.write_segment(draft.path, "only", segment)
        datastore.publish(draft.path, ["only"])
        entries = Datastore.open(draft.path)
        shard = IndexShard.build(entries, 0, 8, Index(kind="flat", shards=1), seed=0)
        shard.save(shard_directory(draft.path, 0))
    return directory


def write_tuned(models, name, made_for):
    """Settings that ignore what is found, tuned for the datastore `made_for`."""
    inputs = {"datastore": artifact.load(made_for, "datastore")}
    with artifact.create(models / "tuned" / name, "tuned", {}, inputs) as draft:
        settings = as_dict(KNN(k=2, weight=0.0, temperature=3))
        (draft.path / SETTINGS).write_text(json.dumps({**settings, "finalists": []}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    write_models(directory)
    write_datastore(directory, "contacts")
    return directory


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "clip [one].wav"
    wave = np.random.default_rng(0).standard_normal(SAMPLE_RATE) / 10
    soundfile.write(path, wave, SAMPLE_RATE)
    return path


@pytest.fixture
def mmrag(models, capsys):
    """Run `mmrag transcribe …`; the exit status, standard output and standard error.

    The clips are noise, which is transcribed all the same unless `threshold` says otherwise, by a
    random model, which agrees with nothing that retrieval says and loops.
    """

    def run(*arguments, models=models, threshold=0):
        asked = ["--models", models, "--speech-threshold", threshold, "--trust", *arguments]
        with pytest.raises(SystemExit) as stopped:
            cli.main(["transcribe", *map(str, asked)])
        status, printed = stopped.value.code, capsys.readouterr()
        if isinstance(status, str):  # Python prints it and exits with 1
            return 1, printed.out, printed.err + status
        return status, printed.out, printed.err

    return run


def test_where_nobody_speaks_there_is_no_transcript(mmrag, clip):
    status, out, err = mmrag(clip, threshold=0.75)
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"{clip}  0.0–1.0 s", "  (nothing said)"]
    _, printed, _ = mmrag(clip, "--json", threshold=0.75)
    said = json.loads(printed)
    assert (said["text"], said["words"], said["end"]) == ("", [], 1.0)


def test_a_file_is_transcribed_under_its_name_and_times(mmrag, clip):
    status, out, err = mmrag(clip)
    assert (status, err) == (0, "")
    first, text = out.splitlines()
    assert first == f"{clip}  0.0–1.0 s"
    assert text.strip()


def test_json_is_one_object_a_stretch_of_audio_with_the_same_words(mmrag, clip):
    _, out, _ = mmrag(clip)
    status, lines, _ = mmrag("--json", "--max-seconds", 1, clip, clip)
    assert status == 0
    answers = [json.loads(line) for line in lines.splitlines()]
    assert [answer["file"] for answer in answers] == [str(clip)] * 2
    for answer in answers:
        assert answer["text"] == out.splitlines()[1].strip()
        assert [word["text"] for word in answer["words"]] == answer["text"].split()
        assert (answer["start"], answer["end"]) == (0.0, 1.0)
        assert {"probability", "lm_probability", "changed", "source"} <= answer["words"][0].keys()


def test_long_audio_is_split(mmrag, tmp_path):
    path = tmp_path / "long.flac"
    soundfile.write(path, np.random.default_rng(0).standard_normal(40_000) / 10, SAMPLE_RATE)
    _, lines, _ = mmrag("--json", "--max-seconds", 1, path)
    answers = [json.loads(line) for line in lines.splitlines()]
    assert len(answers) >= 3
    assert answers[-1]["end"] == 2.5
    assert all(answer["end"] - answer["start"] <= 1 for answer in answers)


def test_files_that_cannot_be_read_are_named_and_the_others_transcribed(mmrag, clip, tmp_path):
    text, empty, missing = tmp_path / "notes.wav", tmp_path / "empty.wav", tmp_path / "gone.wav"
    text.write_text("meeting at ten")
    empty.touch()
    status, lines, err = mmrag("--json", missing, text, clip, empty, tmp_path, clip)
    assert status == 1
    assert [json.loads(line)["file"] for line in lines.splitlines()] == [str(clip)] * 2
    complaints = err.splitlines()
    assert len(complaints) == 4
    for path, complaint in zip((missing, text, empty, tmp_path), complaints, strict=True):
        assert complaint.startswith(f"mmrag: {path}: ")


def test_a_datastore_changes_words_and_says_where_they_came_from(mmrag, clip):
    plain = json.loads(mmrag("--json", clip)[1])
    changed = json.loads(mmrag("--json", "--datastore", "contacts", "--weight", 0.9999, clip)[1])
    assert changed["text"] != plain["text"]
    sources = [word["source"] for word in changed["words"] if word["changed"]]
    assert sources
    assert {source["document"] for source in sources} == {"contacts [home]"}
    _, out, _ = mmrag("--datastore", "contacts", "--weight", 0.9999, clip)
    assert "from contacts [home], distance" in out, "brackets are text, not markup"
    _, ignored, _ = mmrag("--json", "--datastore", "contacts", "--weight", 0, clip)
    assert json.loads(ignored) == plain


def test_a_datastore_is_found_by_name_and_by_path(mmrag, models, clip):
    by_name, by_path = (
        mmrag("--json", "--datastore", named, "--weight", 0.9, clip)
        for named in ("contacts", models / "datastores" / "contacts")
    )
    assert by_name == by_path


def test_tuned_settings_are_used_unless_a_weight_is_given(mmrag, models, clip, tmp_path):
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    write_tuned(moved, "contacts", made_for=moved / "datastores" / "contacts")
    arguments = ("--json", "--datastore", "contacts", clip)
    plain, untuned = mmrag("--json", clip), mmrag(*arguments)
    assert untuned != plain
    assert mmrag(*arguments, models=moved) == plain
    assert mmrag("--weight", 0.3, *arguments, models=moved) != plain


def test_settings_tuned_for_another_datastore_are_refused(mmrag, models, clip, tmp_path):
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    other = moved / "datastores" / "other"
    with artifact.create(other, "datastore", {"other": True}, {}):
        pass
    write_tuned(moved, "contacts", made_for=other)
    status, _, err = mmrag("--datastore", "contacts", clip, models=moved)
    assert status == 1
    fingerprint = artifact.load(other, "datastore").fingerprint
    assert f"was made with datastore {fingerprint}" in err


@pytest.mark.parametrize("role", ["lm", "codebook"])
def test_a_datastore_keyed_by_other_models_is_refused_naming_both(
    mmrag, models, clip, role, tmp_path
):
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    write_datastore(moved, "foreign", identity={role: "0123456789abcdef"})
    status, out, err = mmrag("--datastore", "foreign", clip, models=moved)
    assert (status, out) == (1, "")
    ours = artifact.load(models / role, role).fingerprint
    assert f"keyed by {role} 0123456789abcdef, but this is {role} {ours}" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--datastore", "nowhere"], "nowhere"),
        (["--datastore", "contacts", "--weight", "2"], "weight"),
        (["--beams", "0"], "beams"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_transcribed(mmrag, clip, arguments, named):
    status, out, err = mmrag(*arguments, clip)
    assert (status, out) == (1, "")
    assert err.startswith("mmrag: ")
    assert named in err


def test_a_directory_that_holds_no_models_is_named(mmrag, clip, tmp_path):
    missing = tmp_path / "nowhere"
    status, _, err = mmrag(clip, models=missing)
    assert status == 1
    assert err == f"mmrag: {missing}/hubert is not a finished hubert: no such directory"


@pytest.mark.parametrize(
    "arguments", [[], ["--max-seconds", "0"], ["--max-seconds", "nan", "a.wav"]]
)
def test_wrong_usage_exits_with_2(mmrag, arguments):
    status, _, err = mmrag(*arguments)
    assert status == 2
    assert "usage: mmrag" in err
