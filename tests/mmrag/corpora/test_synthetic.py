import re
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations
from math import prod
from random import Random

import numpy as np
import pytest
from plain_plan import plain_plan

from mmrag.config import Sentences, Synthesize, Workers
from mmrag.corpora import synthetic
from mmrag.corpora.grammar import GRAMMAR
from mmrag.corpora.synthetic import (
    SPLITS,
    Planned,
    assign_voices,
    make_names,
    other_names,
    plan,
    render,
    stream,
)
from mmrag.corpora.voices import kokoro
from mmrag.corpora.voices.espeak import VOICES, Synthesizer, Voice, varied
from mmrag.corpora.voices.speech import SPEEDS
from mmrag.records import Line

pytest.importorskip("faker")
pytest.importorskip("espeakng_loader")

CONFIG = Synthesize(
    lm=300,
    adapter=60,
    mentions=3,
    dev=40,
    test=50,
    text=200,
    everyday_share=0.4,
    workers=Workers(count=1, num_cpus=1),
)


@pytest.fixture(scope="module")
def planned() -> dict[str, list[Planned]]:
    return plan(CONFIG, seed=7)


def entities(planned: dict[str, list[Planned]], *splits: str) -> set[str]:
    return {entity for split in splits for one in planned[split] for entity in one.entities}


def words_of(planned: dict[str, list[Planned]], *splits: str) -> set[str]:
    return {word for split in splits for one in planned[split] for word in one.text.split()}


def test_a_plan_follows_from_the_configuration_and_the_seed(planned):
    assert plan(CONFIG, seed=7) == planned
    assert plan(CONFIG, seed=8)["test"] != planned["test"]


@pytest.fixture
def real_sentences(tmp_path) -> Sentences:
    """Of two files that have some lines in common."""
    places, things = ("here", "there", "at home", "upstairs"), "abcdefghijklmnopqrstuvwxyz"
    lines = [f"put the {thing} {place} please" for thing in things for place in places]
    (tmp_path / "one.txt").write_text("\n".join(lines[:80]))
    (tmp_path / "other.txt").write_text("\n".join(lines[60:]))
    files = tuple(str(tmp_path / f"{name}.txt") for name in ("one", "other"))
    return Sentences(files=files, held_out=0.2, lm=30, dev=6, test=6)


def test_a_plan_that_is_streamed_is_the_one_of_lists(planned, real_sentences):
    assert planned == plain_plan(CONFIG, seed=7)
    changes = {"sentences": real_sentences, "voices": {"espeak": 1.0, "kokoro": 1.0}}
    mixed = CONFIG.model_copy(update=changes)
    made = plan(mixed, seed=7)
    assert made == plain_plan(mixed, seed=7)
    assert {one.domain for one in made["text"]} == {"everyday", "assistant", "one", "other"}


def test_no_utterance_is_made_before_it_is_asked_for(monkeypatch):
    made: list[str] = []

    def note(**fields) -> Planned:
        made.append(fields["id"])
        return Planned(**fields)

    monkeypatch.setattr(synthetic, "Planned", note)
    splits = stream(CONFIG, seed=7)
    assert made == []
    assert [next(splits["lm"]).id for _ in range(3)] == made
    assert next(splits["test"]).id == made[-1] == "test-000000"


def test_splits_have_the_sizes_and_shares_that_were_asked_for(planned):
    assert tuple(planned) == SPLITS
    for split in ("lm", "text", "dev", "test"):
        domains = Counter(one.domain for one in planned[split])
        size = getattr(CONFIG, split)
        assert domains == {"everyday": 0.4 * size, "assistant": 0.6 * size}
    assert {one.domain for one in planned["adapter"]} == {"assistant"}
    assert len(planned["adapter"]) == CONFIG.adapter


def test_no_sentence_and_no_id_stands_twice_anywhere(planned):
    everything = [one for split in SPLITS for one in planned[split]]
    assert len({one.text for one in everything}) == len(everything)
    assert len({one.id for one in everything}) == len(everything)
    assert all(one.document == one.id for one in everything)


