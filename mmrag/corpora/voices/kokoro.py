"""Text to speech with Kokoro-82M (Apache-2.0), a neural synthesizer with some fifty voices.

The library and its runtime come with the extra `kokoro`; the model and the voice packs are files
in a directory, which `python -m jobs.fetch_voices` fills, or which holds the files that the model's
makers publish (`kokoro*.onnx`, `voices*.bin`).

A voice pack holds a style for each length of a text, and the mean of two packs' styles is a
speaker that nobody has recorded: a blend. The model is asked beside its audio how long each phoneme
takes, an output that published files compute and do not give.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np

from mmrag.corpora.voices import phones
from mmrag.corpora.voices.speech import SPEEDS, Speech, UnspeakableError, played
from mmrag.records import Timed

DURATION = "duration"
"""The output that tells the length of each phoneme, in frames of 600 samples."""
_LENGTHS = "/encoder/Clip_output_0"
"""The tensor of published graphs that holds them."""
MODEL, VOICES = ("kokoro*.onnx",), ("voices*.bin", "voices*.npz")
"""What files are called that hold the model, and all voice packs."""

PACKS: dict[str, tuple[str, ...]] = {
    "train": (
        *("af_alloy", "af_aoede", "af_bella", "af_heart", "af_jessica", "af_nicole", "af_river"),
        *("af_sky", "am_adam", "am_fenrir", "am_liam", "am_michael", "am_onyx", "am_santa"),
        *("bf_alice", "bf_emma", "bm_daniel", "bm_george"),
    ),
    "dev": ("af_kore", "am_echo", "bf_lily", "bm_fable"),
    "test": ("af_nova", "af_sarah", "am_eric", "am_puck", "bf_isabella", "bm_lewis"),
}
"""Who speaks which splits, of the packs that were made for English."""
ACCENTED = (
    *("ef_dora", "em_alex", "ff_siwis", "hf_alpha", "hf_beta", "hm_omega", "hm_psi", "if_sara"),
    *("im_nicola", "jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo", "pf_dora"),
    *("pm_alex", "zf_xiaobei", "zf_xiaoni", "zf_xiaoxiao", "zf_xiaoyi", "zm_yunjian", "zm_yunxi"),
    *("zm_yunxia", "zm_yunyang"),
)
"""Packs of speakers of other languages: in training, they speak English with an accent."""
ACCENTED_SHARE = 0.5
RATES = (0.8, 1.25)

_LETTERS = {
    "ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "oʊ": "O", "əʊ": "Q", "eɪ": "A", "aɪ": "I", "ɔɪ": "Y", "aʊ": "W",
    "dʒ": "ʤ", "tʃ": "ʧ", "ɚ": "əɹ", "r": "ɹ", "ː": "",
}  # fmt: skip
"""espeak-ng's IPA -> the letters that the model was trained on."""
_LETTER = re.compile("|".join(_LETTERS))
_IPA = {"O": "oʊ", "Q": "əʊ", "A": "eɪ", "I": "aɪ", "Y": "ɔɪ", "W": "aʊ"}
_STRESS = "ˈˌ"
PAUSE_SECONDS = 0.1
"""Of a gap between words that is heard as one."""
_PAUSES = frozenset(' ;:,.!?—…"()“”')


@dataclass(frozen=True)
class Voice:
    """A speaker: a pack, or a blend of packs with their weights."""

    engine: ClassVar[str] = "kokoro"
    blend: tuple[tuple[str, float], ...]
    rate: float = 1.0
    """How fast it speaks, 0.5 to 2; 1 is the voice's own."""
    speed: float = 1.0
    """How fast what was said is played: tempo, pitch and formants move together."""

    def __post_init__(self) -> None:
        if not self.blend:
            raise ValueError("a voice is made of at least one pack")
        if not 0.5 <= self.rate <= 2:
            raise ValueError(f"voice {self.id}: rate {self.rate} is not in 0.5..2")
        if not 0.5 <= self.speed <= 2:
            raise ValueError(f"voice {self.id}: speed {self.speed} is not in 0.5..2")

    @property
    def id(self) -> str:
        """The packs: `af_heart+zm_yunxi`."""
        return "+".join(pack for pack, _ in self.blend)

    @property
    def language(self) -> str:
        """Of espeak-ng's phonemes: British for a British pack."""
        return "en-gb" if self.blend[0][0].startswith("b") else "en-us"


