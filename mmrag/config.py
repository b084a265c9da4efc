"""One experiment: frozen models, one complete YAML file, `section.key=value` overrides.

OmegaConf reads the file (so `${oc.env:NAME,default}` works) and merges the overrides; pydantic
checks the result. Unknown keys and illegal combinations are errors that name the key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from yaml import YAMLError

Fraction = Field(ge=0.0, le=1.0)
SLUG = r"^[a-z0-9][a-z0-9_-]{0,62}$"
CONDITION = r"^(noise-[0-9]+|telephone|flite-[a-z]+|spanish)$"
Retrieves = Literal["none", "knn", "cross_attention", "both"]
Format = Literal["text", "speech", "speech_first", "text_first"]


class ConfigError(ValueError):
    """The experiment's file or an override is wrong; the message names file and key."""


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Workers(Section):
    """How many processes do a stage's work, and what each of them takes from the cluster."""

    count: PositiveInt
    num_cpus: float = Field(gt=0)
    """CPUs a worker reserves; may be a fraction."""
    num_gpus: float = Field(default=0, ge=0)


class Tracking(Section):
    """Where runs are recorded."""

    uri: str
    """MLflow tracking URI; MLFLOW_TRACKING_URI in the environment wins."""
    experiment: str


class Synthesize(Section):
    """A corpus of synthetic speech. Counts are utterances of each split."""

    lm: PositiveInt
    """Everyday and assistant sentences, to train the language model on."""
    adapter: PositiveInt
    """Assistant sentences with entities of their own, to train retrieval adapters on."""
    mentions: PositiveInt
    """Sentences in the datastore split about each entity of adapter, dev and test."""
    dev: PositiveInt
    test: PositiveInt
    text: int = Field(ge=0)
    """Sentences in the lm split's manner that nobody speaks."""
    everyday_share: float = Fraction
    """Share of everyday sentences in lm, text, dev and test; the rest are assistant's."""
    workers: Workers


class Hubert(Section):
    """A HuBERT encoder: its shape, or published weights, which bring their own."""

    weights: str | None = None
    """`torchaudio:BUNDLE`, a Hugging Face directory, or a model of this package (`mmrag:tiny`);
    None to pretrain the shape below."""
    front: Literal["waveform", "mel"] = "waveform"
    """What feeds the transformer: convolutions, or log-mel bands (MelHuBERT, arXiv 2211.09944)."""
    conv_channels: PositiveInt
    """Width of the convolutions; with front mel, the number of bands."""
    norm: Literal["layer_norm", "group_norm"]
    """layer_norm for HuBERT large's arrangement, group_norm for base's."""
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    feed_forward: PositiveInt
    layer: PositiveInt
    """Transformer layer (1 = first) whose output is quantized."""

    @model_validator(mode="after")
    def _shape(self) -> Hubert:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.layer > self.layers:
            raise ValueError(f"layer {self.layer} of an encoder with {self.layers} layers")
        return self


class PretrainRound(Section):
    """One round of masked prediction."""

    target: Literal["mfcc", "hubert", "phones"]
    """What a frame's class is: a cluster of MFCCs, a cluster of the previous round's features, or
    the corpus's own phone (arXiv 2206.10125)."""
    classes: PositiveInt | None = None
    """Clusters; None for phones."""
    steps: PositiveInt

    @model_validator(mode="after")
    def _counted(self) -> PretrainRound:
        if (self.classes is None) != (self.target == "phones"):
            raise ValueError(f"target {self.target}: classes are given for clusters, and only then")
        return self


