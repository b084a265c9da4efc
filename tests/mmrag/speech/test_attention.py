import pytest
import torch
import torch.nn.functional as F
from torchaudio.models.wav2vec2.components import SelfAttention

from mmrag.speech.attention import Attention, by_products


def frames(length=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, length, 12, generator=generator)


def beyond(length=7):
    """Of the second clip two frames are none."""
    inside = torch.arange(length) < torch.tensor([length, length - 2])[:, None]
    return inside[:, None, None, :].expand(-1, 1, length, -1)


@pytest.mark.parametrize("mask", [None, beyond()])
def test_products_are_the_fused_kernel_and_so_are_their_gradients(mask):
    ways = []
    for attend in (by_products, F.scaled_dot_product_attention):
        inputs = [frames().unflatten(-1, (3, 4)).transpose(1, 2) * n for n in (1, 2, 3)]
        for one in inputs:
            one.requires_grad_()
        made = attend(*inputs, mask)
        gradients = torch.autograd.grad(made.square().sum(), inputs)
        ways.append((made, *gradients))
    for ours, fused in zip(*ways, strict=True):
        torch.testing.assert_close(ours, fused, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("learning", [False, True])
def test_it_gives_what_the_module_gives_that_it_has_the_weights_of(learning):
    torch.manual_seed(0)
    published = SelfAttention(12, 3).eval()
    ours = Attention(published)
    assert ours.state_dict().keys() == published.state_dict().keys()
    with torch.set_grad_enabled(learning):
        given, _ = published(frames())
        made, nothing = ours(frames())
    torch.testing.assert_close(made, given, atol=1e-5, rtol=1e-5)
    assert nothing is None
