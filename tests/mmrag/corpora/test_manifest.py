import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.corpora.manifest import LAST_SECOND, ManifestError, read, row, write
from mmrag.records import Rejection, Timed, Utterance

GOOD = {"audio_filepath": "clips/a.flac", "text": "call mary", "duration": 1.5}


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def reasons(path: Path) -> list[str]:
    return [made.reason if isinstance(made, Rejection) else "" for made in read(path)]


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
seconds = st.floats(0, 1e6, allow_nan=False)
in_half_a_day = st.floats(0, LAST_SECOND / 2, allow_nan=False)
words = st.builds(
    lambda text, start, length: Timed(text, start, start + length),
    *(names.filter(bool), in_half_a_day, in_half_a_day),
)
utterances = st.builds(
    Utterance,
    id=names.filter(bool),
    text=names.filter(bool),
    audio=st.none() | st.sampled_from([Path("/corpus/clips/a.flac"), Path("/elsewhere/b.wav")]),
    duration=st.none() | seconds,
    offset=st.none() | seconds,
    speaker=names,
    age=st.none() | st.floats(0, 120),
    document=names.filter(bool),
    domain=names,
    entities=st.lists(names, max_size=3).map(tuple),
    words=st.lists(words, max_size=3).map(tuple),
    phones=st.lists(words, max_size=3).map(tuple),
)


@given(st.lists(utterances, max_size=4, unique_by=lambda utterance: utterance.id))
def test_what_is_written_is_read_back(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("manifest") / "manifest.jsonl"
    assert write(path, made) == len(made)
    assert list(read(path)) == made


def test_audio_below_the_manifest_is_written_relative_to_it_and_other_audio_absolute():
    root = Path("/corpus")
    assert row(Utterance("a", audio=root / "clips" / "a.wav"), root) == {
        "audio_filepath": "clips/a.wav",
        "utterance": "a",
    }
    assert row(Utterance("b", audio=Path("/other/b.wav")), root)["audio_filepath"] == "/other/b.wav"


def test_text_without_speech_has_no_audio_field():
    assert row(Utterance("a", text="call mary"), Path()) == {"text": "call mary", "utterance": "a"}


def test_phones_are_a_field_of_their_own_with_seconds(tmp_path):
    phones = (Timed("k", 0.1, 0.25), Timed("@", 0.25, 0.5))
    utterance = Utterance("a", text="call", phones=phones, document="a")
    assert row(utterance, tmp_path)["phones"] == [
        {"text": "k", "start": 0.1, "end": 0.25},
        {"text": "@", "start": 0.25, "end": 0.5},
    ]
    assert "words" not in row(utterance, tmp_path)
    write(tmp_path / "manifest.jsonl", [utterance])
    assert list(read(tmp_path / "manifest.jsonl")) == [utterance]


def test_audio_is_found_beside_the_manifest_and_need_not_exist(tmp_path):
    [utterance] = read(lines(tmp_path / "manifest.jsonl", GOOD))
    assert utterance.audio == tmp_path / "clips" / "a.flac"
    assert utterance.duration == 1.5


def test_an_id_is_made_from_the_audio_path_or_the_line_number(tmp_path):
    path = lines(
        tmp_path / "manifest.jsonl",
        {"audio_filepath": "one/a.wav"},
        {"audio_filepath": "two/a.wav"},
        {"text": "hello"},
        {"text": "hello", "utterance": "mine", "document": "book"},
    )
    assert [(made.id, made.document) for made in read(path)] == [
        ("one/a", "one/a"),
        ("two/a", "two/a"),
        ("line-3", "line-3"),
        ("mine", "book"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "recursion"),
        (b'["a"]', "not a JSON object but list"),
        (b"{}", "neither audio_filepath nor text"),
        (b'{"text": ""}', "neither audio_filepath nor text"),
        (b'{"text": 3}', "text is not a string but 3"),
        (b'{"text": "a \\ud800"}', "surrogates not allowed"),
        (b'{"audio_filepath": ["a.wav"]}', "audio_filepath is not a string"),
        (b'{"text": "a", "duration": "2"}', "duration is not a number"),
        (b'{"text": "a", "duration": true}', "duration is not a number"),
        (b'{"text": "a", "duration": -1}', "duration is not a time"),
        (b'{"text": "a", "duration": NaN}', "duration is not a time"),
        (b'{"text": "a", "duration": 1' + b"0" * 400 + b"}", "too large"),
        (b'{"text": "a", "entities": "mary"}', "entities is not a list"),
        (b'{"text": "a", "entities": [1]}', "entities is not a string but 1"),
        (b'{"text": "a", "words": ["a"]}', "words holds not an object"),
        (b'{"text": "a", "words": [{"text": "a", "start": 0}]}', "end is not a number"),
        (b'{"text": "a", "words": [{"start": 0, "end": 1}]}', "text of words is not a string"),
        (b'{"text": "a", "words": [{"text": "a", "start": 2, "end": 1}]}', "ends before it starts"),
        (b'{"text": "a", "words": [{"text": "a", "start": 0, "end": 86401}]}', "words: 'a' ends"),
        (b'{"text": "a", "phones": [{"text": "@", "start": 0, "end": 1e9}]}', "more than a day"),
        (b'{"text": "a", "phones": [{"text": "@", "start": 1e300, "end": 1e300}]}', "phones: '@'"),
        (b'{"text": "a", "phones": {"a": 1}}', "phones is not a list"),
        (b'{"text": "a", "phones": [{"text": "@", "start": 0}]}', "end is not a number"),
        (b'{"text": "a", "phones": [{"start": 0, "end": 1}]}', "text of phones is not a string"),
        (b'{"text": "a", "utterance": 7}', "utterance is not a string"),
    ],
)
def test_a_bad_line_is_rejected_with_its_number_and_reading_goes_on(tmp_path, line, reason):
    path = tmp_path / "manifest.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n" + line + b"\n" + good + b"\n")
    rejection, utterance = read(path)
    assert rejection.source == f"{path}:2"
    assert reason in rejection.reason
    assert utterance.text == "call mary"


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_line(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    [utterance] = read(path)
    assert utterance.text == "call mary"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(GOOD).encode())
    [utterance] = read(path)
    assert utterance.text == "call mary"


