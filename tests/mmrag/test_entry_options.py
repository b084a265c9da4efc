"""Who speaks, as a command line says it."""

import argparse

import pytest

from mmrag.config import ESPEAK, Speaking
from mmrag.entry_options import add_speaking, speaking


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_speaking(parser)
    return parser.parse_args(arguments)


def test_espeak_speaks_once_where_nobody_says_who():
    assert speaking(parsed()) == ESPEAK


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ("espeak", {"espeak": 1}),
        ("espeak,kokoro", {"espeak": 1, "kokoro": 1}),
        ("espeak=3,kokoro=0.5", {"espeak": 3, "kokoro": 0.5}),
    ],
)
def test_engines_have_the_shares_that_are_given(given, shares):
    assert parsed("--voices", given).voices == shares
    assert speaking(parsed("--takes", "8")) == Speaking(takes=8)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--voices", value) for value in ("flite", "", "espeak=0", "espeak=much", "kokoro=inf")),
        *(("--takes", value) for value in ("0", "9", "two")),
    ],
)
def test_a_wrong_option_is_wrong_usage_and_named(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(option, value)
    assert ended.value.code == 2 and f"argument {option}" in capsys.readouterr().err


def test_a_synthesizer_that_is_not_there_or_does_not_speak_is_named(tmp_path):
    with pytest.raises((OSError, ImportError), match=r"jobs\.fetch_voices|pip install"):
        speaking(parsed("--voices", "kokoro", "--kokoro", str(tmp_path)))
    with pytest.raises(ValueError, match="--kokoro: it does not speak"):
        speaking(parsed("--kokoro", str(tmp_path)))
