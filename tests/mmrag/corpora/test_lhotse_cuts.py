import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import (
    CutSet,
    MonoCut,
    MultiCut,
    Recording,
    RecordingSet,
    SupervisionSegment,
    SupervisionSet,
)
from lhotse.audio import AudioSource
from lhotse.supervision import AlignmentItem

from mmrag.corpora import lhotse_cuts
from mmrag.corpora.splits import CorpusError
from mmrag.records import Rejection, Timed, Utterance


def recording(directory: Path, name: str, seconds: float = 4.0, channels: int = 1) -> Recording:
    path = directory / f"{name}.wav"
    soundfile.write(path, np.zeros((round(seconds * 16_000), channels)), 16_000)
    return Recording.from_file(path, recording_id=name)


def supervision(id: str, recording_id: str, start: float, duration: float, **fields):
    return SupervisionSegment(id, recording_id, start, duration, **{"text": "hello", **fields})


def rows(path: Path, split: str = "all") -> tuple[dict[str, Utterance], dict[str, str]]:
    found = list(lhotse_cuts.read(path).splits[split])
    said = {one.id: one for one in found if isinstance(one, Utterance)}
    return said, {one.source: one.reason for one in found if isinstance(one, Rejection)}


def of(directory: Path, *cuts: object, name: str = "cuts.jsonl") -> Path:
    path = directory / name
    CutSet.from_cuts(cuts).to_file(path)
    return path


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz", "cuts.json.gz"])
def test_a_supervision_is_an_utterance_of_its_recording(tmp_path, name):
    words = [
        AlignmentItem("", 0.5, 0.25),
        AlignmentItem("hello", 0.75, 0.5),
        AlignmentItem("there", 1.25, 0.25),
    ]
    said = [
        supervision("s1", "a", 0.5, 1.0, text="hello there", speaker="mary").with_alignment(
            "word", words
        ),
        supervision("s2", "a", 1.5, 0.5),
    ]
    cut = MonoCut("cut", 1.0, 2.0, 0, said, recording=recording(tmp_path, "a"))
    found, rejected = rows(of(tmp_path, cut, name=name))
    assert rejected == {}
    assert found["s1"] == Utterance(
        id="s1",
        text="hello there",
        audio=tmp_path / "a.wav",
        duration=1.0,
        offset=1.5,
        speaker="mary",
        document="a",
        words=(Timed("hello", 0.25, 0.75), Timed("there", 0.75, 1.0)),
    )
    assert (found["s2"].offset, found["s2"].duration, found["s2"].words) == (2.5, 0.5, ())


def test_a_cut_without_a_supervision_and_a_recording_have_no_transcript(tmp_path):
    one = recording(tmp_path, "a")
    path = of(tmp_path, MonoCut("cut", 0.5, 2.0, 0, recording=one), name="cuts.yaml")
    found, _ = rows(path)
    assert (found["cut"].text, found["cut"].offset, found["cut"].duration) == (None, 0.5, 2.0)
    RecordingSet.from_recordings([one]).to_file(tmp_path / "recordings.jsonl.gz")
    found, _ = rows(tmp_path / "recordings.jsonl.gz")
    assert [(each.text, each.duration) for each in found.values()] == [(None, 4.0)]


def test_a_supervision_without_text_has_no_transcript(tmp_path):
    said = [
        supervision("none", "a", 0, 1, text=None),
        supervision("blank", "a", 1, 1, text=" "),
    ]
    found, _ = rows(of(tmp_path, MonoCut("c", 0, 4, 0, said, recording=recording(tmp_path, "a"))))
    assert [one.text for one in found.values()] == [None, None]


def test_recordings_go_with_the_supervisions_of_their_name_split_by_split(tmp_path):
    for part in ("train-clean-5", "dev-clean"):
        held = recording(tmp_path, f"rec-{part}")
        said = [
            supervision(f"u-{part}", held.id, 1.0, 2.0),
            supervision(f"lost-{part}", "gone", 1.0, 2.0),
        ]
        RecordingSet.from_recordings([held]).to_file(tmp_path / f"x_recordings_{part}.jsonl.gz")
        SupervisionSet.from_segments(said).to_file(tmp_path / f"x_supervisions_{part}.jsonl.gz")
    assert list(lhotse_cuts.read(tmp_path).splits) == ["lm", "dev"]
    found, rejected = rows(tmp_path, "lm")
    assert [(one.id, one.offset, one.domain) for one in found.values()] == [
        ("u-train-clean-5", 1.0, "train-clean-5")
    ]
    assert rejected == {
        f"{tmp_path}/x_supervisions_train-clean-5.jsonl.gz:2": "supervision 'lost-train-clean-5': "
        "no recording 'gone' in x_recordings_train-clean-5.jsonl.gz"
    }


