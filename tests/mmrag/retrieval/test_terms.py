"""Words that surprise are listened for, and the phrases that a datastore was given."""

from dataclasses import replace

import numpy as np
import pytest
from small_datastores import store_arrays, stored_arrays

from mmrag.model.vocabulary import EOS, SentencePieces, Vocabulary
from mmrag.retrieval import terms
from mmrag.retrieval.compaction import compact
from mmrag.retrieval.datastore import Datastore, create, delete, publish, write_segment
from mmrag.retrieval.phrases import PHRASE_WORDS
from mmrag.retrieval.segment import DatastoreError, Description, Segment, join, windows_of
from mmrag.retrieval.terms import ALONE, TERM, WORD, Listed, anything, listed, places
from mmrag.retrieval.verify import verify
from mmrag.retrieval.wording import Entry
from mmrag.text import normalise

WINDOW = 6
DESCRIPTION = Description(width=4, window=WINDOW, metric="l2", audio="none", identity={})
VOCABULARY = Vocabulary(SentencePieces.train(["please call ann and bob now", "ann lee"], 50), 6)
LITTLE = 1.0
MUCH = 40.0


def of_words(*sentences):
    """Entries of (document, words) pairs: a word may have its nats behind a colon. The end of each
    surprises more than any of them."""
    pieces, nats, whose = [], [], []
    for number, (_, words) in enumerate(sentences):
        for word in words.split():
            text, _, own = word.partition(":")
            first, *rest = VOCABULARY.encode(text)
            pieces += [first, *rest]
            nats += [float(own or LITTLE) - LITTLE / 2 * len(rest), *[LITTLE / 2] * len(rest)]
            whose += [number] * (1 + len(rest))
        pieces.append(EOS)
        nats.append(MUCH)
        whose.append(number)
    tokens, whose = np.array(pieces), np.array(whose, int)
    each = [tokens[whose == number] for number in range(len(sentences))]
    return Segment(
        keys=np.zeros((len(tokens), 4)),
        tokens=tokens,
        windows=np.concatenate([np.empty((0, WINDOW)), *(windows_of(one, WINDOW) for one in each)]),
        positions=np.concatenate([np.empty(0, int), *(np.arange(len(one)) for one in each)]),
        utterances=whose,
        names=[(f"u{number}", document) for number, (document, _) in enumerate(sentences)],
        surprisals=np.array(nats),
    )


def of_phrases(*phrases):
    """Entries of phrases alone, without an end: as they are kept of sentences that say them."""
    whole = of_words(*((one, VOCABULARY.decode(VOCABULARY.encode(one))) for one in phrases))
    kept = whole.tokens != EOS
    fields = ("keys", "tokens", "windows", "positions", "utterances", "surprisals")
    return replace(whole, **{field: getattr(whole, field)[kept] for field in fields})


def store_of(*segments):
    return Datastore.of(DESCRIPTION, segments)


def sentences(*said):
    """A datastore of sentences, each of a call of its own."""
    return store_of(of_words(*((f"call-{number}", one) for number, one in enumerate(said))))


def texts(store):
    return [one.entry.text for one in listed(store, VOCABULARY)]


@pytest.fixture
def directory(tmp_path):
    create(tmp_path, DESCRIPTION)
    return tmp_path


def add(directory, name, segment):
    write_segment(directory, name, segment)
    publish(directory, [name])


@pytest.mark.parametrize(
    ("said", "terms"),
    [
        ("call priya:8 raghavan:12 now", ["priya raghavan"]),
        ("call priya:8 raghavan:11.5 now", []),
        ("call priya:8 raghavan:8 lee:8 now", ["priya raghavan lee"]),
        ("call priya:7.5 raghavan:13 now", []),
        ("call priya:13 and raghavan:13 now", []),
        ("call priya:8 and raghavan:14 now", ["raghavan", "priya and raghavan"]),
        ("call priya:13 and not raghavan:13 now", []),
        ("priya:10 raghavan:10 has called bob:10 lee:10", ["priya raghavan", "bob lee"]),
        ("ann:9 bob:9 lee:9 of rome:11 oslo:9", ["ann bob lee", "rome oslo"]),
        ("ann:9 bob:12 of rome:12 oslo:9", ["ann bob", "rome oslo"]),
        ("call priya:14 now", ["priya"]),
        ("call priya:13.5 now", []),
        ("call priya:14 raghavan:8 now", ["priya raghavan", "priya"]),
        ("call raghavan:9 and priya:20", ["priya", "raghavan and priya"]),
        ("please call ann now", []),
        ("", []),
    ],
)
def test_words_that_surprise_side_by_side_are_a_term_and_one_alone_that_surprises_more(said, terms):
    assert (WORD, TERM, ALONE) == (8, 20, 14)
    assert texts(store_of(of_words(("what was said about all those", said)))) == terms


