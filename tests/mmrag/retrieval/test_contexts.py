"""While it learns, an adapter is shown lists of phrases, what searches brought, or nothing."""

from collections import Counter

import numpy as np
import pytest
import torch

from mmrag.config import Contexts
from mmrag.names import Names
from mmrag.retrieval import datastore
from mmrag.retrieval.contexts import (
    ALIKE,
    FOREVER,
    PackedNeighbours,
    TrainingContexts,
    pack_neighbours,
    read_neighbours,
    write_neighbours,
)
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.phrases import Phrases
from mmrag.retrieval.segment import Description, Segment, windows_of

WIDTH, WINDOW, MENTIONS = 4, 6, 2
NAMES = [f"name {number}" for number in range(30)]
EXAMPLES = [f"u{number}" for number in range(5)]
ENTITIES = [["name 0"], ["name 1", "name 2"], [], ["name 3", "unheard of"], ["unheard of"]]
LENGTHS = [4, 9, 1, 7, 3]
"""Tokens of each example, its end included."""


def fill(directory, stretches):
    """A datastore of stretches: (utterance, document, its tokens)."""
    datastore.create(directory, Description(WIDTH, WINDOW, "l2", "none", {}))
    tokens = np.concatenate([said for *_, said in stretches])
    counts = [len(said) for *_, said in stretches]
    segment = Segment(
        keys=np.random.default_rng(len(tokens)).standard_normal((len(tokens), WIDTH)),
        tokens=tokens,
        windows=np.concatenate([windows_of(said, WINDOW) for *_, said in stretches]),
        positions=np.concatenate([np.arange(count) for count in counts]),
        utterances=np.repeat(np.arange(len(stretches)), counts),
        names=[(utterance, document) for utterance, document, _ in stretches],
    )
    datastore.write_segment(directory, "only", segment)
    datastore.publish(directory, ["only"])
    return Datastore.open(directory)


@pytest.fixture(scope="module")
def phrases(tmp_path_factory):
    """Phrase n is written as 100 + n, and its mentions are told apart by what follows."""
    said = [
        (f"s{number}-{way}", name, np.array([100 + number, 50 + way][: 1 + number % 2]))
        for way in range(MENTIONS)
        for number, name in enumerate(NAMES)
    ]
    return Phrases(fill(tmp_path_factory.mktemp("phrases"), said))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """What is searched: one datastore that knows, whose tokens are 200 and up, and one that does
    not, from 500 on."""
    return [
        fill(
            tmp_path_factory.mktemp(name),
            [(f"{name}{n}", f"{name}{n}", first + 10 * n + np.arange(10)) for n in range(8)],
        )
        for name, first in (("right", 200), ("wrong", 500))
    ]


def neighbours(entries=80, k=4, seed=0):
    """Every example's entries near each of its tokens; the farther of some tokens are missing."""
    random = np.random.default_rng(seed)
    found = {}
    for name, length in zip(EXAMPLES, LENGTHS, strict=True):
        near = random.integers(0, entries, (length, k))
        near[np.arange(length) % 3 == 1, 2:] = -1
        found[name] = near
    return found


FOUND, MISLED = neighbours(seed=1), neighbours(seed=2)


def contexts(**changes):
    fields = {
        "split": "adapter",
        "phrases": "phrases",
        "retrieved": "right",
        "wrong": "wrong",
        "mixture": {"phrases": 1},
        "list_length": (3, 12),
        "own": 1.0,
        "k": 3,
        "strides": (1,),
    }
    return Contexts(**{**fields, **changes})


@pytest.fixture(scope="module")
def shown(phrases, stores):
    def build(**changes):
        right, wrong = stores
        settings = contexts(**changes)
        return TrainingContexts(
            settings, EXAMPLES, ENTITIES, phrases, (right, FOUND), (wrong, MISLED)
        )

    return build


def draw(seed=0):
    return np.random.default_rng(seed)


def rows_of(windows):
    """Each row's windows: (its tokens, since, until)."""
    rows = []
    for index, since, until in zip(windows.index, windows.since, windows.until, strict=True):
        rows.append(
            [
                (tuple(windows.tokens[i][windows.present[i]].tolist()), int(s), int(u))
                for i, s, u in zip(index, since, until, strict=True)
                if i >= 0
            ]
        )
    return rows


