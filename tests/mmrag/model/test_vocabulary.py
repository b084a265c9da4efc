import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmrag.model.vocabulary import (
    ALPHABET,
    BOS,
    EOS,
    PAD,
    SPECIALS,
    SPEECH,
    TEXT,
    BasePieces,
    SentencePieces,
    Vocabulary,
    sampled,
)
from mmrag.records import Units
from mmrag.text import normalise, spoken

SENTENCES = ["turn on the light", "Play Zoë's song 7!", "don't turn it off", "light the light"]
UNITS = 11
PIECES = SentencePieces.train(SENTENCES, 60)
VOCABULARY = Vocabulary(PIECES, UNITS)
UNKNOWN = VOCABULARY.first_piece + PIECES.unknown
ANY_TEXT = st.text(ALPHABET + " .A7", max_size=25) | st.sampled_from(["", *SENTENCES])


def units(*ids):
    return Units(np.array(ids, np.int32), np.ones(len(ids), np.int32))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE `tokenizer.json` with special tokens, as base language models have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    path = tmp_path_factory.mktemp("base") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["sentencepiece", "base"])
def vocabulary(request, tokenizer):
    return VOCABULARY if request.param == "sentencepiece" else Vocabulary(BasePieces(tokenizer), 11)


def test_specials_pieces_and_units_share_one_id_space_without_overlap(vocabulary):
    pieces = [vocabulary.first_piece + piece for piece in range(vocabulary.pieces.size)]
    speech = vocabulary.encode_units(units(*range(UNITS)))
    assert [*range(len(SPECIALS)), *pieces, *speech] == list(range(vocabulary.size))
    assert vocabulary.units == UNITS
    assert [SPECIALS[i] for i in (PAD, BOS, EOS, SPEECH, TEXT)] == list(SPECIALS)


@pytest.mark.parametrize("spelled", [*SPECIALS, "</s>", "<s>", "<unk>", "<pad> <speech> hello"])
def test_text_that_spells_a_control_token_stays_text(vocabulary, spelled):
    ids = vocabulary.encode(spelled)
    assert all(vocabulary.first_piece <= i < vocabulary.first_unit for i in ids)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_no_text_at_all_becomes_a_control_token_a_unit_or_unknown(text):
    if VOCABULARY.unspeakable(text):
        with pytest.raises(ValueError, match="cannot be spoken"):
            VOCABULARY.encode(text)
        return
    ids = VOCABULARY.encode(text)
    assert UNKNOWN not in ids
    assert all(VOCABULARY.first_piece <= i < VOCABULARY.first_unit for i in ids)


@settings(deadline=None)
@given(st.text(ALPHABET + ALPHABET.upper() + " .,!?-", max_size=40))
def test_decoding_what_was_encoded_gives_the_normalised_text(text):
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == normalise(text)


def test_the_alphabet_is_known_even_where_the_corpus_lacks_it():
    text = "quick brown foxes jump over lazy dwarves"
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == text
    assert PIECES.size <= 60
    assert SentencePieces.train(["a b"], 4000).size < 60


def test_the_number_of_threads_changes_no_piece():
    texts = [f"{word} {other} light" for word in SENTENCES for other in SENTENCES] * 20
    one, many = SentencePieces.train(texts, 90), SentencePieces.train(texts, 90, threads=4)
    assert one.size == many.size
    ids = list(range(one.size))
    assert [one.decode([each]) for each in ids] == [many.decode([each]) for each in ids]
    assert all(one.encode(text) == many.encode(text) for text in texts[:20])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=3), max_size=20), st.integers(1, 25), st.integers(0, 3))
def test_of_many_texts_some_are_drawn_in_their_order_and_of_few_all(texts, most, seed):
    drawn = list(sampled(lambda: iter(texts), most, seed))
    assert drawn == list(sampled(lambda: iter(texts), most, seed))
    if len(texts) <= most:
        assert drawn == texts
    numbered = list(sampled(lambda: iter(range(len(texts))), most, seed))
    assert len(numbered) == min(most, len(texts)) and numbered == sorted(set(numbered))
    assert drawn == [texts[number] for number in numbered]


