"""The command that scores anybody's transcripts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import score

BIASING = (
    'u1\tthey met jondrette here\t["jondrette"]\t["jondrette", "kaor"]\n'
    'u2\tkaor john carter\t["kaor"]\t["kaor", "mogs"]\n'
    "u3\tyes indeed\t[]\t[]\n"
)
HEARD = "u3\tyes indeed\nu1\tthey met john here\nu2\tkaor kaor john carter\n"


@pytest.fixture
def files(tmp_path: Path):
    """Write references and hypotheses; give the command's arguments."""

    def written(references: str | bytes, hypotheses: str | bytes, *more: str) -> list[str]:
        arguments = []
        for name, content in (("refs", references), ("hyps", hypotheses)):
            path = tmp_path / f"{name}.tsv"
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            arguments += [f"--{name}", str(path)]
        return [*arguments, *more]

    return written


def printed(capsys, arguments: list[str]) -> str:
    score.main(arguments)
    return capsys.readouterr().out


def as_json(capsys, arguments: list[str]) -> dict:
    return json.loads(printed(capsys, [*arguments, "--json"]))


def refused(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        score.main(arguments)
    message = stopped.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def test_a_file_with_lists_has_all_three_rates(files, capsys):
    found = as_json(capsys, files(BIASING, HEARD))
    assert found["utterances"] == 3 and found["missing"] == found["without_reference"] == []
    assert found["wer"]["rate"] == 2 / 9 and found["u_wer"]["rate"] == 0.0
    biased = found["b_wer"]
    assert (biased["substitutions"], biased["insertions"], biased["reference"]) == (1, 1, 2)
    for rate in (found["wer"], found["u_wer"], biased):
        assert rate["low"] <= rate["rate"] <= rate["high"]


def test_a_plain_file_has_wer_alone(files, capsys):
    found = as_json(capsys, files("u1\tcall anna\nu2\tyes\n", "u1\tcall hannah\nu2\tyes\n"))
    assert found["wer"]["rate"] == 1 / 3
    assert not {"u_wer", "b_wer"} & found.keys()


def test_the_table_has_rates_intervals_and_counts(files, capsys):
    header, *lines = printed(capsys, files(BIASING, HEARD)).splitlines()
    assert header.split() == ["rate", "95", "%", "interval", "sub", "del", "ins", "words"]
    assert [line.split()[0] for line in lines] == ["WER", "U-WER", "B-WER"]
    assert lines[2].split()[1] == "100.00%" and lines[2].split()[3:] == ["1", "0", "1", "2"]


def test_a_rate_of_no_words_is_left_open(files, capsys):
    arguments = files("u1\tyes\t[]\t[]\n", "u1\tno\n")
    assert printed(capsys, arguments).splitlines()[3].split() == ["B-WER", "–", "–", *"0000"]
    assert as_json(capsys, arguments)["b_wer"]["rate"] is None
    assert "B-WER: error_rate=None, ref_words=0" in printed(capsys, [*arguments, "--benchmark"])


def test_the_benchmarks_lines_are_as_in_its_own_result_files(files, capsys):
    assert printed(capsys, files(BIASING, HEARD, "--benchmark")) == (
        "WER: error_rate=22.22222222222222, ref_words=9, subs=1, ins=1, dels=0\n"
        "U-WER: error_rate=0.0, ref_words=7, subs=0, ins=0, dels=0\n"
        "B-WER: error_rate=100.0, ref_words=2, subs=1, ins=1, dels=0\n"
    )


def test_a_byte_order_mark_line_ends_and_empty_lines_change_nothing(files, capsys):
    expected = as_json(capsys, files(BIASING, HEARD))
    strange = [
        "\ufeff" + BIASING.replace("\n", "\r\n"),
        BIASING.replace("\n", "\r"),
        "\n" + BIASING.replace("\n", "\n\n").rstrip("\n"),
    ]
    for references in strange:
        assert (
            as_json(capsys, files(references, "\ufeff" + HEARD.replace("\n", "\r\n"))) == expected
        )


def test_nothing_heard_may_be_written_with_a_tab_or_without(files, capsys):
    for hypotheses in ("u1\nu2\tyes\n", "u1\t\nu2\tyes\n"):
        found = as_json(capsys, files("u1\tcall anna\nu2\tyes\n", hypotheses))
        assert (found["wer"]["deletions"], found["missing"]) == (2, [])


def test_missing_hypotheses_are_named(files):
    references = "".join(f"u{number}\tyes\n" for number in range(9))
    assert refused(files(references, "u0\tyes\nu1\tyes\n")) == (
        "error: 7 of 9 utterances have no hypothesis: u2, u3, u4, u5, u6 and 2 more; "
        "--missing empty counts all their words as deleted"
    )


def test_missing_hypotheses_count_as_deleted_where_that_is_asked_for(files, capsys):
    score.main(files(BIASING, "u1\tthey met jondrette here\n", "--missing", "empty", "--json"))
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["wer"]["deletions"] == 5 and found["b_wer"]["deletions"] == 1
    assert found["missing"] == ["u2", "u3"]
    assert err == ("note: 2 of 3 utterances have no hypothesis and count as deleted: u2, u3\n")


def test_a_hypothesis_without_a_reference_is_told(files, capsys):
    score.main(files("u1\tyes\n", "u1\tyes\nu7\tno\n", "--json"))
    out, err = capsys.readouterr()
    assert json.loads(out)["without_reference"] == ["u7"]
    assert err == "note: 1 hypotheses have no reference and were not scored: u7\n"


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ("u1\ta\nu2\tb\nu1\tc\n", "u1\ta\n", "refs.tsv, line 3: utterance u1 is there twice"),
        ("u1\ta\n", "u1\ta\n\nu1\ta\n", "hyps.tsv, line 3: utterance u1 is there twice"),
        ('u1\ta\t["a"\t[]\n', "u1\ta\n", "refs.tsv, line 1: rare words: not JSON: "),
        ("u1\ta\t[]\t[]\nu2\tb\t[]\t[,]\n", "", "refs.tsv, line 2: biasing words: not JSON: "),
        ('u1\ta\t{"a": 1}\t[]\n', "", "line 1: rare words: not a JSON list of words"),
        ("u1\ta\t[]\t[1]\n", "", "line 1: biasing words: not a JSON list of words"),
        (f"u1\ta\t{'[' * 100_000}\t[]\n", "", "line 1: rare words: not a JSON list of words"),
        ('u1\ta\t["new york"]\t[]\n', "", 'line 1: rare words: "new york" is not one word; a phr'),
        ('u1\ta\t[""]\t[]\n', "", 'line 1: rare words: "" is not one word'),
        ("u1\ta\t[]\n", "u1\ta\n", "refs.tsv, line 1: 3 columns; a reference has 2 (utterance, te"),
        ("u1 a\n", "u1\ta\n", "refs.tsv, line 1: 1 column; a reference has 2"),
        ("u1\ta\t[]\t[]\nu2\tb\n", "", "line 2: 2 columns, where the lines before it have 4"),
        ("u1\ta\n", "u1\ta\tb\n", "hyps.tsv, line 1: 3 columns; a hypothesis has 2"),
        ("\ta\n", "u1\ta\n", "refs.tsv, line 1: the first column, the utterance, is empty"),
        ("\n", "u1\ta\n", "refs.tsv holds no utterance"),
        ("u1\t\n", "u1\ta\n", "no reference words to score against in 1 utterances"),
        (b"u1\t\xff\n", "u1\ta\n", "refs.tsv is not UTF-8: byte 3"),
        ("u1\ta\n", b"\xff\xfeu\x001\x00", "hyps.tsv is not UTF-8: byte 0"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused_in_one_line(
    files, references, hypotheses, message
):
    assert message in refused(files(references, hypotheses))


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "nowhere.tsv" in refused(["--refs", str(tmp_path / "nowhere.tsv"), "--hyps", "x"])


def test_words_are_as_written_unless_normalising_is_asked_for(files, capsys):
    arguments = files('u1\tAsk Jondrette.\t["Jondrette."]\t[]\n', "u1\task jondrette\n")
    assert as_json(capsys, arguments)["wer"]["substitutions"] == 2
    found = as_json(capsys, [*arguments, "--normalise"])
    assert (found["wer"]["rate"], found["b_wer"]["reference"], found["normalised"]) == (0, 1, True)


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "x"])
def test_a_number_of_resamples_that_is_none_is_refused(files, capsys, number):
    with pytest.raises(SystemExit) as stopped:
        score.main(files("u1\ta\n", "u1\ta\n", "--resamples", number))
    assert stopped.value.code == 2
    assert f"'{number}' is not a number from 1" in capsys.readouterr().err


def test_scoring_needs_neither_ray_nor_a_model(files):
    """In a process of its own: what it loads is what makes it slow to start."""
    code = (
        "import sys; from jobs import score; score.main(sys.argv[1:]); "
        "heavy = {'ray', 'torch', 'faiss', 'mlflow', 'cluster', 'transformers'}; "
        "sys.exit(f'loaded {heavy & sys.modules.keys()}' if heavy & sys.modules.keys() else 0)"
    )
    command = [sys.executable, "-c", code, *files(BIASING, HEARD)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "B-WER" in done.stdout