def test_words_side_by_side_in_two_sentences_are_no_term():
    assert texts(sentences("please call priya:9", "raghavan:9 called")) == []


def test_a_word_surprises_as_much_as_it_does_on_the_average():
    assert texts(sentences("call priya:20 now", "call priya:8 now")) == ["priya"]
    assert texts(sentences("call priya:20 now", "call priya:7 now")) == []
    said = ["call priya:12 raghavan:12 now", "call priya:4 now"]
    assert texts(sentences(*said)) == ["priya raghavan"], "where both of them stand"
    assert texts(sentences(*said, "call priya now")) == []
    apart = [of_words(("call-17", one)) for one in ("call priya:20 now", "call priya:7 now")]
    assert texts(store_of(*apart)) == [], "whichever segment has them"


def test_a_word_of_many_tokens_surprises_as_much_as_all_of_them():
    assert len(VOCABULARY.encode("xylophone")) > 5
    made = of_words(("call-17", "call xylophone now"))
    spread = np.where(made.surprisals < MUCH, 2.0, made.surprisals)
    assert texts(store_of(replace(made, surprisals=spread))) == ["xylophone"]


@pytest.mark.parametrize(("words", "terms"), [(PHRASE_WORDS, 3), (PHRASE_WORDS + 1, 2)])
def test_more_words_than_a_phrase_has_are_no_term_but_the_most_surprising_of_them_are(words, terms):
    run = ["priya:14", *["ann:9", "bob:9", "lee:9", "rome:9"][: words - 2], "raghavan:20"]
    run[1:1] = ["oslo:9"] * (words - len(run))
    plain = " ".join(one.partition(":")[0] for one in run)
    found = texts(sentences(f"please call {' '.join(run)} now"))
    assert found == [plain, "priya", "raghavan"][3 - terms :]


@pytest.mark.parametrize(
    ("said", "terms"),
    [
        (("at fritz:20 and sons now", "fritz:20 and sons called"), ["fritz", "fritz and sons"]),
        (("at fritz:20 and sons", "fritz:20 and sons called"), ["fritz", "fritz and sons"]),
        (("at fritz:20 and sons", "fritz:20 and bob called"), ["fritz", "fritz and"]),
        (("at fritz:20 and sons", "call fritz:20"), ["fritz"]),
        (("fritz:20 and sons called", "fritz:20 and sons called"), ["fritz"]),
        (("ann called fritz:20 now",), ["fritz"]),
        (("from bob:9 lee:11 road", "to bob:9 lee:11 road"), ["bob lee", "bob lee road"]),
        (
            (f"at fritz:20 {'and on ' * PHRASE_WORDS}now", f"fritz:20 {'and on ' * 9}called"),
            ["fritz", "fritz and on and on"],
        ),
    ],
)
def test_what_always_follows_a_term_belongs_to_it(said, terms):
    assert texts(sentences(*said)) == terms


def test_what_is_deleted_says_nothing(directory):
    add(directory, "first", of_words(("call-1", "call priya:20 now"), ("call-2", "call ann:20")))
    add(directory, "second", of_words(("call-3", "call priya:4"), ("ann lee", "ann lee")))
    store = Datastore.open(directory)
    assert texts(store) == ["ann lee", "ann"] and anything(store, VOCABULARY)
    delete(directory, store.entries_of(["call-3"]))
    store.refresh()
    assert texts(store) == ["ann lee", "priya", "ann"], "nor how little a word surprises there"
    delete(directory, store.entries_of(["call-1", "ann lee"]))
    store.refresh()
    assert texts(store) == ["ann"]
    compact(directory, everything=True)
    assert texts(Datastore.open(directory)) == ["ann"]
    delete(directory, store.entries_of(["call-2"]))
    store = Datastore.open(directory)
    assert texts(store) == [] and not anything(store, VOCABULARY)


