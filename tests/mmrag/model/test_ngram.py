"""Counts of word pieces say what Witten and Bell's formula says of them, kept or read again."""

import math
import zipfile
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.model.ngram import FILE, PARTS, UNKNOWN, NGram

BEGIN, END, FIRST = 0, 1, 2
SIZE = 12
SPOKEN = [END, *range(FIRST, 10)]
"""Ids 10 and 11 are never said, as the beginning is not."""
ROUNDED = math.exp(0.5 / PARTS) - 1
"""How far off a share may be that is kept in parts of a nat."""

texts = st.lists(st.lists(st.integers(FIRST, 6), max_size=7), min_size=1, max_size=12)
leasts = st.lists(st.integers(1, 3), min_size=1, max_size=4)
starts = st.lists(st.integers(END, 9), max_size=6)
"""What was written so far, pieces that nobody counted among it."""


def counted(texts, least=(1, 1, 1)):
    return NGram.count(texts, least, SIZE, len(SPOKEN), BEGIN, END)


class Counts:
    """The slow twin: dictionaries of what followed each context, and the formula."""

    def __init__(self, texts, least):
        self.least = least
        self.after = defaultdict(Counter)
        for text in texts:
            whole = BEGIN, *text, END
            for end in range(len(whole)):
                for start in range(max(0, end - len(least) + 1), end + 1):
                    self.after[whole[start:end]][whole[end]] += 1

    def keeps(self, gram):
        """Whether an n-gram, and all that it begins with, occurred often enough."""
        return all(
            self.after[gram[:end]][gram[end]] >= self.least[end] for end in range(1, len(gram))
        )

    def likely(self, piece, context):
        """Probability of a piece after a context, and how far off rounded shares may have it."""
        context = tuple(context)[max(0, len(context) - len(self.least) + 1) :]
        lower, error = self.likely(piece, context[1:]) if context else (1 / len(SPOKEN), 0.0)
        said = {x: c for x, c in self.after.get(context, {}).items() if x != BEGIN}
        if not said or not self.keeps(context):
            return lower, error
        total = sum(said.values()) + len(said)
        shares = {x: c / total for x, c in said.items() if self.keeps((*context, x))}
        own, taken = shares.get(piece, 0.0), sum(shares.values())
        rest_off = ROUNDED * (1 - taken)
        off = ROUNDED * own + rest_off * lower + (1 - taken + rest_off) * error
        return own + (1 - taken) * lower, off


def after(ngram, *contexts):
    """Probabilities (R, V) of what comes after each context, which begins a text."""
    likely = []
    for context in contexts:
        nodes = ngram.start(1)
        for piece in context:
            nodes = ngram.advance(nodes, np.array([piece]))
        likely.append(np.exp(ngram.logp(nodes)[0].astype(np.float64)))
    return np.array(likely)


def same(one, other):
    assert [getattr(one, name) for name in ("order", "size", "spoken", "begin")] == [
        getattr(other, name) for name in ("order", "size", "spoken", "begin")
    ]
    for name in ("pieces", "shares", "first", "rest"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs), name


@settings(deadline=None)
@given(texts, leasts, starts)
def test_every_piece_is_as_likely_as_the_formula_has_it(texts, least, context):
    plain, [found] = Counts(texts, least), after(counted(texts, least), context)
    for piece in SPOKEN:
        expected, off = plain.likely(piece, (BEGIN, *context))
        assert abs(found[piece] - expected) <= off + 1e-6, piece


@settings(deadline=None)
@given(texts, leasts, starts)
def test_what_may_follow_adds_up_to_about_one_and_the_beginning_never_follows(
    texts, least, context
):
    [found] = after(counted(texts, least), context)
    assert found[SPOKEN].sum() == pytest.approx(1, abs=0.03)
    assert found[BEGIN] == found[10] == found[11] == found.min()


def test_what_nearly_always_follows_leaves_the_others_what_is_theirs():
    found = after(counted([[2, 3]] * 1000 + [[4, 5]] * 1000, (1, 1)), [2])
    alone = 1000 / (6000 + 5)  # of 4, behind anything
    assert found[0, 4] == pytest.approx(alone * 1 / 1001, rel=0.15)