class Pretrain(Section):
    """HuBERT pretraining (arXiv 2106.07447)."""

    rounds: tuple[PretrainRound, ...] = Field(min_length=1)
    batch_seconds: PositiveFloat
    """Seconds of audio a step."""
    crop_seconds: PositiveFloat
    """Longer clips are cropped to this."""
    learning_rate: PositiveFloat
    mask_probability: float = Fraction
    """Share of frames at which a masked span starts."""
    mask_length: PositiveInt
    """Frames a masked span covers."""
    seen_weight: float = Field(default=0, ge=0)
    """Weight in the loss of a frame that is not masked; a masked one weighs 1."""
    sample_seconds: PositiveFloat
    """Audio whose features k-means sees."""
    num_cpus: float = Field(gt=0)
    """CPUs that the one training process reserves."""
    num_gpus: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _first_round(self) -> Pretrain:
        if self.rounds[0].target == "hubert":
            raise ValueError("the first round has no previous features to be its target")
        return self


class Tokenize(Section):
    """Audio to units."""

    name: str = Field(default="tokens", pattern=SLUG)
    """The output's directory in the workspace."""
    source: str | None = None
    """A manifest, a directory of audio or of manifests `<split>.jsonl`; None for the workspace's
    corpus."""
    codebook: str | None = None
    """A fitted codebook's directory, or a model of this package (`mmrag:tiny`); None to fit one on
    `source`."""
    units: PositiveInt
    """Codebook size K."""
    sample_seconds: PositiveFloat
    """Audio whose features k-means sees."""
    min_seconds: PositiveFloat
    max_seconds: PositiveFloat
    """Longer clips are rejected if they have a transcript, else split at silence."""
    batch_seconds: PositiveFloat
    """Audio encoded at once, seconds."""
    part_seconds: PositiveFloat
    """Audio in one output file: what a killed job may have to redo, a worker."""
    require_text: bool
    """Reject clips without a transcript."""
    workers: Workers

    @model_validator(mode="after")
    def _splittable(self) -> Tokenize:
        if 2 * self.min_seconds > self.max_seconds:
            raise ValueError(
                f"max_seconds {self.max_seconds} is less than twice min_seconds "
                f"{self.min_seconds}: a longer clip could not be split"
            )
        return self


class Vocabulary(Section):
    """Word pieces."""

    pieces: PositiveInt
    """SentencePiece vocabulary size."""
    tokenizer: str | None = None
    """A base language model's `tokenizer.json`, used instead of training SentencePiece."""


class LanguageModel(Section):
    """Shape of the Llama-family decoder. The vocabulary's size is not part of it."""

    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    feed_forward: PositiveInt
    tied: bool
    """Whether the output projection is the embedding."""
    rope_theta: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-5
    qkv_bias: bool = False
    """Qwen-style biases on the query, key and value projections."""
    head_width: PositiveInt | None = None
    """Width of a head; None for width / heads."""

    @model_validator(mode="after")
    def _shape(self) -> LanguageModel:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class CrossAttention(Section):
    """Shape of the adapter that reads retrieved windows."""

    every: PositiveInt
    """A block follows every n-th layer of the language model."""
    heads: PositiveInt
    head_width: PositiveInt
    window: PositiveInt
    """Most tokens of a window."""
    encoder_layers: PositiveInt
    encoder_heads: PositiveInt
    encoder_feed_forward: PositiveInt


class Contexts(Section):
    """What the adapter is shown while it learns to read; never utterances that the language model
    was trained on, whose words it knows already."""

    split: str
    phrases: str = Field(pattern=SLUG)
    """A datastore of entities (`datastore.entries=entities`), from which lists are drawn."""
    retrieved: str = Field(pattern=SLUG)
    """A datastore whose windows are read where they are near."""
    wrong: str = Field(pattern=SLUG)
    """A datastore that has nothing to say."""
    mixture: dict[Literal["phrases", "retrieved", "wrong", "empty"], PositiveFloat] = Field(
        min_length=1
    )
    """Context -> weight: the chance that a micro-batch is shown it."""
    list_length: tuple[PositiveInt, PositiveInt]
    """Phrases of the shortest and of the longest list."""
    own: float = Fraction
    """Chance that a list holds the utterance's own entities."""
    k: PositiveInt
    """Windows that a search brings, of the `read.k` that were found."""
    strides: tuple[PositiveInt, ...] = Field(min_length=1)
    """Tokens from one search to the next, of which each utterance draws one."""

    @model_validator(mode="after")
    def _ordered(self) -> Contexts:
        if self.list_length[0] > self.list_length[1]:
            raise ValueError(f"list_length {self.list_length}: the shortest comes first")
        return self