def test_what_weighs_nothing_says_nothing():
    made = of_words(("call-1", "call priya:20"), ("ann lee", "ann lee"), ("call-2", "call rome:20"))
    silent = {name: Entry(name, weight=0) for name in ("call-1", "ann lee")}
    assert texts(store_of(made)) == ["ann lee", "priya", "rome"]
    assert texts(store_of(replace(made, wordings=silent))) == ["rome"]
    alone = of_words(("call-1", "call priya:20 now"))
    assert anything(store_of(alone), VOCABULARY)
    assert not anything(store_of(replace(alone, wordings=silent)), VOCABULARY)


def test_a_datastore_of_phrases_has_them_as_they_were_given():
    given = {"ann": Entry("ann", "Ann L.", ("anne", "/æn/"), 0.5, "en-GB")}
    made = replace(of_phrases("bob", "ann", "bob lee", "ann"), wordings=given)
    store = store_of(made, of_phrases("rome", "bob"))
    found = listed(store, VOCABULARY)
    assert [one.entry for one in found] == [
        *(Entry("bob"), given["ann"], Entry("bob lee"), Entry("rome"))
    ]
    assert [(one.document, one.text) for one in found] == [(one.entry.text,) * 2 for one in found]


def test_a_phrase_is_listed_whether_it_surprises_or_not_and_its_words_are_no_terms():
    made = of_phrases("priya raghavan", "ann")
    for nats in (0.0, 30.0):
        surprisals = np.full(len(made.tokens), nats)
        assert texts(store_of(replace(made, surprisals=surprisals))) == ["priya raghavan", "ann"]


def test_phrases_that_are_told_in_digits_or_accents_are_phrases():
    assert texts(store_of(of_phrases("ánn lee", "7"))) == ["ánn lee", "7"]


def test_a_datastore_of_both_has_its_phrases_and_the_terms_of_its_sentences_each_once():
    first = of_words(("call-1", "call rome:20 and priya:9 raghavan:11"), ("ann", "ann:30"))
    second = of_words(
        *(("bob", "bob"), ("call-2", "call ann:20 or bob:1 or oslo:20"), ("ann", "ann:30")),
        ("call-3", "from oslo:20 priya:9 raghavan:11 called rome:20"),
    )
    second = replace(second, wordings={"bob": Entry("bob", "Bob")})
    store = store_of(first, second)
    assert texts(store) == [
        *("ann", "bob"),
        *("rome", "priya raghavan", "rome and priya raghavan", "oslo"),
        *("oslo priya raghavan", "oslo priya raghavan called rome"),
    ]
    assert [one.entry for one in listed(store, VOCABULARY)][1] == Entry("bob", "Bob")


def test_each_is_found_where_it_is_said_first():
    store = store_of(
        of_words(("call-1", "please call ann"), ("call-2", "call rome:20 now")),
        of_words(("call-3", "from rome:20 to oslo:20"), ("bob", "bob")),
    )
    found = listed(store, VOCABULARY)
    assert found[0] == Listed(Entry("bob"), "bob", "bob")
    assert places(found) == {
        "bob": ("bob", "bob"),
        "rome": ("call-2", "call rome now"),
        "oslo": ("call-3", "from rome to oslo"),
        "rome to oslo": ("call-3", "from rome to oslo"),
    }
    assert places([]) == {}


@pytest.mark.parametrize(
    ("said", "seems"),
    [
        ("please call ann now", False),
        ("please call priya:13.5 now", False),
        ("please call priya:14 now", True),
        ("call priya:9 raghavan:11 now", True),
        ("call priya:9 and raghavan:9 now", False),
    ],
)
def test_whether_there_is_anything_to_listen_for_is_seen_at_a_glance(said, seems):
    store = sentences(said, "please call bob")
    assert anything(store, VOCABULARY) == bool(texts(store)) == seems


def test_a_datastore_of_phrases_has_something_to_listen_for_whatever_its_sentences_are():
    plain = of_words(("call-1", "please call ann now"))
    assert not anything(store_of(plain), VOCABULARY)
    for order in ((plain, of_phrases("bob")), (of_phrases("bob"), plain)):
        assert anything(store_of(*order), VOCABULARY) and texts(store_of(*order)) == ["bob"]


def test_a_datastore_that_is_too_large_to_be_looked_through_is_not(monkeypatch):
    store = sentences("call priya:20 now")
    assert anything(store, VOCABULARY)
    monkeypatch.setattr(terms, "MOST", store.entries - 1)
    assert not anything(store, VOCABULARY)


def test_phrases_alone_are_not_read_word_by_word(monkeypatch):
    monkeypatch.setattr(terms, "_said", None)
    silent = {"ann": Entry("ann", weight=0), "bob": Entry("bob", "Bob")}
    store = store_of(replace(of_phrases("rome", "bob", "ann"), wordings=silent))
    assert listed(store, VOCABULARY) == [
        Listed(Entry("rome"), "rome", "rome"),
        Listed(silent["bob"], "bob", "bob"),
    ]


