"""Prepacked layers compute what plain ones do, and leave what does not fit alone."""

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


def test_names_shapes_and_types_of_weights_stay(unet: UNet) -> None:
    before = {name: (p.shape, p.dtype) for name, p in unet.named_parameters()}
    fast.prepack(unet)
    call(unet, 8, 8)
    assert {name: (p.shape, p.dtype) for name, p in unet.named_parameters()} == before


def test_a_prepacked_layer_refuses_to_be_trained_through() -> None:
    layer = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    fast.prepack(layer)
    layer(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="has no gradient"):
        layer(torch.ones(1, 4, requires_grad=True))


def test_layers_that_others_read_or_that_do_not_fit_are_left_alone() -> None:
    attention, half, odd = nn.MultiheadAttention(8, 2), nn.Linear(4, 4).half(), nn.Conv2d(2, 2, 3, padding="same")
    module = nn.ModuleList([attention, half, odd, nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")])
    before = list(module.modules())
    fast.prepack(module.requires_grad_(False))
    assert all(a is b for a, b in zip(module.modules(), before, strict=True))


def test_nothing_is_packed_where_onednn_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Sequential(nn.Linear(4, 4))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    fast.prepack(layer)
    assert type(layer[0]) is nn.Linear