def listed(windows):
    """The phrases that each row is shown."""
    return [[NAMES[tokens[0] - 100] for tokens, *_ in row] for row in rows_of(windows)]


CHOSEN = [0, 1, 2, 3, 4]


def test_neighbours_are_read_back_part_by_part(tmp_path):
    halves = [dict(list(FOUND.items())[:2]), dict(list(FOUND.items())[2:])]
    for number, half in enumerate(halves):
        write_neighbours(tmp_path / f"part-{number}.npz", half)
    (tmp_path / ".part-9.npz.123.npz").write_bytes(b"half of a part")
    found = read_neighbours(tmp_path)
    assert list(found) == EXAMPLES
    for name, near in FOUND.items():
        np.testing.assert_array_equal(found[name], near)
    assert len(list(tmp_path.glob("part-*"))) == 2, "nothing is left behind"


def test_packed_neighbours_are_those_that_were_read(tmp_path):
    first, last = dict(list(FOUND.items())[:3]), dict(list(FOUND.items())[2:])
    again = {**last, EXAMPLES[0]: FOUND[EXAMPLES[0]][:2]}
    for number, part in enumerate((first, again)):
        write_neighbours(tmp_path / f"part-{number}.npz", part)
    expected = read_neighbours(tmp_path)
    packed = PackedNeighbours(pack_neighbours(tmp_path, tmp_path / "packed"))
    assert packed.keys() == expected.keys() and len(packed) == len(expected)
    for name, near in expected.items():
        np.testing.assert_array_equal(packed[name], near)
    with pytest.raises(KeyError):
        packed["nobody"]


def test_neighbours_that_were_found_anew_are_packed_anew(tmp_path):
    write_neighbours(tmp_path / "part-0.npz", {"u0": np.zeros((2, 1), np.int64)})
    pack_neighbours(tmp_path, tmp_path / "packed")
    made = (tmp_path / "packed").stat().st_ino
    assert pack_neighbours(tmp_path, tmp_path / "packed").stat().st_ino == made
    write_neighbours(tmp_path / "part-0.npz", {"u0": np.ones((2, 1), np.int64)})
    packed = PackedNeighbours(pack_neighbours(tmp_path, tmp_path / "packed"))
    assert packed["u0"].tolist() == [[1], [1]]


@pytest.mark.parametrize("kind", ["retrieved", "phrases"])
def test_contexts_of_packed_neighbours_are_the_same(tmp_path, phrases, stores, kind):
    near = []
    for name, found in (("right", FOUND), ("wrong", MISLED)):
        (tmp_path / name).mkdir()
        write_neighbours(tmp_path / name / "part-0.npz", found)
        made = pack_neighbours(tmp_path / name, tmp_path / f"{name}-packed")
        near.append(PackedNeighbours(made))
    settings, (right, wrong) = contexts(mixture={kind: 1}, strides=(1, 2)), stores
    listed = TrainingContexts(
        settings, EXAMPLES, ENTITIES, phrases, (right, FOUND), (wrong, MISLED)
    )
    packed = TrainingContexts(
        settings, Names.of(EXAMPLES), ENTITIES, phrases, (right, near[0]), (wrong, near[1])
    )
    one, other = vars(listed(CHOSEN, draw())), vars(packed(CHOSEN, draw()))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_directory_without_neighbours_names_what_makes_them(tmp_path):
    with pytest.raises(ValueError, match=rf"no neighbours in {tmp_path} .*jobs\.retrieve"):
        read_neighbours(tmp_path)


@pytest.mark.parametrize("kind", ["phrases", "retrieved", "wrong", "empty"])
def test_a_context_follows_from_its_generator(shown, kind):
    build = shown(mixture={kind: 1}, own=0.5, strides=(1, 2, 3))
    first, again, other = (build(CHOSEN, draw(seed)) for seed in (3, 3, 4))
    for name in first.__dataclass_fields__:
        assert getattr(first, name).equal(getattr(again, name))
    assert kind == "empty" or rows_of(first) != rows_of(other)


