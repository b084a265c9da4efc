"""`mmrag datastore`, as a person or a script calls it."""

import json

import pytest
from small_datastores import DESCRIPTION, fill

from mmrag.cli import main
from mmrag.retrieval.datastore import Datastore, create


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
        json.dumps({"merged": 3, "made": 1, "erased": 12})
    ]
    assert call("compact", directory)[1] == ["there is nothing to merge or to erase"]
    assert Datastore.open(directory).entries_of(["own-0"]).tolist() == [3, 4, 5]


def test_damage_is_found_and_says_so_by_the_exit_status(directory, call):
    assert call("verify", directory)[:2] == (0, [f"{directory} is whole"])
    file = directory / "segments" / "s-1" / "keys.npy"
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