def test_phrases_are_known_however_they_are_written():
    written = ("Ann Lee", "José Núñez", "o'neil-lee", "St. Ann", "Bob 7")
    spoken = [normalise(VOCABULARY.spoken(one)) for one in written]
    whole = of_words(*zip(written, spoken, strict=True))
    assert texts(store_of(whole)) == list(written)
    named = {"Ann Lee": Entry("Ann Lee", "A. Lee", weight=2.0)}
    [first, *_] = listed(store_of(replace(whole, wordings=named)), VOCABULARY)
    assert first.entry == named["Ann Lee"]


def test_where_nothing_is_said_nothing_is_a_phrase():
    store = store_of(
        of_words(("call-17", ""), ("main office", "main"), ("call-18", "call rome:20"))
    )
    assert texts(store) == ["rome"]


def test_a_phrase_that_weighs_nothing_is_no_term_of_a_sentence():
    made = of_words(("Ann Lee", "ann lee"), ("call-1", "call ann:20 lee:20 now"))
    silent = {"Ann Lee": Entry("Ann Lee", weight=0)}
    assert texts(store_of(replace(made, wordings=silent))) == ["ann", "lee"]


def test_an_empty_datastore_has_nothing_to_listen_for(directory):
    for store in (Datastore.open(directory), store_of(), store_of(of_words())):
        assert listed(store, VOCABULARY) == []
        assert not anything(store, VOCABULARY)


OLD = ("call-1", "call priya:20 now"), ("call-2", "please call ann")
NEW = ("call-3", "call rome:20 now"), ("call-4", "call priya:20 now")


def without(directory, name):
    """A segment's file as older versions wrote it."""
    arrays = stored_arrays(directory, name)
    del arrays["surprisals"]
    store_arrays(directory, name, arrays)


@pytest.fixture(params=["nobody asked", "an older version"])
def unasked(request, directory):
    """A datastore of OLD, with no surprisals."""
    asked = request.param == "an older version"
    add(directory, "old", replace(of_words(*OLD), **({} if asked else {"surprisals": None})))
    if asked:
        without(directory, "old")
        assert "surprisals" not in stored_arrays(directory, "old")
    return directory


def test_a_datastore_of_which_nobody_asked_what_surprises_has_no_terms(unasked):
    store = Datastore.open(unasked)
    assert store.surprisals.dtype == np.float16
    np.testing.assert_array_equal(store.surprisals, np.zeros(store.entries))
    assert listed(store, VOCABULARY) == [] and not anything(store, VOCABULARY)
    assert list(verify(unasked)) == []


def test_it_goes_together_with_segments_of_which_somebody_asked(unasked):
    add(unasked, "new", of_words(*NEW))
    before = Datastore.open(unasked)
    assert before.surprisals.tolist()[-1] == MUCH and anything(before, VOCABULARY)
    assert texts(before) == ["rome"], "of priya nobody knows at both places"
    delete(unasked, before.entries_of(["call-2"]))
    for _ in range(2):
        compact(unasked, everything=True)
        after = Datastore.open(unasked)
        assert len(after.segments) == 1 and texts(after) == ["rome"]
        np.testing.assert_array_equal(after.surprisals, before.surprisals)
        assert list(verify(unasked)) == []


def test_what_surprises_is_read_back_and_joined():
    old, new = replace(of_words(*OLD), surprisals=None), of_words(*NEW)
    joined = join([old, new])
    nothing = np.zeros(len(old.tokens))
    np.testing.assert_array_equal(joined.surprisals, [*nothing, *new.surprisals])
    np.testing.assert_array_equal(store_of(joined).surprisals, [*nothing, *new.surprisals])


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float16), np.zeros(8, np.int64)])
def test_surprisals_that_do_not_fit_are_named(directory, wrong):
    made = of_words(OLD[0])
    with pytest.raises(ValueError, match=r"surprisals have shape \(3,\)"):
        write_segment(directory, "only", replace(made, surprisals=np.zeros(3)))
    add(directory, "only", made)
    arrays = stored_arrays(directory, "only")
    store_arrays(directory, "only", arrays | {"surprisals": wrong})
    with pytest.raises(DatastoreError, match=r"damaged: its surprisals are .*, not float16"):
        Datastore.open(directory)
