"""A CTC head's frames read as they are defined: one prefix, one frame, one alignment at a time.

What `mmrag.decoding.ctc` and `mmrag.decoding.joint` are compared with.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np

from mmrag.records import Letters

IMPOSSIBLE = -np.inf


def random_letters(
    frames: int, alphabet: str = " ab", seed: int = 0, sharp: float = 2.0
) -> Letters:
    """Frames in which any letter may be heard, some of them likelier than others."""
    logits = np.random.default_rng(seed).normal(size=(frames, 1 + len(alphabet))) * sharp
    return Letters.of(alphabet, logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


def spelling_of(text: str, alphabet: str = " ab") -> Letters:
    """Frames that say a text and hardly anything else: a letter, a blank, the next letter."""
    logp = np.full((2 * len(text) + 1, 1 + len(alphabet)), -8.0)
    logp[::2, 0] = 0.0
    for place, letter in enumerate(text):
        logp[2 * place + 1, 1 + alphabet.index(letter)] = 0.0
    return Letters.of(alphabet, logp)


def frames(heard: Letters) -> np.ndarray:
    """Log-probabilities (F, 1 + A) of the labels, which are one of them for sure."""
    logp = heard.logp().astype(float)
    return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)


def alignments(heard: Letters, text: str) -> tuple[float, float]:
    """Log-probabilities that what is said begins with `text`, and is `text`: the sum over every
    way to label the frames."""
    logp, begins, is_ = frames(heard), IMPOSSIBLE, IMPOSSIBLE
    for way in itertools.product(range(logp.shape[1]), repeat=len(logp)):
        said = "".join(heard.alphabet[label - 1] for label, _ in itertools.groupby(way) if label)
        own = sum(logp[frame, label] for frame, label in enumerate(way))
        if said.startswith(text):
            begins = np.logaddexp(begins, own)
        if said == text:
            is_ = np.logaddexp(is_, own)
    return float(begins), float(is_)


def prefix(heard: Letters, text: str) -> tuple[float, float]:
    """The same, frame by frame (Watanabe et al. 2017, algorithm 2): that so many letters are said
    until there, and the last of them ends it, or a blank behind it does."""
    labels = np.array([1 + heard.alphabet.index(letter) for letter in text], int)
    doubled = np.append(False, labels[1:] == labels[:-1])[: len(text)]
    spelt, rested = np.full((2, len(text) + 1), IMPOSSIBLE)
    rested[0] = 0.0
    begins = IMPOSSIBLE if text else 0.0
    for logp in frames(heard):
        either = np.logaddexp(spelt, rested)
        new = np.where(doubled, rested[:-1], either[:-1]) + logp[labels]
        begins = np.logaddexp(begins, new[-1]) if text else begins
        spelt[1:] = np.logaddexp(spelt[1:] + logp[labels], new)
        rested = either + logp[0]
    return float(begins), float(np.logaddexp(spelt[-1], rested[-1]))


def spelt(written: Sequence[str], tokens: Sequence[int], alphabet: str) -> str:
    """What tokens write, in letters of the alphabet and gaps between words; other letters, and
    what is a part of one, are left out. A token that is a gap alone is one, but for a first."""
    said, waits = "", False
    for token in tokens:
        text = unicodedata.normalize("NFD", written[token]).lower()
        if text.isspace():
            said, waits = (said, True) if not said and not waits else (said + " ", False)
            continue
        gap = False
        for one in text:
            if one in alphabet and one != " ":
                waits = waits and said[-1:] != " "
                said += " " * bool(said and (gap or waits)) + one
                gap = waits = False
            elif not one.isalpha() and one not in "\u0301\ufffd":
                gap = True
        waits = waits or gap
    return said


def next_logp(
    heard: Letters, written: Sequence[str], tokens: Sequence[int], end: int
) -> np.ndarray:
    """Log-probability (V,) of every token's letters behind those of `tokens`."""
    before, whole = prefix(heard, spelt(written, tokens, heard.alphabet))
    if before == IMPOSSIBLE:
        return np.zeros(len(written))
    texts = [spelt(written, [*tokens, token], heard.alphabet) for token in range(len(written))]
    known = {text: prefix(heard, text)[0] - before for text in set(texts)}
    found = np.array([known[text] for text in texts])
    found[end] = whole - before
    return found.clip(min=-1000.0)