def test_another_seed_draws_other_texts():
    first, second = (list(sampled(lambda: range(1000), 30, seed)) for seed in (0, 1))
    assert first != second


def test_base_pieces_keep_case_and_punctuation(tokenizer):
    vocabulary = Vocabulary(BasePieces(tokenizer), UNITS)
    text = "Play Zoë's song, 7!"
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_decoding_passes_over_specials_and_units(vocabulary):
    ids = vocabulary.encode("turn it off")
    mixed = [BOS, vocabulary.first_unit, *ids, EOS, PAD, vocabulary.size - 1]
    assert vocabulary.decode(mixed) == vocabulary.decode(ids) == "turn it off"


def test_base_pieces_with_gaps_between_their_ids_stay_below_the_units(tmp_path):
    words = {"a": 0, "b": 1, "far": 9}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary(BasePieces(tmp_path / "tokenizer.json"), UNITS)
    assert vocabulary.encode("far")[0] < vocabulary.first_unit


def check_partition(vocabulary, ids):
    found = vocabulary.word_ends(ids)
    ends = [end for _, end in found]
    assert [word for word, _ in found] == vocabulary.decode(ids).split()
    assert ends == sorted(ends)
    assert all(0 <= end <= len(ids) for end in ends)
    for count, end in enumerate(ends, start=1):
        # Up to a word's end, the text is the words so far, the last of them whole.
        assert vocabulary.decode(ids[:end]).split() == vocabulary.decode(ids).split()[:count]


@settings(deadline=None)
@given(ANY_TEXT)
def test_word_ends_cut_the_tokens_of_a_text_into_its_words(text):
    check_partition(VOCABULARY, VOCABULARY.encode(text))


@settings(deadline=None)
@given(st.lists(st.integers(1, PIECES.size - 1), max_size=12))
def test_word_ends_cut_any_tokens_into_words(pieces):
    check_partition(VOCABULARY, [VOCABULARY.first_piece + piece for piece in pieces])


@pytest.mark.parametrize("text", ["Play Zoë's song 7!", "turn on the light", "日本 nihon"])
def test_word_ends_of_byte_level_pieces(tokenizer, text):
    vocabulary = Vocabulary(BasePieces(tokenizer), UNITS)
    check_partition(vocabulary, vocabulary.encode(text))


def test_word_ends_never_fall_where_one_token_holds_several_words():
    class Phrases:
        unknown = None
        size = 3
        words = (" of course", " we", " can")

        def decode(self, pieces):
            return "".join(self.words[piece] for piece in pieces)

    vocabulary = Vocabulary(Phrases(), UNITS)
    first = vocabulary.first_piece
    ends = vocabulary.word_ends([first + 1, first, first + 2])
    assert ends == [("we", 1), ("of", 1), ("course", 2), ("can", 3)]
    ends = vocabulary.word_ends([first, first + 1])
    assert ends == [("of", 0), ("course", 1), ("we", 2)]


@pytest.mark.parametrize("outside", [UNITS, -1])
def test_a_unit_outside_the_codebook_is_an_error(outside):
    with pytest.raises(ValueError, match=rf"0\.\.{UNITS - 1}.*{outside}"):
        VOCABULARY.encode_units(units(0, outside))
    assert VOCABULARY.encode_units(units()) == []


def test_a_training_sequence_is_its_format():
    text, speech = VOCABULARY.encode("turn it off"), VOCABULARY.encode_units(units(3, 0, 3))
    assert VOCABULARY.sequence("text", text, speech) == [BOS, TEXT, *text, EOS]
    assert VOCABULARY.sequence("speech", text, speech) == [BOS, SPEECH, *speech, EOS]
    speech_first = VOCABULARY.sequence("speech_first", text, speech)
    assert speech_first == [BOS, SPEECH, *speech, TEXT, *text, EOS]
    text_first = VOCABULARY.sequence("text_first", text, speech)
    assert text_first == [BOS, TEXT, *text, SPEECH, *speech, EOS]


