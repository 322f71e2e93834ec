from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.controlnet import ControlNet, ControlNetOptions
from ldm.control import Adapter, Control
from ldm.denoiser import AdapterUse, Denoiser
from ldm.generate import Models, Request, images
from ldm.guidance import GuidanceConfig
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.registry import ConfigError
from ldm.samplers import DDIM, DPMpp2M, EulerAncestral, ImageNoise, Sampler
from ldm.schedule import Schedule
from ldm.source import Source, begin, first_step, for_inpainting
from tests.small import trained_unet, waken

SIZE, LATENT = (16, 16), (4, 8, 8)
STEPS = 10


class Listening(Adapter[Tensor]):
    """Adds nothing; remembers the times it is asked at, and what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def prepare(self, hint: Tensor) -> Tensor:
        return hint

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: Tensor) -> Control:
        self.seen.append((int(t[0]), tuple(x_t.shape)))
        return Control()


def build(in_channels: int = 4) -> Models:
    unet = trained_unet(
        UNetConfig(in_channels, channels=(8, 16), blocks=1, depth=(0, 1), context_dim=16, num_heads=2, groups=4)
    )
    vae = waken(VAE(VAEConfig(channels=(8, 8), blocks=1, groups=4, scale_factor=1.0)))
    text = TextEncoder(TextConfig(width=16, layers=1, heads=2, merges=100, context_length=16))
    return Models(Denoiser(unet, {"ear": Listening()}).eval(), vae.eval(), text.eval(), Schedule(), "eps")


@pytest.fixture(scope="module")
def models() -> Models:
    return build()


@pytest.fixture(scope="module")
def inpainting() -> Models:
    return build(9)


def source(b: int = 1, strength: float = 1.0, *, masked: bool = False) -> Source:
    mask = torch.zeros(b, 1, *SIZE)
    mask[..., :8] = 1
    return Source(torch.rand(b, 3, *SIZE) * 2 - 1, strength, mask if masked else None)


def draw(
    models: Models, seeds: list[int], sampler: Sampler | None = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The pictures and the latent after each step."""
    path: list[Tensor] = []
    request = Request(["a"] * len(seeds), seeds, SIZE, **options)
    sampler = sampler or DDIM(models.schedule, steps=STEPS)
    return images(models, request, sampler, on_step=lambda _, x: path.append(x)), path


def encoded(models: Models, image: Tensor, draw: ImageNoise) -> Tensor:
    with torch.no_grad():
        return models.vae.to_latent(image, draw())


@pytest.mark.parametrize(
    ("steps", "strength", "start"), [(50, 0.75, 13), (50, 0.8, 10), (50, 0.3, 35), (20, 1.0, 0), (20, 0.05, 19)]
)
def test_strength_counts_steps_as_published_pipelines_do(steps: int, strength: float, start: int) -> None:
    assert first_step(steps, strength) == start


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(ConfigError, match=r"strength is .*allowed: above 0, up to 1"):
        first_step(20, strength)


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0.04 leaves none of 20 steps; allowed: 0.05..1"):
        first_step(20, 0.04)


def test_a_start_is_the_source_noised_to_the_level_of_its_first_step(models: Models) -> None:
    levels, given = DDIM(models.schedule, steps=STEPS).levels, source(2, 0.3)
    with torch.no_grad():
        start = begin(given, models.vae, levels, ImageNoise([1, 2], LATENT), inpainting=False)
    noise = ImageNoise([1, 2], LATENT)
    x0, eps = encoded(models, given.image, noise), noise()
    t = DDIM(models.schedule, steps=STEPS).timesteps[7]
    assert start.index == 7
    torch.testing.assert_close(start.x, models.schedule.add_noise(x0, eps, torch.tensor([int(t)] * 2)))


def test_without_a_mask_strength_one_still_holds_the_image_and_with_one_it_does_not(models: Models) -> None:
    levels = DDIM(models.schedule, steps=STEPS).levels
    noise = ImageNoise([1], LATENT)
    noise()  # goes into the posterior
    pure = noise()
    for masked in (False, True):
        with torch.no_grad():
            start = begin(source(masked=masked), models.vae, levels, ImageNoise([1], LATENT), inpainting=False)
        assert start.index == 0 and torch.equal(start.x, pure) == masked


def test_a_small_strength_stays_near_the_image_and_a_large_one_leaves_it(models: Models) -> None:
    def distance(strength: float) -> float:
        given = source(1, strength)
        start = encoded(models, given.image, ImageNoise([1], LATENT))
        return (
            (draw(models, [1], source=given, guidance=GuidanceConfig(scale=1.0))[1][-1] - start).square().mean().item()
        )

    assert distance(0.1) < 0.1 < distance(0.9)


def test_adapters_and_guidance_count_over_the_whole_schedule(models: Models) -> None:
    ear = models.denoiser.adapter("ear")
    assert isinstance(ear, Listening)
    ear.seen.clear()
    uses = {"ear": AdapterUse(start=0.4, end=0.8)}
    guidance = GuidanceConfig(scale=3.0, start=0.0, end=0.7)
    draw(models, [1], source=source(1, 0.5), hints={"ear": torch.rand(1, 3, *SIZE)}, uses=uses, guidance=guidance)
    times = DDIM(models.schedule, steps=STEPS).timesteps
    assert [(times.index(t), shape[0]) for t, shape in ear.seen] == [(5, 2), (6, 2), (7, 1)]


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", [DDIM, DPMpp2M, EulerAncestral])
def test_the_known_region_ends_as_the_source_and_keeps_its_level_on_the_way(
    models: Models, sampler: type[DDIM | DPMpp2M | EulerAncestral], strength: float
) -> None:
    given, method = source(2, strength, masked=True), sampler(models.schedule, steps=STEPS)
    _, path = draw(models, [1, 2], method, source=given)
    noise = ImageNoise([1, 2], LATENT)
    x0, eps = encoded(models, given.image, noise), noise()
    torch.testing.assert_close(path[-1][..., 4:], x0[..., 4:], atol=0, rtol=0)
    assert (path[-1][..., :4] - x0[..., :4]).abs().mean() > 0.05
    a = method.levels[-2]
    torch.testing.assert_close(path[-2][..., 4:], (a**0.5 * x0 + (1 - a) ** 0.5 * eps)[..., 4:])


