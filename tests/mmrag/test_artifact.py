"""A directory is a finished artifact or none, and knows what it was made from."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from mmrag import artifact
from mmrag.artifact import Artifact, ArtifactError
from mmrag.config import Recipe, Section, recipe

CONFIG = {"units": 100, "rounds": [1, 2]}


def make(path: Path, text: str = "contents", config=CONFIG, inputs=None, **how) -> Artifact:
    with artifact.create(path, "thing", config, inputs or {}, **how) as draft:
        (draft.path / "data.txt").write_text(text)
        draft.summary["letters"] = len(text)
    return artifact.load(path, "thing")


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def kill_while_writing(path: Path, text: str = "half", config=CONFIG) -> None:
    with suppress(Killed), artifact.create(path, "thing", config, {}) as draft:
        (draft.path / "part.txt").write_text(text)
        raise Killed


def test_a_finished_artifact_says_what_it_is(tmp_path):
    source = make(tmp_path / "source")
    made = make(tmp_path / "deep" / "made", inputs={"source": source})
    assert made.path == tmp_path / "deep" / "made" and made.kind == "thing"
    assert made.config == CONFIG and made.inputs == {"source": source.fingerprint}
    assert made.summary == {"letters": 8}
    assert sorted(file.name for file in made.path.iterdir()) == ["artifact.json", "data.txt"]


def test_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make(Path("here")).path == tmp_path / "here"


def test_the_fingerprint_is_of_contents_configuration_and_inputs(tmp_path):
    other = make(tmp_path / "other", "else")
    prints = [
        make(tmp_path / "a").fingerprint,
        make(tmp_path / "b", "contentS").fingerprint,
        make(tmp_path / "c", config={"units": 101}).fingerprint,
        make(tmp_path / "d", inputs={"source": other}).fingerprint,
    ]
    assert len({*prints, other.fingerprint}) == 5
    assert make(tmp_path / "elsewhere").fingerprint == prints[0]


def test_bulk_files_enter_the_fingerprint_by_size_alone(tmp_path):
    def written(name: str, text: str) -> str:
        return make(tmp_path / name, text, bulk=("data",)).fingerprint

    assert written("a", "abc") == written("b", "xyz") != written("c", "abcd")


def test_a_killed_stage_leaves_the_old_artifact(tmp_path):
    old = make(tmp_path / "made")
    kill_while_writing(tmp_path / "made")
    assert artifact.load(tmp_path / "made", "thing") == old


def test_a_killed_stage_leaves_no_artifact_where_there_was_none(tmp_path):
    kill_while_writing(tmp_path / "made")
    with pytest.raises(ArtifactError, match="not a finished thing: no such directory"):
        artifact.load(tmp_path / "made", "thing")
    assert artifact.finished(tmp_path / "made", "thing", CONFIG, {}) is None


def test_a_killed_stage_finds_its_draft_again(tmp_path):
    kill_while_writing(tmp_path / "made")
    with artifact.create(tmp_path / "made", "thing", CONFIG, {}) as draft:
        assert draft.resumed and (draft.path / "part.txt").read_text() == "half"
        (draft.path / "data.txt").write_text("contents")
    with artifact.create(tmp_path / "at_once", "thing", CONFIG, {}) as draft:
        assert not draft.resumed
        (draft.path / "part.txt").write_text("half")
        (draft.path / "data.txt").write_text("contents")
    resumed, at_once = (artifact.load(tmp_path / n, "thing") for n in ("made", "at_once"))
    assert resumed.fingerprint == at_once.fingerprint


def test_only_force_throws_a_draft_away_and_says_what_it_held(tmp_path):
    kill_while_writing(tmp_path / "made")
    with artifact.create(tmp_path / "made", "thing", CONFIG, {}, force=True) as draft:
        assert not draft.resumed and not (draft.path / "part.txt").exists()
        assert draft.discarded == "1 file"
    assert set(os.listdir(tmp_path)) == {"made", ".made.lock"}


def test_a_draft_of_something_else_is_refused_and_kept(tmp_path):
    source = make(tmp_path / "source")
    kill_while_writing(tmp_path / "made")
    with (
        pytest.raises(ArtifactError) as raised,
        artifact.create(tmp_path / "made", "thing", {**CONFIG, "units": 7}, {"source": source}),
    ):
        pass
    for part in [
        str(tmp_path / ".made.partial"),
        "units was 100 and is now 7",
        f"input source was None and is now {source.fingerprint}",
        "--force throws away 1 file in",
    ]:
        assert part in str(raised.value)
    assert "rounds" not in str(raised.value)
    with artifact.create(tmp_path / "made", "thing", CONFIG, {}) as draft:
        assert draft.resumed and (draft.path / "part.txt").read_text() == "half"


@pytest.mark.parametrize("plan", ["{", "[]", "{}", '{"config": 3}', None])
def test_a_draft_that_does_not_say_what_it_is_of_is_refused_and_kept(tmp_path, plan):
    kill_while_writing(tmp_path / "made")
    [known] = tmp_path.glob(".made.partial/.plan.json")
    known.unlink() if plan is None else known.write_text(plan)
    with pytest.raises(ArtifactError, match=r"cannot be read.*--force throws away 1 file"):
        make(tmp_path / "made")
    assert (tmp_path / ".made.partial" / "part.txt").exists()
    assert make(tmp_path / "made", force=True).summary == {"letters": 8}
    assert not (tmp_path / "made" / "part.txt").exists()


def test_a_draft_that_holds_nothing_is_started_again(tmp_path):
    with suppress(Killed), artifact.create(tmp_path / "made", "thing", CONFIG, {}):
        raise Killed
    assert make(tmp_path / "made", config={"units": 7}).config == {"units": 7}
    kill_while_writing(tmp_path / "other")  # of a stage that always starts from the beginning
    made = make(tmp_path / "other", config={"units": 7}, holds=artifact.nothing)
    assert made.config == {"units": 7} and not (made.path / "part.txt").exists()


def test_a_draft_that_is_being_thrown_away_is_never_gone_on_with(tmp_path, monkeypatch):
    kill_while_writing(tmp_path / "made")

    def half(path, **_):
        if not Path(path).exists():
            return
        (Path(path) / "part.txt").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            make(tmp_path / "made", force=True)
    with artifact.create(tmp_path / "made", "thing", CONFIG, {}) as draft:
        assert not draft.resumed


DIVIDED = Recipe(
    {"units": 100, "left_out": []},
    {"workers": 2, "cut": 10},
    layout=frozenset({"cut"}),
    corrections=frozenset({"left_out"}),
)


def with_recipe(identity=None, **operation) -> Recipe:
    return replace(
        DIVIDED,
        identity={**DIVIDED.identity, **(identity or {})},
        operation={**DIVIDED.operation, **operation},
    )


def test_how_it_is_made_changes_neither_what_is_found_nor_its_fingerprint(tmp_path):
    made = make(tmp_path / "made", config=DIVIDED)
    assert made.config == DIVIDED.identity and made.operation == DIVIDED.operation
    assert make(tmp_path / "other", config=with_recipe(workers=9)).fingerprint == made.fingerprint
    for how in ({"workers": 9}, {"cut": 7}):
        assert artifact.finished(tmp_path / "made", "thing", with_recipe(**how), {}) == made
    with pytest.raises(ArtifactError, match=r"left_out was \[\] and is now \['a'\].*--force"):
        artifact.finished(tmp_path / "made", "thing", with_recipe({"left_out": ["a"]}), {})


def test_a_draft_goes_on_with_another_operation_and_a_correction_but_no_other_layout(tmp_path):
    kill_while_writing(tmp_path / "made", config=DIVIDED)
    corrected = with_recipe({"left_out": ["a"]}, workers=9)
    kill_while_writing(tmp_path / "made", config=corrected)
    with pytest.raises(ArtifactError, match=r"cut was 10 and is now 7"):
        make(tmp_path / "made", config=with_recipe({"left_out": ["a"]}, cut=7))
    with artifact.create(tmp_path / "made", "thing", corrected, {}) as draft:
        assert draft.resumed and (draft.path / "part.txt").exists()
    made = artifact.load(tmp_path / "made", "thing")
    assert made.config["left_out"] == ["a"] and made.operation["workers"] == 9


def test_a_layout_matters_only_to_what_was_laid_out_by_it(tmp_path):
    kill_while_writing(tmp_path / "made", config=DIVIDED)
    other = with_recipe(cut=7)
    free = artifact.Held("a vocabulary", laid_out=False)
    assert artifact.resumable(tmp_path / "made", "thing", other, {}, lambda _: free)
    make(tmp_path / "made", config=other, holds=lambda _: free)
    assert artifact.load(tmp_path / "made", "thing").operation["cut"] == 7


class Recorded:
    """What happened to the files below a directory, in order."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.events = root, []
        fsync, rename, replace_ = os.fsync, Path.rename, Path.replace

        def synced(handle: int) -> None:
            self._add("sync", Path(os.readlink(f"/proc/self/fd/{handle}")))
            fsync(handle)

        def renamed(source: Path, target: Path) -> Path:
            self._add("rename", Path(target))
            return rename(source, target)

        def replaced(source: Path, target: Path) -> Path:
            self._add("rename", Path(target))
            return replace_(source, target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(Path, "replace", replaced)

    def _add(self, what: str, path: Path) -> None:
        self.events.append((what, path.relative_to(self.root).as_posix()))

    def index(self, what: str, name: str) -> int:
        """The last time that it happened."""
        return max(n for n, event in enumerate(self.events) if event == (what, name))


def test_an_artifact_is_on_the_disk_before_the_rename_that_makes_it_count(tmp_path, monkeypatch):
    make(tmp_path / "made", "old")
    recorded = Recorded(tmp_path, monkeypatch)
    with artifact.create(tmp_path / "made", "thing", CONFIG, {}) as draft:
        (draft.path / "deep" / "er").mkdir(parents=True)
        (draft.path / "deep" / "er" / "data.txt").write_text("new")
        (draft.path / ".scratch").write_text("x")
    counts = recorded.index("rename", "made")
    contents = recorded.index("sync", ".made.partial/deep/er/data.txt")
    for directory in ("deep/er", "deep", "."):
        entry = recorded.index("sync", (Path(".made.partial") / directory).as_posix())
        assert contents < entry < counts, directory
    assert recorded.index("sync", ".made.partial/artifact.json") < counts
    assert counts < recorded.index("sync", "."), "and then the entry that the rename made"
    assert not any("scratch" in name for _, name in recorded.events)


def test_an_adopted_artifact_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    original = make(tmp_path / "original")
    recorded = Recorded(tmp_path, monkeypatch)
    artifact.adopt(original.path, tmp_path / "own", "thing")
    counts = recorded.index("rename", "own")
    assert recorded.index("sync", ".own.partial/data.txt") < counts
    assert recorded.index("sync", ".own.partial") < counts < recorded.index("sync", ".")


def test_json_is_on_the_disk_before_and_after_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    recorded = Recorded(tmp_path, monkeypatch)
    artifact.write_json(tmp_path / "value.json", 3)
    aside = f".value.json.{os.getpid()}"
    assert recorded.events == [("sync", aside), ("rename", "value.json"), ("sync", ".")]


def test_scratch_files_do_not_reach_the_artifact(tmp_path):
    with artifact.create(tmp_path / "made", "thing", CONFIG, {}) as draft:
        (draft.path / ".cursor").write_text("9")
        (draft.path / ".parts").mkdir()
        (draft.path / ".parts" / "a").write_text("a")
        (draft.path / "data.txt").write_text("contents")
        draft.summary["letters"] = 8
    assert sorted(os.listdir(tmp_path / "made")) == ["artifact.json", "data.txt"]
    made = artifact.load(tmp_path / "made", "thing")
    assert made.fingerprint == make(tmp_path / "plain").fingerprint


def test_a_new_artifact_replaces_the_whole_old_one(tmp_path):
    with artifact.create(tmp_path / "made", "thing", CONFIG, {}) as draft:
        (draft.path / "old.txt").write_text("old")
    make(tmp_path / "made")
    assert sorted(os.listdir(tmp_path / "made")) == ["artifact.json", "data.txt"]
    assert {name for name in os.listdir(tmp_path) if "old" in name or "partial" in name} == set()


def test_a_kill_between_the_two_renames_brings_the_old_artifact_back(tmp_path):
    old = make(tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / ".made.old")
    assert artifact.finished(tmp_path / "made", "thing", CONFIG, {}) == old
    assert not (tmp_path / ".made.old").exists()


def test_a_kill_after_both_renames_leaves_the_new_artifact(tmp_path):
    make(tmp_path / "made", "old")
    shutil.copytree(tmp_path / "made", tmp_path / ".made.old")
    new = make(tmp_path / "made", "new one")
    shutil.copytree(tmp_path / "made", tmp_path / ".made.old")
    assert artifact.load(tmp_path / "made", "thing") == new
    assert not (tmp_path / ".made.old").exists()


def test_a_reader_leaves_the_renames_of_a_writer_alone(tmp_path, monkeypatch):
    """A reader that comes between a live writer's two renames must not undo the first."""
    make(tmp_path / "made", "old")
    rename = Path.rename

    def read_in_between(source: Path, target: Path) -> Path:
        renamed = rename(source, target)
        if target.name == ".made.old":
            with pytest.raises(ArtifactError, match="no such directory"):
                artifact.load(tmp_path / "made", "thing")
        return renamed

    monkeypatch.setattr(Path, "rename", read_in_between)
    assert make(tmp_path / "made", "new").summary == {"letters": 3}


def test_two_processes_cannot_write_the_same_artifact(tmp_path):
    with artifact.create(tmp_path / "made", "thing", CONFIG, {}):
        with (
            pytest.raises(ArtifactError, match=r"another process is writing .*made"),
            artifact.create(tmp_path / "made", "thing", CONFIG, {}),
        ):
            pass
        make(tmp_path / "neighbour")
    assert artifact.load(tmp_path / "made", "thing")


def test_what_was_made_from_just_this_is_found(tmp_path):
    source = make(tmp_path / "source")
    assert artifact.finished(tmp_path / "made", "thing", CONFIG, {"source": source}) is None
    made = make(tmp_path / "made", inputs={"source": source})
    assert artifact.finished(tmp_path / "made", "thing", CONFIG, {"source": source}) == made


def test_what_was_made_from_something_else_is_refused_naming_the_difference(tmp_path):
    source, other = make(tmp_path / "source"), make(tmp_path / "other", "else")
    make(tmp_path / "made", inputs={"source": source})
    with pytest.raises(ArtifactError) as raised:
        artifact.finished(
            tmp_path / "made", "thing", {**CONFIG, "units": 7}, {"source": other, "extra": other}
        )
    for part in [
        str(tmp_path / "made"),
        "units was 100 and is now 7",
        f"input source was {source.fingerprint} and is now {other.fingerprint}",
        f"input extra was None and is now {other.fingerprint}",
    ]:
        assert part in str(raised.value)
    assert "rounds" not in str(raised.value)


def test_a_tuple_in_the_configuration_is_the_list_that_json_makes_of_it(tmp_path):
    config = {"modes": ("none", "knn")}
    made = make(tmp_path / "made", config=config)
    assert artifact.finished(tmp_path / "made", "thing", config, {}) == made
    kill_while_writing(tmp_path / "made", config=config)
    with artifact.create(tmp_path / "made", "thing", config, {}) as draft:
        assert draft.resumed


def test_an_input_is_required_by_fingerprint_and_both_are_named(tmp_path):
    source, other = make(tmp_path / "source"), make(tmp_path / "other", "else")
    made = make(tmp_path / "made", inputs={"codebook": source})
    made.require("codebook", source)
    with pytest.raises(ArtifactError) as raised:
        made.require("codebook", other)
    for name in ("codebook", source.fingerprint, other.fingerprint, str(other.path)):
        assert name in str(raised.value)
    with pytest.raises(ArtifactError, match="vocabulary None"):
        made.require("vocabulary", source)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has schema None, this version reads 1"),
        ('{"schema": 2, "kind": "thing"}', "has schema 2"),
        ('{"schema": 1, "kind": "other"}', "is a other, not a thing"),
        ('{"schema": 1, "kind": "thing"}', "lacks a field"),
        (None, "holds no artifact.json"),
    ],
)
def test_a_directory_that_is_no_such_artifact_is_refused(tmp_path, text, reason):
    (tmp_path / "wrong").mkdir()
    if text is not None:
        (tmp_path / "wrong" / "artifact.json").write_text(text)
    with pytest.raises(ArtifactError, match=reason) as raised:
        artifact.load(tmp_path / "wrong", "thing")
    assert str(tmp_path / "wrong") in str(raised.value)


