import pytest

from mmrag.corpora import slue_voxpopuli
from mmrag.corpora.splits import CorpusError
from mmrag.records import Rejection

COLUMNS = "id\traw_text\tnormalized_text\tspeaker_id\tsplit\traw_ner\tnormalized_ner"
SITTING = "20131007-0900-PLENARY-19-en_20131007-21:26:04"


def row(id: str, text: str, entities: object, speaker: str = "28266", split: str = "dev") -> str:
    return f"{id}\t{text.title()}.\t{text}\t{speaker}\t{split}\t[]\t{entities}"


def table(directory, split: str, *rows: str, header: str = COLUMNS):
    file = directory / f"slue-voxpopuli_{split}.tsv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def test_entities_are_cut_out_of_the_normalized_text(tmp_path):
    text = 'the "council in brussels met on monday'
    spans = [["ORG", 5, 7], ["GPE", 16, 8]]
    table(tmp_path, "dev", row(f"{SITTING}_3", text, spans))
    [said] = slue_voxpopuli.read(tmp_path).splits["dev"]
    assert (said.text, said.entities) == (text, ("council", "brussels"))
    assert said.audio == tmp_path / "dev" / f"{SITTING}_3.ogg"
    assert (said.speaker, said.document) == ("28266", "20131007-0900-PLENARY-19-en")


def test_the_published_splits_are_ours(tmp_path):
    for split in ("test", "fine-tune", "dev"):
        table(tmp_path, split, row(f"of-{split}", "hello", "None", "None", split))
    splits = {name: list(rows) for name, rows in slue_voxpopuli.read(tmp_path).splits.items()}
    assert list(splits) == ["lm", "dev", "test"]
    assert splits["lm"][0].audio == tmp_path / "fine-tune" / "of-fine-tune.ogg"
    assert splits["lm"][0].entities == () and splits["lm"][0].speaker == ""


def test_damaged_rows_are_named_and_the_others_read(tmp_path):
    file = table(
        tmp_path,
        "test",
        row("good", "a word", "[]"),
        "only\tthree\tcolumns",
        row("../../etc/passwd", "a word", "[]"),
        row("silent", " ", "[]"),
        row("outside", "a word", "[['ORG', 3, 40]]"),
        row("odd", "a word", "[['ORG']]"),
        row("code", "a word", "__import__('os').getcwd()"),
        row("good", "another word", "[]"),
        "a return\rin it",
        row("last", "a word", "[]"),
    )
    with file.open("ab") as stream:
        stream.write(b"\xff\tx\n")
    rows = list(slue_voxpopuli.read(tmp_path).splits["test"])
    assert [one.id for one in rows if not isinstance(one, Rejection)] == ["good", "last"]
    reasons = {one.source: one.reason for one in rows if isinstance(one, Rejection)}
    told = {
        f"{file}:3": "3 columns, the header has 7",
        f"{file}:4": "the id '../../etc/passwd' names no file",
        f"{file}:5": "silent: no normalized_text",
        f"{file}:6": "outside: an entity reaches out of the text",
        f"{file}:7": "odd: normalized_ner is not a list of [label, start, length]",
        f"{file}:8": "code: normalized_ner is not a list of [label, start, length]",
        str(file): "utterance 'good' stands twice",
        f"{file}:10": "1 columns, the header has 7",
        f"{file}:12": "not UTF-8",
    }
    assert reasons.keys() == told.keys()
    assert all(reason in reasons[place] for place, reason in told.items())


def test_a_table_without_a_column_and_a_directory_without_a_table_are_errors(tmp_path):
    with pytest.raises(CorpusError, match="holds none of slue-voxpopuli_fine-tune"):
        slue_voxpopuli.read(tmp_path)
    table(tmp_path, "dev", "x", header="id\tsplit")
    with pytest.raises(CorpusError, match="no column normalized_text, speaker_id, normalized_ner"):
        list(slue_voxpopuli.read(tmp_path).splits["dev"])
