"""What a clip says of a list is found by its letters, and where it is said."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_ctc import random_letters, spelling_of

from mmrag.config import Spotting
from mmrag.decoding import spotting
from mmrag.decoding.boost import START
from mmrag.decoding.spotting import BLANK, Favoured, Spotted, Spotter, spells_all
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.records import LEAST_LIKELY, NO_ENTRY, Letters, Word
from mmrag.retrieval.wording import Entry

ENGLISH = " 'abcdefghijklmnopqrstuvwxyz"
ALPHABETS = (" ab", "ab", "a b")
NOTHING_LESS = -1e3
"""No phrase that can be said in a clip is as unlikely as this, a letter."""
USUAL = Spotting(least=-2.4)
CITIES = ("ann", "bob", "rome", "oslo", "lima", "cairo", "delhi", "quito", "accra", "hanoi")
VOCABULARY = Vocabulary(SentencePieces.train(["call ann and bob", "seven up", *CITIES], 80), 6)

phrases = st.text(" ab", max_size=6)
leasts = st.integers(0, 60).map(lambda tenths: -tenths / 10 - 0.0437)
"""None is exactly what a phrase of a few letters may have."""


def letters_of(phrase, alphabet):
    """The labels of a phrase's letters, and of the gaps between its words."""
    between = " " if " " in alphabet else ""
    return [alphabet.index(letter) + 1 for letter in between.join(phrase.split())]


def parted(labels, alphabet):
    """With the gaps around it."""
    edge = [alphabet.index(" ") + 1] if " " in alphabet else []
    return [*edge, *labels, *edge]


def frames(heard):
    """How likely each label is, frame by frame: in the clip's, and in one before and behind in
    which a gap is heard for sure."""
    inner = (heard.costs / -10).tolist()
    if " " not in heard.alphabet:
        return inner
    edge = [-math.inf] * (1 + len(heard.alphabet))
    edge[heard.alphabet.index(" ") + 1] = 0.0
    return [edge, *inner, edge]


def telling(labels):
    """Letters that a score is over."""
    return max(1, len(labels) - spotting.CHANCE)


def every_way(costs):
    """By every way to label any of the frames: what is heard so, and the likeliest sum."""
    best = {}
    for start, stop in itertools.combinations(range(len(costs) + 1), 2):
        for way in itertools.product(range(len(costs[0])), repeat=stop - start):
            said = tuple(label for label, _ in itertools.groupby(way) if label != BLANK)
            own = sum(cost[label] for cost, label in zip(costs[start:stop], way, strict=True))
            best[said] = max(best.get(said, -math.inf), own)
    return best


def likeliest(costs, labels):
    """The same of one sequence of labels, frame by frame: a way is at a label, or rests behind it
    in blanks."""
    ways, best = {}, -math.inf
    for cost in costs:
        after = {}
        for (place, rests), so_far in [*ways.items(), ((-1, True), 0.0)]:
            steps = [(place, True, BLANK)] if place >= 0 else []
            if not rests:
                steps.append((place, False, labels[place]))
            if place + 1 < len(labels) and (rests or labels[place + 1] != labels[place]):
                steps.append((place + 1, False, labels[place + 1]))
            for to, then_rests, label in steps:
                one = so_far + cost[label]
                after[to, then_rests] = max(one, after.get((to, then_rests), -math.inf))
        ways = after
        best = max(best, ways.get((len(labels) - 1, False), -math.inf))
    return best


