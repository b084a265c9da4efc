"""What a step reads is found fast, and is what counting everything one by one gives."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.model import curriculum as curricula
from mmrag.model.curriculum import Curriculum
from mmrag.model.epochs import RECENT, Chosen, Kept, lay_out
from mmrag.model.examples import Example
from tests.mmrag.model.test_train import MIXED, phase, recipe

LENGTHS = st.tuples(st.integers(0, 60), st.integers(0, 60)).filter(any)


def data_of(lengths):
    return [
        Example([10] * text, [70] * units or None, f"u{number}")
        for number, (text, units) in enumerate(lengths)
    ]


def one_by_one(data, settings, seed) -> Iterator[list[Chosen]]:
    """Every micro-batch of a run, example by example: the slow twin."""
    budget, out = settings.micro_batch_tokens, set(settings.leave_out)

    def length(index, form):
        example = data[index]
        if (form != "speech" and not example.text) or (form != "text" and not example.units):
            return None
        return 4 + sum(
            len(part or ())
            for part, absent in ((example.text, "speech"), (example.units, "text"))
            if form != absent
        )

    for number, part in enumerate(settings.phases):
        left, epoch = part.steps * settings.micro_batches, 0
        while left:
            random = np.random.default_rng([seed, number, epoch])
            weights = np.array(list(part.mixture.values()))
            drawn = random.choice(
                list(part.mixture), size=len(data), p=weights / weights.sum()
            ).tolist()
            jitter = random.uniform(0.95, 1.05, len(data)).tolist()
            sizes = [length(index, form) for index, form in enumerate(drawn)]
            usable = [index for index, size in enumerate(sizes) if size is not None]
            batches: list[list[int]] = []
            for index in sorted(usable, key=lambda one: sizes[one] * jitter[one]):
                longest = max([sizes[one] for one in batches[-1]] if batches else [0])
                longest = max(longest, sizes[index])
                if not batches or longest * (len(batches[-1]) + 1) > budget:
                    batches.append([])
                batches[-1].append(index)
            for turn in random.permutation(len(batches)):
                kept = [
                    Chosen(index, drawn[index])
                    for index in batches[turn]
                    if sizes[index] <= budget and data[index].name not in out
                ]
                if kept and left:
                    left -= 1
                    yield kept
            epoch += 1


RUNS = st.builds(
    lambda lengths, budget, out, seed: (
        data_of([(1, 1), *lengths]),
        recipe(
            micro_batch_tokens=budget,
            leave_out=tuple(f"u{number}" for number in out if number <= len(lengths)),
            phases=[phase({"text": 1}, 2), phase(MIXED, 5)],
        ),
        seed,
    ),
    st.lists(LENGTHS, max_size=25),
    st.integers(6, 200),
    st.sets(st.integers(1, 25), max_size=3),
    st.integers(0, 5),
)


@settings(max_examples=60, deadline=None)
@given(RUNS, st.booleans(), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_any_step_is_the_one_that_counting_from_the_start_comes_to(
    tmp_path_factory, run, kept, order
):
    data, recipe, seed = run
    every = list(one_by_one(data, recipe, seed))
    directory = tmp_path_factory.mktemp("epochs") if kept else None
    for _ in range(2):  # again, with what the first left on the disk
        curriculum = Curriculum(data, recipe, seed, directory, kept=1)
        for step in order:
            _, found = curriculum.step(step)
            assert found == every[step * recipe.micro_batches :][: recipe.micro_batches]


@settings(max_examples=60, deadline=None)
@given(RUNS)
def test_no_micro_batch_exceeds_its_budget(run):
    data, recipe, seed = run
    curriculum = Curriculum(data, recipe, seed)
    listed = {(one.index, form) for one in curriculum.too_long() for form in one.forms}
    for step in range(recipe.steps):
        for batch in curriculum.step(step)[1]:
            assert batch and not listed & set(batch)
            width = max(
                4
                + (len(data[index].text) if form != "speech" else 0)
                + (len(data[index].units or ()) if form != "text" else 0)
                for index, form in batch
            )
            assert width * len(batch) <= recipe.micro_batch_tokens


DATA = data_of([(3 + number % 9, 5 + number % 17) for number in range(40)])
RECIPE = recipe(phases=[phase(MIXED, 60)], micro_batches=4)


@pytest.fixture
def laid_out(monkeypatch):
    """The epochs that were laid out, counted."""
    seen = []

    def counted(*told):
        seen.append(1)
        return lay_out(*told)

    monkeypatch.setattr(curricula, "lay_out", counted)
    return seen


def test_a_run_goes_on_without_laying_out_what_was_read_before(tmp_path, laid_out):
    whole = [Curriculum(DATA, RECIPE, seed=0).step(step) for step in (0, 30, 59)]
    del laid_out[:]
    before = Curriculum(DATA, RECIPE, 0, tmp_path, kept=len(DATA))
    for step in range(31):
        before.step(step)
    epochs = len(laid_out)
    assert epochs > 3
    after = Curriculum(DATA, RECIPE, 0, tmp_path, kept=len(DATA))
    assert after.step(30) == whole[1]
    assert len(laid_out) == epochs, "found, and not laid out again"
    assert after.step(59) == whole[2]
    assert Curriculum(DATA, RECIPE, 0, tmp_path, kept=len(DATA)).step(0) == whole[0]


def test_small_epochs_are_counted_now_and_then_and_kept_nowhere(tmp_path, laid_out):
    curriculum = Curriculum(DATA, RECIPE, 0, tmp_path, kept=5 * len(DATA))
    for step in range(RECIPE.steps):
        curriculum.step(step)
    epochs = len(laid_out)
    [kept] = tmp_path.iterdir()
    assert {path.name for path in kept.iterdir()} == {"phase-0.json", "lock"}
    del laid_out[:]
    again = Curriculum(DATA, RECIPE, 0, tmp_path, kept=5 * len(DATA))
    assert again.step(RECIPE.steps - 1) == curriculum.step(RECIPE.steps - 1)
    assert len(laid_out) <= 6 < epochs, "those since it was last written down, and its own"


def test_of_the_epochs_that_are_kept_the_latest_stay(tmp_path):
    curriculum = Curriculum(DATA, RECIPE, 0, tmp_path, kept=1)
    for step in range(RECIPE.steps):
        curriculum.step(step)
    [kept] = tmp_path.iterdir()
    assert len(list(kept.glob("phase-*-epoch-*"))) == RECENT
    curriculum = Curriculum(DATA, RECIPE, 0, tmp_path, kept=1)
    assert curriculum.step(0) == Curriculum(DATA, RECIPE, seed=0).step(0), "begun again"
    assert (kept / "phase-000-epoch-000000").is_dir()


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_tokens": 90},
        {"leave_out": ("u3",)},
        {"phases": recipe(phases=[phase({"speech": 1}, 60)]).phases},
    ],
)
def test_epochs_of_other_settings_are_not_mistaken_for_these(tmp_path, changes):
    Curriculum(DATA, RECIPE, 0, tmp_path, kept=1).step(9)
    other = RECIPE.model_copy(update=changes)
    found = Curriculum(DATA, other, 0, tmp_path, kept=1).step(9)
    assert found == Curriculum(DATA, other, seed=0).step(9)
    assert Curriculum(DATA, RECIPE, 1, tmp_path, kept=1).step(9) == Curriculum(
        DATA, RECIPE, seed=1
    ).step(9)


def test_an_epoch_that_another_process_kept_first_is_as_good(tmp_path):
    epoch = lay_out(Curriculum(DATA, RECIPE, seed=0)._lengths, MIXED, 120, np.random.default_rng(0))
    kept = Kept(tmp_path / "kept")
    first, second = kept.put(0, 0, epoch), kept.put(0, 0, epoch)
    assert list(first) == list(second) == list(epoch)
    assert sorted(os.listdir(kept.directory)) == ["phase-000-epoch-000000"]
    with pytest.raises(IndexError, match=f"micro-batch {len(epoch)} of {len(epoch)}"):
        epoch[len(epoch)]