def test_a_white_mask_is_plain_image_to_image_and_a_black_one_returns_the_source(models: Models) -> None:
    given = source(1, 0.5)
    white = Source(given.image, 0.5, torch.ones(1, 1, *SIZE))
    assert torch.equal(draw(models, [1], source=white)[0], draw(models, [1], source=given)[0])
    black = Source(given.image, 0.5, torch.zeros(1, 1, *SIZE))
    assert torch.equal(draw(models, [1], source=black)[1][-1], encoded(models, given.image, ImageNoise([1], LATENT)))


def test_an_on_step_sees_the_blend_and_may_replace_it(models: Models) -> None:
    request = Request(["a"], [1], SIZE, source=source(masked=True))
    zero = images(models, request, DDIM(models.schedule, steps=2), on_step=lambda _, x: torch.zeros_like(x))
    assert torch.equal(zero, models.vae.from_latent(torch.zeros(1, *LATENT)).detach().add(1).div(2).clamp(0, 1))


def test_an_inpainting_unet_is_given_latent_mask_and_masked_latent_in_both_halves(inpainting: Models) -> None:
    given, seen = source(2, masked=True), []
    mask = given.mask
    assert mask is not None
    given = Source(given.image, 1.0, mask * 0.6)  # grey from one half on counts as white
    hook = inpainting.denoiser.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, path = draw(inpainting, [1, 2], source=given, guidance=GuidanceConfig(scale=2.0))
    hook.remove()
    noise = ImageNoise([1, 2], LATENT)
    x_T = noise()
    hidden = encoded(inpainting, torch.where(mask < 0.5, given.image, 0.0), noise)
    for step, x in enumerate([x_T, *path[:-1]]):
        small = torch.cat([torch.ones(2, 1, 8, 4), torch.zeros(2, 1, 8, 4)], dim=3)
        want = torch.cat([x, small, hidden], dim=1)  # latent, mask, latent of the masked image
        torch.testing.assert_close(seen[step], torch.cat([want, want]))
    assert (
        path[-1][..., 4:] - encoded(inpainting, given.image, ImageNoise([1, 2], LATENT))[..., 4:]
    ).abs().mean() > 0.01


def test_adapters_hear_what_the_inpainting_unet_hears(inpainting: Models) -> None:
    ear = inpainting.denoiser.adapter("ear")
    assert isinstance(ear, Listening)
    ear.seen.clear()
    draw(inpainting, [1], source=source(masked=True), hints={"ear": torch.rand(1, 3, *SIZE)})
    assert {shape for _, shape in ear.seen} == {(2, 9, 8, 8)}
    net = ControlNet(ControlNetOptions(hint_widths=(4, 8)), unet=inpainting.denoiser.unet)
    with_net = Models(
        Denoiser(inpainting.denoiser.unet, {"net": net}).eval(), inpainting.vae, inpainting.text, Schedule(), "eps"
    )
    given, hint = source(masked=True), torch.rand(1, 3, *SIZE)
    fresh = draw(with_net, [1], source=given, hints={"net": hint})[0]
    assert torch.equal(fresh, draw(with_net, [1], source=given)[0])  # zero convolutions: it runs and adds nothing


@pytest.mark.parametrize("kind", ["image", "blend", "inpainting"])
def test_an_image_depends_on_its_own_source_only(models: Models, inpainting: Models, kind: str) -> None:
    used = inpainting if kind == "inpainting" else models
    given = source(3, 0.6, masked=kind != "image")
    sampler = DDIM(used.schedule, steps=STEPS, eta=1.0)
    together, _ = draw(used, [4, 5, 4], sampler, source=given)
    for row, seed in enumerate([4, 5, 4]):
        mask = None if given.mask is None else given.mask[row : row + 1]
        alone, _ = draw(used, [seed], sampler, source=Source(given.image[row : row + 1], 0.6, mask))
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-4, rtol=0)
    assert (together[0] - together[2]).abs().max() > 0.01


def test_half_precision_models_take_a_float32_source() -> None:
    half = build(9)
    for module in (half.denoiser, half.vae, half.text):
        assert module is not None
        module.to(torch.bfloat16)
    assert draw(half, [1], source=source(masked=True))[0].isfinite().all()


def test_what_does_not_fit_is_said(models: Models, inpainting: Models) -> None:
    for given in (None, source()):
        with pytest.raises(ConfigError, match=r"in_channels is 9: an inpainting UNet without a mask; .*sample.mask"):
            draw(inpainting, [1], source=given)
    with pytest.raises(ConfigError, match=r"in_channels is 8; sampling knows 4 .* and 9"):
        for_inpainting(build(8).denoiser.unet, models.vae, masked=True)
    with pytest.raises(ValueError, match=r"source image is \(2, 3, 16, 16\), must be \(1, 3, 16, 16\)"):
        draw(models, [1], source=source(2))
    with pytest.raises(ValueError, match=r"source mask is \(1, 1, 8, 8\)"):
        draw(models, [1], source=Source(source().image, 1.0, torch.ones(1, 1, 8, 8)))
    with pytest.raises(ConfigError, match="leaves none of 10 steps"):
        draw(models, [1], source=source(1, 0.01))