def expected(heard, listed, least, best):
    """Number in the list -> score, of all that score so much; `best` of the frames and labels."""
    scores = {}
    for number, phrase in enumerate(listed):
        if labels := letters_of(phrase, heard.alphabet):
            score = best(frames(heard), parted(labels, heard.alphabet)) / telling(labels)
            if score >= least:
                scores[number] = score
    return scores


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(0, 100),
    st.sampled_from(ALPHABETS),
    st.lists(phrases, max_size=9),
)
def test_a_score_is_that_of_the_likeliest_of_all_ways(count, seed, alphabet, listed):
    heard = random_letters(count, alphabet, seed)
    ways = every_way(frames(heard)) if count else {}
    told = expected(
        heard, listed, NOTHING_LESS, lambda _, labels: ways.get(tuple(labels), -math.inf)
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spotting, "RIVALS", 10**6)
        patched.setattr(spotting, "PART", -math.inf)
        found = Spotter(listed, alphabet).spot(heard, NOTHING_LESS)
    assert {one.phrase: one.score for one in found} == pytest.approx(told, abs=1e-4)
    for labels in filter(None, ways):
        assert likeliest(frames(heard), labels) == pytest.approx(ways[labels])


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 1000),
    st.sampled_from(ALPHABETS),
    st.lists(st.text(" ab", max_size=12), max_size=9),
    leasts,
)
def test_every_phrase_that_scores_enough_is_spotted_where_it_is_said(
    count, seed, alphabet, listed, least
):
    heard = random_letters(count, alphabet, seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spotting, "RIVALS", 10**6)
        patched.setattr(spotting, "PART", -math.inf)
        patched.setattr(spotting, "AT_ONCE", 2)
        found = Spotter(listed, alphabet).spot(heard, least)
    told = expected(heard, listed, least, likeliest)
    assert {one.phrase: one.score for one in found} == pytest.approx(told, abs=1e-4)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert 0 <= one.start < one.end <= count
        there = Letters(alphabet, heard.costs[one.start : one.end])
        labels, inside = letters_of(listed[one.phrase], alphabet), frames(there)
        if " " in alphabet:
            inside = inside[one.start > 0 : len(inside) - (one.end < count)]
        score = likeliest(inside, parted(labels, alphabet)) / telling(labels)
        assert score == pytest.approx(one.score, abs=1e-4)


def spotted(listed, heard, least=USUAL.least, alphabet=ENGLISH):
    heard = spelling_of(heard, alphabet) if isinstance(heard, str) else heard
    return Spotter(listed, alphabet).spot(heard, least)


def test_a_phrase_is_spotted_from_its_first_frame_to_its_last_gap():
    """Each letter is heard in every other frame: the n-th in frame 2 n + 1."""
    found = spotted(["rome", "ann", "bob lee", "met"], "ann met bob lee")
    assert found == [
        Spotted(1, 0.0, 0, 8),
        Spotted(3, 0.0, 7, 16),
        Spotted(2, 0.0, 15, 31),
    ]


def test_a_phrase_that_is_said_twice_is_spotted_once_where_it_is_first_said():
    assert spotted(["ann"], "ann met ann") == [Spotted(0, 0.0, 0, 8)]


def test_a_letter_that_is_heard_on_and_on_is_one():
    heard = spelling_of("ana", ENGLISH)
    held = Letters(ENGLISH, np.repeat(heard.costs, 3, axis=0))
    assert [one.phrase for one in spotted(["anna", "ana"], held, -1)] == [1]
    run_together = Letters(ENGLISH, spelling_of("anna", ENGLISH).costs[[0, 1, 3, 5, 7]])
    assert [one.phrase for one in spotted(["anna", "ana"], run_together, -1)] == [1]


@pytest.mark.parametrize("heard", ["hannah", "hann", "annah", "joann is late", "an n", "plan now"])
def test_what_is_a_part_of_a_word_or_parted_is_not_spotted(heard):
    assert spotted(["ann"], heard) == []
    assert spotted(["ann"], f"{heard} ann") != []


@pytest.mark.parametrize("phrase", ["", " ", "  ", "...", "—", "漢字", "!?"])
def test_what_has_no_letters_is_never_spotted(phrase):
    spotter = Spotter([phrase, "ann"], ENGLISH)
    assert len(spotter) == 1
    assert [one.phrase for one in spotter.spot(spelling_of("  ann    ", ENGLISH), -20)] == [1]


@pytest.mark.parametrize("letters", [9, 5_000])
def test_a_phrase_that_takes_longer_than_the_clip_is_not_spotted(letters):
    assert spotted(["ab" * letters, "it"], "it") == [Spotted(1, 0.0, 0, 5)]


