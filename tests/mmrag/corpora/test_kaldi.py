from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmrag.corpora import lhotse_cuts
from mmrag.corpora.splits import CorpusError
from mmrag.records import Rejection, Utterance

TRAP = "trap"


@pytest.fixture
def data(tmp_path) -> Path:
    """A data directory with one recording of four seconds and one of two."""
    for name, seconds in (("a", 4), ("b", 2)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(seconds * 8000), 8000)
    write(tmp_path, "wav.scp", f"rec-a {tmp_path}/a.wav", "rec-b b.wav")
    return tmp_path


def write(directory: Path, name: str, *rows: str) -> None:
    (directory / name).write_text("".join(row + "\n" for row in rows))


def read(directory: Path) -> tuple[dict[str, Utterance], dict[str, str]]:
    rows = list(lhotse_cuts.read(directory).splits["all"])
    said = {one.id: one for one in rows if isinstance(one, Utterance)}
    return said, {one.source: one.reason for one in rows if isinstance(one, Rejection)}


def test_segments_are_stretches_of_their_recordings(data):
    write(data, "segments", "u1 rec-a 0.5 2.25", "u2 rec-a 2.25 -1", "u3 rec-b 0 2")
    write(data, "text", "u1 call mary", "u2 and john", "u3")
    write(data, "utt2spk", "u1 spk1", "u2 spk2", "u3 spk1")
    said, rejected = read(data)
    assert rejected == {}
    first, second, third = said["u1"], said["u2"], said["u3"]
    assert (first.audio, first.offset, first.duration) == (data / "a.wav", 0.5, 1.75)
    assert (second.offset, second.duration) == (2.25, 1.75)
    assert (first.text, first.speaker, first.document) == ("call mary", "spk1", "rec-a")
    assert third.audio == data / "b.wav" and third.text is None


def test_a_recording_is_an_utterance_where_there_are_no_segments(data):
    write(data, "text", "rec-a hello there")
    said, rejected = read(data)
    assert rejected == {}
    assert (said["rec-a"].text, said["rec-a"].duration) == ("hello there", 4.0)
    assert said["rec-b"].text is None


def test_a_directory_of_recordings_alone_has_no_transcripts(data):
    said, _ = read(data)
    assert {one.text for one in said.values()} == {None} and len(said) == 2


def test_a_command_in_wav_scp_is_refused_by_name_and_not_run(data):
    trap = data / TRAP
    with (data / "wav.scp").open("a") as stream:
        stream.write(f"rec-c touch {trap} |\nrec-d sph2pipe -f wav x.sph|\n")
    said, rejected = read(data)
    assert set(said) == {"rec-a", "rec-b"} and not trap.exists()
    assert rejected[f"{data}/wav.scp:3"].startswith(
        f"a shell command, which is not run: touch {trap} |"[:110]
    )
    assert "not run" in rejected[f"{data}/wav.scp:4"]


def test_damaged_lines_are_named_and_the_others_read(data):
    with (data / "wav.scp").open("a") as stream:
        stream.write("rec-c gone.wav\nrec-a again.wav\nrec-e\n")
    (data / "broken.wav").write_text("no audio")
    with (data / "wav.scp").open("a") as stream:
        stream.write(f"rec-f {data}/broken.wav\n")
    write(
        data,
        "segments",
        "good rec-a 0 1",
        "short rec-a 0",
        "word rec-a zero 1",
        "lost rec-c 0 1",
        "past rec-b 1 9",
        "back rec-b 2 1",
    )
    write(data, "text", "good yes", "past yes", "back yes", "nobody yes")
    said, rejected = read(data)
    assert list(said) == ["good"]
    told = {
        f"{data}/wav.scp:3": "no such file: gone.wav",
        f"{data}/wav.scp:4": "'rec-a' stands twice",
        f"{data}/wav.scp:5": "no file",
        f"{data}/wav.scp: rec-f": "cannot be read as audio",
        f"{data}/segments:2": "not a segment, its recording, its start and its end",
        f"{data}/segments:3": "could not convert string to float: 'zero'",
        f"{data}/segments:4": "its recording 'rec-c' is not read",
        f"{data}/text: nobody": "no such recording or segment is read",
        f"{data}/wav.scp: rec-b": "supervision",
    }
    assert rejected.keys() == told.keys()
    assert all(reason in rejected[place] for place, reason in told.items())


def test_a_directory_of_which_no_recording_is_left_is_an_error(tmp_path):
    write(tmp_path, "wav.scp", "a cat secret |")
    with pytest.raises(CorpusError, match=r"no recording that can be read; the first: a shell"):
        read(tmp_path)
