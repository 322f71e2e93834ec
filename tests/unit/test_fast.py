"""Prepacked layers compute what plain ones do, and can be taken back."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ldm import fast
from ldm.control import Control
from ldm.models.unet import UNet, UNetConfig

pytestmark = pytest.mark.skipif(not fast.available(), reason="this torch lacks oneDNN's packed operations")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def unet(request: pytest.FixtureRequest) -> Iterator[UNet]:
    config = UNetConfig(channels=(16, 32), blocks=1, depth=(0, 1), context_dim=16, num_heads=2, groups=8)
    net = UNet(config).requires_grad_(False).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    yield net.to(request.param)


def call(unet: UNet, h: int, w: int, b: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(h)
    dtype = unet.encoder.conv_in.weight.dtype
    x, context = (torch.randn(b, *shape, generator=generator).to(dtype) for shape in ((4, h, w), (5, 16)))
    return unet(x, torch.full((b,), 7), Control(context=context))


def test_prepacked_layers_give_the_same_at_the_first_size_and_at_others(unet: UNet) -> None:
    sizes = [(8, 8, 2), (8, 8, 1), (4, 16, 3)]
    plain = [call(unet, *size) for size in sizes]
    fast.prepack(unet)
    atol = 1e-5 if plain[0].dtype == torch.float32 else 0.02
    for size, want in zip(sizes, plain, strict=True):
        torch.testing.assert_close(call(unet, *size), want, atol=atol, rtol=1e-5)
    assert any(p.is_mkldnn for p in unet.parameters())


def test_unpacking_brings_back_the_very_weights_and_calls(unet: UNet) -> None:
    weights = {name: p.clone() for name, p in unet.state_dict().items()}
    plain = call(unet, 8, 8)
    fast.prepack(unet)
    call(unet, 8, 8)
    fast.unpack(unet)
    assert all(torch.equal(p, weights[name]) for name, p in unet.state_dict().items())
    assert torch.equal(call(unet, 8, 8), plain)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_a_prepacked_layer_refuses_to_be_trained_through() -> None:
    layer = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    fast.prepack(layer)
    layer(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="unpack"):
        layer(torch.ones(1, 4, requires_grad=True))


def test_layers_that_others_read_or_that_do_not_fit_are_left_alone() -> None:
    attention, half, odd = nn.MultiheadAttention(8, 2), nn.Linear(4, 4).half(), nn.Conv2d(2, 2, 3, padding="same")
    module = nn.ModuleList([attention, half, odd, nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")])
    fast.prepack(module.requires_grad_(False))
    assert not any("forward" in vars(part) for part in module.modules())