def test_nothing_is_spotted_in_no_time_or_of_no_list():
    nothing = Letters(ENGLISH, np.zeros((0, 29), np.uint8))
    assert spotted(["ann"], nothing) == [] == spotted([], "ann")


def test_letters_of_another_alphabet_are_refused():
    with pytest.raises(ValueError, match=r"heard in ' ab', and phrases in \" 'abc"):
        Spotter(["ann"], ENGLISH).spot(random_letters(4), -2.4)


def heard_as(text, place, letters):
    """A clip that says `text`, in which the letter at `place` may be others, at so many nats."""
    heard = spelling_of(text, ENGLISH)
    for letter, nats in letters.items():
        heard.costs[2 * place + 1, 1 + ENGLISH.index(letter)] = round(10 * nats)
    return heard


def test_of_those_in_one_place_the_best_are_spotted_and_so_many_in_all(monkeypatch):
    heard = heard_as("ann met bob", 2, {"a": 1.0, "e": 2.0, "i": 3.0, "y": 4.0})
    listed = ["any", "ani", "ana", "bob", "ane", "ann", "met", "bop"]
    found = spotted(listed, heard)
    names = [listed[one.phrase] for one in found]
    assert names == ["bob", "ann", "met", "ana", "ane"], "equals of one length as they are listed"
    assert [one.score for one in found] == pytest.approx([0, 0, 0, -1, -2])
    monkeypatch.setattr(spotting, "RIVALS", 1)
    assert [listed[one.phrase] for one in spotted(listed, heard)] == ["bob", "ann", "met"]
    monkeypatch.setattr(spotting, "MOST", 2)
    assert [listed[one.phrase] for one in spotted(listed, heard)] == ["bob", "ann"]


def test_of_two_phrases_that_are_misheard_alike_the_longer_is_likelier():
    """Of a score's letters two are left out, which any clip has somewhere."""
    for name, score in (("al", -1), ("ann", -1), ("anna", -1 / 2), ("annabel", -1 / 5)):
        heard = heard_as(name, 0, {"a": 1.0, "o": 0.0})
        assert [one.score for one in spotted([name], heard)] == pytest.approx([score])


def test_neighbours_are_no_rivals(monkeypatch):
    monkeypatch.setattr(spotting, "RIVALS", 1)
    found = spotted(["bob", "met", "ann"], "ann met bob")
    assert [(one.start, one.end) for one in found] == [(15, 23), (7, 16), (0, 8)]


def test_a_word_of_a_phrase_that_is_said_is_not_spotted_besides():
    listed = ["ann lee", "ann", "lee", "an"]
    assert [one.phrase for one in spotted(listed, "call ann lee")] == [0]
    assert {one.phrase for one in spotted(listed, "lee called ann")} == {1, 2}
    assert [one.phrase for one in spotted(["an b", "an"], "ab")] == []


def test_a_word_that_is_heard_much_better_than_the_phrase_is_spotted_besides(monkeypatch):
    listed, heard = ["ann quito", "ann"], "call ann lima"
    assert {one.phrase for one in spotted(listed, heard, least=NOTHING_LESS)} == {0, 1}
    monkeypatch.setattr(spotting, "PART", math.inf)
    assert {one.phrase for one in spotted(listed, heard, least=NOTHING_LESS)} == {0}


def test_ways_to_say_the_same_are_one(monkeypatch):
    monkeypatch.setattr(spotting, "RIVALS", 1)
    monkeypatch.setattr(spotting, "MOST", 2)
    listed, whose = ["ann", "anne", "bob", "rob", "lee"], [7, 7, 8, 8, 9]
    found = Spotter(listed, ENGLISH, whose).spot(spelling_of("ann bob lee", ENGLISH), -30.0)
    assert [one.phrase for one in found] == [0, 2]