def test_what_is_shown_is_what_the_datastore_holds(shown, stores):
    windows = shown(mixture={"retrieved": 1})(CHOSEN, draw())
    [right, _] = stores
    everything = np.arange(right.entries)
    kept = right.passages(everything)
    for number in range(len(windows.tokens)):
        tokens = windows.tokens[number][windows.present[number]].tolist()
        matching = [
            entry
            for entry in everything
            if kept.tokens[entry][kept.present[entry]].tolist() == tokens
        ]
        assert matching
        length = len(tokens)
        assert windows.present[number].tolist() == [n < length for n in range(WINDOW)]
        assert any(
            (windows.keys[number, :length].numpy() == kept.keys[e, :length]).all() for e in matching
        )
    assert not windows.keys[~windows.present].any()


def test_an_empty_context_shows_nobody_anything(shown):
    windows = shown(mixture={"empty": 1})(CHOSEN, draw())
    assert rows_of(windows) == [[]] * 5
    assert (windows.index == -1).all()
    assert len(windows.tokens), "something has to be encoded, which no row sees"


def test_a_list_holds_what_is_spoken_among_distractors(shown, phrases):
    for seed in range(20):
        for row, entities in zip(listed(shown()(CHOSEN, draw(seed))), ENTITIES, strict=True):
            known = [name for name in entities if name in phrases.names]
            assert set(known) <= set(row)
            assert len(row) == len(set(row)), "a phrase stands there once"
            assert len(row) > len(known), "and others with it"


def test_a_list_without_its_own_is_all_distractors(shown):
    for seed in range(20):
        for row, entities in zip(listed(shown(own=0.0)(CHOSEN, draw(seed))), ENTITIES, strict=True):
            assert row
            assert not set(entities) & set(row)


def test_a_list_has_its_own_as_often_as_the_settings_say(shown):
    build = shown(own=0.3)
    held = [
        set(entities) <= set(row)
        for seed in range(200)
        for row, entities in zip(listed(build([0, 1], draw(seed))), ENTITIES, strict=False)
    ]
    assert np.mean(held) == pytest.approx(0.3, abs=0.07)


def test_what_sounds_like_a_phrase_is_what_has_keys_like_its_own(tmp_path):
    said = [(f"s{n}", name, np.array([n])) for n, name in enumerate(["bea", "dea", "xu", "zoo"])]
    store = fill(tmp_path / "store", said)
    keys = store.keys_of(np.arange(4)).astype(float)
    apart = ((keys[:, None] - keys) ** 2).sum(-1) + np.where(np.eye(4), np.inf, 0)
    names = ["bea", "dea", "xu", "zoo"]
    expected = {
        name: [names[n] for n in row[:2]] for name, row in zip(names, apart.argsort(), strict=True)
    }
    assert Phrases(store).alike(2) == expected
    assert all(len(row) == 3 for row in Phrases(store).alike(9).values())


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_list_may_hold_what_sounds_like_its_own_and_is_not_said(shown, phrases, own):
    alike = phrases.alike(ALIKE)
    build = shown(near=1.0, own=own, list_length=(9, 9))
    for seed in range(10):
        for row, entities in zip(listed(build(CHOSEN, draw(seed))), ENTITIES, strict=True):
            near = {like for name in entities for like in alike.get(name, ())} - set(entities)
            known = [name for name in entities if name in phrases.names]
            assert set(row) & set(entities) == (set(known) if own else set())
            assert len(near & set(row)) >= min(len(near), 9 - len(known))
    rows = [listed(shown(near=0.3, own=own)(CHOSEN[:1], draw(seed)))[0] for seed in range(200)]
    held = np.mean([set(alike["name 0"][:2]) <= set(row) for row in rows])
    assert 0.2 < held < 0.5


def test_lists_are_as_long_as_they_may_be_and_short_ones_as_frequent_as_long_ones(shown):
    build = shown(list_length=(2, 32))
    lengths = [len(listed(build([2], draw(seed)))[0]) for seed in range(300)]
    assert min(lengths) == 2
    assert max(lengths) == len(NAMES), "all there are"
    assert np.median(lengths) == pytest.approx(8, abs=2), "half-way from 2 to 32 by ratio"


