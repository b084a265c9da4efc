"""LibriSpeech with biasing lists (Le et al., Interspeech 2021; fbai-speech, is21_deep_bias).

A table is `{test-clean,test-other}.biasing_N.tsv`, four tab-separated columns without a header:
utterance, reference, JSON list of the rare words in it, JSON list of biasing words: N others and
the rare ones. The audio is a LibriSpeech tree: `speaker/chapter/utterance.flac`, in the directory
that is named or in the part's own folder below it (`test-clean/`). Rare words are entities, and
each utterance's list goes to the dynamic-context task. A chapter is a document, the part the
domain. Audio is not opened here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from glob import glob
from itertools import chain
from pathlib import Path

from mmrag.corpora.splits import Corpus, CorpusError, Row, by_split, lines, sound
from mmrag.records import Rejection, Utterance

UTTERANCE = re.compile(r"\d+-\d+-\d+")
NAME = re.compile(r"(?P<part>.+?)\.biasing_(?P<size>\d+)$")


def tables(path: Path) -> list[Path]:
    """The files that `path` names: a table, a directory of them, or a pattern such as
    `ref/*.biasing_100.tsv`. Raises CorpusError for none."""
    if path.is_file():
        return [path]
    pattern = path / "*.tsv" if path.is_dir() else path
    found = sorted(Path(name) for name in glob(str(pattern)) if Path(name).is_file())
    if not found:
        raise CorpusError(f"no biasing table {pattern}")
    return found


def read(path: Path, audio: Path | None = None) -> Corpus:
    """The tables' utterances and their lists; `audio` is LibriSpeech's tree, by default the
    directory of the tables.

    Raises CorpusError for no table, or two lengths of list for one part.
    """
    found: dict[str, Path] = {}
    for table in tables(path):
        named = NAME.match(table.stem)
        part = named["part"] if named else table.stem
        if part in found:
            raise CorpusError(
                f"{path}: {found[part].name} and {table.name} list the same utterances; name one, "
                f"or a pattern such as *.biasing_{named['size'] if named else 100}.tsv"
            )
        found[part] = table
    splits, phrases = {}, {}
    for split, parts in by_split(path, found).items():
        rows = [
            _read(table, _tree(audio or table.parent, part), part, phrases) for part, table in parts
        ]
        splits[split] = list(sound(chain.from_iterable(rows), str(path)))
    return Corpus(splits, phrases)


def _tree(audio: Path, part: str) -> Path:
    """Where a part's speakers are."""
    own = [each for each in (audio / part, audio / "LibriSpeech" / part) if each.is_dir()]
    return own[0] if own else audio


def _read(table: Path, tree: Path, part: str, phrases: dict[str, list[str]]) -> Iterator[Row]:
    for line in lines(table):
        if isinstance(line, Rejection):
            yield line
            continue
        number, text = line
        try:
            utterance, listed = _parse(text, tree, part)
        except (ValueError, RecursionError) as error:
            yield Rejection(f"{table}:{number}", str(error))
        else:
            phrases.setdefault(utterance.id, listed)
            yield utterance


def _parse(line: str, tree: Path, part: str) -> tuple[Utterance, list[str]]:
    cells = line.split("\t")
    if len(cells) != 4:
        raise ValueError(
            f"{len(cells)} columns, not utterance, reference, rare words and biasing words"
        )
    id, text, *lists = cells
    if not UTTERANCE.fullmatch(id):
        raise ValueError(f"{id!r:.80} is not an utterance of LibriSpeech (speaker-chapter-number)")
    if not text.strip():
        raise ValueError(f"{id}: no reference")
    rare, listed = _words(id, "rare words", lists[0]), _words(id, "biasing words", lists[1])
    if absent := sorted(set(rare) - set(listed)):
        raise ValueError(f"{id}: rare words that are not among its biasing words: {absent}")
    speaker, chapter, _ = id.split("-")
    return Utterance(
        id=id,
        text=text,
        audio=tree / speaker / chapter / f"{id}.flac",
        speaker=speaker,
        document=f"{speaker}-{chapter}",
        domain=part,
        entities=tuple(rare),
    ), listed


def _words(id: str, column: str, written: str) -> list[str]:
    try:
        words = json.loads(written)
    except ValueError as error:
        raise ValueError(f"{id}: {column} are not JSON: {error}") from None
    if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
        raise ValueError(f"{id}: {column} are not a list of words: {written:.80}")
    return words


def written(phrases: Mapping[str, list[str]]) -> Iterator[str]:
    """The lists as lines of JSON: utterance and its phrases."""
    for utterance, listed in phrases.items():
        yield json.dumps({"utterance": utterance, "phrases": listed}, ensure_ascii=False) + "\n"
