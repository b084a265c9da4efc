import json

import numpy as np
import pytest
import soundfile

from mmrag.corpora import recordings
from mmrag.corpora.recordings import Rerecorded
from mmrag.corpora.voices.speech import SPEEDS
from mmrag.records import Rejection
from mmrag.speech.audio import SAMPLE_RATE, AudioError


@pytest.fixture
def manifests(tmp_path):
    """Two manifests of people: three lines of training, of which one can be used, one of dev."""
    folder = tmp_path / "people"
    folder.mkdir()
    tone = 0.3 * np.sin(np.arange(SAMPLE_RATE) / 9)
    soundfile.write(folder / "one.wav", tone, SAMPLE_RATE)
    said = {"audio_filepath": "one.wav", "text": "we call it bear", "speaker": "0001", "age": 9}
    lines = [json.dumps(said), "no json", json.dumps({"text": "only text"})]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "dev.jsonl").write_text(json.dumps({**said, "domain": "visitors"}) + "\n")
    return {"lm": folder / "train.jsonl", "dev": folder / "dev.jsonl"}


def test_training_is_heard_several_times_and_dev_once(manifests):
    planned = list(recordings.plan(manifests, copies=3, seed=1))
    kept = [(split, one) for split, one in planned if isinstance(one, Rerecorded)]
    assert [split for split, _ in kept] == ["lm"] * 3 + ["dev"]
    assert [one.said.domain for _, one in kept] == ["people"] * 3 + ["visitors"]
    assert [one.seed is None for _, one in kept] == [True, False, False, True]
    assert len({one.said.id for _, one in kept}) == 4
    assert {one.said.text for _, one in kept} == {"we call it bear"}
    rejected = [one for _, one in planned if isinstance(one, Rejection)]
    assert [one.reason.split(":")[0] for one in rejected] == [
        "not JSON",
        "text without a recording",
    ]
    assert planned == list(recordings.plan(manifests, copies=3, seed=1))
    other = [one for _, one in recordings.plan(manifests, copies=3, seed=2)]
    assert other[1] != planned[1][1]


def test_a_copy_is_recorded_worse_and_at_another_speed_the_same_each_time(manifests):
    plain, *copies = [
        one
        for split, one in recordings.plan(manifests, copies=25, seed=1)
        if split == "lm" and isinstance(one, Rerecorded)
    ]
    said, wave = recordings.record(plain)
    assert (said.speaker, said.text, said.age) == ("0001", "we call it bear", 9)
    np.testing.assert_allclose(wave, 0.3 * np.sin(np.arange(SAMPLE_RATE) / 9), atol=1e-3)
    speeds = {round(SAMPLE_RATE / len(recordings.record(one)[1]), 2) for one in copies}
    assert min(SPEEDS) - 0.05 < min(speeds) < 1 < max(speeds) < max(SPEEDS) + 0.05
    _, first = recordings.record(copies[0])
    np.testing.assert_array_equal(first, recordings.record(copies[0])[1])
    assert np.abs(first).max() <= 1


def test_a_recording_that_cannot_be_read_is_named(manifests):
    [(_, one)] = list(recordings.plan({"dev": manifests["dev"]}, copies=1, seed=1))
    one.said.audio.write_bytes(b"RIFF")
    with pytest.raises(AudioError, match=r"one\.wav"):
        recordings.record(one)


@pytest.mark.parametrize(
    ("domain", "named"),
    [
        ("visitors-2", "visitors-2"),
        ("日本_é", "日本_é"),
        (".speech", "_speech"),
        ("../../etc", "______etc"),
        ("/tmp/a", "_tmp_a"),
        ("a\0b c", "a_b_c"),
        ("d" * 300, "d" * 40),
    ],
)
def test_what_a_manifest_calls_a_domain_is_a_sound_part_of_a_file_name(
    manifests, tmp_path, domain, named
):
    path = tmp_path / "named.jsonl"
    row = {**json.loads(manifests["dev"].read_text()), "domain": domain}
    path.write_text(json.dumps(row) + "\n")
    [(_, one)] = recordings.plan({"dev": path}, copies=1, seed=1)
    assert (one.said.id, one.said.domain) == (f"{named}-dev-000000-0", domain)


@pytest.mark.parametrize("duration", [0, 0.02])
def test_a_recording_shorter_than_a_frame_is_named_each_time_that_it_is_to_stand(
    manifests, tmp_path, duration
):
    path = tmp_path / "short.jsonl"
    row = {"audio_filepath": "people/one.wav", "text": "bear", "offset": 0, "duration": duration}
    path.write_text(json.dumps(row) + "\n")
    for _, one in recordings.plan({"lm": path}, copies=2, seed=1):
        with pytest.raises(AudioError, match=r"one\.wav: .* shorter than 0\.025 s"):
            recordings.record(one)
