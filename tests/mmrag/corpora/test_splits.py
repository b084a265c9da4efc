import pytest

from mmrag.corpora.splits import CorpusError, by_split, sound, split_of
from mmrag.records import Rejection, Utterance


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("train-clean-100", "lm"),
        ("fine-tune", "lm"),
        ("validation", "dev"),
        ("DEV", "dev"),
        ("test_other", "test"),
        ("datastore", "datastore"),
        ("validated", None),
        ("trainer", None),
        ("all", None),
    ],
)
def test_a_published_split_has_a_name_of_ours(name, ours):
    assert split_of(name) == ours


def test_parts_of_one_split_come_together_and_splits_in_the_order_of_the_stages(tmp_path):
    parts = {"test": 1, "train-a": 2, "dev": 3, "train-b": 4}
    assert by_split(tmp_path, parts) == {
        "lm": [("train-a", 2), ("train-b", 4)],
        "dev": [("dev", 3)],
        "test": [("test", 1)],
    }


def test_a_part_of_unknown_name_is_a_corpus_without_splits_only_when_it_is_alone(tmp_path):
    assert by_split(tmp_path, {"validated": 1}) == {"all": [("validated", 1)]}
    with pytest.raises(CorpusError, match="which split is 'validated'"):
        by_split(tmp_path, {"validated": 1, "train": 2})


def test_a_second_utterance_of_one_name_and_half_a_character_are_rejected():
    rows = [Utterance("a", "x"), Utterance("a", "y"), Utterance("b", "\ud83d"), Utterance("c", "z")]
    kept = list(sound(rows, "table"))
    assert [row.id for row in kept if isinstance(row, Utterance)] == ["a", "c"]
    assert [row for row in kept if isinstance(row, Rejection)] == [
        Rejection("table", "utterance 'a' stands twice"),
        Rejection("table", "utterance 'b': half a character in its text"),
    ]