def test_shares_are_those_of_counts_worked_out_by_hand():
    """Behind 2 came 3 twice and 4 once; all in all 2 came three times, 3 and the end, 4 once."""
    found = after(counted([[2, 3], [2, 3], [2, 4]], (1, 1)), [2], [4], [9])
    alone = {2: 3 / 13, 3: 2 / 13, 4: 1 / 13, END: 3 / 13}
    unigram = {piece: alone.get(piece, 0) + 4 / 13 / 9 for piece in SPOKEN}
    assert found[2][SPOKEN] == pytest.approx([unigram[p] for p in SPOKEN], rel=0.05)
    assert found[0, 3] == pytest.approx(2 / 5 + 2 / 5 * unigram[3], rel=0.05)
    assert found[0, 4] == pytest.approx(1 / 5 + 2 / 5 * unigram[4], rel=0.05)
    assert found[0, 9] == pytest.approx(2 / 5 * unigram[9], rel=0.1), "of what two contexts leave"
    assert found[1, END] == pytest.approx(1 / 2 + 1 / 2 * unigram[END], rel=0.05)


def test_an_ngram_of_one_piece_looks_at_no_context():
    ngram = counted([[2, 3], [2, 4]], (1,))
    assert ngram.start(3).shape == (3, 1)
    found = after(ngram, [], [2], [9, 3])
    assert (found == found[0]).all()
    assert found[0, 2] == pytest.approx(2 / 10 + 4 / 10 / 9, rel=0.05)


def test_contexts_end_where_their_sentence_does():
    apart = counted([[2, 3], [4, 5]])
    assert len(apart) == 6 + 6 + 4
    found = after(apart, [2, 3], [4])
    assert found[0, END] > 0.5 > 0.1 > found[0, 4]
    same(apart, counted([[4, 5], [2, 3]]))


def test_a_text_of_no_pieces_is_a_beginning_and_an_end():
    found = after(counted([[]]), [])
    assert found[0].argmax() == END


def test_what_is_rare_is_left_to_shorter_contexts_and_no_single_piece_is_lost():
    texts = [[2, 3, 4]] * 3 + [[5, 3, 6]]
    all_, some = counted(texts), counted(texts, (9, 2, 2))
    assert len(some) < len(all_)
    assert set(some.pieces[: some.first[1]].tolist()) == {BEGIN, END, 2, 3, 4, 5, 6}
    alone, behind = after(some, [9], [5])
    assert np.array_equal(alone, behind), "nothing that came behind 5 is kept"
    kept, pruned = after(all_, [5, 3])[0], after(some, [5, 3])[0]
    assert kept[6] > 0.5 > 0.1 > pruned[6]
    assert np.array_equal(pruned, after(some, [9, 3])[0])
    assert pruned[4] > 0.4


def test_an_ngram_is_not_kept_where_what_it_begins_with_is_not():
    ngram = counted([[2, 3, 4], [3, 4]], (1, 2, 1))
    assert ngram.start(1).tolist()[0][2] == UNKNOWN
    nodes = ngram.start(1)
    for piece in (2, 3):
        nodes = ngram.advance(nodes, np.array([piece]))
    assert (nodes >= 0).tolist() == [[True, True, False]]


def test_a_piece_that_nobody_counted_leaves_no_context_but_none():
    ngram = counted([[2, 3, 4]] * 2)
    nodes = ngram.advance(ngram.advance(ngram.start(1), np.array([2])), np.array([9]))
    assert nodes.tolist() == [[0, UNKNOWN, UNKNOWN]]
    assert np.array_equal(ngram.logp(nodes), ngram.logp(np.array([[0, UNKNOWN, UNKNOWN]])))
    back = ngram.advance(nodes, np.array([3]))
    assert (back >= 0).tolist() == [[True, True, False]]
    assert ngram.logp(back)[0].argmax() == 4


