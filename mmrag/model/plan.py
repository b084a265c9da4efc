"""What a training takes of memory, links and time, by arithmetic alone: before anybody rents a GPU.

ZeRO's accounting (arXiv 1910.02054, section 3) with DeepSpeed's own buffers, in bytes; collectives
as rings (of S bytes over G processes, S (G - 1) / G pass each link). Knows neither DeepSpeed nor a
device; its memory is held against fake tensors, its FLOPs against torch's count, by tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mmrag.config import LanguageModel, Phase, Train
from mmrag.model.flops import PEAK_FLOPS, forward_flops, matrix_parameters

GIB = 2**30
WIDE, HALF = 4, 2
"""Bytes of a float32 and of a bfloat16."""
OVERHEAD = 2 * GIB
"""What a process takes before it trains: CUDA's context, NCCL's and cuBLAS's buffers."""
MARGIN = 0.1
"""Share of what is allocated that fragmentation may cost beside it."""
UNITS_A_SECOND, PIECES_A_SECOND = 28.0, 3.0
"""Tokens of a second of read speech: units with runs collapsed, and word pieces."""


@dataclass(frozen=True)
class Card:
    """A GPU: its name in `PEAK_FLOPS`, the bytes torch finds on it, and the bytes a second that it
    receives from the others of its node and, with its share of the node's adapters, from outside.
    """

    name: str
    memory: float
    intranode: float
    internode: float


CARDS = {
    # Memory as `torch.cuda.get_device_properties` gives it; NVLink one way (half of what a data
    # sheet states), PCIe where there is none; adapters as the usual machines of a cloud have them.
    "H200": Card("NVIDIA H200", 139.8 * GIB, 450e9, 50e9),
    "H100-80GB": Card("NVIDIA H100 80GB HBM3", 79.1 * GIB, 450e9, 50e9),
    "A100-80GB": Card("NVIDIA A100-SXM4-80GB", 79.1 * GIB, 300e9, 12.5e9),
    "A100-40GB": Card("NVIDIA A100-SXM4-40GB", 39.4 * GIB, 300e9, 6.25e9),
    "B200": Card("NVIDIA B200", 178.3 * GIB, 900e9, 50e9),
    "L40S": Card("NVIDIA L40S", 44.4 * GIB, 32e9, 6.25e9),
    "A10G": Card("NVIDIA A10G", 22.0 * GIB, 32e9, 1.5e9),
}


@dataclass(frozen=True)
class Cluster:
    """The machines, as they are hoped to be."""

    card: Card
    gpus: int
    gpus_per_node: int
    mfu: float = 0.4
    """Share of the card's peak that computing reaches while it waits for nobody."""
    storage: float = 1e9
    """Bytes a second that a node writes of a checkpoint."""

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)


@dataclass(frozen=True)
class Partition:
    """How DeepSpeed lays out a training, with its own defaults; sizes in elements."""

    stage: int
    secondary: int = 1
    """Processes that share a second copy of the weights (hpZ, arXiv 2306.10209); 1 for none."""
    reduce_bucket: int = 500_000_000
    allgather_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    """Most gathered parameters under ZeRO-3."""
    sub_group: int = 1_000_000_000
    """Parameters that the optimizer updates at a time under ZeRO-3."""
    all_reduces: bool = True
    """Whether ZeRO-1 and -2 reduce a bucket to everyone, and not to its owners alone."""
    overlaps: bool = True
    optimizer_offloaded: bool = False
    parameters_offloaded: bool = False

    @classmethod
    def of(cls, stage: int, settings: Mapping[str, Any]) -> Partition:
        """From DeepSpeed's `zero_optimization`."""
        names = {
            "secondary": "zero_hpz_partition_size",
            "reduce_bucket": "reduce_bucket_size",
            "allgather_bucket": "allgather_bucket_size",
            "prefetch": "stage3_prefetch_bucket_size",
            "live": "stage3_max_live_parameters",
            "sub_group": "sub_group_size",
            "all_reduces": "use_multi_rank_bucket_allreduce",
            "overlaps": "overlap_comm",
        }
        given = {ours: settings[name] for ours, name in names.items() if name in settings}
        offloaded = (f"offload_{what}" in settings for what in ("optimizer", "param"))
        partition = cls(stage, **given)
        optimizer, parameters = offloaded
        return replace(partition, optimizer_offloaded=optimizer, parameters_offloaded=parameters)


