import json

import pytest

from mmrag.corpora import librispeech_biasing
from mmrag.corpora.splits import CorpusError
from mmrag.records import Rejection


def line(id: str, text: str, rare: list, listed: list) -> str:
    return "\t".join([id, text, json.dumps(rare), json.dumps(listed)]) + "\n"


GOOD = line("61-70968-0000", "he began a harangue", ["harangue"], ["harangue", "zanab"])


def test_rare_words_are_entities_and_the_list_goes_with_the_utterance(tmp_path):
    table = tmp_path / "test-clean.biasing_100.tsv"
    table.write_text(GOOD + line("61-70968-0001", "and so on", [], ["kuri"]))
    tree = tmp_path / "LibriSpeech" / "test-clean"
    tree.mkdir(parents=True)
    corpus = librispeech_biasing.read(table, tmp_path)
    first, second = corpus.splits["test"]
    assert (first.text, first.entities) == ("he began a harangue", ("harangue",))
    assert first.audio == tree / "61" / "70968" / "61-70968-0000.flac"
    assert (first.speaker, first.document, first.domain) == ("61", "61-70968", "test-clean")
    assert second.entities == ()
    assert corpus.phrases == {"61-70968-0000": ["harangue", "zanab"], "61-70968-0001": ["kuri"]}
    written = [json.loads(one) for one in librispeech_biasing.written(corpus.phrases)]
    assert written[1] == {"utterance": "61-70968-0001", "phrases": ["kuri"]}


def test_the_audio_lies_beside_the_table_unless_another_tree_is_named(tmp_path):
    table = tmp_path / "mine.tsv"
    table.write_text(GOOD)
    [said] = librispeech_biasing.read(table).splits["all"]
    assert said.audio == tmp_path / "61" / "70968" / "61-70968-0000.flac"


def test_a_pattern_names_the_tables_of_one_length(tmp_path):
    for chapter, name in enumerate(("test-clean", "test-other", "dev-clean")):
        for size in (100, 500):
            row = GOOD.replace("70968", str(chapter))
            (tmp_path / f"{name}.biasing_{size}.tsv").write_text(row)
    corpus = librispeech_biasing.read(tmp_path / "*.biasing_100.tsv")
    assert {name: [one.domain for one in rows] for name, rows in corpus.splits.items()} == {
        "dev": ["dev-clean"],
        "test": ["test-clean", "test-other"],
    }
    with pytest.raises(CorpusError, match="list the same utterances"):
        librispeech_biasing.read(tmp_path)


def test_damaged_rows_are_named_and_the_others_read(tmp_path):
    table = tmp_path / "test-clean.biasing_100.tsv"
    table.write_text(
        GOOD
        + "61-70968-0001\tthree\tcolumns\n"
        + line("../1-2", "text", [], [])
        + line("61-70968-0002", " ", [], [])
        + "61-70968-0003\ttext\t[broken\t[]\n"
        + "61-70968-0004\ttext\t[]\t[1]\n"
        + line("61-70968-0005", "text", ["text"], ["other"])
        + GOOD
        + "\n"
        + line("61-70968-0006", "text", [], [])
    )
    corpus = librispeech_biasing.read(table)
    rows = list(corpus.splits["test"])
    good = [one.id for one in rows if not isinstance(one, Rejection)]
    assert good == ["61-70968-0000", "61-70968-0006"] and list(corpus.phrases) == good
    assert [(one.source, one.reason) for one in rows if isinstance(one, Rejection)] == [
        (f"{table}:2", "3 columns, not utterance, reference, rare words and biasing words"),
        (f"{table}:3", "'../1-2' is not an utterance of LibriSpeech (speaker-chapter-number)"),
        (f"{table}:4", "61-70968-0002: no reference"),
        (
            f"{table}:5",
            "61-70968-0003: rare words are not JSON: Expecting value: line 1 column 2 (char 1)",
        ),
        (f"{table}:6", "61-70968-0004: biasing words are not a list of words: [1]"),
        (f"{table}:7", "61-70968-0005: rare words that are not among its biasing words: ['text']"),
        (str(table), "utterance '61-70968-0000' stands twice"),
    ]


def test_no_table_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="no biasing table"):
        librispeech_biasing.read(tmp_path / "*.tsv")
