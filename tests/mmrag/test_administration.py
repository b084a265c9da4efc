"""`mmrag datastore`, as a person or a script calls it."""

import json
import re

import numpy as np
import pytest
import soundfile
from small_datastores import DESCRIPTION, fill

from mmrag import shipped, terminal
from mmrag.cli import main
from mmrag.corpora.synthetic import assign_voices, render
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.model.vocabulary import Vocabulary
from mmrag.retrieval.datastore import Datastore, create
from mmrag.retrieval.display import Display
from mmrag.retrieval.phrases import CARRIERS
from mmrag.speech.audio import SAMPLE_RATE


@pytest.fixture
def directory(tmp_path):
    create(tmp_path / "drugs", DESCRIPTION)
    fill(tmp_path / "drugs", 3)
    return tmp_path / "drugs"


@pytest.fixture
def call(capsys):
    """Exit status and what was printed: (status, lines of output, errors)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["datastore", *map(str, arguments)])
        said = capsys.readouterr()
        code = ended.value.code
        if isinstance(code, str):
            return 1, said.out.splitlines(), code
        return code or 0, said.out.splitlines(), said.err

    return run


def test_datastores_are_listed_and_one_that_cannot_be_read_is_named(directory, call):
    create(directory.parent / "empty", DESCRIPTION)
    (directory.parent / "something else").mkdir()
    status, lines, _ = call("list", directory.parent, "--json")
    told = [json.loads(line) for line in lines]
    assert status == 0
    assert [(one["name"], one["entries"], one["documents"]) for one in told] == [
        ("drugs", 18, 4),
        ("empty", 0, 0),
    ]
    (directory / "segments.json").write_text("{")
    status, lines, errors = call("list", directory.parent)
    assert status == 1 and "segments.json is damaged" in errors
    assert any("empty" in line for line in lines) and not any("drugs" in line for line in lines)


def test_a_datastore_is_shown_with_its_largest_documents(directory, call):
    status, [line], _ = call("show", directory, "--json")
    told = json.loads(line)
    assert status == 0
    assert (told["entries"], told["deleted"], told["segments"]) == (18, 0, 3)
    assert told["largest_documents"] == {"shared": 9, "own-0": 3, "own-1": 3, "own-2": 3}
    assert told["identity"] == {"lm": "aaaa"} and told["snapshots"] == []
    status, lines, _ = call("show", directory)
    assert status == 0 and any("shared" in line for line in lines)


def test_documents_are_deleted_by_name_and_erased(directory, call):
    status, lines, errors = call("delete", directory, "shared", "nobody", "own-1")
    assert status == 1 and "no document 'nobody'" in errors
    assert lines == ["shared: 9 entries deleted", "own-1: 3 entries deleted"]
    assert call("compact", directory, "--all", "--json")[1] == [
        json.dumps({"merged": 3, "made": 1, "erased": 12, "index": None})
    ]
    assert call("compact", directory)[1] == ["there is nothing to merge or to erase"]
    assert Datastore.open(directory).entries_of(["own-0"]).tolist() == [3, 4, 5]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of texts: two phrases and a sentence."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("zanab kuri\nmelodia hartwig\nplease remind me to water the plants tonight\n")
    return file


TINY = ("--models", "mmrag:tiny")


def test_entries_are_put_in_with_what_is_said_of_them_and_replaced(tmp_path, call):
    place, file = tmp_path / "drugs", tmp_path / "entries.jsonl"
    worded = {"text": "zolpidem", "display_as": "Zolpidem®", "pronunciations": ["zole pie dem"]}
    file.write_text(json.dumps(worded) + "\nmetformin\n")
    assert call("create", place, file, "--text-only", *TINY)[0] == 0
    store = Datastore.open(place)
    known = store.wordings()
    assert known["zolpidem"].fields() == worded and known["metformin"].plain
    assert call("add", place, file, *TINY)[1] == [f"{place}: 0 entries more"], "they are there"
    options = ("--display-as", "ZOLPIDEM", "--weight", "0.5")
    assert call("add", place, "--text", "zolpidem", *options, *TINY)[0] == 0
    store.refresh()
    again = store.wordings()["zolpidem"]
    assert again.fields() == {"text": "zolpidem", "display_as": "ZOLPIDEM", "weight": 0.5}
    assert len(store.entries_of(["zolpidem"])) == len(store.wordings.weights()[0])
    assert call("verify", place)[0] == 0


def test_an_entry_is_looked_at_before_it_is_put_in(tmp_path, call):
    place, file = tmp_path / "drugs", tmp_path / "names.txt"
    file.write_text("zaleplon\nmetformin\n")
    assert call("create", place, file, "--text-only", *TINY)[0] == 0
    before = Datastore.open(place).segments
    asked = ("search", place, "Zalepon", "--hear", "--pronunciation", "zalla pon", *TINY)
    status, [line], _ = call(*asked, "--json")
    told = json.loads(line)
    assert status == 0 and (told["writes"], told["shows"]) == ("zalepon", "Zalepon")
    near = {one["text"]: one for one in told["confused_with"]}
    assert near["zaleplon"]["kind"] == "entry" and near["zaleplon"]["sound"] > 0.5
    [heard] = told["heard"]
    assert heard["pronunciation"] == "zalla pon" and heard["heard"].startswith("please call")
    status, lines, _ = call(*asked)
    assert status == 0 and any("zaleplon" in line for line in lines)
    assert Datastore.open(place).segments == before


FORMS = {"A1C": "a one c", "O'Brien-Smith": "o'brien smith", "Zoë": "zoe", "5-HTP": "five htp"}


def test_digits_capitals_hyphens_and_accents_are_put_in_and_looked_at_as_they_stand(tmp_path, call):
    place, file = tmp_path / "names", tmp_path / "names.txt"
    file.write_text("\n".join(FORMS), encoding="utf-8")
    assert call("create", place, file, "--text-only", *TINY)[0] == 0
    store = Datastore.open(place)
    vocabulary = Vocabulary.load(shipped.find(shipped.TINY) / "lm")
    for given, writes in FORMS.items():
        pieces = store.tokens[store.entries_of([given])]
        mentions = pieces.reshape(len(CARRIERS), -1)
        assert [vocabulary.decode(list(map(int, one))) for one in mentions] == [writes] * 3
    known = [store.wordings()[given] for given in FORMS]
    told = f"take {' and '.join(FORMS.values())} today"
    assert Display.of(known, vocabulary.spoken).of_text(told) == f"take {' and '.join(FORMS)} today"
    status, [line], _ = call("search", place, "A1C", "--hear", "--json", *TINY)
    told = json.loads(line)
    assert status == 0 and (told["writes"], told["shows"]) == ("a one c", "A1C")
    assert told["heard"][0]["sentence"] == "please call eigh one C today", "the letter's name"
    assert "A1C" not in [one["text"] for one in told["confused_with"]]


def test_what_several_voices_say_has_as_many_keys_and_text_alone_has_none(tmp_path, call):
    once, thrice, text = (tmp_path / name for name in ("once", "thrice", "text"))
    file = tmp_path / "names.txt"
    file.write_text("zaleplon\n")
    assert call("create", once, file, *TINY)[0] == 0
    assert call("create", thrice, file, "--takes", 3, *TINY)[0] == 0
    one, three = Datastore.open(once), Datastore.open(thrice)
    assert three.entries == 3 * one.entries
    np.testing.assert_array_equal(three.keys(0, one.entries), one.keys(0, one.entries))
    assert call("create", text, file, "--text-only", *TINY)[0] == 0
    status, _, errors = call("add", text, file, "--takes", 3, *TINY)
    assert status == 1 and "keyed over text alone: nobody speaks for it" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "DIR"), "add: a file, or --text"),
        (("add", "DIR", "FILE", "--weight", "2"), "--weight goes with --text"),
        (("add", "DIR", "--text", "a", "--weight", "3"), "weight: a number from 0 to 2"),
        (("search", "DIR", "a", "--display-as", "A"), "--display-as goes with --hear"),
        (("search", "DIR", "a", "--takes", "2"), "--takes: nobody speaks without --hear"),
        (("create", "DIR", "FILE", "--text-only", "--voices", "espeak"), "nobody speaks"),
        (("add", "DIR", "FILE", "--url", "http://x", "--takes", "2"), "--takes: an endpoint"),
        (("add", "DIR", "FILE", "--kokoro", "DIR"), "--kokoro: it does not speak"),
    ],
)
def test_what_is_said_of_an_entry_goes_with_one(directory, call, tmp_path, arguments, said):
    file = tmp_path / "names.txt"
    file.write_text("rome\n")
    places = {"DIR": directory, "FILE": file}
    status, _, errors = call(*(places.get(one, one) for one in arguments))
    assert status == 1 and said in errors


def test_a_datastore_is_made_of_texts_added_to_and_looked_up_in(
    tmp_path, call, written, monkeypatch
):
    place = tmp_path / "contacts"
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    status, [line], said = call("create", place, written, "--text-only", "--json")
    read = re.findall(r"putting texts in: (\d+)/(\d+) sentences", said)
    assert len(read) > 2 and read[-1][0] == read[-1][1] and len({of for _, of in read}) == 1
    told = json.loads(line)
    assert status == 0 and told["created"] == str(place) and told["added"] > 10
    more = tmp_path / "more.txt"
    more.write_text("odalys brandt\n")
    status, [line], _ = call("add", place, more)
    assert status == 0 and line.startswith(f"{place}: ") and line.endswith("entries more")
    store = Datastore.open(place)
    assert store.entries > told["added"]
    assert call("add", place, more)[1] == [f"{place}: 0 entries more"], "it is there already"
    status, lines, _ = call("search", place, "please call zanab kuri today", "-k", 2, "--json")
    found = [json.loads(one) for one in lines]
    assert status == 0 and all(len(one["neighbours"]) == 2 for one in found)
    assert found[-1]["token"] == "(end)"
    nearest = [one["neighbours"][0] for one in found]
    exact = [one for one in nearest if one["distance"] < 0.05]
    named = [one for one in exact if one["document"] == "zanab kuri"]
    assert len(named) > len(exact) / 2 and all("zanab" in one["window"] for one in named)
    status, lines, _ = call("search", place, "zanab", "-k", 1)
    assert status == 0 and any("zanab kuri" in line for line in lines)


def test_a_recording_is_looked_up_as_it_is_heard(tmp_path, call, written):
    place, clip = tmp_path / "contacts", tmp_path / "clip.wav"
    assert call("create", place, written)[0] == 0
    [planned] = assign_voices(["please call zanab kuri today"], 0)
    soundfile.write(clip, render(planned, Synthesizer()).wave, SAMPLE_RATE)
    status, lines, _ = call("search", place, clip, "--json")
    found = [json.loads(line) for line in lines]
    assert status == 0 and len(found) > 5
    documents = {near["document"] for one in found for near in one["neighbours"]}
    assert documents <= {"zanab kuri", "melodia hartwig"} | set(written.read_text().splitlines())
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    status, _, errors = call("search", place, silent)
    assert status == 1 and "nobody speaks" in errors


def test_what_cannot_be_put_in_or_looked_up_is_named_and_nothing_is_written(
    directory, tmp_path, call, written
):
    status, _, errors = call("create", directory, written)
    assert status == 1 and "holds a datastore already" in errors
    status, _, errors = call("add", directory, written)
    assert status == 1 and "was keyed by lm aaaa" in errors
    place = tmp_path / "own"
    assert call("create", place, "--text-only")[0] == 0
    bad = tmp_path / "bad.txt"
    bad.write_text("good enough\nпривет\n")
    status, _, errors = call("add", place, bad)
    assert status == 1 and "привет" in errors
    assert Datastore.open(place).entries == 0
    for file, named in ((bad, "привет"), (tmp_path / "none.txt", "none.txt")):
        status, _, errors = call("create", tmp_path / "never", file)
        assert status == 1 and named in errors and not (tmp_path / "never").exists()
    status, _, errors = call("add", place, tmp_path / "none.txt")
    assert status == 1 and "none.txt" in errors
    status, _, errors = call("search", place, "anything", "-k", 0)
    assert status == 1 and "-k 0" in errors
    status, _, errors = call("list")
    assert status == 1 and "a directory, or the --url" in errors


def test_an_index_is_built_anew(directory, call):
    status, lines, _ = call("index", directory, "--shards", 2, "--json")
    told = [json.loads(line) for line in lines]
    assert status == 0 and [one["entries"] for one in told] == [9, 9]
    assert all(one["chosen"].startswith("flat: 9 keys") for one in told)
    status, [line], _ = call("index", directory)
    assert status == 0 and line == "flat: 18 keys are soon compared one by one"
    status, _, errors = call("index", directory, "--shards", 0)
    assert status == 1 and "shards" in errors


def test_compaction_indexes_anew_what_fell_behind_and_says_so(directory, call):
    call("index", directory, "--shards", 2)
    fill(directory, 3, first=10)
    status, lines, _ = call("compact", directory)
    assert status == 0 and lines == [
        "indexed anew, since 18 entries were added to the 18 that were indexed:",
        *["flat: 18 keys are soon compared one by one"] * 2,
    ]
    assert call("compact", directory)[1] == ["there is nothing to merge or to erase"]
    fill(directory, 3, first=20)
    status, [line], _ = call("compact", directory, "--all", "--json")
    told = json.loads(line)
    assert (told["merged"], [one["entries"] for one in told["index"]["shards"]]) == (9, [27, 27])


def test_statistics_say_how_a_datastore_is_filled(directory, call):
    status, [line], _ = call("stats", directory, "--json")
    told = json.loads(line)
    assert status == 0
    assert told["segment_entries"] == {"smallest": 6, "largest": 6}
    assert told["document_entries"] == {"p5": 3, "p50": 3, "p95": 8}
    assert told["typical_distance"] > 0 and told["bytes_per_entry"]["keys"] > 0
    status, lines, _ = call("stats", directory)
    assert status == 0 and any("typical distance" in line for line in lines)


def test_damage_is_found_and_says_so_by_the_exit_status(directory, call):
    assert call("verify", directory)[:2] == (0, [f"{directory} is whole"])
    file = directory / "segments" / "s-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, [line], _ = call("verify", directory, "--json")
    assert status == 1 and str(file) in json.loads(line)["problem"]


def test_it_goes_back_to_a_snapshot(directory, call):
    assert call("snapshot", "create", directory, "monday")[0] == 0
    call("delete", directory, "shared")
    assert call("snapshot", "list", directory)[1] == ["monday: 18 entries, of which 0 are deleted"]
    assert call("snapshot", "rollback", directory, "monday")[0] == 0
    assert len(Datastore.open(directory).entries_of(["shared"])) == 9
    assert call("snapshot", "drop", directory, "monday")[0] == 0
    assert call("snapshot", "list", directory)[1] == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["show", "DIR/no"], "datastore.json is missing"),
        (["list", "DIR/no"], "No such file or directory"),
        (["snapshot", "drop", "DIR", "monday"], "has no snapshot monday"),
        (["snapshot", "create", "DIR", "A b"], "snapshot name 'A b'"),
        (["snapshot", "create", "DIR"], "snapshot create goes with a name"),
        (["snapshot", "list", "DIR", "x"], "snapshot list goes without a name"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_names_it(directory, call, arguments, problem):
    status, lines, error = call(*(a.replace("DIR", str(directory)) for a in arguments))
    assert (status, lines) == (1, [])
    assert error.startswith("mmrag: ") and problem in error and "\n" not in error
