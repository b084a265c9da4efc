import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cluster.parts import Part
from cluster.tokenizing import EncodeFeatures
from jobs import tokenize
from mmrag import artifact
from mmrag.config import ConfigError, Experiment, Workers
from mmrag.corpora.manifest import ManifestError
from mmrag.records import Utterance
from mmrag.speech import audio, tokenized
from mmrag.speech.audio import AudioError
from mmrag.speech.hubert import HubertEncoder
from mmrag.speech.tokenized import Tokenized, write_part
from mmrag.speech.units import Codebook, expand

pytestmark = pytest.mark.ray


def noise(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    samples = np.random.default_rng(7).normal(scale=0.1, size=(round(seconds * rate), channels))
    return samples.astype(np.float32)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a folder of audio holds on a bad day."""
    directory = tmp_path_factory.mktemp("recordings")
    soundfile.write(directory / "a-good.wav", noise(1.0), 16_000)
    soundfile.write(directory / "b-telephone.mp3", noise(2.0, 8_000, 2), 8_000)
    (directory / "c-empty.wav").touch()
    soundfile.write(directory / "d-whole.flac", noise(1.5), 16_000)
    whole = (directory / "d-whole.flac").read_bytes()
    (directory / "d-truncated.flac").write_bytes(whole[: len(whole) // 2])
    (directory / "e-letter.wav").write_text("Dear Sir or Madam,\n" * 50)
    soundfile.write(directory / "f-click.wav", noise(0.02), 16_000)
    soundfile.write(directory / "g-lecture.flac", noise(65.0, 8_000), 8_000)
    (directory / "notes.txt").write_text("not audio, and not named like it")
    return directory


def reading(experiment: Experiment, source: Path, **changes) -> Experiment:
    settings = experiment.tokenize.model_copy(
        update={
            "name": "mine",
            "source": str(source),
            "codebook": str(experiment.workspace / "codebook"),
            "min_seconds": 0.1,
            "max_seconds": 30.0,
            "part_seconds": 20.0,
            **changes,
        }
    )
    return experiment.model_copy(update={"tokenize": settings})


def rejected(made: artifact.Artifact) -> dict[str, str]:
    """Source -> reason."""
    lines = [json.loads(line) for line in (made.path / "rejected.jsonl").open()]
    assert len({line["source"] for line in lines}) == len(lines)
    return {line["source"]: line["reason"] for line in lines}


def check(reasons: dict[str, str], expected: dict[str, str]) -> None:
    assert set(reasons) == set(expected)
    for source, part in expected.items():
        assert part in reasons[source], source


def test_a_folder_on_a_bad_day_is_read_and_what_cannot_be_is_named(borrow, recordings, monkeypatch):
    """… and a run that stops short of the end goes on without redoing finished parts."""
    experiment = reading(borrow("hubert", "codebook"), recordings, require_text=False)

    def stop(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "join_rejections", stop)
        with pytest.raises(KeyboardInterrupt):
            tokenize.run(experiment)
    draft = experiment.workspace / ".mine.partial" / "all"
    first, *others = sorted(draft.glob("part-*.parquet"))
    assert len(others) >= 3
    mark = Tokenized(Utterance(id="written before the stop", duration=1.0), None)
    write_part(first, [*tokenized.read_part(first), mark])
    lost, *kept = others
    lost.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in kept}

    made = tokenize.run(experiment)
    after = {path.name: (made.path / "all" / path.name).stat().st_mtime_ns for path in kept}
    assert after == before
    found = list(tokenized.read(made.path / "all"))
    assert mark.utterance.id in [one.utterance.id for one in found]
    spoken = {one.utterance.id: one for one in found if one.units is not None}
    lecture = [name for name in spoken if name.startswith("g-lecture.flac#")]
    assert set(spoken) == {"a-good.wav", "b-telephone.mp3", "d-whole.flac", *lecture}
    assert len(lecture) >= 3
    assert sum(spoken[name].utterance.duration for name in lecture) == pytest.approx(65.0)
    assert all(spoken[name].utterance.duration <= 30.0 for name in lecture)
    assert {spoken[name].utterance.document for name in lecture} == {"g-lecture.flac"}
    assert all(len(one.units) for one in spoken.values())
    check(
        rejected(made),
        {
            str(recordings / "c-empty.wav"): "the file is empty",
            str(recordings / "d-truncated.flac"): "breaks off after",
            str(recordings / "e-letter.wav"): "cannot be read as audio",
            str(recordings / "f-click.wav"): "0.020 s, shorter than 0.1 s",
        },
    )
    assert made.summary["rejected"] == 4
    assert made.summary["utterances"] == len(spoken) + 1
    assert not list(made.path.rglob(".*"))


def test_a_manifest_on_a_bad_day_is_read_and_what_cannot_be_is_named(borrow, recordings, tmp_path):
    lines = [
        {"audio_filepath": str(recordings / "a-good.wav"), "text": "hello", "utterance": "good"},
        {"audio_filepath": "gone.wav", "text": "hello"},
        "{broken",
        {"audio_filepath": str(recordings / "d-whole.flac")},
        {"audio_filepath": str(recordings / "g-lecture.flac"), "text": "dear students"},
        {"text": "said by nobody", "utterance": "written"},
        {"speaker": "nobody"},
        {"audio_filepath": str(recordings / "d-whole.flac"), "text": "x", "utterance": "good"},
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    made = tokenize.run(reading(borrow("hubert", "codebook"), manifest, require_text=True))
    found = {one.utterance.id: one for one in tokenized.read(made.path / "all")}
    assert set(found) == {"good", "written"}
    assert found["good"].units is not None and found["good"].utterance.duration == 1.0
    assert found["written"].units is None
    check(
        rejected(made),
        {
            str(tmp_path / "gone.wav"): "no such file",
            f"{manifest}:3": "not JSON",
            str(recordings / "d-whole.flac"): "no transcript",
            str(recordings / "g-lecture.flac"): "65.0 s, longer than 30.0 s",
            f"{manifest}:7": "neither audio_filepath nor text",
            f"{manifest}:8": "utterance 'good' is also on line 1",
        },
    )
    assert (made.summary["utterances"], made.summary["rejected"]) == (2, 6)


def test_of_a_manifests_recordings_the_spans_are_read_and_those_past_the_end_named(
    borrow, tmp_path
):
    pitch = np.repeat([200, 400, 800, 1600], 32_000)
    tones = np.sin(2 * np.pi * np.arange(8 * 16_000) / 16_000 * pitch)
    tones = (tones * 2**14).astype(np.int16)  # each format rounds a float in its own way
    soundfile.write(tmp_path / "call.flac", tones, 16_000)
    for number in range(4):
        alone = tones[number * 32_000 :][:32_000]
        soundfile.write(tmp_path / f"part-{number}.wav", alone, 16_000)
    call = {"audio_filepath": "call.flac", "duration": 2.0, "text": "x"}
    lines = [
        *({**call, "offset": 2 * number, "speaker": number} for number in range(4)),
        *({"audio_filepath": f"part-{number}.wav", "text": "x"} for number in range(4)),
        {**call, "offset": 7.5},
        {**call, "utterance": "first"},
        {"audio_filepath": "part-0.wav", "duration": 9.0, "text": "x", "utterance": "short"},
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\r\n" for line in lines))
    made = tokenize.run(reading(borrow("hubert", "codebook"), manifest, require_text=True))
    found = {one.utterance.id: one for one in tokenized.read(made.path / "all")}
    assert len(found) == 9
    for number in range(4):
        span, alone = found[f"call@{2 * number}"], found[f"part-{number}"]
        assert (span.utterance.duration, span.utterance.speaker) == (2.0, str(number))
        assert span.utterance.document == "call"
        assert np.mean(expand(span.units) == expand(alone.units)) > 0.9
    assert found["first"].utterance.duration == 2.0
    past = "7.50 s to 9.50 s is wanted of it, but it ends after 8.00 s"
    check(
        rejected(made),
        {
            str(tmp_path / "call.flac"): past,
            str(tmp_path / "part-0.wav"): "is 2.00 s long, not 9.00 s",
        },
    )


def test_bad_paths_in_a_folder_and_in_a_manifest_are_rejected_and_the_rest_is_read(
    borrow, tmp_path
):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    soundfile.write(folder / "good.wav", noise(1.0), 16_000)
    soundfile.write(elsewhere / "linked.wav", noise(1.0), 16_000)
    (folder / "link").symlink_to(elsewhere)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "gone.wav").symlink_to("nowhere.wav")
    latin = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.wav"))
    latin.write_bytes((folder / "good.wav").read_bytes())
    experiment = borrow("hubert", "codebook")
    made = tokenize.run(reading(experiment, folder, require_text=False))
    found = [one.utterance.id for one in tokenized.read(made.path / "all")]
    assert sorted(found) == ["good.wav", "link/linked.wav"]
    check(
        rejected(made),
        {
            f"{folder}/caf\\xe9.wav": "its name is not UTF-8",
            f"{folder}/gone.wav": "a link to nowhere.wav, which is not there",
        },
    )
    names = ["folder/good.wav", "folder/gone.wav", "x" * 300 + ".wav", "a\0b.wav", "folder"]
    manifest = tmp_path / "manifest.jsonl"
    rows = [json.dumps({"audio_filepath": name, "text": "x"}).encode() for name in names]
    rows.append(b'{"audio_filepath": "folder/caf\xe9.wav", "text": "x"}')
    manifest.write_bytes(b"\n".join(rows))
    made = tokenize.run(reading(experiment, manifest, name="listed", require_text=True))
    assert [one.utterance.id for one in tokenized.read(made.path / "all")] == ["folder/good"]
    reasons = "\n".join(rejected(made).values())
    for part in ("which is not there", "File name too long", "no such file", "is not a file"):
        assert part in reasons
    assert "not JSON" in reasons and made.summary["rejected"] == 5


def test_separate_operators_make_the_very_same_artifact(borrow, workspace):
    experiment = borrow("corpus", "hubert", "codebook")
    decoders = Workers(count=1, num_cpus=0.5)
    changes = {"operators": "separate", "decoders": decoders}
    settings = experiment.tokenize.model_copy(update=changes)
    made = tokenize.run(experiment.model_copy(update={"tokenize": settings}))
    fused = artifact.load(workspace.path / "tokens", "tokens")
    assert (made.fingerprint, made.summary) == (fused.fingerprint, fused.summary)
    assert any(name.startswith("phone_information") for name in made.summary)


def test_a_source_of_which_nothing_can_be_used_is_an_error_and_is_read_again_once_mended(
    borrow, tmp_path
):
    experiment = borrow("hubert", "codebook")
    manifest = tmp_path / "manifest.jsonl"
    lines = [{"audio_filepath": f"{number}.wav", "text": "x"} for number in range(5)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    listed = experiment.workspace / "mine.rejected.jsonl"
    mine = reading(experiment, manifest, require_text=True)
    with pytest.raises(ValueError, match="nothing of 'all' can be used: 5 rejected") as raised:
        tokenize.run(mine)
    assert f"{tmp_path / '0.wav'}: no such file" in str(raised.value)
    assert str(listed) in str(raised.value)
    assert [json.loads(line)["reason"] for line in listed.open()] == [
        f"{tmp_path / f'{number}.wav'}: no such file" for number in range(5)
    ]
    assert not (experiment.workspace / "mine").exists()
    soundfile.write(tmp_path / "3.wav", noise(1.0), 16_000)
    made = tokenize.run(mine)
    assert (made.summary["utterances"], made.summary["rejected"]) == (1, 4)
    assert not listed.exists()
    manifest.write_text("{}\n" * 3)
    with pytest.raises(ValueError, match="neither audio_filepath nor text"):
        tokenize.run(reading(experiment, manifest, name="other"))
    manifest.write_text("")
    with pytest.raises(ValueError, match=r"manifest\.jsonl: holds no utterance"):
        tokenize.run(reading(experiment, manifest, name="other"))


def test_a_codebook_without_any_clip_says_why(borrow, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.wav").write_text("Dear Sir or Madam")
    experiment = reading(borrow("hubert"), tmp_path / "folder", codebook=None)
    with pytest.raises(AudioError, match=r"to fit a codebook on: .*letter\.wav: cannot be read"):
        tokenize.run(experiment)


def test_a_codebook_goes_where_the_encoder_has_what_its_base_heard(borrow, workspace):
    experiment = borrow("corpus")
    base, codebook = (workspace.path / kind for kind in ("hubert", "codebook"))
    before, further = (HubertEncoder.load(base).eval() for _ in range(2))
    away = 50 * torch.randn(further.width, generator=torch.Generator().manual_seed(0))
    last = further.model.encoder.transformer.layers[further.layer - 1]
    last.feed_forward.output_dense.bias.data += away
    inputs = {"base": artifact.load(base, "hubert")}
    with artifact.create(experiment.workspace / "hubert", "hubert", {}, inputs) as draft:
        further.save(draft.path)
    settings = experiment.tokenize.model_copy(update={"codebook": str(codebook)})
    experiment = experiment.model_copy(update={"tokenize": settings})
    with pytest.raises(ConfigError, match=r"tokenize\.codebook .*pretrain\.base has to name it"):
        tokenize.run(experiment)
    pretrain = experiment.pretrain.model_copy(update={"base": str(base)})
    tokenize.run(experiment.model_copy(update={"pretrain": pretrain}))
    moved = Codebook.load(experiment.workspace / "codebook")
    wave = audio.read(next(iter((workspace.path / "corpus" / "audio").rglob("*.flac"))))
    then, now = (encoder.features([wave])[0].numpy() for encoder in (before, further))
    alike = moved.assign(now) == Codebook.load(codebook).assign(then)
    assert alike.mean() > 0.8
    assert (Codebook.load(codebook).assign(now) == moved.assign(now)).mean() < 0.5


def test_a_source_without_audio_is_an_error(borrow, tmp_path):
    experiment = borrow("hubert", "codebook")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AudioError, match="holds no audio file"):
        tokenize.run(reading(experiment, empty))
    with pytest.raises(artifact.ArtifactError, match=r"no such file or directory: .*/nowhere"):
        tokenize.run(reading(experiment, tmp_path / "nowhere"))


def test_clips_that_cannot_be_read_are_passed_over_when_a_codebook_is_fitted(workspace, recordings):
    hubert, settings = workspace.path / "hubert", workspace.experiment.tokenize
    encode = EncodeFeatures(hubert, settings)

    def features(*names: str) -> np.ndarray:
        clips = [Utterance(id=name, audio=recordings / name) for name in names]
        return encode(Part("part", clips))

    good = features("a-good.wav")
    assert len(good) > 10
    assert np.array_equal(features("c-empty.wav", "a-good.wav", "gone.wav", "e-letter.wav"), good)
    assert len(features("c-empty.wav")) == 0
    limit = settings.max_seconds / 1.0
    assert len(good) * limit / 2 < len(features("g-lecture.flac")) < len(good) * limit * 1.1


def test_units_of_the_corpus_last_as_long_as_its_audio(workspace):
    made = artifact.load(workspace.path / "tokens", "tokens")
    written = {split: list(tokenized.read(made.path / split)) for split in tokenize.CORPUS_SPLITS}
    assert made.summary["utterances"] == sum(map(len, written.values()))
    assert made.summary["rejected"] == 0
    for split, utterances in written.items():
        for one in utterances:
            assert (one.units is None) == (split == "text")
            if one.units is not None:
                frames = one.units.durations.sum() * 0.02
                assert frames == pytest.approx(one.utterance.duration, abs=0.05)
                assert 0 <= one.units.ids.min() <= one.units.ids.max() < 16


def test_units_of_a_clip_do_not_depend_on_its_batch(workspace):
    encoder = HubertEncoder.load(workspace.path / "hubert").eval()
    codebook = Codebook.load(workspace.path / "codebook")
    for one in tokenized.read(workspace.path / "tokens" / "dev"):
        [clip] = (workspace.path / "corpus" / "audio").rglob(f"{one.utterance.id}.flac")
        [features] = encoder.features([audio.read(clip)])
        alone = codebook.encode(features.detach().numpy())
        # A frame on the border of two units may fall on either side of it.
        assert np.mean(expand(alone) == expand(one.units)) > 0.98


def test_a_summary_counts_the_letters_that_the_encoder_hears_if_it_hears_any():
    nothing = {"all": tokenize.Counted()}
    assert tokenize._summary(nothing, 0, " ab")["letters"] == 3
    assert "letters" not in tokenize._summary(nothing, 0, None)


def test_a_manifest_that_is_no_file_is_named(tmp_path):
    with pytest.raises(ManifestError, match="cannot read manifest"):
        tokenize.Listing(tmp_path / "gone.jsonl")
