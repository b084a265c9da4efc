"""One id space for text and speech: specials, then word pieces, then units.

Sequences are built as ids, never as strings, so no text a person writes can turn into a control
token or a unit. What a person writes becomes what is spoken here, as far as the pieces go: what
none of them writes is refused by name. Nothing here knows the model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from mmrag.artifact import local
from mmrag.config import Format
from mmrag.records import Letters, Units
from mmrag.storage import Location
from mmrag.text import composed, fold, is_letter, normalise, spell, spoken

SPECIALS = ("<pad>", "<bos>", "<eos>", "<speech>", "<text>")
PAD, BOS, EOS, SPEECH, TEXT = range(len(SPECIALS))
ALPHABET = "abcdefghijklmnopqrstuvwxyz'"
DIGITS = "0123456789"
QUOTED_LETTERS = 40
"""How much of a text an error shows."""


class Pieces(Protocol):
    """Word pieces with ids from 0 to size - 1."""

    size: int
    unknown: int | None
    """The piece that stands for what no piece writes, where there is one: it says nothing."""

    def knows(self, letter: str) -> bool: ...
    def spoken(self, text: str) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, pieces: Sequence[int]) -> str: ...
    def save(self, directory: Path) -> None: ...


class SentencePieces:
    """Pieces trained on the corpus. Text is normalised (lower case, no punctuation) first."""

    FILE = "pieces.model"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self._processor.vocab_size()
        self.unknown = self._processor.unk_id()
        written = map(self._processor.id_to_piece, set(range(self.size)) - {self.unknown})
        self._letters = frozenset("".join(written)) - {"\N{LOWER ONE EIGHTH BLOCK}"}
        self._spells = not self._letters.issuperset(DIGITS)

    @classmethod
    def train(cls, texts: Iterable[str], size: int, threads: int = 1) -> SentencePieces:
        """At most `size` BPE pieces; the Latin alphabet is always among them, digits never.

        `texts` are taken one at a time, by SentencePiece, which keeps them all. The pieces are the
        same for any number of `threads`.
        """
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(spoken(text) for text in texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars=ALPHABET,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=threads,
            minloglevel=2,
        )
        return cls(model.getvalue())

    def knows(self, letter: str) -> bool:
        """Whether a piece writes this letter, small or large."""
        return self._letters.issuperset(letter.lower())

    def spoken(self, text: str) -> str:
        """`text` with numbers spelt out, and letters that no piece writes without their accents.

        Pieces that were trained on digits keep them.
        """
        text = spell(text) if self._spells else composed(text)
        return fold(text, lambda letter: not is_letter(letter) or self.knows(letter))

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(normalise(text))

    def decode(self, pieces: Sequence[int]) -> str:
        return self._processor.decode([int(piece) for piece in pieces])

    def save(self, directory: Path) -> None:
        (directory / self.FILE).write_bytes(self._model)


def sampled(texts: Callable[[], Iterable[str]], most: int, seed: int) -> Iterator[str]:
    """`most` of the texts that each call gives anew, drawn by `seed`, in their order; all of them
    where they are no more. None is kept."""
    count = sum(1 for _ in texts())
    if count <= most:
        yield from texts()
        return
    drawn = np.zeros(count, bool)
    drawn[np.random.default_rng(seed).choice(count, most, replace=False, shuffle=False)] = True
    yield from compress(texts(), drawn)


class BasePieces:
    """The pieces of a base language model's `tokenizer.json`, its own special tokens among them.

    Raises ValueError if the file is not a tokenizer.
    """

    FILE = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(f"{path} is not a tokenizer: {error}") from None
        # Ids may have gaps, so their number can be less than the largest of them.
        self.size = 1 + max(self._tokenizer.get_vocab().values())
        self.unknown = _unknown(self._tokenizer)
        self._known: dict[str, bool] = {}

    def knows(self, letter: str) -> bool:
        """Whether pieces write this letter."""
        if letter not in self._known:
            pieces = self.encode(letter)
            self._known[letter] = bool(pieces) and self.unknown not in pieces
        return self._known[letter]

    def spoken(self, text: str) -> str:
        """`text` as it stands, but for what no piece writes: letters lose their accents, and what
        is no letter goes."""
        if self.unknown is not None and self.unknown not in self.encode(text):
            return text
        blank = "" if self.unknown in self.encode(" ") else " "
        kept = (c if self.knows(c) or is_letter(c) or c.isspace() else blank for c in text)
        return fold("".join(kept), lambda letter: not is_letter(letter) or self.knows(letter))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, pieces: Sequence[int]) -> str:
        return self._tokenizer.decode([int(piece) for piece in pieces]).strip()

    def save(self, directory: Path) -> None:
        self._tokenizer.save(str(directory / self.FILE))


def _unknown(tokenizer: Tokenizer) -> int | None:
    """The id of a tokenizer's unknown token, where it has one."""
    model = tokenizer.model
    if isinstance(model, Unigram):  # the one model that does not tell
        return json.loads(tokenizer.to_str())["model"]["unk_id"]
    return None if model.unk_token is None else tokenizer.token_to_id(model.unk_token)


