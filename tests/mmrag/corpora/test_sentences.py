import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.corpora import sentences
from mmrag.corpora.sentences import left_out, split_of


def read(files, held_out: float, *taken: str) -> dict[str, list[tuple[str, str]]]:
    """(sentence, file's name) by split."""
    splits: dict[str, list[tuple[str, str]]] = {"lm": [], "dev": [], "test": []}
    for split, text, name in sentences.read(files, held_out, set(taken)):
        splits[split].append((text, name))
    return splits


def test_sentences_are_as_spoken_without_scraps_and_twins(tmp_path):
    file = tmp_path / "real.txt"
    file.write_text(
        "I'm still waiting on 2 cards?\nim here\nHello\nCafé  OLÉ!\n你好 你好\n"
        "i'm still waiting on two cards\n" + "word " * 31 + "\n"
    )
    splits = read([file], held_out=0.1)
    found = [one for each in splits.values() for one in each]
    assert sorted(found) == [
        ("cafe ole", "real"),
        ("i'm still waiting on two cards", "real"),
        ("im here", "real"),
    ]
    fewer = read([file], 0.1, "im here", "another")
    assert [one for each in fewer.values() for one in each] == [
        one for one in found if one[0] != "im here"
    ]
    listed = [(one.source, one.reason) for one in left_out([file])]
    assert [source for source, _ in listed] == [f"{file}:{number}" for number in (3, 5, 7)]
    assert [reason.split(",")[0] for _, reason in listed] == [
        "1 words",
        "letters that English lacks in '你好 你好'",
        "31 words",
    ]


def test_no_sentence_is_in_two_splits_and_shares_are_kept(tmp_path):
    one, other = tmp_path / "a.txt", tmp_path / "b.txt"
    lines = [f"sentence {letter} {more}" for letter in "abcdefgh" for more in "ijklmnopqrstuvwxyz"]
    one.write_text("\n".join(lines[:100]))
    other.write_text("\n".join(line.upper() + "!" for line in lines[50:]))
    splits = read([one, other], held_out=0.2)
    sets = {split: {text for text, _ in each} for split, each in splits.items()}
    assert sum(map(len, sets.values())) == len(set().union(*sets.values())) == len(lines)
    for split in ("dev", "test"):
        assert 0.1 * len(lines) < len(sets[split]) < 0.3 * len(lines)
    assert {domain for each in splits.values() for _, domain in each} == {"a", "b"}
    alone = read([other], held_out=0.2)
    for split, each in alone.items():
        assert {text for text, _ in each} <= sets[split], "whatever other files there are"


@given(st.text(alphabet="abc XYZ,.'!", min_size=1))
def test_a_split_depends_on_the_words_alone(text):
    assert split_of(text, 0.2) == split_of(f"  {text.upper()}!?", 0.2)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with pytest.raises(OSError, match=r"no\.txt"):
        read([tmp_path / "no.txt"], 0.1)
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"bad\.txt:2: not UTF-8"):
        read([tmp_path / "bad.txt"], 0.1)