class Part(NamedTuple):
    """Bytes of one GPU's memory, or of the host's for it."""

    name: str
    bytes: float
    about: str
    on_host: bool = False


class Transfer(NamedTuple):
    """Bytes of one optimizer step that a GPU receives within its node, and a whole node from
    outside."""

    name: str
    inside: float
    between: float


@dataclass(frozen=True)
class Plan:
    """The figures of one training; bytes and seconds."""

    parameters: int
    tokens: int
    """Read in a step by all GPUs, padding included."""
    resident: tuple[Part, ...]
    """Held all the time."""
    passing: tuple[Part, ...]
    """Held beside it while a micro-batch passes."""
    moments: tuple[Part, ...]
    """Held beside both, one after the other."""
    updating: Part
    """Held in the optimizer's step, in place of what a micro-batch needs."""
    memory: float
    """What the card has."""
    transfers: tuple[Transfer, ...]
    compute: float
    """Seconds of a step without any waiting."""
    traffic: float
    """Seconds of a step's transfers, one after the other."""
    overlaps: bool
    mfu: float
    """Model FLOPs over the peak, waiting and recomputation included."""
    checkpoint: float
    checkpoint_seconds: float
    gpus: int

    @property
    def used(self) -> float:
        """The most a GPU allocates, without the margin."""
        held = sum(part.bytes for part in self.resident if not part.on_host)
        return held + max(self.micro_batch, self.updating.bytes)

    @property
    def micro_batch(self) -> float:
        """The most that a micro-batch holds."""
        return sum(part.bytes for part in self.passing) + max(part.bytes for part in self.moments)

    @property
    def needed(self) -> float:
        """With what fragmentation may cost."""
        return self.used * (1 + MARGIN)

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory

    @property
    def step(self) -> float:
        """Seconds; traffic hides behind computing where DeepSpeed overlaps them."""
        waits = max(self.compute, self.traffic)
        return waits if self.overlaps else self.compute + self.traffic

    @property
    def step_at_worst(self) -> float:
        """Seconds, if nothing is hidden."""
        return self.compute + self.traffic

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


def parameters_of(shape: LanguageModel, vocabulary: int) -> int:
    """Numbers of an LM of this shape."""
    head = shape.head_width or shape.width // shape.heads
    biases = (shape.heads + 2 * shape.kv_heads) * head if shape.qkv_bias else 0
    embedded = vocabulary * shape.width * (1 if shape.tied else 2)
    norms = (2 * shape.layers + 1) * shape.width
    return matrix_parameters(shape) + embedded + norms + shape.layers * biases


def saved_of_layer(shape: LanguageModel, half: int = HALF) -> int:
    """Bytes a token that a layer keeps for its backward pass; `half` is an activation's size.

    Two norms keep their input and their result in float32, with their scale; projections keep what
    they read, attention its inputs, its output and a float32 a head; SwiGLU four of its width.
    """
    head = shape.head_width or shape.width // shape.heads
    norms = 2 * (2 * WIDE * shape.width + WIDE)
    read = 2 * shape.width
    attention = (2 * shape.heads + 2 * shape.kv_heads) * head
    return norms + half * (read + attention + 4 * shape.feed_forward) + WIDE * shape.heads


def saved_at_the_ends(shape: LanguageModel, half: int = HALF) -> int:
    """Bytes a token that embedding, rotary angles and the last norm keep."""
    head = shape.head_width or shape.width // shape.heads
    token, angles = 8, 2 * WIDE * head
    return token + angles + 2 * WIDE * shape.width + WIDE


def loss_bytes(
    shape: LanguageModel, vocabulary: int, positions: int, chunk: int | None, half: int = HALF
) -> tuple[int, int]:
    """What the loss keeps for the backward pass, and the most it holds beside that on its way.

    It keeps the gradients of the states and of the output matrix. It holds a chunk's logits twice
    in float32, beside the sum of the matrix's gradients the part that a chunk adds, and the model's
    other outputs (its states and its key).
    """
    rows = min(chunk or positions, positions)
    matrix, states = vocabulary * shape.width, positions * shape.width
    kept = half * (states + matrix)
    sums = WIDE * matrix if rows < positions else 0
    return kept, 2 * WIDE * rows * vocabulary + sums + 2 * half * states