@settings(deadline=None)
@given(texts, leasts, st.lists(starts, min_size=1, max_size=5))
def test_rows_of_a_batch_are_told_what_each_is_told_alone(texts, least, contexts):
    ngram = counted(texts, least)
    together, alone = ngram.start(len(contexts)), [ngram.start(1) for _ in contexts]
    length = min(map(len, contexts))
    for place in range(length):
        pieces = np.array([context[place] for context in contexts])
        together = ngram.advance(together, pieces)
        alone = [ngram.advance(nodes, pieces[row : row + 1]) for row, nodes in enumerate(alone)]
    assert np.array_equal(together, np.concatenate(alone))
    found = ngram.logp(together)
    assert found.shape == (len(contexts), SIZE) and found.dtype == np.float32
    assert np.array_equal(found, np.concatenate([ngram.logp(nodes) for nodes in alone]))
    assert ngram.logp(together[:0]).shape == (0, SIZE)


def test_without_texts_there_is_nothing_to_count():
    with pytest.raises(ValueError, match="needs texts to count"):
        counted([])
    with pytest.raises(ValueError, match="needs texts to count"):
        counted(iter([]))


@settings(deadline=None, max_examples=30)
@given(texts, leasts)
def test_what_is_read_is_what_was_saved(tmp_path_factory, texts, least):
    directory, ngram = tmp_path_factory.mktemp("ngram"), counted(texts, least)
    ngram.save(directory)
    assert [path.name for path in directory.iterdir()] == [FILE]
    same(NGram.read(directory), ngram)


def test_a_large_vocabulary_and_frequent_pieces_are_read_as_they_were_saved(tmp_path):
    random = np.random.default_rng(0)
    texts = [(random.zipf(1.3, 9) % 70_000).tolist() for _ in range(2000)]
    texts = [[piece for piece in text if piece not in (60_000, 60_001)] for text in texts]
    ngram = NGram.count(texts, (1, 1, 2), 70_000, 69_999, 60_000, 60_001)
    ngram.save(tmp_path)
    same(NGram.read(tmp_path), ngram)


def an_empty_file(path):
    path.write_bytes(b"")


def a_letter(path):
    path.write_text("Dear Sir or Madam,\n" * 50)


def a_truncated_file(path):
    path.write_bytes(path.read_bytes()[:-60])


def a_damaged_part(path):
    with zipfile.ZipFile(path) as whole:
        part = whole.getinfo("children.npy")
    content = bytearray(path.read_bytes())
    start = part.header_offset + 30 + len(part.filename) + 30
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(bytes(content))


def another_array(path):
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


def changed(**parts):
    def write(path):
        with np.load(path) as found:
            kept = {name: found[name] for name in found}
        kept |= {name: part(kept[name]) for name, part in parts.items()}
        np.savez_compressed(path, **{k: part for k, part in kept.items() if part is not None})

    return write


@pytest.mark.parametrize(
    "damage",
    [
        an_empty_file,
        a_letter,
        a_truncated_file,
        a_damaged_part,
        another_array,
        changed(shares=lambda _: None),
        changed(shape=lambda shape: shape[:3]),
        changed(shape=lambda shape: shape[0]),
        changed(pieces=lambda pieces: pieces[:-1]),
        changed(children=lambda children: children[:-1]),
        changed(shares=lambda shares: np.append(shares, shares)),
    ],
    ids=[
        "empty",
        "a letter",
        "truncated",
        "damaged",
        "one array",
        "a part is missing",
        "a number is missing",
        "a number alone",
        "fewer pieces",
        "fewer nodes",
        "more shares",
    ],
)
def test_a_file_that_holds_no_ngrams_is_named(tmp_path, damage):
    counted([[2, 3, 4], [2, 3]]).save(tmp_path)
    NGram.read(tmp_path)
    damage(tmp_path / FILE)
    with pytest.raises(ValueError, match=rf"{tmp_path / FILE} holds no n-grams"):
        NGram.read(tmp_path)


def test_parts_of_two_trees_are_refused(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    for directory, texts in ((small, [[2]]), (large, [[2, 3, 4]])):
        directory.mkdir()
        counted(texts).save(directory)
    with np.load(large / FILE) as other:
        changed(children=lambda _: other["children"])(small / FILE)
    with pytest.raises(ValueError, match=f"{small / FILE} holds no n-grams: .* not of one tree"):
        NGram.read(small)
