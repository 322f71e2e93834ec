"""Text and image prompts guided apart, with a real IP-Adapter and ControlNet."""

from typing import Any

import pytest
import torch
from torch import Tensor

import adapters  # noqa: F401  registers them
from ldm import registry
from ldm.control import Adapter, Control
from ldm.denoiser import AdapterUse, Denoiser
from ldm.generate import Models, Request, images
from ldm.guidance import GuidanceConfig
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.samplers import DDIM, ImageNoise
from ldm.schedule import Schedule
from tests.small import waken

SIZE, STEPS = (16, 16), 4
TOWER = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 1, "heads": 2}


@pytest.fixture
def models() -> Models:
    unet = waken(UNet(UNetConfig(channels=(8, 16), blocks=1, depth=(1, 1), context_dim=16, num_heads=2, groups=4)))
    net: Adapter[Any] = registry.build("adapter", {"name": "controlnet", "hint_widths": [4, 8]}, unet=unet)
    prompt: Adapter[Any] = registry.build("adapter", {"name": "ip_adapter", "encoder": TOWER}, unet=unet)
    denoiser = Denoiser(unet, {"net": waken(net), "ip": prompt}).eval().requires_grad_(False)
    vae = VAE(VAEConfig(channels=(8, 8), blocks=1, groups=4, scale_factor=1.0))
    text = TextEncoder(TextConfig(width=16, layers=1, heads=2, merges=100, context_length=16))
    return Models(denoiser, vae.eval(), text.eval(), Schedule(), "eps")


@pytest.fixture
def hints() -> dict[str, Tensor]:
    return {"net": torch.rand(2, 3, *SIZE), "ip": torch.rand(2, 1, 3, 16, 16)}


def draw(models: Models, hints: dict[str, Tensor], guidance: GuidanceConfig, **options: Any) -> Tensor:
    request = Request(["a", "b"], [1, 2], SIZE, negative="bad", guidance=guidance, hints=hints, **options)
    return images(models, request, DDIM(models.schedule, steps=STEPS))


def calls(models: Models) -> list[int]:
    """Filled with the batch size of every UNet call from now on."""
    sizes: list[int] = []
    models.denoiser.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    return sizes


@torch.no_grad()
def test_three_branches_are_three_passes_and_the_papers_formula(models: Models, hints: dict[str, Tensor]) -> None:
    got = draw(models, hints, GuidanceConfig(scale=3.0, image=1.5))
    unet, text, sampler = models.denoiser.unet, models.text, DDIM(models.schedule, steps=STEPS)
    net, prompt = models.denoiser.adapter("net"), models.denoiser.adapter("ip")
    features = prompt.encode(hints["ip"])
    nothing = prompt.null(features)
    assert isinstance(text, TextEncoder) and nothing is not None
    image, silence = prompt.prepare(features), prompt.prepare(nothing)
    words, negatives = (Control(context=text(text.ids(texts))) for texts in (["a", "b"], ["bad", "bad"]))
    x = ImageNoise([1, 2], (4, 8, 8))()
    for i, t in enumerate(sampler.timesteps):
        times, eps = torch.full((2,), int(t)), []
        for base, heard in ((negatives, silence), (negatives, image), (words, image)):
            lines = net.control(x, times, base, net.prepare(hints["net"]))
            eps.append(unet(x, times, base + lines + heard))
        mixed = eps[0] + 1.5 * (eps[1] - eps[0]) + 3.0 * (eps[2] - eps[1])
        a, b = sampler.levels[i], sampler.levels[i + 1]
        x = b**0.5 * (x - (1 - a) ** 0.5 * mixed) / a**0.5 + (1 - b) ** 0.5 * mixed
    want = models.vae.from_latent(x).add(1).div(2).clamp(0, 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guess", [False, True], ids=["shared", "guess"])
def test_equal_scales_draw_what_ordinary_guidance_draws(models: Models, hints: dict[str, Tensor], guess: bool) -> None:
    left = torch.zeros(2, 1, *SIZE)
    left[..., :8] = 1
    options = {
        "uses": {"net": AdapterUse(guess=guess, end=0.75), "ip": AdapterUse(scale=0.8, start=0.25)},
        "masks": {"ip": left},
    }
    ordinary = draw(models, hints, GuidanceConfig(scale=3.0, rescale=0.5), **options)
    equal = draw(models, hints, GuidanceConfig(scale=3.0, rescale=0.5, image=3.0), **options)
    torch.testing.assert_close(equal, ordinary, atol=1e-4, rtol=0)
    other = draw(models, hints, GuidanceConfig(scale=3.0, rescale=0.5, image=0.5), **options)
    assert (other - ordinary).abs().max() > 1e-3


def test_a_third_branch_runs_only_while_an_image_prompt_is_active(models: Models, hints: dict[str, Tensor]) -> None:
    sizes = calls(models)
    draw(models, hints, GuidanceConfig(scale=3.0, image=2.0, end=0.75), uses={"ip": AdapterUse(start=0.25)})
    assert sizes == [4, 6, 6, 2]


def test_an_image_prompt_of_scale_zero_is_absent_bit_for_bit(models: Models, hints: dict[str, Tensor]) -> None:
    off = draw(models, hints, GuidanceConfig(scale=3.0, image=2.0), uses={"ip": AdapterUse(scale=0.0)})
    assert torch.equal(off, draw(models, {"net": hints["net"]}, GuidanceConfig(scale=3.0)))