def plan(
    shape: LanguageModel,
    vocabulary: int,
    settings: Train,
    partition: Partition,
    cluster: Cluster,
    context: int,
) -> Plan:
    """The figures of training an LM of this shape over `vocabulary` ids, in sequences of `context`
    tokens."""
    parameters = parameters_of(shape, vocabulary)
    passes = settings.micro_batches // settings.workers.count
    tokens = settings.micro_batches * settings.micro_batch_tokens
    half = WIDE if settings.precision == "fp32" else HALF
    transfers = _transfers(parameters * half, passes, partition, cluster)
    flops = forward_flops(shape, vocabulary, tokens, context)
    again = forward_flops(shape, 0, tokens, context) if settings.activation_checkpointing else 0.0
    peak = cluster.gpus * PEAK_FLOPS[cluster.card.name]
    compute = (3 * flops + again) / (peak * cluster.mfu)
    traffic = sum(_seconds(one, cluster) for one in transfers)
    step = max(compute, traffic) if partition.overlaps else compute + traffic
    weights = 0 if partition.stage == 3 else half * parameters
    checkpoint = 3 * WIDE * parameters + weights
    return Plan(
        parameters,
        tokens,
        tuple(_resident(parameters, half, partition, cluster)),
        tuple(_passing(shape, parameters, settings, partition, half)),
        tuple(_moments(shape, vocabulary, settings, half)),
        _updating(parameters, partition, cluster),
        cluster.card.memory,
        tuple(transfers),
        compute,
        traffic,
        partition.overlaps,
        3 * flops / (step * peak),
        checkpoint,
        checkpoint / (cluster.nodes * cluster.storage),
        cluster.gpus,
    )


def _resident(parameters: int, half: int, partition: Partition, cluster: Cluster) -> list[Part]:
    """What a GPU holds all the time."""
    stage, share = partition.stage, parameters / cluster.gpus
    own = share if stage == 3 else parameters
    masters = share if stage else 0.0
    states = share if stage else parameters
    gradients = {0: parameters * half, 1: parameters * half}.get(stage, share * WIDE)
    master = 0.0 if half == WIDE and stage == 3 else WIDE * masters
    optimizer, weights = partition.optimizer_offloaded, partition.parameters_offloaded
    parts = [
        Part("parameters", half * own, _over(stage == 3, cluster), weights),
        Part("fp32 master weights", master, _over(stage > 0, cluster), optimizer),
        Part(
            "optimizer states",
            2 * (WIDE if stage else half) * states,
            f"AdamW's two moments, {_over(stage > 0, cluster)}",
            optimizer,
        ),
        Part("gradients", gradients, _over(stage >= 2, cluster), optimizer),
    ]
    if stage == 3 and partition.secondary > 1:
        second = half * parameters / partition.secondary
        parts.append(Part("second copy of parameters", second, f"hpZ over {partition.secondary}"))
    buffers = 2 * half * min(partition.reduce_bucket, parameters) if stage else 0
    if stage in (1, 2):
        buffers += half * min(partition.allgather_bucket, parameters)
    if stage == 3:
        buffers += half * min(partition.prefetch, parameters)
    parts.append(Part("communication buckets", buffers, "gradients twice, weights once"))
    return [*parts, Part("CUDA, NCCL, cuBLAS", OVERHEAD, "assumed")]


def _over(partitioned: bool, cluster: Cluster) -> str:
    return f"1 of {cluster.gpus} parts" if partitioned else "whole"