@dataclass(frozen=True, eq=False)
class Heard(Sequence[int]):
    """A clip as the language model takes it, its units' `ids`, and the `letters` that a CTC head
    hears in it: None where the encoder has none."""

    ids: Sequence[int]
    letters: Letters | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place):  # noqa: ANN001
        return self.ids[place]


class Vocabulary:
    """The id space `[specials | pieces | units]` and the sequences built in it."""

    FILE = "vocabulary.json"

    def __init__(self, pieces: Pieces, units: int) -> None:
        self.pieces = pieces
        self.first_piece = len(SPECIALS)
        self.first_unit = self.first_piece + pieces.size
        self.size = self.first_unit + units

    bos = BOS
    eos = EOS
    """The id that ends a transcript."""

    @property
    def units(self) -> int:
        """Size of the codebook."""
        return self.size - self.first_unit

    def spoken(self, text: str) -> str:
        """Written text as the pieces can write it, in which nothing else is changed."""
        return self.pieces.spoken(text)

    def unspeakable(self, text: str) -> list[str]:
        """The letters of a text, or else its words, that no piece writes, each once.

        Where words are known but not beside each other, that is the whole of it.
        """
        said, pieces = self.pieces.spoken(text), self.pieces
        lost = [letter for letter in said if is_letter(letter) and not pieces.knows(letter)]
        lost = lost or [word for word in said.split() if pieces.unknown in pieces.encode(word)]
        if not lost and pieces.unknown in pieces.encode(said):
            return [said]
        return list(dict.fromkeys(lost))

    def refusal(self, text: str) -> str | None:
        """Why a text cannot be listened for; None if it can."""
        quoted = repr(text[:QUOTED_LETTERS]) + "…" * (len(text) > QUOTED_LETTERS)
        if lost := self.unspeakable(text):
            named = ", ".join(map(repr, lost[:QUOTED_LETTERS]))
            return f"{quoted} cannot be spoken: this model has no letters for {named}"
        if not any(map(str.isalnum, text)) or not self.encode(text):
            return f"nothing to listen for in {quoted}"
        return None

    def encode(self, text: str) -> list[int]:
        """Written text to ids, of what is `spoken`; ValueError for what no piece writes."""
        pieces = self.pieces.encode(self.pieces.spoken(text))
        lossy = self.pieces.unknown is None  # a tokenizer that would drop it without a word
        if self.pieces.unknown in pieces or (lossy and self.unspeakable(text)):
            raise ValueError(self.refusal(text))
        return [self.first_piece + piece for piece in pieces]

    def spellings(self, phrase: str) -> list[list[int]]:
        """A phrase as ids, at a text's start and behind a blank where that makes a difference.

        None for a phrase that no pieces write.
        """
        if self.unspeakable(phrase):
            return []
        ways = [self.encode(blank + phrase) for blank in ("", " ")]
        return ways[: 1 if ways[0] == ways[1] else 2]

    def find(self, phrase: str, text: Sequence[int]) -> slice | None:
        """Where a phrase stands in a text given as ids, whole words of it; None if it does not."""
        for way in filter(None, self.spellings(phrase)):
            for start in range(len(text) - len(way) + 1):
                found = slice(start, start + len(way))
                if list(text[found]) == way and self._stands_alone(text, found):
                    return found
        return None

    def _stands_alone(self, text: Sequence[int], found: slice) -> bool:
        """Whether no word goes on across the ends of `found`."""
        ends = (found.start, found.start + 1, found.stop, found.stop + 1)
        before, first, whole, after = (self.decode(text[:end]) for end in ends)
        goes_on = before[-1:].isalnum() and first[len(before) :][:1].isalnum()
        return not goes_on and not after[len(whole) :][:1].isalnum()

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; specials, units and the unknown piece among them are passed over."""
        kept = [i - self.first_piece for i in ids if self.first_piece <= i < self.first_unit]
        return self.pieces.decode([piece for piece in kept if piece != self.pieces.unknown])

    @cached_property
    def alphabet(self) -> dict[str, int]:
        """Every character that the pieces can write, numbered in order."""
        written = (self.pieces.decode([piece]) for piece in range(self.pieces.size))
        return {letter: number for number, letter in enumerate(sorted({" ", *"".join(written)}))}

    def spelling(self, ids: Sequence[int]) -> list[int]:
        """The letters of a text given as ids: indices into `alphabet`."""
        known = self.alphabet
        return [known[letter] for letter in self.decode(ids) if letter in known]

    def word_starts(self) -> np.ndarray:
        """Ids after which an earlier word has ended: (V,) bool, the end token among them."""
        starts = np.array([" " in text for text in self.written], bool)
        starts[EOS] = True
        return starts

    @cached_property
    def written(self) -> list[str]:
        """What each id writes behind a letter of the same text (V,): "" where that is nothing."""
        [anchor] = self.pieces.encode("a")[-1:]
        before, written = len(self.pieces.decode([anchor])), [""] * self.size
        for piece in range(self.pieces.size):
            written[self.first_piece + piece] = self.pieces.decode([anchor, piece])[before:]
        return written

    def word_ends(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        """Each word of the decoded text with the index just past its last token.

        Ends never fall. A token that holds several words belongs to the last of them.
        """
        counts = [len(self.decode(ids[: i + 1]).split()) for i in range(len(ids))]
        words = self.decode(ids).split()
        ends = np.zeros(len(words), int)
        for index, count in enumerate(counts):
            if 0 < count <= len(words):
                ends[count - 1] = index + 1
        return list(zip(words, np.maximum.accumulate(ends).tolist(), strict=True))

    def encode_units(self, units: Units) -> list[int]:
        """Units to ids; ValueError if a unit is outside the codebook."""
        if len(units) and not 0 <= units.ids.min() <= units.ids.max() < self.units:
            found = f"{units.ids.min()}..{units.ids.max()}"
            raise ValueError(f"unit ids must be in 0..{self.units - 1}, got {found}")
        return (units.ids + self.first_unit).tolist()

    def speech_input(self, units: Units) -> Heard:
        """A clip as the language model takes it, and its letters."""
        return Heard(self.encode_units(units), units.letters)

    def letters(self, speech: Sequence[int]) -> Letters | None:
        """What a CTC head hears in a clip; None where there was none."""
        return speech.letters if isinstance(speech, Heard) else None

    def prompt(self, units: Sequence[int] | None, context: Sequence[int] = ()) -> list[int]:
        """What stands before a transcript: the speech (its ids), or nothing but the marker.

        `context` is text (its ids) that comes before the speech.
        """
        before = [BOS, TEXT, *context] if context else [BOS]
        return [*before, SPEECH, *units, TEXT] if units is not None else [*before, TEXT]

    def sequence(self, form: Format, text: Sequence[int], units: Sequence[int]) -> list[int]:
        """A whole training sequence in one of the four formats."""
        match form:
            case "text":
                return [BOS, TEXT, *text, EOS]
            case "speech":
                return [BOS, SPEECH, *units, EOS]
            case "speech_first":
                return [*self.prompt(units), *text, EOS]
            case "text_first":
                return [BOS, TEXT, *text, SPEECH, *units, EOS]

    def transcript_ids(self) -> np.ndarray:
        """Ids that may stand in a transcript, the end among them: (V,) bool.

        The unknown piece may not: nobody says it.
        """
        allowed = np.zeros(self.size, bool)
        allowed[self.first_piece : self.first_unit] = True
        if self.pieces.unknown is not None:
            allowed[self.first_piece + self.pieces.unknown] = False
        allowed[EOS] = True
        return allowed

    def first_ids(self) -> np.ndarray:
        """Ids that may begin a transcript: (V,) bool."""
        return self.transcript_ids()

    def save(self, directory: Path) -> None:
        """Write `vocabulary.json` and the pieces beside it."""
        self.pieces.save(directory)
        fields = {"specials": SPECIALS, "pieces": self.pieces.size, "units": self.units}
        (directory / self.FILE).write_text(json.dumps(fields, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Location) -> Vocabulary:
        """Read what `save` wrote; ValueError if the special tokens or the pieces are others."""
        directory = local(directory)
        fields = json.loads((directory / cls.FILE).read_text())
        if tuple(fields["specials"]) != SPECIALS:
            raise ValueError(f"{directory} has other special tokens: {fields['specials']}")
        base = directory / BasePieces.FILE
        pieces = (
            BasePieces(base)
            if base.exists()
            else SentencePieces((directory / SentencePieces.FILE).read_bytes())
        )
        if pieces.size != fields["pieces"]:
            raise ValueError(f"{directory} has {pieces.size} pieces, not {fields['pieces']}")
        return cls(pieces, fields["units"])