def test_where_there_are_cuts_they_alone_are_read(tmp_path):
    held = recording(tmp_path, "a")
    RecordingSet.from_recordings([held]).to_file(tmp_path / "recordings.jsonl")
    of(tmp_path, MonoCut("cut", 0, 1, 0, recording=held))
    assert list(rows(tmp_path)[0]) == ["cut"]


def test_manifests_of_one_name_are_refused_and_so_are_supervisions_of_no_recordings(tmp_path):
    cut = MonoCut("cut", 0, 1, 0, recording=recording(tmp_path, "a"))
    for corpus in ("one", "two"):
        of(tmp_path, cut, name=f"{corpus}_cuts_train.jsonl")
    with pytest.raises(CorpusError, match=r"two_cuts_train\.jsonl: another manifest beside it"):
        rows(tmp_path, "lm")
    apart = tmp_path / "apart"
    apart.mkdir()
    RecordingSet.from_recordings([cut.recording]).to_file(apart / "recordings_train.jsonl")
    said = SupervisionSet.from_segments([supervision("s", "a", 0, 1)])
    said.to_file(apart / "supervisions_all_train.jsonl")
    with pytest.raises(CorpusError, match=r"same name for supervisions_all_train\.jsonl"):
        rows(apart, "lm")


def test_a_file_is_looked_for_beside_the_manifest_too(tmp_path):
    held = recording(tmp_path, "a")
    held.sources[0].source = "a.wav"
    found, _ = rows(of(tmp_path, MonoCut("cut", 0, 1, 0, recording=held)))
    assert found["cut"].audio == tmp_path / "a.wav"


def test_channels_in_a_file_of_their_own_are_read_and_one_of_several_is_refused(tmp_path):
    stereo = recording(tmp_path, "stereo", channels=2)
    left, right = recording(tmp_path, "left"), recording(tmp_path, "right")
    apart = Recording(
        "apart",
        [
            AudioSource("file", [0], left.sources[0].source),
            AudioSource("file", [1], right.sources[0].source),
        ],
        *(left.sampling_rate, left.num_samples, left.duration),
    )
    cuts = [
        MonoCut("one", 0, 1, 0, recording=stereo),
        MonoCut("own", 0, 1, 1, recording=apart),
        MultiCut("all", 0, 1, [0, 1], recording=stereo),
        MultiCut("both", 0, 1, [0, 1], recording=apart),
        MultiCut(
            "speaker", 0, 1, [0, 1], [supervision("s", "stereo", 0, 1, channel=1)], recording=stereo
        ),
    ]
    path = of(tmp_path, *cuts)
    found, rejected = rows(path)
    assert {name: one.audio.name for name, one in found.items()} == {
        "own": "right.wav",
        "all": "stereo.wav",
    }
    assert "cut 'one': channels [0] of [0, 1] have no file of their own" in rejected[f"{path}:1"]
    assert "cut 'both': channels [0, 1] of [0, 1]" in rejected[f"{path}:4"]
    assert "supervision 's': channels [1] of [0, 1]" in rejected[f"{path}:5"]


def test_what_is_more_than_a_stretch_of_a_file_is_refused_by_name(tmp_path):
    plain = MonoCut("plain", 0, 1, 0, recording=recording(tmp_path, "a"))
    command = Recording(
        "command", [AudioSource("command", [0], f"touch {tmp_path}/trap")], 16_000, 16_000, 1.0
    )
    path = of(
        tmp_path,
        plain,
        plain.resample(8000).with_id("resampled"),
        plain.perturb_speed(1.1).with_id("fast"),
        plain.perturb_volume(2.0).resample(8000).with_id("loud"),
        plain.mix(plain.with_id("other"), snr=10).with_id("mixed"),
        plain.pad(duration=2.0).with_id("padded"),
        MonoCut("command", 0, 1, 0, recording=command),
    )
    found, rejected = rows(path)
    assert set(found) == {"plain", "resampled"} and not (tmp_path / "trap").exists()
    told = {
        3: "cut 'fast': its recording is changed when it is read (Speed)",
        4: "cut 'loud': its recording is changed when it is read (Volume)",
        5: "cut 'mixed': a MixedCut is no stretch of one recording",
        6: "cut 'padded': a MixedCut is no stretch of one recording",
        7: "cut 'command': its audio is a command, and only files are read",
    }
    assert all(told[number] in rejected[f"{path}:{number}"] for number in told)
    assert len(rejected) == len(told)