class AdapterTraining(Section):
    """A cross-attention adapter to train, in place of the language model."""

    base: str | None = None
    """The adapter to start from: that of a model of this package (`mmrag:tiny`), or a directory;
    None for an untrained one."""
    shape: CrossAttention
    contexts: Contexts


class Phase(Section):
    """A stretch of training with one mixture of sequence formats."""

    name: str
    steps: PositiveInt
    mixture: dict[Format, PositiveFloat] = Field(min_length=1)
    """Format -> weight: the chance that an utterance is shown in that format."""


class Train(Section):
    """Training of the language model."""

    phases: tuple[Phase, ...] = Field(min_length=1)
    base: str | None = None
    """What to start from: a Hugging Face Llama, Mistral or Qwen directory, or a model of this
    package (`mmrag:tiny`); None for random weights."""
    micro_batch_tokens: PositiveInt
    """Tokens (padding included) in one forward pass of one worker."""
    micro_batches: PositiveInt
    """Micro-batches in one optimizer step, over all workers."""
    learning_rate: PositiveFloat
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    clip: PositiveFloat
    """Largest gradient norm."""
    ctc_weight: float = Field(ge=0)
    """Weight of a CTC loss on the audio positions of speech-first sequences; 0 for none."""
    unit_dropout: float = Fraction
    """Share of units dropped from a speech-first sequence."""
    precision: Literal["auto", "fp32", "bf16"]
    """auto: bf16 where the hardware multiplies it fast, else fp32."""
    zero_stage: Literal[0, 1, 2, 3]
    deepspeed: str | None = None
    """JSON file with more DeepSpeed settings (offload, buckets); None for DeepSpeed's own."""
    checkpoint_steps: PositiveInt
    log_steps: PositiveInt
    max_failures: int = Field(ge=0)
    """Worker failures after which the run is given up."""
    workers: Workers

    @model_validator(mode="after")
    def _divides(self) -> Train:
        if self.micro_batches % self.workers.count:
            raise ValueError(
                f"micro_batches {self.micro_batches} is not a multiple of "
                f"workers.count {self.workers.count}"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps over all phases."""
        return sum(phase.steps for phase in self.phases)


class Index(Section):
    """How one shard's keys are searched."""

    kind: Literal["flat", "ivfpq"]
    shards: PositiveInt
    lists: PositiveInt = 1024
    """ivfpq: inverted lists."""
    code_bytes: PositiveInt = 64
    """ivfpq: bytes a key; must divide the key's width."""
    probes: PositiveInt = 32
    """ivfpq: lists visited a query."""
    rerank: PositiveInt = 8
    """ivfpq: candidates fetched for each neighbour asked for, then re-ranked exactly."""


class Datastore(Section):
    """Entries: one a text token, keyed by the language model's own state."""

    name: str = Field(pattern=SLUG)
    source: str | None = None
    """A tokens directory, a file of text lines, or a manifest (`.jsonl`) of texts and entities;
    None for the workspace's datastore split."""
    splits: tuple[str, ...] = ("datastore",)
    """The splits of a tokens directory that are read; `all` where it has no splits."""
    domain: str | None = None
    """Only utterances of this domain; None for all."""
    utterances: PositiveInt | None = None
    """At most so many utterances, from the first; None for all."""
    audio: Literal["paired", "none", "spoken"]
    """Key over the utterance's own units, over text alone, or over units of synthetic speech."""
    paired_share: float = Field(default=1, ge=0, le=1)
    """With audio paired, the share of the utterances whose units are used; the others are keyed
    over text alone."""
    metric: Literal["l2", "ip", "cosine"]
    entries: Literal["all", "entities"] = "all"
    """An entry for every token, or for the tokens of the utterances' entities alone; an entity is
    then a document of its own, whatever sentence spoke of it."""
    window: PositiveInt
    """Tokens around an entry that make up its value."""
    batch_tokens: PositiveInt
    part_utterances: PositiveInt
    """Utterances in one segment."""
    index: Index
    workers: Workers


class KNN(Section):
    """How neighbours re-weight the next token (arXiv 1911.00172)."""

    k: PositiveInt
    weight: float = Fraction
    """w in w * p_kNN + (1 - w) * p_LM."""
    temperature: PositiveFloat
    gate: PositiveFloat | None = None
    """Largest distance of the nearest neighbour at which retrieval is heard; None for any."""
    certain: float | None = Field(default=None, gt=0, le=1)
    """Probability of the language model's best token from which on nothing is looked up: a model
    so sure is left alone. None to look everything up."""
    query: Literal["speech", "text"] = "speech"
    """The state that asks: over speech and transcript, or over the transcript read alone, as the
    keys of a text-only datastore were."""


class Read(Section):
    """How retrieved windows are attended to (arXiv 2406.09618, section 3.2)."""

    k: PositiveInt
    """Windows that a search brings."""
    stride: PositiveInt
    """Tokens for which they are read, until the next search."""
    whole: int = Field(ge=0)
    """A request's own list of at most so many windows is read whole, without a search."""
    gate: PositiveFloat | None = None
    """Largest distance of the nearest entry at which what was found is read; None for any."""
    certain: float | None = Field(default=None, gt=0, le=1)
    """As in `knn`: a model so sure of its next token looks nothing up."""


class Decode(Section):
    """From units to text."""

    beams: PositiveInt
    """1 for greedy search."""
    length_penalty: float = Field(ge=0)
    """Exponent of the length by which a beam's log-probability is divided."""
    tokens_per_second: PositiveFloat
    """Longest transcript, pieces a second of audio (at least 16)."""
    batch_seconds: PositiveFloat
    """Audio transcribed at once, seconds."""
    max_seconds: PositiveFloat
    """Longer audio is split at silence."""
    speech: float = Field(default=0.75, ge=0, le=1)
    """Probability from which on a moment counts as speech; audio without any has no transcript. 0
    to transcribe everything."""
    agreement: float | None = Field(default=None, lt=0)
    """What the language model alone must think of a transcript made with retrieval, mean
    log-probability a token: below it, and where the transcript loops, it is made again without.
    None to trust every transcript."""


class Tune(Section):
    """Grid of kNN settings, scored on the dev split."""

    k: tuple[PositiveInt, ...] = Field(min_length=1)
    weight: tuple[Annotated[float, Fraction], ...] = Field(min_length=1)
    temperature: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Multiples of the dev queries' median nearest distance."""
    gate: tuple[PositiveFloat | None, ...] = (None,)
    """Likewise; None for no gate."""
    certain: tuple[Annotated[float, Field(gt=0, le=1)] | None, ...] = (None,)
    """As in `knn`."""
    query: tuple[Literal["speech", "text"], ...] = ("speech",)
    """Tried with datastores of text alone; the others are always asked with speech."""
    finalists: PositiveInt
    """Settings of least dev loss, one for each weight, gate, certainty and query, that are then
    decoded and compared by WER."""
    utterances: PositiveInt | None = None
    """At most so many dev utterances are decoded; None for all."""
    read: tuple[Read, ...] = ()
    """Ways to read what was retrieved that are decoded where there is an adapter; their gates are
    multiples like those above."""
    both_weight: tuple[Annotated[float, Fraction], ...] = ()
    """Weights of kNN-LM beside the chosen way to read."""
    decoy: str | None = Field(default=None, pattern=SLUG)
    """A datastore that has nothing to say about the dev split."""
    harm: float = Field(default=0.01, ge=0)
    """How much worse (relative) the decoy may make the dev split's WER; settings that let it do
    more are passed over."""


class Evaluate(Section):
    """A split transcribed in several modes."""

    split: Literal["dev", "test"]
    domain: str | None
    """Only utterances of this domain; None for all."""
    modes: tuple[Retrieves, ...] = Field(min_length=1)
    datastores: tuple[str, ...]
    """Datastores to compare in the modes that retrieve; those keyed without speech in mode knn
    alone."""
    retriever: Literal["local", "sharded"]
    replicas: PositiveInt
    """Copies of each shard's actor."""
    shard_cpus: float = Field(gt=0)
    """CPUs a shard's actor reserves."""
    resamples: PositiveInt
    """Bootstrap resamples behind each confidence interval."""
    workers: Workers


class Reproduce(Section):
    """The paper's experiments, on the dev and test splits of the workspace's corpus."""

    docs: Path
    """Where `results.md`, `results.json` and the plots go; relative to the working directory."""
    utterances: PositiveInt
    """At most so many test utterances a task."""
    sweep_utterances: PositiveInt
    """At most so many for each point of a sweep."""
    phrases: tuple[PositiveInt, ...]
    """Lengths of the list that comes with an utterance (dynamic context)."""
    carriers: tuple[str, ...] = Field(min_length=1)
    """Sentences in which a phrase is spoken for its datastore; `{phrase}` stands for it."""
    mentions: PositiveInt
    """Carriers, from the first, whose phrases are read whole."""
    boost: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Weights of phrase boosting tried on the dev split, in nats a piece."""
    shares: tuple[Annotated[float, Fraction], ...]
    """Shares of a datastore's entries with real paired audio."""
    sizes: tuple[PositiveInt, ...]
    """Entries of a datastore; those beyond the datastore split come from the lm split."""
    strides: tuple[PositiveInt, ...]
    """Tokens from one entry to the next."""
    documents: tuple[PositiveInt, ...]
    """Documents that two-level retrieval keeps before it searches entries."""
    conditions: tuple[Annotated[str, Field(pattern=CONDITION)], ...]
    """Recordings made worse, by another synthesizer, or in another language: `noise-DB`,
    `telephone`, `flite-VOICE`, `spanish`."""


class Experiment(Section):
    """Everything that a run needs to know. Every section is written out in the YAML file."""

    workspace: Path
    """Directory of the artifacts; absolute once parsed."""
    seed: int
    tracking: Tracking
    synthesize: Synthesize
    hubert: Hubert
    pretrain: Pretrain
    tokenize: Tokenize
    vocabulary: Vocabulary
    lm: LanguageModel
    train: Train
    datastore: Datastore
    knn: KNN
    """Used where no tuned settings are named."""
    read: Read
    decode: Decode
    tune: Tune
    evaluate: Evaluate
    adapter: AdapterTraining | None = None
    """Given, `jobs.train` trains an adapter for the workspace's language model."""
    reproduce: Reproduce | None = None

    @field_validator("workspace")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()


def read(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in YAML file `path`, with `section.key=value` overrides merged in."""
    path = Path(path)
    try:
        merged = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"no such config file: {path}") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        if not re.match(r"[^.=]+(\.[^.=]+)*=", override):
            raise ConfigError(f"{path}: override {override!r} is not of the form key.sub=value")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (TypeError, YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{path}: override {override!r}: {error}") from None
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from None
    return parse(values, str(path))


def parse(values: Any, source: str) -> Experiment:
    """Check `values` (the parsed YAML of `source`)."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, source)) from None


def as_dict(section: Section) -> dict[str, Any]:
    """A section as plain JSON values."""
    return section.model_dump(mode="json")


def explain(error: ValidationError, source: str) -> str:
    """What is wrong with `source`, a line for each key."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{source}: {key}: {message}")
    return "\n".join(lines)
