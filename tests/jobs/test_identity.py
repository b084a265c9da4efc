"""What becomes of each stage's output, finished or half made, when each setting is changed.

The stages say for themselves what they make it by; their work is left out.
"""

import math
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import (
    build_datastore,
    clips,
    evaluate,
    models,
    ngram,
    pretrain_hubert,
    retrieve,
    stage,
    synthesize,
    tokenize,
    train,
    train_whisper,
    tune,
)
from jobs.models import Models
from jobs.reproduce import run as reproduce
from mmrag import artifact, config
from mmrag.artifact import Artifact, ArtifactError
from mmrag.config import ConfigError, Experiment, Recipe, Role, Section, roles
from mmrag.records import Utterance

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
DATASTORE = (
    *("datastore.splits", "datastore.domain", "datastore.utterances", "datastore.audio"),
    *("datastore.paired_share", "datastore.metric", "datastore.entries", "datastore.window"),
    *("datastore.index", "datastore.part_utterances", "datastore.voices"),
)
READS = {
    "corpus": ("seed", "synthesize"),
    "hubert": ("seed", "hubert", "pretrain"),
    "codebook": ("seed", "tokenize.units", "tokenize.sample_seconds"),
    "tokens": ("tokenize",),
    "lm": ("seed", "lm", "vocabulary", "train"),
    "ngram": ("ngram",),
    "adapter": ("seed", "adapter", "train"),
    "clips": ("tokenize.min_seconds", "tokenize.max_seconds", "tokenize.require_text"),
    "whisper": ("seed", "whisper"),
    "datastore": ("seed", "language", *DATASTORE),
    "neighbours": ("adapter.contexts.split", "attention.k"),
    "tuned": ("tune", "decode", "evaluate.domain", "language"),
    "evaluation": ("evaluate", "decode", "knn", "attention", "language"),
    "results": (
        *("seed", "language", "reproduce", "decode", "tune", "attention", "datastore.source"),
        "spotting",
        *DATASTORE,
    ),
}
"""What is made -> the settings that it depends on, sections and keys; others change nothing."""
ELSEWHERE = {"tokenize.name", "datastore.name"}
"""Keys that say which directory of the workspace is meant."""


def base() -> Experiment:
    """Everything is made here: nothing is taken from the package."""
    trained = config.read(CONFIGS / "train_tiny.yaml")
    about = config.read(CONFIGS / "adapter.yaml")
    whole = config.read(CONFIGS / "reproduce.yaml")
    corpus = trained.synthesize.model_copy(
        update={
            "held_out_voices": {"espeak": 1.0},
            "copies": {"espeak": 2},
            "sentences": config.Sentences(files=("a.txt",), held_out=0.1, lm=1, dev=1, test=1),
            "recordings": config.Recordings(lm="lm.jsonl", dev="dev.jsonl", test="test.jsonl"),
        }
    )
    read = tuple(config.RetrievedAttention(k=k, stride=1, whole=0) for k in (4, 8))
    return trained.model_copy(
        update={
            "synthesize": corpus,
            "adapter": about.adapter,
            "ngram": config.NGramCounts(),
            "reproduce": whole.reproduce,
            "whisper": config.read(CONFIGS / "whisper_tiny.yaml").whisper,
            "train": trained.train.model_copy(
                update={"phases": (SPEECH_FIRST,), "ctc_weight": 0.0}  # as an adapter wants it
            ),
            "tune": trained.tune.model_copy(update={"attention": read}),
            "evaluate": trained.evaluate.model_copy(
                update={"modes": ("none", "knn", "both"), "datastores": ("multimodal",)}
            ),
        }
    )


def changed(section: Section, dotted: str) -> Any:
    """The section with another value of the same kind under that key."""
    name, _, rest = dotted.partition(".")
    value = getattr(section, name)
    if rest and isinstance(value, Section):
        return section.model_copy(update={name: changed(value, rest)})
    return section.model_copy(update={name: other(value, dotted)})


def other(value: Any, dotted: str) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case Path():
            return value / "other"
        case str():
            return f"other{value}"
        case None:
            return WHERE_THERE_IS_NONE.get(dotted.split(".")[-1], 7)
        case tuple():
            return (*value, *value) if value else ("one",)
        case dict():
            return {**value, next(iter(value), "assistant"): 99.0}
    raise TypeError(f"{dotted}: {value!r}")