def test_what_a_clip_says_is_looked_for_once(monkeypatch):
    asked = []
    spot = Spotter.spot
    monkeypatch.setattr(Spotter, "spot", lambda self, *how: asked.append(how) or spot(self, *how))
    monkeypatch.setattr(spotting, "KNOWN", 2)
    listed = favoured("ann", "bob")
    for text in ("call ann", "call bob", "call ann"):
        heard = spelling_of(text, ENGLISH)
        assert [one.text for one in listed.spotted(heard)] == text.split()[1:]
        assert listed.boost(heard) and listed.evidence(words_of(text), heard)[1].source
    assert len(asked) == 2
    listed.spotted(spelling_of("call both", ENGLISH))
    listed.spotted(spelling_of("call ann", ENGLISH))
    assert len(asked) == 4, "of the last few"


UNHEARD = ["c", "cc", "c c"]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, spotting.SPAN),
    st.integers(0, 1000),
    st.lists(phrases, min_size=1, max_size=9),
    leasts,
)
def test_a_long_list_is_searched_as_a_whole_where_few_of_it_may_be_said(count, seed, listed, least):
    """In a clip as short as SPAN, what may be said is at least as likely as it seems at first."""
    heard = random_letters(count, " ab", seed)
    never = np.full((count, 1), LEAST_LIKELY, np.uint8)
    heard = Letters(" abc", np.concatenate((heard.costs, never), axis=1))
    spotter = Spotter([*listed, *UNHEARD], " abc")
    assume(len(spotter) > len(UNHEARD))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spotting, "RIVALS", 10**6)
        patched.setattr(spotting, "PART", -math.inf)
        whole = spotter.spot(heard, least)
        patched.setattr(spotting, "SEARCHED", len(spotter) - len(UNHEARD))
        assert spotter.spot(heard, least) == whole


def test_of_a_long_list_those_are_searched_whose_letters_are_heard_together(monkeypatch):
    rest = ["".join(one) for one in itertools.product("bjxz", "aeiou", "kvxz", "aeiou")]
    listed = [*rest, *CITIES]
    said = "we met bob in rome and flew to quito and then on to cairo with ann"
    whole = spotted(listed, said, -1.5)
    assert {listed[one.phrase] for one in whole} == {"bob", "rome", "quito", "cairo", "ann"}
    monkeypatch.setattr(spotting, "SEARCHED", 40)
    assert spotted(listed, said, -1.5) == whole
    assert spotted(rest, "why try fly") == []


def favoured(*listed, **changes):
    return Favoured(listed, VOCABULARY, USUAL.model_copy(update=changes))


def said_of(listed, heard):
    return [one.text for one in listed.spotted(spelling_of(heard, ENGLISH))]


def test_a_list_e_times_as_long_asks_for_so_much_more(monkeypatch):
    asked = []

    def watched(self, heard, least):
        asked.append(least)
        return []

    monkeypatch.setattr(Spotter, "spot", watched)
    heard, digits = spelling_of("ann", ENGLISH), "abcdefghij"
    names = ["".join(digits[int(one)] for one in str(number)) for number in range(2_000)]
    for count in (spotting.USUAL, 1, 736, 2_000):
        Favoured(names[:count], VOCABULARY, USUAL).spotted(heard)
    usual, fewer, more, most = asked
    assert usual == USUAL.least
    assert usual - fewer == pytest.approx(spotting.GROWTH * math.log(100))
    assert most - more == pytest.approx(spotting.GROWTH, abs=1e-3)
    Favoured(names, VOCABULARY, Spotting(least=-0.1)).spotted(heard)
    assert asked[-1] == 0, "nothing is likelier than all else"


def test_what_weighs_nothing_is_never_favoured():
    listed = favoured(Entry("ann", weight=0.0), Entry("bob", weight=0.5))
    assert len(listed) == 1
    assert said_of(listed, "call ann and bob") == ["bob"]


def test_a_text_that_is_listed_twice_counts_once():
    assert said_of(favoured("ann", "bob", "ann"), "call ann") == ["ann"]
    assert len(favoured("ann", "bob", "ann")) == 2


def test_an_entry_is_spotted_by_any_of_its_respellings_once():
    siobhan = Entry("siobhan", pronunciations=("shivon", "shi von"))
    assert said_of(favoured(siobhan), "call shivon") == ["siobhan"]
    assert said_of(favoured(siobhan), "call shi von or shivon or siobhan") == ["siobhan"]
    assert said_of(favoured("siobhan"), "call shivon") == []


