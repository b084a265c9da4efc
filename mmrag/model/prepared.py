"""A language model's weights as its processor multiplies them quickest, and its step compiled.

Prepared once, when a model is loaded to decode with: maps that read the same input become one, and
oneDNN or FBGEMM keep their matrices in the order of their own kernels. What is exact stays so;
int8 weights (a scale for each output, activations scaled as they come, keys and values kept in
bfloat16) are taken where they are asked for by name. A prepared model decodes and reads; it is
neither trained nor saved. Which of float32 and bfloat16 is the quicker, and whether compiling
helps, is measured on the model's own shape.
"""

from __future__ import annotations

import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmrag.model.lm import LM, Block
from mmrag.model.pages import PAGE

Compute = Literal["auto", "float32", "bfloat16", "int8"]
REPEATS = 5
"""Of a measurement; the least counts."""
GRAPHS = 16
"""Most that a compiler makes of one model's step; batches of any size need no more than four."""
READ = 10 * PAGE
"""Tokens that rows have read in the steps that are measured."""

_PACKED: dict[int, Any] = {}
"""Packed weights by number: a compiler carries numbers, not weights of a kind unknown to it."""
# Without VNNI the sums of two products are of 16 bits, and hold one bit less of each.
_NARROW = not torch.cpu.get_capabilities().get("avx512_vnni", False)


@dataclass(frozen=True)
class Prepared:
    """What was chosen, and why: milliseconds by candidate."""

    compute: str
    """What weights are kept in."""
    compiled: bool
    matrices_ms: dict[str, float]
    """The matrix products of all blocks in a step, by number format."""
    steps_ms: dict[str, float]
    """A step, by `eager` or `compiled` and the number of rows."""
    refused: str = ""
    """Why nothing could be compiled."""

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        how += f", since nothing can be compiled here: {self.refused}" if self.refused else ""
        measured = {**self.matrices_ms, **self.steps_ms}
        each = ", ".join(f"{name} {ms:.1f} ms" for name, ms in measured.items())
        return f"{self.compute}, {how}" + (f" ({each})" if each else "")


class PackedLinear(nn.Module):
    """A linear map whose matrix lies as the processor's kernels want it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, int8: bool = False) -> None:
        """`weight` (outputs, inputs)."""
        super().__init__()
        self.outputs = len(weight)
        self.int8 = int8
        self.weight_bytes = weight.numel() * (1 if int8 else weight.element_size())
        """What a product has to read."""
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        number = max(_PACKED, default=0) + 1
        _PACKED[number] = _quantized(weight) if int8 else _reordered(weight)
        self.register_buffer("number", torch.tensor(number), persistent=False)
        weakref.finalize(self, _PACKED.pop, number, None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        rows = x.flatten(0, -2) if x.dim() > 2 else x
        product = torch.ops.mmrag.packed_linear(rows, self.number, self.outputs, self.int8)
        product = product.unflatten(0, x.shape[:-1]) if x.dim() > 2 else product
        return product if self.bias is None else product + self.bias


def prepare(
    lm: LM, compute: Compute | None = None, rows: int = 16, compiled: bool | None = None
) -> Prepared:
    """Make `lm` ready to decode `rows` hypotheses at a time; it changes in place.

    `compute` None leaves the weights in the format that they have; auto takes the quicker of
    float32 and bfloat16 where they are bfloat16. `compiled` None measures whether that is quicker,
    and does without where there is no compiler (RuntimeError if it is True); False does not try. On
    a GPU nothing is packed.
    """
    if lm.block_step or isinstance(lm.head, PackedLinear):
        raise ValueError("this language model is prepared already")
    matrices: dict[str, float] = {}
    compute = compute or _format(lm)
    if compute == "auto":
        compute, matrices = _quickest_format(lm, rows)
    if compute != "int8":
        lm.to(getattr(torch, compute))
    elif lm.device.type == "cpu":
        lm.float().kept_in = torch.bfloat16
    if lm.device.type == "cpu":
        _pack(lm, int8=compute == "int8")
    elif compute == "int8":
        raise ValueError("int8 weights are for processors; a GPU multiplies in bfloat16")
    steps: dict[str, float] = {}
    refused = ""
    if compiled is not False:
        try:
            steps = _compile(lm, rows, keep=compiled)
        except RuntimeError as error:
            if compiled:
                raise
            lm.block_step, refused = None, str(error).partition("\n")[0]
    return Prepared(compute, lm.block_step is not None, matrices, steps, refused)


def _pack(lm: LM, int8: bool) -> None:
    for block in lm.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        attention.qkv = _joined([attention.q, attention.k, attention.v], int8)
        feed_forward.gate_up = _joined([feed_forward.gate, feed_forward.up], int8)
        attention.q = attention.k = attention.v = None
        feed_forward.gate = feed_forward.up = None
        attention.out = _joined([attention.out], int8)
        feed_forward.down = _joined([feed_forward.down], int8)
    lm.head = PackedLinear((lm.embedding if lm.head is None else lm.head).weight, None, int8)


def _joined(maps: Sequence[nn.Linear], int8: bool) -> PackedLinear:
    bias = None if maps[0].bias is None else torch.cat([one.bias for one in maps])
    return PackedLinear(torch.cat([one.weight.detach() for one in maps]), bias, int8)


def _quickest_format(lm: LM, rows: int) -> tuple[Compute, dict[str, float]]:
    """The number format whose products of this model's shapes take least, and what each takes."""
    if _format(lm) != "bfloat16" or lm.device.type != "cpu":
        return _format(lm), {}
    shapes = _shapes(lm)
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.ones(rows, width, dtype=dtype) for _, width in shapes]  # one layer's
        packed = [_reordered(torch.ones(shape, dtype=dtype)) for shape in shapes]

        def products(inputs: Sequence[Tensor] = inputs, packed: Sequence[Tensor] = packed) -> None:
            for x, weight in zip(inputs, packed, strict=True):
                _product(x, weight)

        taken[str(dtype).removeprefix("torch.")] = _milliseconds(products) * len(lm.blocks)
    return min(taken, key=taken.get), taken