WHERE_THERE_IS_NONE = {
    **{"language": "es", "tasks": ("domain",), "whisper": "/whisper"},
    **{"domain": "everyday", "base": "mmrag:tiny", "source": str(CONFIGS), "codebook": "/book"},
    **{"tokenizer": "/tokenizer.json", "deepspeed": "/other.json", "decoy": "wrong"},
    **{"kokoro": "/kokoro", "decoders": config.Workers(count=3, num_cpus=1)},
    **{"weights": "torchaudio:HUBERT_BASE", "gate": 3.0, "certain": 0.5, "agreement": -3.0},
    "harm": 0.05,
}


def recipes(experiment: Experiment) -> dict[str, Recipe]:
    """What each stage says that its output is made by, by kind."""
    known: dict[str, Recipe] = {}

    def made(experiment, directory, kind, *_, **__) -> Artifact:
        return Artifact(experiment.workspace / directory, kind, kind, {}, {})

    def make(experiment, directory, kind, made_by, inputs, work, **options) -> Artifact:
        known[kind] = Recipe.of(made_by)
        return made(experiment, directory, kind)

    opened = SimpleNamespace(description=SimpleNamespace(audio="paired", window=1))

    def named(experiment) -> Models:
        inputs = {role: made(experiment, role, role) for role in ("lm", "codebook")}
        return Models("", inputs, 1, None, language=experiment.language)

    lab = SimpleNamespace(experiment=experiment, settings=experiment.reproduce, force=False)
    lab.heard_by, lab.inputs, lab.prefix = named(experiment), {}, ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "make", make)
        patch.setattr(stage, "load", made)
        patch.setattr(Artifact, "require", lambda *_: None)
        for name in ("outside", "adopt", "load"):
            patch.setattr(artifact, name, lambda path, *_: Artifact(Path(path), "", "", {}, {}))
        for module in (evaluate, tune, train):
            patch.setattr(module, "Datastore", SimpleNamespace(open=lambda path: opened))
        told = Utterance(id="a", text="a", audio=Path("a.wav"))
        patch.setattr(tokenize, "Listing", lambda path: [told])
        patch.setattr(train, "_base", lambda *_: None)
        patch.setattr(evaluate, "show", lambda _: None)
        for name in ("named", "adaptable"):
            patch.setattr(models, name, named)
        for job in (synthesize, pretrain_hubert, tokenize, build_datastore, train_whisper):
            job.run(experiment)
        clips.run(experiment, window_seconds=math.inf)
        for job in (ngram, retrieve, tune, evaluate):
            job.run(experiment)
        train.run(experiment.model_copy(update={"adapter": None}))
        with suppress(ConfigError):  # an adapter takes no CTC loss
            train.run(experiment)
        reproduce._measure(lab, "domain", None)
    return known


SPEECH_FIRST = config.Phase(name="adapter", steps=2, mixture={"speech_first": 1.0})
START = base()
KEYS = [key for key in roles(Experiment) if key not in ELSEWHERE and key != "workspace"]


@pytest.fixture(scope="module")
def first() -> dict[str, Recipe]:
    made = recipes(START)
    assert made.keys() == READS.keys()
    return made


@pytest.fixture(scope="module")
def outputs(first, tmp_path_factory) -> Path:
    """For each kind a finished output and, in `half`, a half-made one."""
    root = tmp_path_factory.mktemp("outputs")
    for kind, recipe in first.items():
        with artifact.create(root / kind, kind, recipe, {}) as draft:
            (draft.path / "weights").write_text(kind)
        with (
            suppress(KeyboardInterrupt),
            artifact.create(root / "half" / kind, kind, recipe, {}) as draft,
        ):
            (draft.path / "part-0").write_text("done")
            raise KeyboardInterrupt
    return root


def depends(kind: str, key: str) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in READS[kind])