def cast(split: str, draw: Random) -> Voice:
    """Who says a sentence of `split`: dev and test have packs of their own, as they are; the
    others have blends of those of train, half of them with an accent."""
    if split in PACKS and split != "train":
        return Voice(((draw.choice(PACKS[split]), 1.0),))
    first = draw.choice(PACKS["train"])
    others = ACCENTED if draw.random() < ACCENTED_SHARE else PACKS["train"]
    second = draw.choice([pack for pack in others if pack != first])
    share = round(draw.uniform(0.2, 0.8), 2)
    return Voice(
        ((first, share), (second, round(1 - share, 2))),
        rate=round(draw.uniform(*RATES), 2),
        speed=draw.choice(SPEEDS),
    )


class Synthesizer:
    """Kokoro, in this process, on one thread: two processes say more than two threads.

    Raises ImportError that says what to install where the `kokoro` extra is missing, OSError that
    names the directory where the files are.
    """

    def __init__(self, directory: Path | str | None) -> None:
        model, packs = ready(directory)
        import onnxruntime
        from kokoro_onnx import Kokoro

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(model), options, providers=onnxruntime.get_available_providers()
        )
        self._kokoro = Kokoro.from_session(session, str(packs))
        self._packs = packs

    def speak(self, text: str, voice: Voice) -> Speech:
        """Say `text`. The same text and voice give identical samples.

        Raises ValueError for a pack that there is not, UnspeakableError for text of which no
        speech is made.
        """
        for pack, _ in voice.blend:
            if pack not in self._kokoro.voices:
                raise ValueError(f"{self._packs} has no voice pack {pack!r}")
        letters = self._letters(text, voice.language)
        if not phones.folded("".join(_IPA.get(letter, letter) for letter in letters)):
            raise UnspeakableError(f"nothing that can be spoken in {text!r}")
        samples, rate, timings = self._kokoro.create_timed(
            letters,
            sum(weight * self._kokoro.get_voice_style(pack) for pack, weight in voice.blend),
            voice.rate,
            is_phonemes=True,
            trim=False,
            sentence_pause=0,
            clause_pause=0,
        )
        wave, slower = played(samples, rate, voice.speed)
        said = [Timed(one.phoneme, one.start * slower, one.end * slower) for one in timings]
        alone = [self._letters(word, voice.language) for word in text.split()]
        duration = len(samples) / rate * slower
        return Speech(
            wave,
            tuple(timed_words(text.split(), alone, said, duration)),
            tuple(phones.timed(timed_ipa(said))),
        )

    @lru_cache(20_000)  # noqa: B019 a synthesizer lives as long as its process
    def _letters(self, text: str, language: str) -> str:
        """What the model is to say."""
        ipa = self._kokoro.tokenizer.phonemize(text, language)
        return _LETTER.sub(lambda found: _LETTERS[found[0]], ipa)


def timed_ipa(said: Sequence[Timed]) -> Iterator[Timed]:
    """The model's timed letters as IPA. A mark of stress has a time of its own, which belongs to
    the vowel after it, and so has the gap between words, which belongs to the phone before it
    unless it is long enough to be a pause."""
    begin = None
    for one, after in zip(said, [*said[1:], None], strict=True):
        if one.text in _STRESS:
            begin = one.start if begin is None else begin
            continue
        if one.text in _PAUSES:
            begin = None
            continue
        end = one.end
        if after is not None and after.text == " " and after.end - after.start < PAUSE_SECONDS:
            end = after.end
        yield Timed(_IPA.get(one.text, one.text), one.start if begin is None else begin, end)
        begin = None


def timed_words(
    words: Sequence[str], alone: Sequence[str], said: Sequence[Timed], duration: float
) -> Iterator[Timed]:
    """When each of `words` is said, in seconds of a clip of `duration` seconds.

    `said` are the model's letters, spaces between groups; `alone` is what each word is by itself.
    espeak-ng runs some words together (`in the` is one group) and takes others apart (a number is
    several): groups and words are matched by their lengths, and words of one group share its time
    by their own. A word lasts until the next one starts.
    """
    spans = [list(group) for gap, group in groupby(said, lambda one: one.text == " ") if not gap]
    groups = [group for group in spans if any(one.text not in _PAUSES for one in group)]
    starts = np.zeros(len(words) + 1)
    starts[-1] = duration
    lengths = [max(1, len(letters.replace(" ", ""))) for letters in alone]
    word = 0
    for count, members in _matched([len(group) for group in groups], lengths):
        begin, end = members[0], members[-1]
        first, last = groups[begin][0].start, groups[end][-1].end
        shares = np.cumsum([0, *lengths[word : word + count]])
        starts[word : word + count] = first + (last - first) * shares[:-1] / shares[-1]
        word += count
    starts = np.maximum.accumulate(np.minimum(starts, duration))
    for number, text in enumerate(words):
        yield Timed(text, float(starts[number]), float(starts[number + 1]))