def test_a_file_in_the_place_of_an_artifact_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="not a finished thing"):
        artifact.load(tmp_path / "file", "thing")


def test_json_is_the_old_text_or_the_new_never_half(tmp_path):
    path = tmp_path / "value.json"
    artifact.write_json(path, {"name": "niño"})
    with pytest.raises(TypeError):
        artifact.write_json(path, {"name": "half", "path": object()})
    assert json.loads(path.read_text()) == {"name": "niño"}


def test_a_users_own_input_is_known_by_its_contents(tmp_path):
    file, folder = tmp_path / "list.txt", tmp_path / "audio"
    file.write_text("one")
    folder.mkdir()
    (folder / "a.wav").write_text("abc")
    before = [artifact.outside(path).fingerprint for path in (file, folder)]
    assert before == [artifact.outside(path).fingerprint for path in (file, folder)]
    file.write_text("two")
    (folder / "b.wav").write_text("abc")
    after = [artifact.outside(path).fingerprint for path in (file, folder)]
    assert len({*before, *after}) == 4
    with pytest.raises(ArtifactError, match=r"no such file or directory: .*missing"):
        artifact.outside(tmp_path / "missing")


def test_a_folder_is_known_for_what_can_be_looked_at_in_it(tmp_path):
    folder, elsewhere = tmp_path / "audio", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "gone.wav").symlink_to("nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(elsewhere)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.wav")).touch()
    before = artifact.outside(folder).fingerprint
    assert artifact.outside(folder).fingerprint == before
    (elsewhere / "a.wav").write_text("abc")
    assert artifact.outside(folder).fingerprint != before
    for name, reason in [("x" * 300, "File name too long"), ("a\0b", "no such file")]:
        with pytest.raises(ArtifactError, match=reason):
            artifact.outside(tmp_path / name)