def test_what_is_pronounced_in_ipa_is_spotted_as_it_is_written():
    listed = favoured(Entry("ann", pronunciations=("/æn/", "anne")))
    assert said_of(listed, "call ann") == said_of(listed, "call anne") == ["ann"]
    assert said_of(listed, "call aeon") == []


def test_a_phrase_is_spotted_as_the_model_writes_it():
    assert said_of(favoured("7 Up", "Ánn"), "call ann for seven up") == ["Ánn", "7 Up"]


def test_clips_of_two_encoders_are_heard_each_in_its_alphabet():
    listed = favoured("abba", "ann")
    assert said_of(listed, "ann") == ["ann"]
    assert [one.text for one in listed.spotted(spelling_of("abba"))] == ["abba"]
    assert said_of(listed, "abba") == ["abba"]


def test_a_clip_without_letters_is_refused():
    for asked in (favoured("ann").spotted, favoured("ann").boost):
        with pytest.raises(ValueError, match="a CTC head hears; this model has none"):
            asked(None)


def test_what_is_spotted_is_boosted_by_its_own_weight():
    siobhan = Entry("ann", pronunciations=("shivon",), weight=0.5)
    listed = favoured(siobhan, Entry("bob", weight=2.0), "rome", weight=3.0)
    boost = listed.boost(spelling_of("call shivon and bob", ENGLISH))
    bonus = boost.bonus(np.array([START]))[0]
    ann, bob, rome = (VOCABULARY.encode(text)[0] for text in ("ann", "bob", "rome"))
    assert (bonus[ann], bonus[bob], bonus[rome]) == (1.5, 6.0, 0.0)
    assert listed.boost(spelling_of("call nobody", ENGLISH)) is None
    assert favoured().boost(spelling_of("call ann", ENGLISH)) is None


def words_of(text):
    return [Word(word, 0.5, 0.5) for word in text.split()]


def test_the_words_of_a_phrase_say_that_it_was_spotted():
    heard = spelling_of("call ann lee and bob", ENGLISH)
    listed = favoured("Ann Lee", "Bob", "rome")
    words = words_of("Call Ann lee, and rob in rome ann")
    told = listed.evidence(words, heard)
    assert [word.source and word.source.document for word in told] == [
        *(None, "Ann Lee", "Ann Lee"),
        *[None] * 5,
    ]
    assert told[1].source.entry == NO_ENTRY and told[1].source.text == "Ann Lee"
    assert [word.text for word in told] == [word.text for word in words]
    assert favoured("rome").evidence(words, heard) == tuple(words)


def test_the_words_of_a_term_say_which_document_has_it_and_what_is_said_there():
    heard = spelling_of("call ann lee and bob", ENGLISH)
    places = {"ann lee": ("call-17", "i met ann lee in rome"), "rome": ("call-18", "off to rome")}
    listed = Favoured(["ann lee", "rome", "bob"], VOCABULARY, USUAL, places)
    told = listed.evidence(words_of("call ann lee and bob"), heard)
    found = [one.source and (one.source.document, one.source.text) for one in told]
    assert found == [None, *[places["ann lee"]] * 2, None, ("bob", "bob")]
    assert {one.source.entry for one in told if one.source} == {NO_ENTRY}


@pytest.mark.parametrize(("doubtful", "surer"), [(5, "lee may"), (15, "ann lee")])
def test_a_word_of_two_phrases_is_evidence_of_the_surer(doubtful, surer):
    text = "call ann lee may"
    heard = heard_as(text, doubtful, {text[doubtful]: 1.0, "o": 0.0})
    for listed in (favoured("ann lee", "lee may"), favoured("lee may", "ann lee")):
        _, *told = listed.evidence(words_of(text), heard)
        assert [word.source.document for word in told] == ["ann lee", surer, "lee may"]


def test_phrases_in_ipa_are_not_spelled():
    respelled = Entry("ann", pronunciations=("anne",))
    assert spells_all([]) and spells_all([respelled, Entry("bob")])
    assert not spells_all([respelled, Entry("bob", pronunciations=("rob", "/bɒb/"))])