def test_a_transcript_is_prompted_just_as_it_was_trained():
    text, speech = VOCABULARY.encode("light"), VOCABULARY.encode_units(units(1, 2))
    for prompt, form in ((speech, "speech_first"), (None, "text")):
        prompted = [*VOCABULARY.prompt(prompt), *text, EOS]
        assert prompted == VOCABULARY.sequence(form, text, speech)


def test_a_transcript_may_hold_every_piece_and_the_end_and_nothing_else(vocabulary):
    allowed = np.flatnonzero(vocabulary.transcript_ids()).tolist()
    pieces = set(range(vocabulary.pieces.size)) - {vocabulary.pieces.unknown}
    assert allowed == [EOS, *(vocabulary.first_piece + piece for piece in sorted(pieces))]


def test_saved_and_loaded_it_encodes_the_same(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert (loaded.size, loaded.units) == (vocabulary.size, UNITS)
    for text in SENTENCES:
        assert loaded.encode(text) == vocabulary.encode(text)
        assert loaded.decode(loaded.encode(text)) == vocabulary.decode(vocabulary.encode(text))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("specials", ["<pad>", "<s>"], "other special tokens"), ("pieces", 59999, "not 59999")],
)
def test_files_of_another_vocabulary_are_refused_by_name(tmp_path, field, value, message):
    VOCABULARY.save(tmp_path)
    path = tmp_path / Vocabulary.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        Vocabulary.load(tmp_path)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path / "other.json"):
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(ValueError, match=f"{path} is not a tokenizer"):
            BasePieces(path)


def test_the_alphabet_numbers_every_character_that_pieces_write(vocabulary):
    letters = list(vocabulary.alphabet)
    assert letters == sorted(letters)
    assert list(vocabulary.alphabet.values()) == list(range(len(letters)))
    assert {*ALPHABET, " ", "ë"} <= set(letters)
    assert all(len(letter) == 1 for letter in letters)
    for piece in range(vocabulary.pieces.size):
        assert set(vocabulary.decode([vocabulary.first_piece + piece])) <= set(letters)


def test_an_alphabet_has_a_blank_though_no_piece_writes_one():
    class Syllables:
        unknown = None
        size = 2
        words = ("ba", "ca")

        def decode(self, pieces):
            return "".join(self.words[piece] for piece in pieces)

    assert Vocabulary(Syllables(), UNITS).alphabet == {" ": 0, "a": 1, "b": 2, "c": 3}


@settings(deadline=None)
@given(ANY_TEXT)
def test_a_spelling_is_the_letters_of_the_text(text):
    letters, ids = list(VOCABULARY.alphabet), VOCABULARY.encode(text)
    assert "".join(letters[number] for number in VOCABULARY.spelling(ids)) == spoken(text)


def test_a_spelling_passes_over_specials_and_units(vocabulary):
    letters, ids = list(vocabulary.alphabet), vocabulary.encode("turn it off")
    mixed = [BOS, vocabulary.first_unit, *ids, EOS, PAD, vocabulary.size - 1]
    assert vocabulary.spelling(mixed) == vocabulary.spelling(ids)
    assert "".join(letters[number] for number in vocabulary.spelling(ids)) == "turn it off"
    assert vocabulary.spelling([]) == vocabulary.spelling([EOS, TEXT]) == []


# A corpus in which `a` begins a word, so that there is a piece for it.
OFTEN_A = Vocabulary(SentencePieces.train([*SENTENCES, "a lamp and a door", "a light"], 70), UNITS)


def check_word_starts(vocabulary, ids):
    """A token starts a word just where one more character would belong to another word."""
    starts = vocabulary.word_starts()
    assert starts.shape == (vocabulary.size,) and starts.dtype == bool
    for index in range(1, len(ids)):
        before, now = (vocabulary.decode(ids[:end]) for end in (index, index + 1))
        assert now.startswith(before)
        assert starts[ids[index]] == (" " in now[len(before) :]), ids[index]


