"""Sections of the language model and its adapter: vocabulary, shapes, training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from mmrag.config.section import (
    SLUG,
    Correction,
    Fraction,
    Operation,
    Section,
    Workers,
)

Format = Literal["text", "speech", "speech_first", "text_first"]


class Vocabulary(Section):
    """Word pieces."""

    pieces: PositiveInt
    """SentencePiece vocabulary size."""
    sentences: PositiveInt = 1_000_000
    """Sentences that SentencePiece is trained on, at most; of more, so many are drawn."""
    threads: Operation[PositiveInt] = 1
    """Threads that prepare them; what takes the time, counting pairs, SentencePiece does in one."""
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
    near: float = Field(default=0, ge=0, le=1)
    """Chance that a list holds phrases that sound like the utterance's own entities, whether these
    are in it or not."""
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
    """Some steps of training with one mixture of sequence formats."""

    name: str
    steps: PositiveInt
    mixture: dict[Format, PositiveFloat] = Field(min_length=1)
    """Format -> weight: the chance that an utterance is shown in that format."""


class TrainWorkers(Workers):
    """The processes that train together."""

    count: Operation[PositiveInt | tuple[PositiveInt, PositiveInt]]
    """How many; or the fewest and the most, and there are as many as there is room for. What is
    learned is the same with any number of them."""

    @field_validator("count", mode="wrap")
    @classmethod
    def _told_once(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(
                f"{value!r} is neither a number of workers, 1 or more, nor the fewest and the "
                "most of them: [1, 4]"
            ) from None

    @model_validator(mode="after")
    def _ordered(self) -> TrainWorkers:
        if self.fewest > self.most:
            raise ValueError(f"count {list(self.count)}: the fewest come first")
        return self

    @property
    def fewest(self) -> int:
        """Workers that it takes to begin."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        """Workers that there may be."""
        return self.count if isinstance(self.count, int) else self.count[1]


class Dev(Section):
    """What is measured while a model trains, on a split that it does not learn from.

    The utterances are the same ones each time, whatever the number of workers.
    """

    split: Operation[str] = "dev"
    """Of `tokens/`; where there is no such split there are no losses."""
    loss_steps: Operation[NonNegativeInt] = 250
    """Optimizer steps from one measurement of the loss to the next, the last step's besides; 0 for
    none."""
    loss_utterances: Operation[PositiveInt] = 200
    """At most so many utterances are read for it."""
    wer_steps: Operation[NonNegativeInt] = 0
    """The same for the word error rate of greedy decoding without retrieval."""
    wer_utterances: Operation[PositiveInt] = 32
    """At most so many utterances are transcribed for it."""
    wer_copy_gib: Operation[PositiveFloat] = 16.0
    """Under ZeRO-3 each worker gathers a whole copy of the language model to decode with, in the
    precision that it is trained in, and lets go of it; a larger one is refused."""


class NGramCounts(Section):
    """An n-gram model of word pieces, counted from text."""

    least: tuple[PositiveInt, ...] = Field(default=(1, 1, 1, 2, 2), min_length=1, max_length=8)
    """How often n-grams of one piece, of two, … have to occur to be kept: as many numbers as the
    longest has pieces. Single pieces are all kept."""
    files: tuple[str, ...] = ()
    """More text, a sentence a line; what the dev and test splits say is not counted."""


class Train(Section):
    """Training of the language model."""

    phases: tuple[Phase, ...] = Field(min_length=1)
    base: str | None = None
    """What to start from: a Hugging Face Llama, Mistral or Qwen directory; a model of this package
    (`mmrag:tiny`), or another workspace's `lm/`, which keep their own word pieces; None for random
    weights."""
    leave_out: Correction[tuple[str, ...]] = ()
    """Utterances, by id, that are passed over; may be added to while a run is unfinished."""
    micro_batch_tokens: PositiveInt
    """Tokens (padding included) in one forward pass of one worker, at most; an utterance that is
    longer by itself is left out."""
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
    zero_stage: Operation[Literal[0, 1, 2, 3]]
    deepspeed: Operation[str | None] = None
    """JSON file with more DeepSpeed settings (offload, buckets), none of which changes what is
    learned; None for DeepSpeed's own."""
    activation_checkpointing: Operation[PositiveInt | None] = None
    """Layers of which a forward pass keeps the input alone, to compute the rest again on the way
    back: a third more arithmetic for a small part of the memory. None keeps all activations."""
    loss_chunk: Operation[PositiveInt | None] = 1024
    """Positions whose logits are held at once; None for those of a whole micro-batch."""
    compiled: Operation[bool] = False
    """Whether each layer is compiled, which takes minutes at the start; not under ZeRO-3, which
    fetches weights between the operations of a layer."""
    checkpoint_steps: Operation[PositiveInt]
    staging: Operation[str | None] = None
    """Directory on each node's own disk, where a checkpoint is written before it is sent to the
    workspace; None for the node's temporary directory."""
    log_steps: Operation[PositiveInt]
    dev: Dev = Dev()
    peak_flops: Operation[PositiveFloat | None] = None
    """What a worker's hardware multiplies at most, FLOP/s: MFU is a share of it. None for the data
    sheet's figure of a known GPU in bf16; where that is not known either, no MFU is told."""
    max_failures: Operation[int] = Field(ge=0)
    """Worker failures after which the run is given up."""
    workers: TrainWorkers

    @model_validator(mode="after")
    def _divides(self) -> Train:
        allowed = range(self.workers.fewest, self.workers.most + 1)
        if wrong := [str(count) for count in allowed if self.micro_batches % count]:
            raise ValueError(
                f"micro_batches {self.micro_batches} is not a multiple of "
                f"workers.count {', '.join(wrong)}"
            )
        if self.compiled and self.zero_stage == 3:
            raise ValueError(
                "compiled goes with zero_stage 0, 1 or 2: ZeRO-3 fetches a layer's weights between "
                "its operations"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps over all phases."""
        return sum(phase.steps for phase in self.phases)


class WhisperShape(Section):
    """A small Whisper to train from nothing."""

    width: PositiveInt
    heads: PositiveInt
    encoder_layers: PositiveInt
    decoder_layers: PositiveInt
    feed_forward: PositiveInt
    mel_bands: PositiveInt = 80
    window_seconds: PositiveInt
    """Length of the window that its encoder hears; a published Whisper's is 30."""
    tokens: PositiveInt
    """Most tokens of prompt and transcript together."""
    pieces: PositiveInt = Field(ge=256)
    """Byte-level word pieces."""
    dropout: float = Fraction

    @model_validator(mode="after")
    def _divides(self) -> WhisperShape:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class WhisperTraining(Section):
    """How a small Whisper is trained, and on what."""

    shape: WhisperShape
    split: str = "lm"
    """The corpus's split that is learned."""
    steps: PositiveInt
    batch: PositiveInt
    """Clips a step."""
    learning_rate: PositiveFloat
    ctc_weight: float = Field(ge=0)
    """Weight of a CTC loss on the encoder's frames; 0 for none."""
    phone_weight: float = Field(default=0, ge=0)
    """Weight of naming the phone that is said in each of them, where the corpus has alignments."""
    leave_out: Correction[tuple[str, ...]] = ()
    """Utterances, by id, that are passed over; may be added to while a run is unfinished."""
    checkpoint_steps: Operation[PositiveInt]
    log_steps: Operation[PositiveInt] = 100
    num_cpus: Operation[float] = Field(gt=0)
    """CPUs that the one training process reserves."""
    num_gpus: Operation[float] = Field(default=0, ge=0)
