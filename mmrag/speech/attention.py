"""Self-attention of the encoder's transformer: torchaudio's weights, computed as is quickest where
they are learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.models.wav2vec2.components import SelfAttention


class Attention(nn.Module):
    """Multi-head self-attention with the weights of a torchaudio module, by the same names."""

    def __init__(self, published: SelfAttention) -> None:
        super().__init__()
        self.heads = published.num_heads
        self.q_proj, self.k_proj = published.q_proj, published.k_proj
        self.v_proj, self.out_proj = published.v_proj, published.out_proj

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: None = None,
        key_padding_mask: None = None,
    ) -> tuple[Tensor, None]:
        """Frames (B, F, D), of which `attention_mask` (B, 1, F, F) bool may be looked at, to the
        same; what else torchaudio's layers hand on is WavLM's, and None."""
        q, k, v = (
            one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        # The fused kernel's way back takes four times as long as these products on a processor.
        learning = torch.is_grad_enabled() and x.device.type == "cpu"
        attend = by_products if learning else F.scaled_dot_product_attention
        return self.out_proj(attend(q, k, v, attention_mask).transpose(1, 2).flatten(2)), None


def by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`scaled_dot_product_attention` of (B, H, F, D) each, `mask` (B, 1, F, F) bool, with all
    scores in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v
