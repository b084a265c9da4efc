"""Text to an n-gram model of the language model's word pieces, which the decoder weighs beside it.

Seconds on a processor, and nothing is trained: whoever has more text, or text of another domain,
names it in `ngram.files` and counts again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from cluster.tracking import Run
from jobs import stage
from jobs.train import SPLITS
from mmrag import artifact
from mmrag.artifact import Artifact, Draft
from mmrag.config import ConfigError, Experiment, NGramCounts, recipe
from mmrag.model.ngram import NGram
from mmrag.model.vocabulary import Vocabulary
from mmrag.recogniser import NGRAM
from mmrag.speech import tokenized
from mmrag.storage import located
from mmrag.text import fold, read_lines, spoken

HELD_OUT = ("dev", "test")
"""Splits whose sentences are not counted, wherever they stand."""


def run(experiment: Experiment, force: bool = False) -> Artifact:
    """Count what `tokens/` has to say in the splits that the language model is trained on, and the
    sentences of `ngram.files`, each once: into `ngram/`."""
    settings = experiment.ngram
    if settings is None:
        raise ConfigError("ngram: null; with ngram={} the text of the corpus is counted")
    lm = stage.load(experiment, "lm", "lm", "train")
    made = stage.load(experiment, experiment.tokenize.name, "tokens", "tokenize")
    inputs = {"lm": lm, "tokens": made}
    inputs |= {f"text {file}": artifact.outside(file) for file in settings.files}

    def work(draft: Draft, tracked: Run) -> None:
        vocabulary, counted = Vocabulary.load(lm.place), Counter()

        def texts() -> Iterator[list[int]]:
            for text in _each_once(made, settings):
                written = not vocabulary.unspeakable(text)
                counted["sentences" if written else "left_out"] += 1
                if written:
                    yield vocabulary.encode(text)

        heard = int(vocabulary.transcript_ids().sum())
        ngram = NGram.count(
            texts(), settings.least, vocabulary.size, heard, vocabulary.bos, vocabulary.eos
        )
        ngram.save(draft.path)
        draft.summary |= {"ngrams": len(ngram), **counted}

    config = recipe({"ngram": settings})
    return stage.make(experiment, NGRAM, NGRAM, config, inputs, work, force=force)


def _each_once(made: Artifact, settings: NGramCounts) -> Iterator[str]:
    """The sentences that are counted; two are one if they are spoken alike."""
    known = {_digest("")} | {_digest(text) for text in _of_splits(made, HELD_OUT)}
    lines = (line for file in settings.files for _, line in read_lines(located(file)))
    for text in chain(_of_splits(made, SPLITS), lines):
        if (digest := _digest(text)) not in known:
            known.add(digest)
            yield text


def _of_splits(made: Artifact, splits: Iterable[str]) -> Iterator[str]:
    for split in splits:
        if (made.place / split).exists():
            yield from tokenized.read_texts(made.place / split)


def _digest(text: str) -> bytes:
    """The same for texts that are spoken alike."""
    return hashlib.blake2b(fold(spoken(text)).encode(), digest_size=12).digest()


if __name__ == "__main__":
    stage.main(run, __doc__)
