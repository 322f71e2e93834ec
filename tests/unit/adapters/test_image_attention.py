"""Image prompts inside the UNet's attention: masks, blocks, the order of tokens, and what one softmax would give."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.ip_adapter import IPAdapter, IPAdapterOptions
from ldm.control import Control, ExtraKV
from ldm.convert.ip_adapter import numbers
from ldm.denoiser import AdapterUse, Denoiser, weigh_blocks
from ldm.models.attention import Attention, SpatialTransformer
from ldm.models.unet import UNet, UNetSpec
from tests.small import SD1, SDXL, latents, trained_unet

VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 1, "heads": 2}
INSTANT_STYLE = {"down": 0.0, "mid": 0.0, "up": 0.0, "up.0.1": 1.0}  # arXiv:2404.02733: style alone


def make(unet: UNet, **options: Any) -> IPAdapter:
    return IPAdapter(IPAdapterOptions(VIT, **options), unet=unet).requires_grad_(False)


@contextmanager
def first_attention(unet: UNet) -> Iterator[list[Tensor]]:
    """Filled with what the first transformer of each UNet call gives, b c h w: nothing before it hears an image."""
    seen: list[Tensor] = []
    first = next(m for m in unet.modules() if isinstance(m, SpatialTransformer))
    handle = first.register_forward_hook(lambda *a: seen.append(a[2]))
    yield seen
    handle.remove()


def test_a_mask_per_reference_is_two_adapters_of_the_same_weights() -> None:
    unet = trained_unet(SD1)
    adapter = make(unet)
    net = Denoiser(unet, {"one": adapter, "two": adapter})
    x_t, t, base = latents(SD1, multiple=1)
    ready = net.prepare({name: torch.randn(2, 1, 1, 16) for name in ("one", "two")})
    ones = torch.ones(2, 1, 16, 32)
    left = torch.cat([ones[..., :16], 0 * ones[..., 16:]], dim=-1)

    def drawn(masks: dict[str, Tensor], prepared: Any, scale: float = 1.0) -> Tensor:
        uses = dict.fromkeys(masks, AdapterUse(scale=scale))
        said = net.control(x_t, t, base, {name: prepared[name] for name in masks}, uses, masks)
        return unet(x_t, t, base + said)

    same = {"one": ready["one"], "two": ready["one"]}
    doubled = drawn({"one": ones}, same, scale=2.0)
    torch.testing.assert_close(drawn({"one": ones, "two": ones}, same), doubled, atol=1e-5, rtol=0)
    assert (doubled - drawn({"one": ones}, same)).abs().max() > 1e-3
    with first_attention(unet) as seen:
        for masks in ({"one": left, "two": 1 - left}, {"one": ones}, {"two": ones}):
            drawn(masks, ready)
    halves, one, two = seen
    half = one.shape[-1] // 2
    torch.testing.assert_close(halves[..., :half], one[..., :half], atol=1e-6, rtol=0)
    torch.testing.assert_close(halves[..., half:], two[..., half:], atol=1e-6, rtol=0)
    assert (one - two).abs().max() > 1e-3  # the references differ


def test_an_attention_mask_is_averaged_over_the_area_of_each_query() -> None:
    unet = trained_unet(SD1)
    x_t, t, base = latents(SD1, multiple=1)
    said = make(unet).prepare(torch.randn(2, 1, 1, 16))
    fine = torch.zeros(2, 1, 4 * x_t.shape[-2], 4 * x_t.shape[-1])
    fine[..., ::2] = 1  # half of each query's area
    with first_attention(unet) as seen:
        for control in (said.masked(fine), said.scaled(0.5)):
            unet(x_t, t, base + control)
    torch.testing.assert_close(seen[0], seen[1], atol=1e-6, rtol=0)


@torch.no_grad()
def test_order_of_tokens_within_a_reference_does_not_matter() -> None:
    unet = trained_unet()
    adapter = make(unet, variant="plus", width=64, tokens=6)
    x_t, t, base = latents()
    features = torch.randn(2, 1, 5, 16)
    said = adapter.prepare(features)
    expected = unet(x_t, t, base + said)
    moved = adapter.prepare(features[:, :, torch.randperm(5)])  # of the encoder, which the resampler reads
    torch.testing.assert_close(unet(x_t, t, base + moved), expected, atol=1e-6, rtol=0)
    order, [own] = torch.randperm(6), said.attn
    k, v = (tuple(x[:, order] for x in side) for side in (own.k, own.v))  # of the adapter, which the UNet reads
    assert not torch.equal(k[0], own.k[0])
    torch.testing.assert_close(unet(x_t, t, base + Control(attn=(ExtraKV(k=k, v=v),))), expected, atol=1e-6, rtol=0)
    half = Control(attn=(ExtraKV(k=k, v=own.v),))  # keys alone: now it matters
    assert (unet(x_t, t, base + half) - expected).abs().max() > 1e-5


@torch.no_grad()
def test_one_softmax_over_text_and_image_mixes_the_two_by_their_shares() -> None:
    heads, text, image, x = 4, torch.randn(2, 5, 12), torch.randn(2, 3, 12), torch.randn(2, 7, 16)
    attn = Attention(16, heads, 12)
    attn.to_out = nn.Linear(16, 16)
    nn.init.eye_(attn.to_out.weight)
    nn.init.zeros_(attn.to_out.bias)
    q = attn.to_q(x).unflatten(-1, (heads, 4)).transpose(1, 2)

    def total(tokens: Tensor) -> Tensor:  # log of the softmax's denominator, b heads n 1
        k = attn.to_k(tokens).unflatten(-1, (heads, 4)).transpose(1, 2)
        return (q @ k.transpose(-1, -2) / 4**0.5).logsumexp(dim=-1, keepdim=True)

    g = (total(image) - total(text)).sigmoid().transpose(1, 2).expand(-1, -1, -1, 4).flatten(2)  # b n dim
    expected = (1 - g) * attn(x, text) + g * attn(x, image)
    torch.testing.assert_close(attn(x, torch.cat([text, image], dim=1)), expected, atol=1e-6, rtol=0)
    assert g.std() > 1e-3


@functools.cache
def sdxl() -> UNetSpec:
    with torch.device("meta"):
        return UNet(SDXL).spec


@pytest.mark.parametrize(
    ("layout", "on"),
    [({}, [*range(69, 88, 2)]), ({"down.2.1": 1.0}, [*range(29, 48, 2), *range(69, 88, 2)])],
    ids=["style", "style and layout"],
)
def test_instantstyles_blocks_are_the_published_layers(layout: dict[str, float], on: list[int]) -> None:
    layers = sdxl().cross_attn
    one = tuple(torch.ones(1, 1, 1) for _ in layers)
    said = weigh_blocks(Control(attn=(ExtraKV(k=one, v=one),)), INSTANT_STYLE | layout, sdxl())
    heard = [n for n, v in zip(numbers(layers), said.attn[0].v, strict=True) if v.any()]
    assert sorted(heard) == on and len(heard) == 10 * (1 + len(layout))
