import json

import pytest

from mmrag.corpora import spoken_squad
from mmrag.corpora.splits import CorpusError
from mmrag.records import Rejection

PARAGRAPH = {
    "context": "the denver broncos won. it was played in santa clara california. broncos again.",
    "qas": [
        {
            "question": "Who?",
            "id": "1",
            "answers": [{"answer_start": 999, "text": "Denver Broncos"}],
        },
        {"question": "Where?", "id": "2", "answers": [{"answer_start": 0, "text": "santa clara"}]},
        {"question": "What?", "id": "3", "answers": [{"answer_start": 0, "text": "bronco"}]},
    ],
}


def write(path, topics: list, **wrapped):
    path.write_text(json.dumps({"version": "1.1", "data": topics, **wrapped}))
    return path


def topic(title: str, *paragraphs: object) -> dict:
    return {"title": title, "paragraphs": list(paragraphs)}


def test_a_sentence_is_an_utterance_whose_file_is_numbered_as_in_the_json(tmp_path):
    write(
        tmp_path / spoken_squad.TEST_FILE,
        [topic("Super_Bowl", PARAGRAPH), topic("Force", {"context": "one.", "qas": []}, PARAGRAPH)],
    )
    (tmp_path / "dev_wav").mkdir()
    said = list(spoken_squad.read(tmp_path).splits["test"])
    names = ["0_0_0", "0_0_1", "0_0_2", "1_0_0", "1_1_0", "1_1_1", "1_1_2"]
    assert [one.audio for one in said] == [tmp_path / "dev_wav" / f"{n}.wav" for n in names]
    assert [one.id for one in said] == [f"test-{name}" for name in names]
    assert said[1].text == "it was played in santa clara california"
    assert said[0].document == said[2].document == "test-Super_Bowl-0" != said[3].document


def test_answers_are_entities_where_they_stand_literally_wherever_they_are_said_to_start(tmp_path):
    write(tmp_path / spoken_squad.TEST_FILE, [topic("t", PARAGRAPH)])
    said = list(spoken_squad.read(tmp_path).splits["test"])
    assert [one.entities for one in said] == [("denver broncos",), ("santa clara",), ()]


def test_a_noisier_variant_is_read_by_its_file_in_its_own_letters(tmp_path):
    paragraph = {**PARAGRAPH, "context": "The denver Broncos won the p.. They came."}
    file = write(tmp_path / "spoken_test-v1.1_WER44.json", [topic("t", paragraph)])
    audio = tmp_path / "noisy"
    audio.mkdir()
    first, second = spoken_squad.read(file, audio).splits["test"]
    assert (first.text, first.entities) == ("The denver Broncos won the p", ("denver Broncos",))
    assert second.audio == audio / "0_0_1.wav"


def test_a_letter_that_grows_in_lower_case_hides_no_answer():
    assert spoken_squad._entities("the İzmir port of Paris", ["paris"]) == ("Paris",)


def test_one_training_topic_in_ten_is_the_dev_split(tmp_path):
    topics = [topic(f"t{n}", {"context": f"number {n}.", "qas": []}) for n in range(20)]
    write(tmp_path / spoken_squad.TRAIN_FILE, topics)
    splits = {name: list(rows) for name, rows in spoken_squad.read(tmp_path).splits.items()}
    assert [one.id for one in splits["dev"]] == ["train-9_0_0", "train-19_0_0"]
    assert len(splits["lm"]) == 18 and "test" not in splits


def test_both_files_need_a_folder_of_audio_each(tmp_path):
    write(tmp_path / spoken_squad.TRAIN_FILE, [topic("a", PARAGRAPH)])
    write(tmp_path / spoken_squad.TEST_FILE, [topic("b", PARAGRAPH)])
    with pytest.raises(CorpusError, match="no folder train_wav or train"):
        spoken_squad.read(tmp_path)
    for folder in ("train_wav", "test_wav"):
        (tmp_path / folder).mkdir()
    splits = {name: list(rows) for name, rows in spoken_squad.read(tmp_path).splits.items()}
    assert splits["lm"][0].audio.parent.name == "train_wav"
    assert splits["test"][0].audio.parent.name == "test_wav"
    assert splits["lm"][0].id != splits["test"][0].id


def test_damaged_paragraphs_are_named_and_keep_the_numbers_of_the_others(tmp_path):
    file = write(
        tmp_path / spoken_squad.TEST_FILE,
        [
            "not a topic",
            topic("t", {"qas": []}, {"context": 3, "qas": []}, {"context": "one. . two."}),
            topic("u", {"context": "one. . two.", "qas": []}, {"context": "x.", "qas": [{}]}),
        ],
    )
    rows = list(spoken_squad.read(tmp_path).splits["test"])
    assert [one.id for one in rows if not isinstance(one, Rejection)] == [
        "test-2_0_0",
        "test-2_0_2",
    ]
    assert [one.source for one in rows if isinstance(one, Rejection)] == [
        f"{file}: topic 0",
        *(f"{file}: paragraph 1_{place}" for place in range(3)),
        f"{file}: sentence 2_0_1",
        f"{file}: paragraph 2_1",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"data": 3}', '{"version": "1.1"}'])
def test_a_file_of_another_schema_is_an_error(tmp_path, text):
    (tmp_path / spoken_squad.TEST_FILE).write_text(text)
    with pytest.raises(CorpusError, match=r"spoken_test-v1\.1\.json: not"):
        spoken_squad.read(tmp_path)


def test_a_directory_without_either_file_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="holds neither"):
        spoken_squad.read(tmp_path)
