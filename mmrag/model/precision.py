"""Which number formats a device computes in as quickly as in float32, and not by emulating them."""

from __future__ import annotations

import torch


def has_bf16(device: torch.device | str) -> bool:
    """Whether matrix products in bfloat16 are the hardware's own."""
    capable = torch.cpu.get_capabilities()
    own = bool(capable.get("amx_bf16") or capable.get("avx512_bf16"))
    return torch.device(device).type == "cuda" or own


def computed_in(stored: torch.dtype, device: torch.device | str) -> torch.dtype:
    """What weights that are `stored` in some format are best computed in on `device`."""
    if torch.device(device).type == "cuda" or not stored.is_floating_point:
        return stored
    if stored == torch.float16 or (stored == torch.bfloat16 and not has_bf16(device)):
        return torch.float32
    return stored