def _format(lm: LM) -> str:
    return str(lm.embedding.weight.dtype).removeprefix("torch.")


def _shapes(lm: LM) -> list[tuple[int, int]]:
    """Outputs and inputs of a block's maps, those of one input together."""
    attention, feed_forward = lm.blocks[0].attention, lm.blocks[0].feed_forward
    width, inner = lm.config.width, feed_forward.up.out_features
    heads = attention.q.out_features + attention.k.out_features + attention.v.out_features
    return [(heads, width), (width, attention.out.in_features), (2 * inner, width), (width, inner)]


def _compile(lm: LM, rows: int, keep: bool | None) -> dict[str, float]:
    """Compile a block's step; unless `keep`, it goes where it is not the quicker of the two."""
    numbers = sorted({1, max(2, rows)})
    compiled = torch.compile(
        Block.step,
        fullgraph=True,
        dynamic=True,
        recompile_limit=GRAPHS,
        isolate_recompiles=True,  # a process may prepare several models
    )
    taken: dict[str, float] = {}
    for name, step in (("eager", None), ("compiled", compiled)):
        lm.block_step = step
        for number in numbers:
            taken[f"{name} step of {number}"] = _milliseconds(_stepping(lm, number))
    gain = [
        taken[f"eager step of {number}"] / taken[f"compiled step of {number}"] for number in numbers
    ]
    if not keep and statistics.geometric_mean(gain) <= 1:
        lm.block_step = None
    return taken


def _stepping(lm: LM, rows: int) -> Callable[[], None]:
    """A step of so many rows that have read READ tokens."""
    cache = lm.cache([None] * rows, READ + 2 * REPEATS + 2)
    with torch.inference_mode():
        lm(torch.zeros(rows, READ, dtype=torch.long, device=lm.device), cache)
    ids = torch.zeros(rows, 1, dtype=torch.long, device=lm.device)

    @torch.inference_mode()
    def step() -> None:
        lm(ids, cache).logits.sum().item()

    return step


def _milliseconds(function: Callable[[], None]) -> float:
    function()
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return min(taken) * 1e3


def _reordered(weight: Tensor) -> Tensor:
    """A matrix in oneDNN's own order; as it is where oneDNN has no kernels for its format here."""
    weight = weight.detach().contiguous()
    own = weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if not (torch.backends.mkldnn.is_available() and own):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, 16)


def _quantized(weight: Tensor) -> Any:
    """A matrix as int8 with a scale for each output, in FBGEMM's own order."""
    scales = weight.detach().float().abs().amax(1).clamp(min=1e-12) / 127
    rounded = (weight.detach().float() / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    with warnings.catch_warnings():  # torch means to drop quantized tensors; the version is pinned
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch._make_per_channel_quantized_tensor(
            rounded, scales.double(), torch.zeros(len(scales), dtype=torch.long), 0
        )
        return torch.ops.quantized.linear_prepack(tensor)


def _packed_linear(x: Tensor, number: Tensor, outputs: int, int8: bool) -> Tensor:
    weight = _PACKED[int(number)]
    if not int8:
        return _product(x, weight)
    return torch.ops.quantized.linear_dynamic.default(x.float(), weight, _NARROW).to(x.dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, inputs) by a matrix that `_reordered` gave: (R, outputs)."""
    if not weight.is_mkldnn:
        return functional.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


_OPERATORS = torch.library.Library("mmrag", "FRAGMENT")
_OPERATORS.define("packed_linear(Tensor x, Tensor number, int outputs, bool int8) -> Tensor")
_OPERATORS.impl("packed_linear", _packed_linear, "CPU")


@torch.library.register_fake("mmrag::packed_linear", lib=_OPERATORS)
def _shape_of_packed(x: Tensor, number: Tensor, outputs: int, int8: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
