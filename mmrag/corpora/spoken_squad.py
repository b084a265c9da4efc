"""Spoken-SQuAD (arXiv 1804.00320): articles of SQuAD read by a synthesizer, sentence by sentence.

`spoken_train-v1.1.json` and `spoken_test-v1.1.json` have SQuAD's schema; their transcripts are
what a recogniser made of the audio, so an error rate against them counts that recogniser's errors
too. A sentence's audio is `Topic_Paragraph_Sentence.wav`, each numbered from 0 as in the JSON, in
`train_wav/` and `dev_wav/` or `test_wav/` (the training and the test numbers are the same numbers).
A topic in ten of the training file is our dev split, since none is published.

Answers are entities of the sentences in which they stand literally: where they start is not read,
since in the noisier variants (`..._WER44.json`, `..._WER54.json`) it does not match the text.
A paragraph is a document. Audio is not opened here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmrag.corpora.splits import DEV, LM, TEST, Corpus, CorpusError, Row, sound
from mmrag.records import Rejection, Utterance

TRAIN_FILE, TEST_FILE = "spoken_train-v1.1.json", "spoken_test-v1.1.json"
FOLDERS = {"train": ("train_wav", "train"), "test": ("test_wav", "dev_wav", "test", "dev")}
DEV_TOPICS = 10
"""Of so many training topics one is the dev split's."""

SENTENCE = re.compile(r"(?<=\.)\s+")
"""What stands between two sentences: each ends in a full stop, which the recogniser wrote nowhere
else."""


def read(path: Path, audio: Path | None = None) -> Corpus:
    """A directory with one or both files, or one JSON file of whatever name (a noisier variant).

    `audio` holds the sentences' files, or the folders of them; by default the directory does.
    Raises CorpusError if there is no file, or one that is not of SQuAD's schema.
    """
    directory = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else [directory / TRAIN_FILE, directory / TEST_FILE]
    found = [file for file in files if file.is_file()]
    if not found:
        raise CorpusError(f"{path}: holds neither {TRAIN_FILE} nor {TEST_FILE}")
    splits: dict[str, Iterator[Row]] = {}
    for file in found:
        training = "train" in file.name
        wav = _folder(audio or directory, "train" if training else "test", len(found) > 1)
        topics = list(enumerate(_topics(file)))
        shares = {TEST: topics}
        if training:
            shares = {LM: [], DEV: []}
            for number, topic in topics:
                of_dev = number % DEV_TOPICS == DEV_TOPICS - 1
                shares[DEV if of_dev else LM].append((number, topic))
        for split, share in shares.items():
            rows = _read(file, share, wav, "train" if training else "test")
            splits[split] = sound(rows, str(file))
    return Corpus({name: splits[name] for name in (LM, DEV, TEST) if name in splits})


def _folder(directory: Path, name: str, ambiguous: bool) -> Path:
    for folder in FOLDERS[name]:
        if (directory / folder).is_dir():
            return directory / folder
    if ambiguous:
        raise CorpusError(
            f"{directory}: no folder {' or '.join(FOLDERS[name])}; with both files there have to "
            "be two, since their sentences have the same numbers"
        )
    return directory


def _topics(file: Path) -> list[Any]:
    try:
        topics = json.loads(file.read_bytes())["data"]
    except OSError as error:
        raise CorpusError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{file}: not JSON: {error}") from None
    except (TypeError, KeyError, IndexError):
        topics = None
    if not isinstance(topics, list):
        raise CorpusError(f"{file}: not SQuAD's schema: no list `data`")
    return topics


def _read(file: Path, topics: Sequence[tuple[int, Any]], audio: Path, prefix: str) -> Iterator[Row]:
    for number, topic in topics:
        try:
            title, paragraphs = str(topic.get("title", number)), topic["paragraphs"]
            numbered = list(enumerate(paragraphs))
        except (AttributeError, KeyError, TypeError):
            yield Rejection(f"{file}: topic {number}", "no list `paragraphs`")
            continue
        for place, paragraph in numbered:
            where = f"{number}_{place}"
            try:
                context, answers = paragraph["context"], list(_answers(paragraph))
                sentences = SENTENCE.split(context.strip())
            except (AttributeError, KeyError, TypeError) as error:
                reason = f"not SQuAD's schema: {type(error).__name__}: {error}"
                yield Rejection(f"{file}: paragraph {where}", reason)
                continue
            for index, sentence in enumerate(sentences):
                name, text = f"{where}_{index}", sentence.rstrip(". ")
                if not text:
                    yield Rejection(f"{file}: sentence {name}", "no words")
                    continue
                yield Utterance(
                    id=f"{prefix}-{name}",
                    text=text,
                    audio=audio / f"{name}.wav",
                    document=f"{prefix}-{title}-{place}",
                    entities=_entities(text, answers),
                )


def _answers(paragraph: dict[str, Any]) -> Iterator[str]:
    """The answers to a paragraph's questions, each once, in lower case."""
    told = (answer["text"] for question in paragraph["qas"] for answer in question["answers"])
    yield from dict.fromkeys(text.strip(" .").lower() for text in told)


def _entities(text: str, answers: Sequence[str]) -> tuple[str, ...]:
    """The answers that stand in the sentence as whole words, as it writes them."""
    found = []
    for answer in answers:
        at = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)
        if answer and at:
            found.append(text[at.start() : at.end()])
    return tuple(found)
