"""Keys and values of a context that stays the same: made once per picture, with the same result."""

import dataclasses

import pytest
import torch

from adapters.controlnet import ControlNet, ControlNetOptions
from ldm import generate
from ldm.control import Control
from ldm.denoiser import Denoiser
from ldm.models.attention import TransformerBlock
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.vae import VAE, VAEConfig
from ldm.samplers import DDIM
from ldm.schedule import Schedule
from tests.small import SHALLOW, latents, trained_unet, waken

TEXT = TextConfig(width=12, layers=1, heads=2, merges=10, context_length=8)


def controlled() -> Denoiser:
    unet = trained_unet()
    net = waken(ControlNet(ControlNetOptions(hint_widths=(4, 8)), unet=unet))
    return Denoiser(unet, {"net": net}).requires_grad_(False).eval()


def test_projected_control_gives_the_same_prediction_without_reading_the_context() -> None:
    unet = trained_unet()
    x_t, t, base = latents()
    whole = unet.project(base)
    assert len(whole.kv) == len(unet.spec.cross_attn) and base.kv == ()
    expected = unet(x_t, t, base)
    torch.testing.assert_close(unet(x_t, t, whole), expected, atol=1e-6, rtol=0)
    assert base.context is not None
    silent = dataclasses.replace(whole, context=torch.zeros_like(base.context))
    assert torch.equal(unet(x_t, t, silent), unet(x_t, t, whole))


def test_keys_of_two_contexts_and_of_two_branches_are_those_of_the_joined_ones() -> None:
    unet = trained_unet()
    x_t, t, a = latents()
    b = latents()[2]
    for joined in (lambda f: f(a) + f(b), lambda f: Control.batch(f(a), f(b))):
        plain, keyed = joined(lambda c: c), joined(unet.project)
        assert plain.context is not None and keyed.kv and torch.equal(plain.context, keyed.context)
        n = len(plain.context) // len(x_t)
        x, times = torch.cat([x_t] * n), torch.cat([t] * n)
        torch.testing.assert_close(unet(x, times, keyed), unet(x, times, plain), atol=1e-6, rtol=0)


def test_keys_of_another_network_are_refused() -> None:
    unet = trained_unet()
    x_t, t, base = latents()
    with pytest.raises(ValueError, match=r"Control\.kv has 1 layers; this UNet has 4"):
        unet(x_t, t, dataclasses.replace(base, kv=unet.project(base).kv[:1]))


def test_settled_controlnet_says_the_same() -> None:
    denoiser = controlled()
    x_t, t, base = latents()
    prepared = denoiser.prepare({"net": torch.rand(2, 3, *(2 * s for s in x_t.shape[-2:]))})
    settled = denoiser.settle(prepared, denoiser.unet.project(base))
    assert settled["net"].kv
    expected, got = (denoiser.control(x_t, t, base, ready) for ready in (prepared, settled))
    assert expected.mid is not None and got.mid is not None
    torch.testing.assert_close(got.mid, expected.mid, atol=1e-6, rtol=0)
    for x, y in zip(got.skips, expected.skips, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [2, 5])
def test_sampling_makes_keys_and_values_once_however_many_steps(steps: int) -> None:
    denoiser = controlled()
    calls = {True: 0, False: 0}
    for module in denoiser.modules():
        if isinstance(module, TransformerBlock):
            module.attn2.to_k.register_forward_hook(lambda *_: calls.update({True: calls[True] + 1}))
            module.attn1.to_k.register_forward_hook(lambda *_: calls.update({False: calls[False] + 1}))
    config = VAEConfig(channels=(4, 4), blocks=1, groups=2)
    schedule, text = Schedule(), TextEncoder(TEXT).requires_grad_(False).eval()
    models = generate.Models(denoiser, VAE(config).requires_grad_(False).eval(), text, schedule, "eps")
    request = generate.Request(["a"], [0], (8, 8), hints={"net": torch.rand(1, 3, 8, 8)})
    assert SHALLOW.context_dim == TEXT.width
    generate.images(models, request, DDIM(schedule, steps=steps))
    own, copied = 4, 2  # cross-attention layers of the UNet and of ControlNet's copy
    assert calls[True] == 2 * own + 2 * copied  # two branches each
    assert calls[False] == steps * (own + copied)
