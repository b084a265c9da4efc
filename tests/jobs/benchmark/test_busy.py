"""A simulated encoder, in the place of one."""

import json

import pytest

from cluster.parts import Part
from cluster.tokenizing import DecodeClips, EncodeClips, EncodeUnits, WriteUnits
from jobs.benchmark import busy
from jobs.benchmark.busy import EncodeSimulated, EncodeUnitsSimulated, Recordings
from mmrag.config import Tokenize, Workers
from mmrag.speech.tokenized import read_part


@pytest.fixture
def reading(tmp_path) -> Recordings:
    lengths = (0.5, 0.75, 1.0)
    (tmp_path / "noise").mkdir()
    busy.write_noise(tmp_path / "noise", lengths)
    return Recordings(tmp_path / "noise", lengths, hours=0.01, part_seconds=10.0)


def settings() -> Tokenize:
    return Tokenize(
        units=2,
        sample_seconds=1,
        min_seconds=0.1,
        max_seconds=60,
        batch_seconds=3,
        part_seconds=10,
        require_text=True,
        workers=Workers(count=1, num_cpus=1),
    )


def test_simulated_recordings_fill_the_hours_that_are_asked_for(reading):
    parts = list(reading())
    said = [one for part in parts for one in part.work]
    assert len({one.id for one in said}) == len(said)
    assert 36 <= sum(one.duration for one in said) < 37
    assert [part.name for part in parts] == [f"all/part-{n:05d}" for n in range(len(parts))]


def test_a_simulated_encoder_takes_its_time_for_every_second_and_logs_it(reading, tmp_path):
    """… and the parts are those that any encoder's would be, in one process and in several."""
    part: Part = next(iter(reading()))
    log = tmp_path / "log"
    log.mkdir()
    decoded = DecodeClips(settings())(part)
    encoded = EncodeSimulated(1e4, log)(decoded)
    for way in ("separate", "fused"):
        (tmp_path / way).mkdir()
    written = WriteUnits(tmp_path / "separate", busy.FRAMES)(encoded)
    fused = EncodeUnitsSimulated(1e4, log, settings(), tmp_path / "fused")(part)
    assert written == fused
    assert written.count.seconds == pytest.approx(sum(one.duration for one in part.work))
    [file] = log.iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(one["seconds"] for one in lines) == pytest.approx(2 * written.count.seconds)
    assert all(one["ended"] - one["began"] >= one["seconds"] / 1e4 for one in lines)
    names = [[one.utterance.id for one in read_part(tmp_path / way / "all/part-00000.parquet")]
             for way in ("separate", "fused")]  # fmt: skip
    assert names[0] == names[1] and len(names[0]) == len(part.work)


def test_only_the_encoder_is_simulated(tmp_path):
    replaced = [
        busy.simulated((stage, {"settings": 1}), 400.0, tmp_path, settings(), tmp_path)[0]
        for stage in (DecodeClips, EncodeClips, WriteUnits, EncodeUnits)
    ]
    assert replaced == [DecodeClips, EncodeSimulated, WriteUnits, EncodeUnitsSimulated]
