from itertools import combinations

import pytest

pytest.importorskip("faker")

from mmrag.corpora import spanish, synthetic
from mmrag.model.vocabulary import ALPHABET
from mmrag.text import normalise

SIZES = {"dev": 30, "test": 40, "mentions": 3, "seed": 5}


@pytest.fixture(scope="module")
def plan():
    return spanish.plan(**SIZES)


def test_the_same_seed_plans_the_same_and_another_one_other_sentences(plan):
    assert spanish.plan(**SIZES) == plan
    other = spanish.plan(**{**SIZES, "seed": 6})
    assert {one.text for one in other["test"]} != {one.text for one in plan["test"]}


def test_no_sentence_stands_twice(plan):
    texts = [one.text for split in plan.values() for one in split]
    assert len(set(texts)) == len(texts)
    assert (len(plan["dev"]), len(plan["test"])) == (30, 40)


def test_the_datastore_mentions_every_name_of_dev_and_test_and_no_other(plan):
    said = [one.entities[0] for one in plan["datastore"]]
    names = {one.entities[0] for split in ("dev", "test") for one in plan[split]}
    assert {name: said.count(name) for name in names} == dict.fromkeys(names, 3)
    assert set(said) == names


def test_names_are_of_their_splits_own_group(plan):
    names = synthetic.make_names(SIZES["seed"])
    for split in ("dev", "test"):
        own = {*names.family[split], *names.towns[split]}
        assert all(one.entities[0].split()[-1] in own for one in plan[split])


def test_a_name_stands_in_its_sentence_and_all_is_written_in_letters_of_english(plan):
    for one in (one for split in plan.values() for one in split):
        assert f" {one.entities[0]} " in f" {one.text} "
        assert set(one.text) <= {*ALPHABET, " "}
        assert one.text == normalise(one.text)


def test_splits_share_no_variant_of_a_voice():
    variants = {
        split: {voice.name.partition("+")[2] for voice in voices}
        for split, voices in spanish.VOICES.items()
    }
    for one, other in combinations(variants.values(), 2):
        assert not one & other