def test_a_list_shorter_than_what_is_spoken_is_cut(shown):
    for row in listed(shown(list_length=(1, 1))(CHOSEN, draw())):
        assert len(row) == 1


def test_every_mention_of_a_phrase_is_shown_sooner_or_later(shown):
    build = shown()
    ways = Counter(
        tokens
        for seed in range(40)
        for tokens, *_ in rows_of(build([1], draw(seed)))[0]
        if tokens[0] == 101
    )
    assert set(ways) == {(101, 50), (101, 51)}


def test_rows_share_their_distractors_and_a_window_is_there_once(shown):
    windows = shown(list_length=(12, 12))(CHOSEN, draw())
    assert len(windows.tokens) <= 12 + 4
    assert sum(map(len, rows_of(windows))) == 5 * 12
    assert set(windows.index.unique().tolist()) - {-1} == set(range(len(windows.tokens)))


def test_the_entities_of_one_example_are_distractors_of_another(shown):
    seen = set()
    for seed in range(10):
        seen |= set(listed(shown(list_length=(6, 6))(CHOSEN, draw(seed)))[2])
    assert {"name 0", "name 1", "name 2", "name 3"} <= seen


def test_a_list_is_there_from_first_to_last(shown):
    for row in rows_of(shown()(CHOSEN, draw())):
        assert {(since, until) for _, since, until in row} == {(0, FOREVER)}


@pytest.mark.parametrize(
    ("kind", "found", "first"), [("retrieved", FOUND, 0), ("wrong", MISLED, 1)]
)
@pytest.mark.parametrize("stride", [1, 2, 3, 20])
def test_what_a_search_brought_is_there_until_the_next(shown, stores, kind, found, first, stride):
    store = stores[first]
    build = shown(mixture={kind: 1}, strides=(stride,))
    offsets = set()
    for seed in range(30):
        for index, row in zip(CHOSEN, rows_of(build(CHOSEN, draw(seed))), strict=True):
            near = found[EXAMPLES[index]]
            times = sorted({since for _, since, _ in row})
            assert times[0] == 0
            assert set(np.diff(times[1:])) <= {stride}
            assert len(times) == 1 or 1 <= times[1] <= stride
            assert len(near) - times[-1] <= stride, "to the end of the text"
            offsets |= set(times[1:2])
            expected = []
            for since, until in zip(times, [*times[1:], FOREVER], strict=True):
                entries = [entry for entry in near[since, :3].tolist() if entry >= 0]
                passages = store.passages(np.array(entries))
                expected += [
                    (tuple(tokens[present].tolist()), since, until)
                    for tokens, present in zip(passages.tokens, passages.present, strict=True)
                ]
            assert row == expected
    assert offsets == set(range(1, min(stride, max(LENGTHS) - 1) + 1))


def test_each_utterance_draws_one_of_the_strides(shown):
    build = shown(mixture={"retrieved": 1}, strides=(1, 4))
    steps = {
        tuple(np.diff(sorted({since for _, since, _ in row})[1:]).tolist())
        for seed in range(20)
        for row in rows_of(build([1], draw(seed)))
    }
    assert steps == {(1,) * 7, (4,), ()} or steps == {(1,) * 7, (4,)}


def test_the_mixture_is_kept_to_and_a_micro_batch_is_of_one_kind(shown):
    build = shown(mixture={"phrases": 1, "retrieved": 2, "wrong": 4, "empty": 1})
    kinds = Counter()
    for seed in range(400):
        firsts = {
            tokens[0] // 100 for row in rows_of(build([0, 1, 3], draw(seed))) for tokens, *_ in row
        }
        kind = {1: "phrases", 2: "retrieved", 5: "wrong"}
        [one] = {kind[first] for first in firsts} or {"empty"}
        kinds[one] += 1
    for name, share in {"phrases": 1, "retrieved": 2, "wrong": 4, "empty": 1}.items():
        assert kinds[name] / 400 == pytest.approx(share / 8, abs=0.06)