def _passing(
    shape: LanguageModel, parameters: int, settings: Train, partition: Partition, half: int
) -> list[Part]:
    """What a GPU holds while a micro-batch passes."""
    tokens, every = settings.micro_batch_tokens, settings.activation_checkpointing
    ends = tokens * saved_at_the_ends(shape, half)
    if every is None:
        kept, about = tokens * saved_of_layer(shape, half) * shape.layers, "all that a layer saves"
    else:
        kept = tokens * half * shape.width * math.ceil(shape.layers / every)
        about = "the input of each layer" if every == 1 else f"the input of every {every} layers"
    parts = [Part("activations", kept + ends, about)]
    if partition.stage == 3:
        gathered = half * min(parameters, partition.live)
        parts.append(Part("gathered parameters", gathered, "stage3_max_live_parameters, at most"))
    return parts


def _moments(shape: LanguageModel, vocabulary: int, settings: Train, half: int) -> list[Part]:
    """What a GPU holds beside that, at most: for the loss, and for a layer's backward pass."""
    tokens, every = settings.micro_batch_tokens, settings.activation_checkpointing or 0
    rows = min(settings.loss_chunk or tokens, tokens)
    loss = sum(loss_bytes(shape, vocabulary, tokens, settings.loss_chunk, half))
    again = tokens * saved_of_layer(shape, half) * min(every, shape.layers)
    backward = tokens * (half * shape.feed_forward + WIDE * shape.width)
    matrix = half * shape.width * max(shape.feed_forward, shape.width)
    if shape.tied:  # the output matrix's gradient waits for the embedding's
        matrix += half * shape.width * vocabulary
    about = f"with what {every} of them saved, computed again" if every else "gradients on the way"
    return [
        Part("loss", loss, f"logits of {rows:,} positions at once"),
        Part("layer's backward pass", again + backward + matrix, about),
    ]


def _updating(parameters: int, partition: Partition, cluster: Cluster) -> Part:
    """What AdamW and DeepSpeed hold in a step: a float32 copy of the gradients and a temporary."""
    if partition.optimizer_offloaded:
        return Part("optimizer step", 0.0, "on the host")
    share = parameters / (cluster.gpus if partition.stage else 1)
    if partition.stage == 3:
        share = min(share, partition.sub_group)
    return Part("optimizer step", 2 * WIDE * share, "in place of what a micro-batch holds")


def _transfers(
    weights: float, passes: int, partition: Partition, cluster: Cluster
) -> list[Transfer]:
    """What a step moves: `weights` are the bytes of all parameters, and of their gradients."""
    world = cluster.gpus
    if partition.stage == 0:
        return [_ring("all-reduce of gradients", 2 * weights, world, cluster)]
    if partition.stage < 3:
        times = passes if partition.stage == 2 else 1
        hops, name = (2, "all-reduce") if partition.all_reduces else (1, "reduce")
        return [
            _ring(f"{name} of gradients", times * hops * weights, world, cluster),
            _ring("all-gather of parameters", weights, world, cluster),
        ]
    reads = 2 * passes  # on the way forward and on the way back
    reduced = _ring("reduce-scatter of gradients", passes * weights, world, cluster)
    if partition.secondary == 1:
        return [_ring("all-gather of parameters", reads * weights, world, cluster), reduced]
    again = _ring("all-gather in a group", (reads - 1) * weights, partition.secondary, cluster)
    return [_ring("all-gather, once a step", weights, world, cluster), again, reduced]


def _ring(name: str, size: float, group: int, cluster: Cluster) -> Transfer:
    passed = size * (group - 1) / group
    return Transfer(name, passed, passed if group > cluster.gpus_per_node else 0.0)


def _seconds(transfer: Transfer, cluster: Cluster) -> float:
    """The slower of both kinds of link; a node's adapters share what comes from outside."""
    card = cluster.card
    outside = transfer.between / (card.internode * cluster.gpus_per_node)
    return max(transfer.inside / card.intranode, outside)


def hours_heard(phase: Phase, tokens: int) -> float:
    """Hours of speech in the `tokens` of each step of a phase, as often as it is read."""
    weight = {form: share / sum(phase.mixture.values()) for form, share in phase.mixture.items()}
    spoken = sum(share for form, share in weight.items() if form != "text")
    mean = sum(
        share * (UNITS_A_SECOND * (form != "text") + PIECES_A_SECOND * (form != "speech"))
        for form, share in weight.items()
    )
    return phase.steps * tokens * spoken / mean / 3600
