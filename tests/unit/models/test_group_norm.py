"""GroupNorm that stays exact on large float32 maps."""

import torch
import torch.nn.functional as F

from ldm.models.blocks import GroupNorm


def norm(channels: int = 8, groups: int = 2) -> GroupNorm:
    torch.manual_seed(0)
    layer = GroupNorm(groups, channels, eps=1e-6)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer


def test_large_channels_last_maps_are_exact() -> None:
    layer = norm()
    x = (torch.randn(2, 8, 384, 512) + 3).to(memory_format=torch.channels_last)
    exact = F.group_norm(x.double(), 2, layer.weight.double(), layer.bias.double(), 1e-6)
    with torch.no_grad():
        got = layer(x)
    assert (got - exact).abs().max() < 3e-6
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_maps_far_from_zero_lose_nothing_to_cancellation() -> None:
    layer = norm()
    x = (torch.randn(1, 8, 96, 64) + 1000).to(memory_format=torch.channels_last)
    exact = F.group_norm(x.double(), 2, layer.weight.double(), layer.bias.double(), 1e-6)
    with torch.no_grad():
        assert (layer(x) - exact).abs().max() < 1e-3


def test_gradients_are_those_of_torch() -> None:
    layer = norm()
    x = torch.randn(1, 8, 96, 64).to(memory_format=torch.channels_last).requires_grad_()
    ours = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    plain = torch.autograd.grad(F.group_norm(x, 2, layer.weight, layer.bias, 1e-6).square().sum(), [x, layer.weight])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.detach()), layer(x), atol=1e-5, rtol=1e-5)
