"""Lists of phrases for utterances, and how far they are trusted; no model, no cluster."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transcripts import REFERENCE, transcribed

from cluster.modes import NoRetrieval, PhraseBoosting
from jobs.reproduce import listed
from jobs.reproduce.lab import ASSISTANT, OWN, WHISPER, Point
from jobs.reproduce.listed import CASTS, MOST_SAID, Trusted, lists, names
from mmrag.config import KNN, RetrievedAttention
from mmrag.config.decoding import ListedWay
from mmrag.records import Utterance
from mmrag.speech.tokenized import Tokenized

pytest.importorskip("faker")

NAMES = tuple(f"name {letter}" for letter in "abcdefgh")
VOTES = KNN(k=4, weight=0.5, temperature=1.0)


def said(number: int, *entities: str) -> Tokenized:
    about = Utterance(id=f"u{number}", text=REFERENCE, domain=ASSISTANT, entities=entities)
    return Tokenized(about, None)


class FakeLab:
    """A lab whose transcripts are a table: mode -> how many of two utterances are wrong."""

    def __init__(self, path: Path, wrong=lambda name: 0, phrases=(2, 5), **settings) -> None:
        self.family, self.attention, self.force = OWN, None, False
        self.corpus = SimpleNamespace(path=path)
        self.heard_by, self.wrong, self.asked = None, wrong, []
        self.settings = SimpleNamespace(
            **{"phrases": phrases, "utterances": 9, "sweep_utterances": 9, "mentions": 1},
            **{"boost": (1.0, 2.0), "carriers": ("{phrase}",)},
            **{"harm": None, "listed": get_args(ListedWay), **settings},
        )
        grid = {"weight": (0.1, 0.9), "temperature": (1.0,), "gate": (None,), "certain": (None,)}
        self.experiment = SimpleNamespace(
            seed=0,
            workspace=path,
            synthesize=SimpleNamespace(kokoro=None),
            tune=SimpleNamespace(utterances=None, both_weight=(0.2,), **grid),
        )
        self.spoken_text = SimpleNamespace(distance_scale=2.0)
        self.built, self.stored = [], []

    def spoken(self, split, domain, limit):
        return [said(0, NAMES[0]), said(1, NAMES[1], NAMES[2])][:limit]

    def datastore(self, name, audio, **changes):
        self.built.append((name, audio, changes))
        return SimpleNamespace(path=Path(name), summary={"entries": 7})

    def store(self, name, audio, **changes):
        self.stored.append((name, audio, changes))
        made = SimpleNamespace(path=Path(name), summary={"entries": 7})
        return SimpleNamespace(artifact=made, knn=VOTES, attention=None, both=None)

    def phrases(self, store, knn, read, own):
        return (str(store.path), knn, read, own)

    def spotting(self, own, count, setting=None):
        return [Point("spotting", own, None, count, setting=setting, lists=own)]

    def transcribe(self, how, spoken):
        self.asked.append(dict(how))
        texts = {name: [REFERENCE, "x x x x"][self.wrong(name) > 0] for name in how}
        return {name: [transcribed(n, text) for n in (0, 1)] for name, text in texts.items()}

    def error_rate(self, heard):
        return sum(one.text != REFERENCE for one in heard) / 2


@pytest.fixture
def corpus(tmp_path):
    """Manifests of dev, test and adapter that say four names."""
    for number, split in enumerate(("dev", "test", "adapter")):
        rows = [
            {"utterance": f"{split}-{n}", "text": "x", "entities": [NAMES[number + n]]}
            for n in (0, 1)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    return tmp_path


@given(count=st.integers(1, 12), seed=st.integers(0, 99), own=st.booleans())
def test_a_list_is_as_long_as_the_names_reach_and_holds_what_is_said_or_none_of_it(
    count, seed, own
):
    spoken = [said(0, NAMES[0]), said(1, NAMES[1], NAMES[2]), said(2)]
    found = lists(spoken, NAMES, count, seed, own)
    for one in spoken:
        listed_names, mine = found[one.utterance.id], set(one.utterance.entities)
        assert len(set(listed_names)) == len(listed_names)
        assert len(listed_names) == min(count, len(NAMES) - (0 if own else len(mine)))
        assert set(listed_names) <= set(NAMES)
        heard = mine & set(listed_names)
        assert heard == set() if not own else len(heard) == min(count, len(mine))
    assert found == lists(spoken, NAMES, count, seed, own), "the seed decides"


def test_the_longest_list_is_filled_with_names_that_nobody_says(corpus):
    known = {NAMES[n] for n in range(4)}
    short = FakeLab(corpus, phrases=(0,))
    assert names(short) == sorted(known)
    long = names(FakeLab(corpus, phrases=(2, 50)))
    assert len(set(long)) == len(long) == 50 + MOST_SAID
    assert known < set(long) and long == sorted(long)
    spoken = FakeLab(corpus).spoken("test", ASSISTANT, 9)
    assert all(len(own) == 50 for own in lists(spoken, long, 50, 0, own=False).values())


@pytest.mark.parametrize(
    ("rates", "allowed", "chosen"),
    [
        ({"said": (0.3, 0.1, 0.2), "unsaid": (0.5, 0.9, 0.5)}, None, 1),
        ({"said": (0.3, 0.1, 0.2), "unsaid": (0.5, 0.9, 0.5)}, 0.01, 2),
        ({"said": (0.3, 0.1, 0.2), "unsaid": (0.505, 0.51, 0.9)}, 0.01, 0),
        ({"said": (0.3, 0.1, 0.2), "unsaid": (0.8, 0.9, 0.7)}, 0.01, 2),
    ],
)
def test_of_settings_that_do_no_harm_the_best_is_chosen_else_the_least_harmful(
    rates, allowed, chosen
):
    named = {f"{kind} {n}": rate for kind, each in rates.items() for n, rate in enumerate(each)}
    assert listed._choice({**named, "plain": 0.5}, 3, allowed) == chosen


def test_lists_of_what_is_not_said_are_tried_on_dev_where_harm_is_limited(corpus):
    free = FakeLab(corpus)
    listed._trusted(free, free.datastore("phrases", "spoken"), NAMES, 2)
    assert {name.split()[0] for how in free.asked for name in how} == {"said"}
    # The second setting of each grid is right, and hears what nobody says.
    lab = FakeLab(corpus, lambda name: name in ("said 0", "unsaid 1"), harm=0.01)
    made = listed._trusted(lab, lab.datastore("phrases", "spoken"), NAMES, 2)
    assert (made.knn.weight, made.boost, made.both) == (0.1, 1.0, None)
    for how in lab.asked:
        assert {"plain", "said 0", "said 1", "unsaid 0", "unsaid 1"} == how.keys()
    *_, own = lab.asked[0]["said 0"]
    *_, other = lab.asked[0]["unsaid 0"]
    assert NAMES[0] in own["u0"] and NAMES[0] not in other["u0"]


def test_what_is_unsaid_is_measured_in_every_mode_and_length(corpus):
    lab = FakeLab(corpus)
    _, _, told = listed.dynamic_context(lab)
    _, limit, untold = listed.unsaid_phrases(lab)
    assert limit == 9 and len(lab.asked) == 2, "what is chosen is chosen once"
    assert [(p.mode, p.phrases) for p in untold] == [
        ("none", None),
        *((mode, count) for count in (2, 5) for mode in ("knn", "boost", "spotting")),
    ]
    assert len({point.name for point in untold}) == len(untold)
    for point in untold[1:]:
        assert point.setting == listed.UNSAID
        assert not set(point.lists["u1"]) & set(NAMES[1:3])
        assert len(point.lists["u1"]) == point.phrases
    assert {p.mode for p in told} == {"none", "knn", "boost", "spotting", "prompt"}
    assert all(NAMES[0] in point.lists["u0"] for point in told[1:])


def test_only_the_named_ways_are_measured_and_nothing_is_spoken_or_tuned_for_others(corpus):
    lab = FakeLab(corpus, listed=("spotting",))
    for task in (listed.dynamic_context, listed.unsaid_phrases):
        assert {point.mode for point in task(lab)[2]} == {"none", "spotting"}
    assert not lab.asked
    lab = FakeLab(corpus, listed=("knn",))
    assert {point.mode for point in listed.dynamic_context(lab)[2]} == {"none", "knn"}
    assert lab.asked


def test_a_prompt_is_not_written_for_the_longest_lists_nor_for_a_whisper(corpus, monkeypatch):
    monkeypatch.setattr(listed, "PROMPTED", 2)

    def prompted(lab):
        return [p.phrases for p in listed.dynamic_context(lab)[2] if p.mode == "prompt"]

    assert prompted(FakeLab(corpus)) == [2]
    other = FakeLab(corpus)
    other.family = WHISPER
    assert prompted(other) == []


def test_with_an_adapter_a_list_is_read_too_and_both(corpus):
    lab = FakeLab(corpus)
    lab.attention = RetrievedAttention(k=2, stride=1, whole=9)
    made = listed._trusted(lab, lab.datastore("phrases", "spoken"), NAMES, 2)
    assert made.both.weight == 0.2
    assert list(made.ways(lab, {})) == ["knn", "cross_attention", "both"]
    assert list(Trusted(made.store, VOTES, None, 1.0).ways(FakeLab(corpus), {})) == ["knn"]


def test_who_speaks_is_compared_where_there_are_neural_voices(corpus, capsys):
    lab = FakeLab(corpus)
    assert listed.synthesizers(lab)[2] == []
    assert "synthesize.kokoro names no neural voices" in capsys.readouterr().out
    lab.experiment.synthesize.kokoro = "/kokoro"
    _, _, points = listed.synthesizers(lab)
    spoken = {name: changes["voices"] for name, _, changes in lab.stored}
    assert list(spoken.values()) == list(CASTS.values()) and len(spoken) == len(CASTS)
    assert all(changes["kokoro"] == "/kokoro" for _, _, changes in (*lab.stored, *lab.built))
    assert [changes["voices"] for _, _, changes in lab.built] == list(CASTS.values())
    assert len({point.name for point in points}) == len(points) == 1 + 2 * len(CASTS)
    phrases = [
        line["entities"] for line in map(json.loads, (corpus / "phrases-by-kokoro.jsonl").open())
    ]
    assert phrases == [[name] for name in NAMES[:3]], "those that dev and test say"


def test_boosting_is_chosen_as_everything_else(corpus):
    lab = FakeLab(corpus, lambda name: name == "said 0")
    made = listed._trusted(lab, lab.datastore("phrases", "spoken"), NAMES, 2)
    assert made.boost == 2.0 and made.knn.weight == 0.9
    modes = lab.asked[-1]
    assert all(isinstance(mode, PhraseBoosting) for mode in modes.values())
    assert not any(isinstance(mode, NoRetrieval) for mode in modes.values())