def test_the_groups_of_splits_share_no_entity_and_no_family_name(planned):
    groups = [("lm", "text"), ("adapter",), ("dev",), ("test",)]
    for one, other in combinations(groups, 2):
        assert not entities(planned, *one) & entities(planned, *other)
        family_names = {entity.split()[-1] for entity in entities(planned, *one)}
        assert (
            not (family_names & words_of(planned, *other))
            - set(GRAMMAR["trade"])
            - {
                "sons",
                "brothers",
            }
        )


def test_the_datastore_mentions_every_looked_up_entity_as_often_as_asked(planned):
    mentions = Counter(entity for one in planned["datastore"] for entity in one.entities)
    looked_up = entities(planned, "adapter", "dev", "test")
    assert mentions == dict.fromkeys(looked_up, CONFIG.mentions)


def test_every_dev_and_test_entity_has_a_word_that_training_text_never_shows(planned):
    seen = words_of(planned, "lm", "text")
    for entity in entities(planned, "dev", "test"):
        assert set(entity.split()) - seen, entity


def test_dev_and_test_voices_are_heard_nowhere_else(planned):
    heard = {
        split: {one.voice for one in planned[split]} - {None}
        for split in ("lm", "adapter", "datastore", "dev", "test")
    }
    assert heard["dev"] == set(VOICES["dev"])
    assert heard["test"] == set(VOICES["test"])
    trained = heard["lm"] | heard["adapter"] | heard["datastore"]
    assert {voice.id for voice in trained} == {voice.id for voice in VOICES["train"]}
    assert {voice.name for voice in trained} == {voice.name for voice in VOICES["train"]}
    assert {one.voice for one in planned["text"]} == {None}


def test_training_voices_are_varied_from_one_sentence_to_the_next(planned):
    for split in ("lm", "adapter", "datastore"):
        voices = [one.voice for one in planned[split]]
        assert {voice.speed for voice in voices} == set(SPEEDS)
        assert len(set(voices)) > 0.8 * len(voices)
    assert {one.voice.speed for split in ("dev", "test") for one in planned[split]} == {1.0}


def test_a_varied_voice_is_like_its_model():
    draw = Random(0)
    for voice in (*VOICES["train"], Voice("low", "en", pitch=3), Voice("high", "en", pitch=95)):
        made = [varied(voice, draw) for _ in range(60)]
        assert {(one.id, one.name) for one in made} == {(voice.id, voice.name)}
        assert all(abs(one.pitch - voice.pitch) <= 15 for one in made)
        assert all(0.84 < one.rate / voice.rate < 1.21 for one in made)
        assert {one.speed for one in made} == set(SPEEDS)
        assert len({one.pitch for one in made}) > 10 and len({one.rate for one in made}) > 15
    assert varied(voice, Random(1)) == varied(voice, Random(1)) != varied(voice, Random(2))


def test_only_what_the_model_is_trained_on_is_recorded_badly(planned):
    rough = {split: {one.rough for one in planned[split]} for split in SPLITS}
    assert rough == {split: {split == "lm"} for split in SPLITS}
    assert not any(one.rough for one in assign_voices(["call mary", "hello"], seed=1))


def test_no_voice_variant_is_in_two_rows_of_voices():
    variants = [{voice.name.partition("+")[2] for voice in row} for row in VOICES.values()]
    for one, other in combinations(variants, 2):
        assert not one & other
    everyone = [voice for row in VOICES.values() for voice in row]
    assert len({voice.id for voice in everyone}) == len(everyone)
    assert len({(voice.name, voice.pitch, voice.rate) for voice in everyone}) == len(everyone)


def test_every_voice_can_speak():
    synthesizer = Synthesizer()
    for row in VOICES.values():
        for voice in row:
            wave = synthesizer.speak("hello there", voice).wave
            assert np.sqrt(np.mean(wave**2)) > 0.02, voice