@settings(deadline=None)
@given(st.lists(st.text(ALPHABET.replace("'", ""), min_size=1, max_size=6), max_size=5))
def test_word_starts_are_the_tokens_that_end_the_word_before_them(words):
    check_word_starts(OFTEN_A, OFTEN_A.encode(" ".join(words)))


@pytest.mark.parametrize("text", ["Play Zoë's song, 7!", "turn on the light", "don't turn it off"])
def test_word_starts_of_byte_level_pieces(tokenizer, text):
    vocabulary = Vocabulary(BasePieces(tokenizer), UNITS)
    check_word_starts(vocabulary, vocabulary.encode(text))


@pytest.mark.parametrize("text", ["turn on the light", "light it"])
def test_word_starts_are_known_where_no_piece_is_an_a_that_starts_a_word(text):
    check_word_starts(VOCABULARY, VOCABULARY.encode(text))


def test_the_end_ends_a_word_and_no_other_special_or_unit_does(vocabulary):
    outside = np.ones(vocabulary.size, bool)
    outside[vocabulary.first_piece : vocabulary.first_unit] = False
    assert np.flatnonzero(vocabulary.word_starts() & outside).tolist() == [EOS]


def test_a_context_stands_as_text_before_the_speech():
    context, speech = VOCABULARY.encode("light the"), VOCABULARY.encode_units(units(3, 0))
    assert VOCABULARY.prompt(speech, context) == [BOS, TEXT, *context, SPEECH, *speech, TEXT]
    assert VOCABULARY.prompt(None, context) == [BOS, TEXT, *context, TEXT]
    assert VOCABULARY.prompt([], context) == [BOS, TEXT, *context, SPEECH, TEXT]
    for nothing in ((), []):
        assert VOCABULARY.prompt(speech, nothing) == VOCABULARY.prompt(speech)
        assert VOCABULARY.prompt(None, nothing) == [BOS, TEXT]


def test_a_phrase_has_one_spelling_where_a_blank_makes_no_difference(tokenizer):
    assert VOCABULARY.spellings("the light") == [VOCABULARY.encode("the light")]
    vocabulary = Vocabulary(BasePieces(tokenizer), UNITS)
    first, inside = vocabulary.spellings("light")
    assert (first, inside) == (vocabulary.encode("light"), vocabulary.encode(" light"))
    assert first != inside
    assert vocabulary.encode("the light")[-len(inside) :] == inside


@pytest.mark.parametrize(
    ("phrase", "text", "place"),
    [
        ("light", "light the light", 0),
        ("the light", "turn on the light", 2),
        ("turn it", "don't turn it off", 1),
        ("turn on the light", "turn on the light", 0),
    ],
)
def test_a_phrase_is_found_where_it_first_stands(vocabulary, phrase, text, place):
    ids = vocabulary.encode(text)
    found = vocabulary.find(phrase, ids)
    assert vocabulary.decode(ids[found]).strip() == phrase
    assert len(vocabulary.decode(ids[: found.start]).split()) == place
    assert vocabulary.find(phrase, [*ids, EOS]) == found


def test_what_does_not_stand_in_a_text_is_not_found(vocabulary):
    ids = vocabulary.encode("turn on the light")
    for phrase in ("off", "the turn", "the light off", "", " "):
        assert vocabulary.find(phrase, ids) is None
    assert vocabulary.find("light", []) is None