def shown(kind: str, key: str) -> str:
    """The key as an output records it: one that is made by a single section leaves its name out."""
    section, _, rest = key.partition(".")
    flat = {"corpus": "synthesize", "tokens": "tokenize", "datastore": "datastore"}
    named = {"codebook": rest or key, "clips": rest, "neighbours": rest.rpartition(".")[2]}.get(
        kind, key
    )
    if (kind, key) == ("tuned", "evaluate.domain"):
        return "domain"
    if (kind, key) == ("results", "datastore.source"):
        return "source"
    return rest if flat.get(kind) == section and rest else named


@pytest.mark.parametrize("key", KEYS)
def test_an_operation_goes_on_and_another_identity_is_refused_by_name(first, outputs, key):
    """Where half made: a layout is refused, a correction goes on; where finished, the reverse."""
    role = roles(Experiment)[key]
    for kind, recipe in recipes(changed(START, key)).items():
        if (kind, key) == ("hubert", "hubert.weights"):
            continue  # published weights are another stage
        about = role if depends(kind, key) else None
        if (kind, key) == ("results", "datastore.source"):
            about = Role.IDENTITY
        if kind == "evaluation" and key.split(".")[0] in ("knn", "attention"):
            about = role
        named = shown(kind, key) if kind != "evaluation" else key.split(".")[-1]

        def finished(kind=kind, recipe=recipe) -> bool:
            return artifact.finished(outputs / kind, kind, recipe, {}) is not None

        def goes_on(kind=kind, recipe=recipe) -> bool:
            return artifact.resumable(outputs / "half" / kind, kind, recipe, {})

        refusing = {
            Role.IDENTITY: (finished, goes_on),
            Role.LAYOUT: (goes_on,),
            Role.CORRECTION: (finished,),
        }.get(about, ())
        for check in (finished, goes_on):
            if check not in refusing:
                assert check(), f"{kind} by {check.__name__}"
                continue
            with pytest.raises(ArtifactError) as raised:
                check()
            assert named in str(raised.value), kind
            assert " was " in str(raised.value) and " and is now " in str(raised.value)
            assert "--force" in str(raised.value)
    assert any(depends(kind, key) for kind in READS) or role == Role.OPERATION


def with_workers(recipe: Recipe, count: int) -> dict[str, Any]:
    operation = recipe.operation["train"]
    return {"train": {**operation, "workers": {**operation["workers"], "count": count}}}


def test_what_recorded_its_operation_as_identity_is_still_known(first, tmp_path):
    """Outputs of earlier versions, whose configuration held every key."""
    now = first["lm"]
    before = now.settings
    with artifact.create(tmp_path / "lm", "lm", before, {}) as draft:
        (draft.path / "weights").write_text("x")
    with (
        suppress(KeyboardInterrupt),
        artifact.create(tmp_path / "half", "lm", before, {}) as draft,
    ):
        (draft.path / ".checkpoints").mkdir()
        (draft.path / ".checkpoints" / "one").write_text("x")
        raise KeyboardInterrupt
    assert "log_steps" in artifact.load(tmp_path / "lm", "lm").config["train"]
    logged = {"train": {**now.operation["train"], "log_steps": 7}}
    other = Recipe(now.identity, now.operation | logged)
    assert artifact.finished(tmp_path / "lm", "lm", other, {})
    assert artifact.resumable(tmp_path / "half", "lm", other, {})
    others = Recipe(now.identity, now.operation | with_workers(now, 5), layout=now.layout)
    assert artifact.finished(tmp_path / "lm", "lm", others, {})
    assert artifact.resumable(tmp_path / "half", "lm", others, {})


def test_a_model_of_the_package_is_found_whatever_the_workers_are(first):
    for kind in ("lm", "adapter"):
        made = artifact.load(Path(artifact.__file__).parent / "models" / "tiny" / kind, kind)
        recipe = Recipe(
            {name: value for name, value in made.config.items() if name != "train"}
            | {
                "train": {
                    name: value
                    for name, value in made.config["train"].items()
                    if name in first["lm"].identity["train"]
                }
            },
            with_workers(first["lm"], 64),
        )
        inputs = {
            role: Artifact(Path(), "x", print_, {}, {}) for role, print_ in made.inputs.items()
        }
        assert artifact.finished(made.path, kind, recipe, inputs) == made
