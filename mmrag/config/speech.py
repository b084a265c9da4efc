"""Sections of what makes sound into units: corpus, HuBERT, codebook."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mmrag.config.section import (
    SLUG,
    Copies,
    Correction,
    Fraction,
    Layout,
    Operation,
    Section,
    Voices,
    Workers,
)


class Sentences(Section):
    """Real sentences of text files, a line each, said beside those of the grammar.

    Each belongs to dev, test or training by what it says alone, so none is in two of them. What is
    left of training's is text that nobody speaks.
    """

    files: Operation[tuple[str, ...]] = Field(min_length=1)
    """What they hold counts, and not where they lie; a file's name is its sentences' domain."""
    held_out: float = Field(gt=0, le=0.25)
    """Share of the sentences that dev may be drawn from, and of those that test may."""
    lm: PositiveInt
    dev: PositiveInt
    test: PositiveInt


class Recordings(Section):
    """Recordings of people with their transcripts: manifests whose utterances join the corpus."""

    lm: Operation[str | None] = None
    dev: Operation[str | None] = None
    test: Operation[str | None] = None
    """What they hold counts, and not where they lie; a manifest's folder is the domain of what
    names none."""
    copies: PositiveInt = 1
    """How often a training recording stands in the corpus: as it is, then recorded worse."""


class Synthesize(Section):
    """A corpus of speech, most of it synthetic. Counts are utterances of each split."""

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
    voices: Voices = Field(default={"espeak": 1.0})
    """Who says what training hears."""
    held_out_voices: Voices | None = None
    """The same for dev and test, whose voices training never hears; None for `voices`."""
    copies: Copies = Field(default={})
    """Synthesizer -> how often what it says for training stands in the corpus, once unless it is
    named here: as it was recorded first, then again, at other speeds and in other places."""
    kokoro: Operation[str | None] = None
    """Directory of Kokoro's model and voice packs, as `jobs.fetch_voices` fills it."""
    sentences: Sentences | None = None
    recordings: Recordings | None = None
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
    stack: PositiveInt | None = None
    """With front mel, windows of 25 ms, 10 ms apart, whose bands make one frame; None for frames of
    one window, 20 ms apart."""
    convolved: bool = False
    """With stack, whether a frame is made of its windows by two convolutions, which also hear the
    windows around it (as Whisper's encoder has them, arXiv 2212.04356), or holds them side by
    side."""
    norm: Literal["layer_norm", "group_norm"]
    """layer_norm for HuBERT large's arrangement, group_norm for base's."""
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    feed_forward: PositiveInt
    layer: PositiveInt
    """Transformer layer (1 = first) whose output is quantized."""
    stored: Literal["float32", "float16"] = "float32"
    """What the weights are kept in on disk, where they are trained here; they are computed in
    float32, unless something else is asked for."""

    @model_validator(mode="after")
    def _shape(self) -> Hubert:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.stack and self.front != "mel":
            raise ValueError(f"stack {self.stack}: front {self.front} has no windows to stack")
        if self.convolved and not self.stack:
            raise ValueError("convolved: without stack a frame is one window")
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
    """Seconds of audio a step, of all workers together."""
    crop_seconds: PositiveFloat
    """Longer clips are cropped to this."""
    learning_rate: PositiveFloat
    mask_probability: float = Fraction
    """Share of frames at which a masked span starts."""
    mask_length: PositiveInt
    """Frames a masked span covers."""
    band_masks: NonNegativeInt = 0
    """With front mel, runs of bands that are hidden all through a crop (SpecAugment, arXiv
    1904.08779)."""
    band_width: PositiveInt = 12
    """Bands in the longest of them."""
    band_warp: float = Field(default=0, ge=0, le=0.3)
    """With front mel, the largest share by which a crop's bands are stretched or squeezed, as
    another speaker's longer or shorter throat would (VTLP, Jaitly and Hinton 2013)."""
    layer_drop: float = Field(default=0, ge=0, le=0.5)
    """Share of the steps that a layer of the transformer is left out of (LayerDrop, arXiv
    1909.11556)."""
    rough: float = Field(default=0, ge=0, le=1)
    """Share of the crops that are recorded anew each time they are drawn, in another place: with
    echo, noise, by telephone. Of aligned clips alone where nothing is spelled."""
    seen_weight: float = Field(default=0, ge=0)
    """Weight in the loss of a frame that is not masked; a masked one weighs 1."""
    balance: float = Field(default=1, ge=0, le=1)
    """How much oftener a speaker of more clips is drawn: as the number of them to this power. 1
    draws every clip alike, 0 every speaker."""
    domain_weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """How much oftener a clip of a domain is drawn than one of another, as speakers are balanced; 1
    of domains that are not named."""
    spelling_weight: float = Field(default=0, ge=0)
    """Weight of CTC (Graves et al. 2006) in the loss: a head on `hubert.layer` learns to spell what
    is written of each whole clip, and goes into the artifact. 0 for no head."""
    alphabet: str = " 'abcdefghijklmnopqrstuvwxyz"
    """Letters that it spells with; a space is the gap between words."""
    base: str | None = None
    """An encoder of this shape that is trained further: a model of this package (`mmrag:small`) or
    an artifact's directory; None to begin with random weights."""
    anchor_weight: float = Field(default=0, ge=0)
    """Weight of how far the features of aligned clips move away from the base's: a language model
    that reads the base's units goes on understanding what is clear, while the others move to it."""
    base_share: float = Field(default=0, ge=0, lt=1)
    """Share of the base in the weights that come of it: those of before and after are averaged
    (WiSE-FT, arXiv 2109.01903), and what was learned is forgotten less."""
    sample_seconds: PositiveFloat
    """Audio whose features k-means sees."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """What matrix products are computed in; auto is bf16 where the hardware has it."""
    leave_out: Correction[tuple[str, ...]] = ()
    """Utterances, by id, that are passed over; may be added to while a run is unfinished."""
    checkpoint_steps: Operation[PositiveInt] = 500
    """Steps after which a killed run finds its state again."""
    log_steps: Operation[PositiveInt] = 1
    """Steps from one point of a curve in MLflow to the next; `metrics.jsonl` has them all."""
    workers: Operation[PositiveInt] = 1
    """Processes that share the crops of each step, on Ray Train where there are several. What is
    learned is the same, but for rounding; a stopped run goes on with any number."""
    max_failures: Operation[NonNegativeInt] = 3
    """Worker failures after which a run of several workers is given up."""
    num_cpus: Operation[float] = Field(gt=0)
    """CPUs that each training process reserves."""
    num_gpus: Operation[float] = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _first_round(self) -> Pretrain:
        if len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError(f"alphabet {self.alphabet!r} has a letter twice")
        if self.anchor_weight and not self.base:
            raise ValueError("anchor_weight: there is no base to stay near")
        if self.base_share and not self.base:
            raise ValueError("base_share: there is no base to average with")
        if self.rounds[0].target == "hubert":
            raise ValueError("the first round has no previous features to be its target")
        return self


class Tokenize(Section):
    """Audio to units."""

    name: Operation[str] = Field(default="tokens", pattern=SLUG)
    """The output's directory in the workspace."""
    source: Operation[str | None] = None
    """A manifest, a directory of audio or of manifests `<split>.jsonl`, or `reader:path` for a
    reader of `mmrag.corpora.sources` (`lhotse:cuts.jsonl.gz`); None for the workspace's corpus.
    What it holds counts, and not where it lies."""
    codebook: Operation[str | None] = None
    """A fitted codebook's directory, or a model of this package (`mmrag:tiny`); None to fit one on
    `source`."""
    units: PositiveInt
    """Codebook size K."""
    sample_seconds: PositiveFloat
    """Audio whose features k-means sees."""
    min_seconds: PositiveFloat
    max_seconds: PositiveFloat
    """Longer clips are rejected if they have a transcript, else split at silence."""
    batch_seconds: Operation[PositiveFloat]
    """Audio encoded at once, seconds."""
    part_seconds: Layout[PositiveFloat]
    """Audio in one output file: what a killed job may have to redo, a worker."""
    require_text: bool
    """Reject clips without a transcript."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """What the encoder multiplies in; auto is bf16 where the hardware has it. In bf16 a few frames
    in a thousand become another unit (`python -m jobs.benchmark tokenize`)."""
    compile: Operation[Literal["auto", "never"]] = "auto"
    """Whether an encoder on a GPU is compiled; auto tries it, and keeps what is faster."""
    workers: Workers
    """Who encodes."""
    operators: Operation[Literal["auto", "fused", "separate"]] = "auto"
    """Whether whoever encodes also decodes and writes (fused), or others do; auto is separate where
    `workers` have GPUs. The parts are the same."""
    decoders: Operation[Workers | None] = None
    """Who decodes where that is separate; None for four processes of a core for each worker."""

    @model_validator(mode="after")
    def _splittable(self) -> Tokenize:
        if 2 * self.min_seconds > self.max_seconds:
            raise ValueError(
                f"max_seconds {self.max_seconds} is less than twice min_seconds "
                f"{self.min_seconds}: a longer clip could not be split"
            )
        return self