def test_the_second_utterance_of_an_id_is_rejected(tmp_path):
    path = lines(tmp_path / "manifest.jsonl", GOOD, {"text": "other"}, GOOD)
    assert reasons(path) == ["", "", "utterance 'clips/a' is also on line 1"]


def test_a_byte_order_mark_and_unknown_fields_do_no_harm(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "caf\xc3\xa9", "lang": "fr"}\n')
    assert [made.text for made in read(path)] == ["café"]


def test_lines_of_one_recording_are_utterances_of_their_own(tmp_path):
    path = lines(
        tmp_path / "manifest.jsonl",
        {**GOOD, "offset": 0},
        {**GOOD, "offset": 1.5},
        {**GOOD, "offset": 3.125, "utterance": "mine", "document": "call"},
        {**GOOD, "offset": 1.5},
        {**GOOD, "offset": -1},
    )
    *made, twice, negative = read(path)
    assert [(one.id, one.document, one.offset, one.duration) for one in made] == [
        ("clips/a@0", "clips/a", 0.0, 1.5),
        ("clips/a@1.5", "clips/a", 1.5, 1.5),
        ("mine", "call", 3.125, 1.5),
    ]
    assert twice.reason == "utterance 'clips/a@1.5' is also on line 2"
    assert negative.reason == "offset is not a time: -1"


def test_a_speaker_may_be_a_number(tmp_path):
    path = lines(
        tmp_path / "manifest.jsonl", {**GOOD, "speaker": 1089}, {"text": "a", "speaker": True}
    )
    assert [getattr(made, "speaker", "rejected") for made in read(path)] == ["1089", "rejected"]


@pytest.mark.parametrize(
    ("age", "kept"), [(31, 31.0), ("twenties", None), (True, None), (-1, None)]
)
def test_an_age_is_a_number_of_years_or_is_not_known(tmp_path, age, kept):
    [one] = read(lines(tmp_path / "manifest.jsonl", {**GOOD, "age": age}))
    assert one.age == kept


def test_windows_line_ends_and_marks_are_read(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert [made.text for made in read(path)] == ["one", "two"]


def test_a_manifest_with_an_impossible_name_is_an_error_that_names_it():
    with pytest.raises(ManifestError, match="embedded null byte"):
        read("a\0b.jsonl")


def test_a_missing_manifest_is_an_error_that_names_it_before_anything_is_read(tmp_path):
    with pytest.raises(ManifestError, match=r"nowhere\.jsonl: No such file"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(ManifestError, match="directory"):
        read(tmp_path)


def test_an_id_cannot_be_written_twice(tmp_path):
    with pytest.raises(ManifestError, match="'a' stands twice"):
        write(tmp_path / "manifest.jsonl", [Utterance("a", text="x"), Utterance("a", text="y")])


def test_silences_of_an_alignment_are_left_out_and_phones_may_outlast_their_clip(tmp_path):
    timed = [{"text": text, "start": n, "end": n + 1} for n, text in enumerate(["", "k", "", "@"])]
    [one] = read(lines(tmp_path / "m.jsonl", {**GOOD, "words": timed, "phones": timed}))
    assert one.words == one.phones == (Timed("k", 1, 2), Timed("@", 3, 4))
    assert one.duration == 1.5