def test_sentences_are_plain_words_that_are_spoken_as_written(planned):
    for split in SPLITS:
        for one in planned[split]:
            assert re.fullmatch(r"[a-z']+( [a-z']+)*", one.text), one.text
            assert not re.search(r"\ba [aeio]", one.text), one.text
            if one.domain == "everyday":
                assert 4 <= len(one.text.split()) <= 10
                assert not one.entities
            else:
                assert 1 <= len(one.entities) <= 2
                assert all(f" {entity} " in f" {one.text} " for entity in one.entities)


def test_the_grammar_is_closed_and_wide():
    @cache
    def expansions(symbol: str) -> int:
        return sum(
            prod(expansions(inner) for inner in re.findall(r"\{(\w+)\}", phrase))
            for phrase in GRAMMAR[symbol]
        )

    used = {
        inner
        for phrases in GRAMMAR.values()
        for phrase in phrases
        for inner in re.findall(r"\{(\w+)\}", phrase)
    }
    from_outside = {"person", "place", "company", "first", "family", "partner", "town"}
    assert used - set(GRAMMAR) == from_outside
    assert not from_outside & set(GRAMMAR)
    assert expansions("everyday") > 1_000_000
    assert len(set(GRAMMAR["assistant"])) >= 25


def test_family_names_and_towns_belong_to_one_group_and_are_no_common_words():
    names = make_names(seed=7)
    for pool in (names.family, names.towns):
        words = [word for group in pool.values() for word in group]
        assert len(set(words)) == len(words)
        assert not set(words) & set(names.first)
        assert not set(words) & set(GRAMMAR["object"])
    assert {"st", "dr"}.isdisjoint(names.family["lm"])


def test_other_names_are_new_and_each_has_a_word_that_training_text_never_shows(planned):
    taken = {entity for split in planned.values() for one in split for entity in one.entities}
    found = other_names(300, 7, taken)
    assert len(set(found)) == 300 and not set(found) & taken
    assert found[:20] == other_names(20, 7, taken), "more are the same and others"
    known = {word for one in (*planned["lm"], *planned["text"]) for word in one.text.split()}
    assert [name for name in found if set(name.split()) <= known] == []


def test_a_grammar_too_small_for_a_split_is_an_error_that_names_the_split(monkeypatch):
    monkeypatch.setitem(GRAMMAR, "everyday", ("we went home again {past}",))
    with pytest.raises(ValueError, match="split lm: there are too few distinct everyday"):
        plan(CONFIG.model_copy(update={"dev": 10, "test": 10}), seed=0)


def test_too_few_names_for_a_split_is_an_error_that_names_the_split(monkeypatch):
    few = synthetic.Names(
        first=("ann",),
        family={group: (f"{group}son",) for group in synthetic.GROUPS},
        towns={group: (f"{group}ton",) for group in synthetic.GROUPS},
    )
    monkeypatch.setattr(synthetic, "make_names", lambda seed: few)
    with pytest.raises(ValueError, match="split dev: there are too few distinct entities"):
        plan(CONFIG, seed=0)


def test_a_line_gets_the_same_training_voice_whatever_stands_around_it():
    [alone] = assign_voices(["call mary"], seed=1)
    first, second, third = assign_voices(["hello", "call mary", "call mary"], seed=1)
    assert (alone.voice, alone.seed) == (second.voice, second.seed)
    assert len({alone.document, first.document, second.document, third.document}) == 3
    everyone = assign_voices([f"line {number}" for number in range(300)], seed=1)
    assert {one.voice.id for one in everyone} == {voice.id for voice in VOICES["train"]}
    assert {one.voice.speed for one in everyone} == set(SPEEDS)


def test_lines_may_be_said_by_several_synthesizers_and_each_keeps_its_voice():
    lines = [f"line {number}" for number in range(300)]
    shares = {"espeak": 0.5, "kokoro": 0.5}
    voiced = assign_voices(lines, 1, shares)
    assert 100 < sum(one.voice.engine == "kokoro" for one in voiced) < 200
    assert assign_voices(lines[7:8], 1, shares)[0].voice == voiced[7].voice
    packs = {pack for one in voiced for pack, _ in getattr(one.voice, "blend", ())}
    assert not packs & {*kokoro.PACKS["dev"], *kokoro.PACKS["test"]}