def files(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def test_an_adopted_artifact_is_the_original_in_another_place(tmp_path):
    source = make(tmp_path / "source")
    original = make(tmp_path / "original", inputs={"source": source})
    adopted = artifact.adopt(original.path, tmp_path / "deep" / "own", "thing")
    assert adopted.path == tmp_path / "deep" / "own"
    assert replace(adopted, place=original.place) == original
    assert adopted == artifact.load(adopted.path, "thing")
    assert files(adopted.path) == files(original.path)
    assert artifact.finished(adopted.path, "thing", CONFIG, {"source": source}) == adopted
    assert artifact.load(original.path, "thing") == original, "and it stays where it was"


def test_adopting_again_copies_nothing(tmp_path):
    original = make(tmp_path / "original")
    adopted = artifact.adopt(original.path, tmp_path / "own", "thing")
    (adopted.path / "note.txt").write_text("mine")
    assert artifact.adopt(original.path, tmp_path / "own", "thing") == adopted
    assert (adopted.path / "note.txt").read_text() == "mine"
    assert artifact.adopt(original.path, original.path, "thing") == original


def test_another_artifact_in_the_place_is_kept_and_both_are_named(tmp_path):
    original, other = make(tmp_path / "original"), make(tmp_path / "own", "else")
    with pytest.raises(ArtifactError) as raised:
        artifact.adopt(original.path, tmp_path / "own", "thing")
    for name in (original.fingerprint, other.fingerprint, str(original.path), str(other.path)):
        assert name in str(raised.value)
    assert artifact.load(tmp_path / "own", "thing") == other


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_artifact_is_not_replaced_by_an_adopted_one(tmp_path, kind):
    original, own = make(tmp_path / "original"), tmp_path / "own"
    if kind == "file":
        own.write_text("mine")
    else:
        own.mkdir()
        (own / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=f"{own} is not a finished thing"):
        artifact.adopt(original.path, own, "thing")
    assert own.read_text() == "mine" if kind == "file" else (own / "mine.txt").exists()


def test_only_a_finished_artifact_of_the_kind_is_adopted(tmp_path):
    original = make(tmp_path / "original")
    with pytest.raises(ArtifactError, match="is a thing, not a other"):
        artifact.adopt(original.path, tmp_path / "own", "other")
    with pytest.raises(ArtifactError, match="missing is not a finished thing"):
        artifact.adopt(tmp_path / "missing", tmp_path / "own", "thing")
    assert not (tmp_path / "own").exists()


def test_adopting_that_was_killed_leaves_nothing_and_is_done_again(tmp_path, monkeypatch):
    original = make(tmp_path / "original")

    def half(source, target):
        Path(target).mkdir()
        (Path(target) / "artifact.json").write_text("{")
        (Path(target) / "half.txt").write_text("half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", half)
        with pytest.raises(Killed):
            artifact.adopt(original.path, tmp_path / "own", "thing")
    assert not (tmp_path / "own").exists()
    adopted = artifact.adopt(original.path, tmp_path / "own", "thing")
    assert files(adopted.path) == files(original.path)


def test_an_artifact_set_aside_by_a_killed_writer_is_found_before_one_is_adopted(tmp_path):
    original, other = make(tmp_path / "original"), make(tmp_path / "own", "else")
    other.path.rename(tmp_path / ".own.old")
    with pytest.raises(ArtifactError, match=other.fingerprint):
        artifact.adopt(original.path, tmp_path / "own", "thing")
    assert artifact.load(tmp_path / "own", "thing") == other


def test_nothing_is_adopted_where_another_process_is_writing(tmp_path):
    original = make(tmp_path / "original")
    with (
        artifact.create(tmp_path / "own", "thing", CONFIG, {}),
        pytest.raises(ArtifactError, match=r"another process is writing .*own"),
    ):
        artifact.adopt(original.path, tmp_path / "own", "thing")


class Later(Section):
    """A section that got a key after something was made by it."""

    units: int
    precision: str = "fp32"


def test_a_key_that_there_was_not_yet_was_as_its_default(tmp_path):
    path = tmp_path / "made"
    with artifact.create(path, "codebook", {"units": 3}, {}):
        pass
    assert artifact.finished(path, "codebook", recipe(Later(units=3)), {})
    with pytest.raises(ArtifactError, match="precision was 'fp32' and is now 'bf16'"):
        artifact.finished(path, "codebook", recipe(Later(units=3, precision="bf16")), {})
