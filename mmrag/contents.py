"""What a person puts into a datastore and looks up in it: texts, said by a synthesizer or read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import numpy as np

from mmrag.config import ESPEAK, Decode, Speaking
from mmrag.corpora.voices import ipa
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.model.contract import Speech, TextVocabulary
from mmrag.model.states import read_states
from mmrag.recogniser import AnyRecogniser, Decoder
from mmrag.records import NO_ENTRY, Retriever
from mmrag.retrieval import datastore
from mmrag.retrieval.compaction import compact
from mmrag.retrieval.confusion import (
    Preview,
    common_words,
    confusable,
    heard,
    hearing,
    written,
)
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.display import Display
from mmrag.retrieval.entries import read_entries
from mmrag.retrieval.index import save_index, saved_shards
from mmrag.retrieval.phrases import (
    BATCH,
    Progress,
    Say,
    description,
    fresh,
    phrases_and_sentences,
    sentences,
    speak,
)
from mmrag.retrieval.retrievers import LocalRetriever
from mmrag.retrieval.segment import DatastoreError, Segment, join
from mmrag.retrieval.shortlist import Remembered
from mmrag.retrieval.wording import Entry, entry, is_ipa
from mmrag.speech import audio, vad
from mmrag.speech.tokenized import Tokenized
from mmrag.text import fold, is_letter
from mmrag.transcribe import recognise


def create(
    directory: Path,
    texts: Sequence[str | Entry],
    recogniser: AnyRecogniser,
    spoken: bool = True,
    progress: Progress | None = None,
    speaking: Speaking = ESPEAK,
) -> int:
    """Make a datastore of texts, or of none, that a synthesizer says, or, not `spoken`, are read;
    the entries they became. `progress` is told how many sentences of how many are read, `speaking`
    says who speaks.

    DatastoreError for a directory that holds a datastore already, ValueError, before anything is
    made, for a text that the models cannot listen for.
    """
    if (directory / "datastore.json").exists():
        raise DatastoreError(f"{directory} holds a datastore already: `add` puts more into it")
    check(texts, recogniser)
    say = recogniser.synthesizer(speaking=speaking) if spoken else None
    datastore.create(directory, description(recogniser.lm, recogniser.keyed_by, say))
    save_index(directory)
    return add(directory, texts, recogniser, progress, speaking)


def add(
    directory: Path,
    texts: Sequence[str | Entry],
    recogniser: AnyRecogniser,
    progress: Progress | None = None,
    speaking: Speaking = ESPEAK,
) -> int:
    """Put texts into a datastore, each a document of its own, those that are there already left
    out; the entries they became. `progress` and `speaking` are as in `create`. An entry that is
    there with another wording is replaced.

    A phrase (`phrases_and_sentences`) is put into carrier sentences and its own tokens alone are
    entries; of a longer text every token is. Raises DatastoreError for a datastore of other models
    or of recordings, ValueError, before anything is written, for a text that the models cannot
    listen for.
    """
    store = Datastore.open(directory)
    store.require(recogniser.keyed_by)
    if store.description.audio == "paired":
        raise DatastoreError(f"{directory} is keyed over recordings: texts alone do not go into it")
    check(texts, recogniser)
    aloud = store.description.audio == "spoken"
    if not aloud and speaking != ESPEAK:
        raise DatastoreError(f"{directory} is keyed over text alone: nobody speaks for it")
    say = recogniser.synthesizer(speaking=speaking) if aloud else None
    takes = speaking.takes if aloud else 1
    phrases, longer = (fresh(store, some) for some in phrases_and_sentences(texts))
    replaced = store.entries_of(one.text for one in (*phrases, *longer))
    names, added = [], 0
    for segment in _segments(phrases, longer, recogniser, say, takes, progress):
        names.append(f"added-{uuid4().hex}")
        datastore.write_segment(directory, names[-1], segment)
        added += len(segment.tokens)
    datastore.publish(directory, names, replaced)
    compact(directory)
    return added


def check(given: Iterable[str | Entry], recogniser: AnyRecogniser) -> None:
    """ValueError for the first entry that the models cannot listen for, or nobody can say."""
    for one in map(entry, given):
        refused = unsayable(one, recogniser.languages) or recogniser.vocabulary.refusal(one.text)
        if refused:
            raise ValueError(refused)


def unsayable(one: Entry, languages: Sequence[str]) -> str | None:
    """Why an entry cannot be said by a model that speaks these languages (ISO 639-1); None if it
    can."""
    if one.code and one.code not in languages:
        return f"language {one.language!r}: this model understands {', '.join(languages)}"
    for number, said in enumerate(one.pronunciations):
        where = f"pronunciations[{number}]"
        if is_ipa(said):
            if refused := ipa.refusal(said[1:-1]):
                return f"{where}: {refused}"
        elif lost := [letter for letter in fold(said) if is_letter(letter) and letter > "\x7f"]:
            named = ", ".join(map(repr, dict.fromkeys(lost)))
            return f"{where}: {named}: write it in Latin letters, or as IPA between slashes"
        elif not any(map(str.isalnum, said)):
            return f"{where}: nothing to say in {said!r}"
    return None


def _segments(
    phrases: Sequence[Entry],
    longer: Sequence[Entry],
    recogniser: AnyRecogniser,
    say: Say | None,
    takes: int,
    progress: Progress | None,
) -> Iterator[Segment]:
    lm, vocabulary = recogniser.lm, recogniser.vocabulary
    read = 0

    def told(done: int, of_phrases: int) -> None:
        nonlocal read
        read = done
        if progress is not None:
            progress(done, of_phrases + len(longer))

    if phrases:
        yield from speak(phrases, lm, vocabulary, say, told, takes)
    every = read + len(longer)
    window = description(lm, {}, say).window
    for start in range(0, len(longer), BATCH):
        batch = longer[start : start + BATCH]
        said = list(sentences(batch, vocabulary.spoken, takes))
        heard = [None] * len(said) if say is None else list(say([line for _, line in said]))
        spoken = [Tokenized(one, units) for (one, _), units in zip(said, heard, strict=True)]
        made = read_entries(lm, vocabulary, spoken, window, "all")
        yield replace(made, wordings={one.text: one for one in batch if not one.plain})
        read += len(batch)
        if progress is not None:
            progress(read, every)


@dataclass(frozen=True)
class Neighbour:
    """An entry near to where a text has come to."""

    token: str
    """What it says comes next."""
    distance: float
    entry: int
    document: str
    window: str
    """What was said around it."""


@dataclass(frozen=True)
class Lookup:
    """A token of what was asked about, and what a decoder would have found in its place."""

    token: str
    neighbours: tuple[Neighbour, ...]


def look_up(
    directory: Path, recogniser: AnyRecogniser, query: str | Path, k: int, settings: Decode
) -> list[Lookup]:
    """What a datastore finds before each token of a text, or of what is said in a recording.

    A recording is transcribed without retrieval first, by `settings`. Raises DatastoreError for a
    datastore of other models, AudioError for a recording that cannot be read, and ValueError for
    one in which nobody speaks or a text that the models cannot listen for.
    """
    store = Datastore.open(directory)
    store.require(recogniser.keyed_by)
    retriever = LocalRetriever.load(saved_shards(directory), store)
    speech = None
    if isinstance(query, Path):
        speech, query = _heard(recogniser, query, settings)
    return near(retriever, recogniser, query, k, speech)


def preview(
    directory: Path,
    recogniser: AnyRecogniser,
    given: Sequence[Entry],
    settings: Decode,
    temperature: float,
    speaking: Speaking = ESPEAK,
) -> list[Preview]:
    """What entries would be confused with in a datastore, which stays as it is, where votes have
    this temperature; and what the models hear of them without it, by `settings`, as `speaking`
    says them.

    Raises DatastoreError for a datastore of other models, ValueError for an entry that they cannot
    listen for.
    """
    store = Datastore.open(directory)
    store.require(recogniser.keyed_by)
    check(given, recogniser)
    vocabulary, say = recogniser.vocabulary, recogniser.synthesizer(speaking=speaking)
    pronounce, words = Remembered(Synthesizer().pronounce), common_words(vocabulary)
    names = store.document_names(store.document_counts()[0])
    keyed, takes = say, speaking.takes
    if store.description.audio == "none":
        keyed, takes = None, 1
    found = []
    for one in given:
        phrases, longer = phrases_and_sentences([one])
        spoken = join(list(_segments(phrases, longer, recogniser, keyed, takes, None)))
        among = store, names, words, vocabulary, pronounce
        confused = confusable(one, spoken, *among, temperature)
        lines = hearing(one, vocabulary)
        texts = recognise(recogniser, list(say(lines)), settings)
        told = [vocabulary.decode(text.tokens) for text in texts]
        said = [line if isinstance(line, str) else line.text for line in lines]
        writes = written(one, vocabulary)
        shows = Display.of([one], vocabulary.spoken).of_text(writes)
        understood = heard(one, vocabulary, told, said)
        found.append(Preview(one.text, writes, shows, understood, tuple(confused)))
    return found


def near(
    retriever: Retriever,
    models: Decoder,
    text: str | Sequence[int],
    k: int,
    speech: Speech | None = None,
) -> list[Lookup]:
    """What a retriever finds before each token of a text, or of the tokens of a transcript, after
    `speech`. Raises ValueError for a text that the models cannot listen for."""
    vocabulary, tokens = models.vocabulary, text
    if isinstance(text, str):
        if refused := vocabulary.refusal(text):
            raise ValueError(refused)
        tokens = vocabulary.encode(vocabulary.spoken(text))
    keys, following, _, _ = read_states(models.lm, vocabulary, [tokens], [speech], logits=False)
    found = retriever.search(keys.cpu().numpy(), k)
    windows = retriever.windows(found.entries)
    looked_up = []
    for row, token in enumerate(following.tolist()):
        there = np.flatnonzero(found.entries[row] != NO_ENTRY)
        origins = retriever.origins(found.entries[row, there])
        near = [
            Neighbour(
                token=_shown(vocabulary, found.tokens[row, at]),
                distance=float(found.distances[row, at]),
                entry=int(found.entries[row, at]),
                document=document,
                window=vocabulary.decode([int(one) for one in windows[row, at] if one]),
            )
            for at, (document, _) in zip(there.tolist(), origins, strict=True)
        ]
        looked_up.append(Lookup(_shown(vocabulary, token), tuple(near)))
    return looked_up


def _heard(recogniser: AnyRecogniser, path: Path, settings: Decode) -> tuple[Speech, list[int]]:
    """A recording's speech as the language model reads it, and the tokens of its transcript."""
    wave = audio.read(path)
    seconds = len(wave) / audio.SAMPLE_RATE
    if seconds > min(settings.max_seconds, recogniser.window_seconds):
        raise ValueError(
            f"{path} lasts {seconds:.1f} s: what is looked up is at most {settings.max_seconds:g} s"
        )
    if not vad.spoken(wave, settings.speech):
        raise ValueError(f"{path}: nobody speaks in it")
    units = recogniser.encode([vad.trim(wave)[0]])
    [heard] = recognise(recogniser, units, settings)
    tokens = [token for token in heard.tokens if token != recogniser.vocabulary.eos]
    return recogniser.vocabulary.speech_input(units[0]), tokens


def _shown(vocabulary: TextVocabulary, token: int) -> str:
    """A piece as a person reads it; that of a word's beginning alone is a space."""
    return "(end)" if token == vocabulary.eos else vocabulary.decode([int(token)]) or "(space)"
