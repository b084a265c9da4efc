"""What is tested of Spoken-SQuAD's passages, and what there is to look up about them."""

import json

import pytest

from mmrag.corpora import passages
from mmrag.corpora.splits import CorpusError

ESPEAK, KOKORO = {"espeak": 1.0}, {"kokoro": 1.0}
WORDS = ("river", "castle", "war", "king", "song", "ship", "garden", "church", "law", "school")


@pytest.fixture
def file(tmp_path):
    """Six topics of twenty sentences; one of them stands in every topic, one is a scrap."""
    topics = []
    for topic in range(6):
        said = [f"the {word} of town {'abcdef'[topic]} was very old" for word in WORDS]
        said += [f"nobody knew the {word} in {'abcdef'[topic]} any more" for word in WORDS[:8]]
        context = ". ".join([*said, "they all met in paris", "amen"]) + "."
        answers = [
            {"text": text, "answer_start": 0} for text in ("Paris", "the river of town a was")
        ]
        paragraph = {"context": context, "qas": [{"answers": answers}]}
        topics.append({"title": f"topic {topic}", "paragraphs": [paragraph]})
    path = tmp_path / "spoken_test-v1.1.json"
    path.write_text(json.dumps({"data": topics}))
    return path


def topics_of(planned):
    return {one.id.split("_")[0] for one in planned}


def test_no_sentence_is_tested_and_looked_up_and_no_topic_tuned_on_and_tested(file):
    made = passages.plan(file, 2, 5, ESPEAK, KOKORO, seed=1)
    assert [len(made[split]) for split in ("dev", "test")] == [5, 5]
    texts = [one.text for split in made.values() for one in split]
    assert len(set(texts)) == len(texts) and "amen" not in texts
    assert sum("they all met" in text for text in texts) <= 1
    assert not topics_of(made["dev"]) & topics_of(made["test"])
    assert topics_of(made["datastore"]) >= topics_of(made["dev"]) | topics_of(made["test"])
    assert all(one.document == one.id for split in made.values() for one in split)


def test_held_out_voices_say_what_is_tested_and_training_voices_the_rest(file):
    made = passages.plan(file, 2, 5, ESPEAK, KOKORO, seed=1)
    engines = {split: {one.voice.engine for one in planned} for split, planned in made.items()}
    assert engines == {"dev": {"kokoro"}, "test": {"kokoro"}, "datastore": {"espeak"}}


def test_answers_are_entities_unless_they_are_clauses(file):
    made = passages.plan(file, 3, 5, ESPEAK, ESPEAK, seed=1)
    everyone = [one for split in made.values() for one in split]
    entities = {entity for one in everyone for entity in one.entities}
    assert entities == {"paris"}, "an answer of six words is none"
    assert all("paris" in one.text.split() for one in everyone if one.entities)


def test_the_plan_follows_from_its_seed(file):
    plans = [passages.plan(file, 2, 5, ESPEAK, KOKORO, seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_a_file_that_holds_too_little_is_named(file):
    with pytest.raises(CorpusError, match=r"spoken_test-v1\.1\.json: 6 topics, fewer than the 8"):
        passages.plan(file, 4, 5, ESPEAK, KOKORO, seed=1)
    with pytest.raises(CorpusError, match=r"\d+ sentences of dev's topics are too few"):
        passages.plan(file, 2, 30, ESPEAK, KOKORO, seed=1)