_RUNS = ((1, 1), *((1, words) for words in range(2, 6)), *((groups, 1) for groups in range(2, 40)))
"""Groups and words that may go together: espeak-ng runs up to five words into one."""


def _matched(groups: Sequence[int], words: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Runs of words beside runs of groups, (words, groups), one of the two a run of one; the
    division in which their lengths differ least."""
    best: dict[tuple[int, int], tuple[float, tuple[int, int]]] = {(0, 0): (0.0, (0, 0))}
    for g in range(1, len(groups) + 1):
        for w in range(1, len(words) + 1):
            for dg, dw in _RUNS:
                before = best.get((g - dg, w - dw))
                if before is None:
                    continue
                differs = abs(sum(groups[g - dg : g]) - sum(words[w - dw : w]))
                cost = before[0] + differs + 0.5 * (dg + dw - 2)
                if (g, w) not in best or cost < best[g, w][0]:
                    best[g, w] = cost, (dg, dw)
    at, runs = (len(groups), len(words)), []
    if at not in best:  # nothing fits: all of it is one run
        yield len(words), range(len(groups))
        return
    while at != (0, 0):
        dg, dw = best[at][1]
        at = at[0] - dg, at[1] - dw
        runs.append((dw, range(at[0], at[0] + dg)))
    yield from reversed(runs)


def require(directory: Path | str | None, setting: str) -> None:
    """Raises what `ready` raises, and ValueError where a pack of those that training knows is
    missing: whoever is cast later has to be there."""
    _, packs = ready(directory, setting)
    with np.load(packs) as held:
        missing = [name for name in (*PACKS["train"], *ACCENTED) if name not in held.files]
    if missing:
        raise ValueError(f"{packs} has no voice pack {missing[0]!r}")


def ready(directory: Path | str | None, setting: str = "synthesize.kokoro") -> tuple[Path, Path]:
    """The model, DURATION among its outputs, and the voice packs in a directory, which is named by
    `setting`.

    Raises ImportError where the `kokoro` extra is missing, OSError that says how to get the files,
    ValueError for a graph that does not compute DURATION.
    """
    if not all(find_spec(library) for library in ("kokoro_onnx", "onnx", "onnxruntime")):
        raise ImportError("neural voices need kokoro_onnx: pip install mmrag[kokoro]")
    how = "`python -m jobs.fetch_voices` fetches Kokoro's model and voices"
    if directory is None:
        raise FileNotFoundError(f"{setting} names no directory; {how}")
    directory = Path(directory)
    found = []
    for patterns in MODEL, VOICES:
        named = sorted(path for pattern in patterns for path in directory.glob(pattern))
        if not named:
            raise FileNotFoundError(f"{directory.absolute()}: no {' or '.join(patterns)}; {how}")
        found.append(named[-1])
    return timed(found[0]), found[1]


def timed(path: Path) -> Path:
    """The model with DURATION among its outputs: written beside `path` if nobody did before.

    Raises ValueError for a graph that does not compute it.
    """
    import onnx

    made = path.with_name(f"timed-{path.name}")
    if made.is_file():
        return made
    model = onnx.load(path)
    graph = model.graph
    if any(output.name == DURATION for output in graph.output):
        return path
    if not any(_LENGTHS in node.output for node in graph.node):
        raise ValueError(f"{path}: this graph does not compute {_LENGTHS}")
    whole = onnx.TensorProto.INT64
    graph.node.append(onnx.helper.make_node("Cast", [_LENGTHS], [DURATION], to=whole))
    graph.output.append(onnx.helper.make_tensor_value_info(DURATION, whole, None))
    aside = made.with_suffix(f".{os.getpid()}")
    onnx.save(model, aside)
    aside.replace(made)
    return made