@pytest.mark.parametrize("shares", [{"espeak": 1.0}, {"espeak": 1.0, "kokoro": 1.0}])
def test_takes_of_a_line_have_other_voices_and_the_first_is_as_ever(shares):
    takes = [Line("call mary", take=take) for take in range(8)]
    voiced = assign_voices(takes, 1, shares)
    [alone] = assign_voices(["call mary"], 1, shares)
    assert (voiced[0].voice, voiced[0].seed) == (alone.voice, alone.seed)
    assert len({one.voice.id for one in voiced}) == len(takes)
    assert {one.text for one in voiced} == {"call mary"}
    [fifth] = assign_voices([takes[5]], 1, shares)
    assert fifth.voice == voiced[5].voice, "whatever stands around it"


def test_ipa_and_other_languages_stay_with_espeak_whoever_speaks_otherwise():
    lines = [Line("/mɛəri/", phonetic=True, take=2), Line("maría", language="es", take=1)]
    assert {one.voice.engine for one in assign_voices(lines, 1, {"kokoro": 1.0})} == {"espeak"}
    many = assign_voices([Line("maría", language="es", take=n) for n in range(8)], 1)
    assert len({one.voice for one in many}) > 4, "where there are few names they come again"


def test_a_rendered_utterance_is_the_same_every_time_and_follows_its_seed():
    synthesizer = Synthesizer()
    one, other = assign_voices(["call mary at the office", "call peter"], seed=3)
    first = render(one, synthesizer)
    render(other, synthesizer)
    np.testing.assert_array_equal(render(one, synthesizer).wave, first.wave)
    reseeded = render(Planned(**{**vars(one), "seed": one.seed + 1}), synthesizer)
    assert reseeded.words == first.words
    assert not np.array_equal(reseeded.wave, first.wave)


def test_rendering_makes_speech_softer_and_adds_25_to_40_decibels_of_noise():
    synthesizer = Synthesizer()
    for one in assign_voices([f"call mary at {hour}" for hour in ("ten", "six", "two")], seed=5):
        clean = synthesizer.speak(one.text, one.voice).wave
        wave = render(one, synthesizer).wave
        gain = float(wave @ clean / (clean @ clean))
        noise = wave - gain * clean
        ratio = 10 * np.log10(np.mean((gain * clean) ** 2) / np.mean(noise**2))
        assert wave.dtype == np.float32
        assert -12.5 < 20 * np.log10(gain) < 0.5
        assert 24 < ratio < 41


def test_a_rough_rendering_is_the_same_speech_recorded_worse():
    synthesizer = Synthesizer()
    [one] = assign_voices(["call mary at the office"], seed=3)
    quiet = render(one, synthesizer)
    rough = [render(replace(one, rough=True, seed=seed), synthesizer) for seed in range(12)]
    clean = synthesizer.speak(one.text, one.voice).wave

    def likeness(wave):
        return wave @ clean / np.linalg.norm(wave) / np.linalg.norm(clean)

    assert all(each.wave.dtype == np.float32 and np.abs(each.wave).max() <= 1 for each in rough)
    assert all((each.words, each.phones) == (quiet.words, quiet.phones) for each in rough)
    assert np.median([likeness(each.wave) for each in rough]) < likeness(quiet.wave)
    assert min(likeness(each.wave) for each in rough) < 0.95
    again = render(replace(one, rough=True, seed=5), synthesizer)
    np.testing.assert_array_equal(again.wave, rough[5].wave)


def test_text_alone_cannot_be_rendered(planned):
    with pytest.raises(ValueError, match="text-000000 has no voice"):
        render(planned["text"][0], Synthesizer())


def test_without_faker_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faker", None)
    with pytest.raises(ImportError, match=r"pip install mmrag\[speech\]"):
        plan(CONFIG, seed=0)
