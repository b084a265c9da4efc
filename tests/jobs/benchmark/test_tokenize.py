"""The measurements of tokenizing, with figures made up and with few clips."""

import numpy as np
import pytest
import soundfile

from jobs.benchmark import encoded, tokenize
from jobs.benchmark.encoded import Encoding
from mmrag import shipped

RESULTS = {
    "tokenize.vs_forward": 0.93,
    "tokenize.vs_forward_started": 0.5,
    "tokenize.vs_naive": 2.5,
    "tokenize.vs_naive_whole": 1.9,
    "audio_seconds": 600.0,
    "cores": 2,
    "bf16_units_alike": 0.997,
    "real_time_factors": {"mmrag:tiny, pipeline": 500.0},
}


@pytest.fixture(scope="module")
def order(tmp_path_factory) -> Encoding:
    directory, random = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
    files = tuple(directory / f"{number}.flac" for number in range(3))
    for number, file in enumerate(files):
        soundfile.write(file, random.normal(0, 0.1, 8_000 * (number + 1)), 16_000)
    model = shipped.find(shipped.TINY)
    return Encoding(model / "hubert", model / "codebook", files, 2.0, 0.0)


def test_the_encoder_alone_hears_every_file_once(order):
    run = encoded.bare(order)
    for _ in range(2):
        assert sum(run()) == pytest.approx(0.5 + 1.0 + 1.5)


def test_most_frames_keep_their_unit_in_bf16(order):
    assert 0.9 < encoded.alike_in_bf16(order) <= 1


def test_what_was_measured_is_shown_beside_its_targets(capsys):
    tokenize.show(RESULTS)
    shown = capsys.readouterr().out
    assert shown.count("met") == 2 and shown.count("missed") == 1
    assert "0.50 of the encoder's speed" in shown and "99.70%" in shown
