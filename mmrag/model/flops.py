"""What training multiplies, in floating-point operations, and what hardware multiplies at most.

Model FLOPs in the sense of MFU (arXiv 2204.02311, appendix B): what the mathematics asks for,
whatever is computed again to save memory. Knows shapes alone, neither tensors nor devices.
"""

from __future__ import annotations

from mmrag.config import LanguageModel

PEAK_FLOPS: dict[str, float] = {
    # NVIDIA's data sheets; where a sheet states a figure "with sparsity", half of it.
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.4e12,
    "NVIDIA H800": 989.4e12,
    "NVIDIA H20": 148e12,
    "NVIDIA A100-SXM4-80GB": 311.9e12,
    "NVIDIA A100-SXM4-40GB": 311.9e12,
    "NVIDIA A100 80GB PCIe": 311.9e12,
    "NVIDIA A100-PCIE-40GB": 311.9e12,
    "NVIDIA A800-SXM4-80GB": 311.9e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362.05e12,
    "NVIDIA L40": 181.05e12,
    "NVIDIA L4": 121e12,
}
"""`torch.cuda.get_device_name()` -> dense bf16 FLOP/s of its tensor cores."""


def matrix_parameters(config: LanguageModel) -> int:
    """Numbers in the matrices that every token is multiplied by: all layers, without embedding,
    norms and output projection."""
    head = config.head_width or config.width // config.heads
    inner, kv_inner = config.heads * head, config.kv_heads * head
    attention = config.width * (2 * inner + 2 * kv_inner)
    return config.layers * (attention + 3 * config.width * config.feed_forward)


def forward_flops(
    config: LanguageModel,
    vocabulary_size: int,
    tokens: float,
    context: float,
    targets: float | None = None,
) -> float:
    """One forward pass over `tokens` in sequences of `context` tokens each.

    A multiplication and an addition a number of each matrix and token; a query meets half of its
    sequence, for attention is causal. `targets` are the positions whose logits are computed; None
    for all.
    """
    head = config.head_width or config.width // config.heads
    met = (context + 1) / 2
    attention = 4 * config.layers * config.heads * head * met
    logits = 2 * config.width * vocabulary_size * (tokens if targets is None else targets)
    return tokens * (2 * matrix_parameters(config) + attention) + logits


def training_flops(
    config: LanguageModel,
    vocabulary_size: int,
    tokens: float,
    context: float,
    targets: float | None = None,
) -> float:
    """Forward and backward over `tokens`, as in `forward_flops`: the gradients of inputs and of
    weights cost a forward pass each, about 6 FLOPs a parameter and token."""
    return 3 * forward_flops(config, vocabulary_size, tokens, context, targets)