def test_what_reaches_past_its_recording_is_rejected_but_for_a_hair(tmp_path):
    held = recording(tmp_path, "a")
    said = [
        supervision("before", "a", -1.0, 1.5),
        supervision("hair", "a", 3.0, 1.01),
        supervision("after", "a", 3.0, 2.0),
        supervision("nothing", "a", 3.0, 0.0),
    ]
    path = of(
        tmp_path,
        MonoCut("c", 0, 4, 0, said, recording=held),
        MonoCut("late", 3.5, 4, 0, recording=held),
        MonoCut("gone", 0, 1, 0, recording=recording(tmp_path, "b")),
    )
    (tmp_path / "b.wav").unlink()  # found out where audio is opened
    found = list(lhotse_cuts.read(path).splits["all"])
    said = {one.id: one for one in found if isinstance(one, Utterance)}
    assert list(said) == ["hair", "gone"] and said["hair"].duration == 1.0
    assert [one.reason for one in found if isinstance(one, Rejection)] == [
        "supervision 'before': it reaches from -1.000 to 0.500 s, past its recording of 4.000 s",
        "supervision 'after': it reaches from 3.000 to 5.000 s, past its recording of 4.000 s",
        "supervision 'nothing': it is no stretch of time: from 3.0 s, 0.0 s long",
        "cut 'late': it reaches from 3.500 to 7.500 s, past its recording of 4.000 s",
    ]


def test_damaged_rows_are_named_and_the_others_read(tmp_path):
    path = of(tmp_path, MonoCut("good", 0, 1, 0, recording=recording(tmp_path, "a")))
    good = path.read_text()
    path.write_text(
        good
        + "{broken\n[1]\n"
        + json.dumps({"audio_filepath": "x.wav", "text": "hello"})
        + "\n\n"
        + json.dumps({"id": "x", "type": "NoCut"})
        + "\n"
        + good.replace('"good"', '"last"')
    )
    found, rejected = rows(path)
    assert list(found) == ["good", "last"]
    assert [place.removeprefix(f"{path}:") for place in rejected] == ["2", "3", "4", "6"]
    assert "not JSON" in rejected[f"{path}:2"]
    assert "not a row of lhotse's" in rejected[f"{path}:4"]


def test_a_compressed_manifest_that_breaks_off_is_read_as_far_as_it_goes(tmp_path):
    held = recording(tmp_path, "a")
    cuts = [MonoCut(f"c{number}", 0, 1, 0, recording=held) for number in range(200)]
    path = of(tmp_path, *cuts, name="cuts.jsonl.gz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found, rejected = rows(path)
    assert 0 < len(found) < 200
    [reason] = rejected.values()
    assert "cannot be read on" in reason


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.txt", "x.json"])
def test_a_manifest_of_another_kind_is_an_error(tmp_path, name):
    line = json.dumps({"audio_filepath": "x.wav", "text": "hello"}) + "\n"
    data = gzip.compress(line.encode()) if name.endswith(".gz") else line.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=f"{name}: (holds no cut|not a manifest)"):
        rows(tmp_path / name)


def test_supervisions_alone_are_no_corpus(tmp_path):
    path = tmp_path / "supervisions.jsonl"
    SupervisionSet.from_segments([supervision("s", "a", 0, 1)]).to_file(path)
    with pytest.raises(CorpusError, match="its first row: a SupervisionSegment, not a cut"):
        rows(path)
    with pytest.raises(CorpusError, match="no cuts, no recordings"):
        rows(tmp_path)


def test_shar_archives_are_refused_by_name(tmp_path):
    held = recording(tmp_path, "a")
    shar = tmp_path / "shar"
    shar.mkdir()
    CutSet.from_cuts([MonoCut("c", 0, 1, 0, recording=held)]).to_shar(
        shar, fields={"recording": "wav"}
    )
    with pytest.raises(CorpusError, match="Shar keeps audio in archives"):
        rows(shar)


def test_without_lhotse_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with pytest.raises(ImportError, match=r"pip install mmrag\[corpora\]"):
        lhotse_cuts.read(tmp_path)


def test_a_phone_that_ends_after_more_than_a_day_is_a_rejection_that_names_it(tmp_path):
    phones = [AlignmentItem("k", 0.0, 1e9)]
    said = supervision("s1", "a", 0.0, 1.0, text="call").with_alignment("phone", phones)
    cut = MonoCut("cut", 0.0, 2.0, 0, [said], recording=recording(tmp_path, "a"))
    _, rejected = rows(of(tmp_path, cut))
    assert [reason for reason in rejected.values() if "'k' ends after 1e+09 s" in reason]