@pytest.mark.parametrize(
    ("phrase", "text"), [("turn", "turnip soup"), ("on", "once more"), ("light", "lights off")]
)
def test_a_phrase_does_not_stand_in_the_beginning_of_a_longer_word(vocabulary, phrase, text):
    assert vocabulary.find(phrase, vocabulary.encode(text)) is None
    both = vocabulary.encode(f"{text} {phrase}")
    found = vocabulary.find(phrase, both)
    assert found.stop == len(both)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("Renée Dubois", "renee dubois"),
        ("ZOË", "zoë"),  # the corpus has this letter
        ("A1C", "a one c"),
        ("Łódź & Straße 2", "lodz and strasse two"),
    ],
)
def test_what_is_written_is_encoded_as_it_is_spoken(written, said):
    assert VOCABULARY.refusal(written) is None
    assert VOCABULARY.decode(VOCABULARY.encode(written)) == said
    assert normalise(VOCABULARY.spoken(written)) == said


@pytest.mark.parametrize("text", ["日本語", "mag日本語 nan", "日本語" * 200])
def test_letters_that_no_piece_writes_are_named(text):
    assert VOCABULARY.unspeakable(text) == ["日", "本", "語"]
    refusal = VOCABULARY.refusal(text)
    assert repr(text[:9])[1:-1] in refusal and "no letters for '日', '本', '語'" in refusal
    assert len(refusal) < 150
    with pytest.raises(ValueError, match="no letters for '日'"):
        VOCABULARY.encode(text)
    assert VOCABULARY.spellings(text) == []
    assert VOCABULARY.find(text, VOCABULARY.encode("turn it off")) is None


@pytest.mark.parametrize("text", ["", "---", "😀", "?& +"])
def test_a_text_without_a_word_is_refused(vocabulary, text):
    assert vocabulary.refusal(text).startswith("nothing to listen for in ")


@pytest.mark.parametrize(("phrase", "said"), [("Renée Dubois", "renee dubois"), ("A1C", "a one c")])
def test_a_phrase_is_found_as_it_is_spoken(phrase, said):
    ids = VOCABULARY.encode("call Renée Dubois about the A1C")
    assert VOCABULARY.decode(ids[VOCABULARY.find(phrase, ids)]) == said


def test_the_unknown_piece_is_passed_over_in_text():
    call, now = VOCABULARY.encode("turn"), VOCABULARY.encode("off")
    assert VOCABULARY.decode([*call, UNKNOWN, *now]) == "turn off"


def test_pieces_that_were_trained_on_digits_keep_them():
    class Digits(SentencePieces):
        def __init__(self):
            super().__init__(PIECES._model)
            self._letters |= set("0123456789")
            self._spells = False

    assert Vocabulary(Digits(), UNITS).spoken("song 7 & Renée") == "song 7 & Renee"


def test_a_new_vocabulary_is_trained_on_what_is_spoken():
    vocabulary = Vocabulary(SentencePieces.train(["song 7 & ñ"], 60), UNITS)
    assert not set("7&") & set(vocabulary.alphabet)
    assert vocabulary.decode(vocabulary.encode("año 7")) == "año seven"


def base_vocabulary(directory, model):
    Tokenizer(model).save(str(directory / "tokenizer.json"))
    return Vocabulary(BasePieces(directory / "tokenizer.json"), UNITS)


LETTERS = {letter: number for number, letter in enumerate("?abcd")}
LOSSY = {
    "names the unknown": models.BPE(LETTERS, [], unk_token="?"),
    "numbers the unknown": models.Unigram([(one, -1.0) for one in LETTERS], unk_id=0),
    "drops what it lacks": models.BPE(LETTERS, []),
}


@pytest.mark.parametrize("model", LOSSY.values(), ids=LOSSY)
def test_a_base_tokenizer_that_lacks_letters_refuses_them_and_folds_accents(tmp_path, model):
    vocabulary = base_vocabulary(tmp_path, model)
    assert vocabulary.decode(vocabulary.encode("bád☃")).replace(" ", "") == "bad"
    assert vocabulary.unspeakable("bax") == ["x"]
    with pytest.raises(ValueError, match="no letters for 'x'"):
        vocabulary.encode("bax")
    unknown = vocabulary.pieces.unknown
    if unknown is not None:
        assert not vocabulary.transcript_ids()[vocabulary.first_piece + unknown]
