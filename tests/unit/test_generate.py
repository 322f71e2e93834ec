from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.controlnet import ControlNet, ControlNetOptions
from ldm.control import Adapter, Control
from ldm.denoiser import GUESS_BASE, AdapterUse, Denoiser
from ldm.generate import Models, Request, images, multiple_of
from ldm.guidance import GuidanceConfig
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.registry import ConfigError
from ldm.samplers import DDIM, ImageNoise
from ldm.schedule import Schedule

SIZE = (16, 16)


class Counting(Adapter[Tensor]):
    """Adds the mean of its hint to the bottleneck; remembers its calls."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.prepared: list[int] = []  # batch sizes
        self.asked: list[tuple[int, int]] = []  # (timestep, batch size)

    def prepare(self, hint: Tensor) -> Tensor:
        self.prepared.append(len(hint))
        return hint.mean(dim=(1, 2, 3))

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: Tensor) -> Control:
        self.asked.append((int(t[0]), len(x_t)))
        return Control(mid=prepared[:, None, None, None].expand(-1, self.channels, 1, 1))


def tiny_unet() -> UNet:
    config = UNetConfig(channels=(8, 16), blocks=1, depth=(0, 1), context_dim=16, num_heads=2, groups=4)
    unet = UNet(config)
    for name, weight in unet.named_parameters():
        if weight.ndim > 1 and not weight.any():  # output convolution and residual branches: nothing would matter
            nn.init.normal_(weight, std=0.3 if name == "decoder.conv_out.weight" else 0.1)
    return unet


@pytest.fixture
def models() -> Models:
    unet = tiny_unet()
    net = ControlNet(ControlNetOptions(hint_widths=(4, 8), zero_conv="gaussian"), unet=unet)
    vae = VAE(VAEConfig(channels=(8, 8), blocks=1, groups=4, scale_factor=1.0))
    text = TextEncoder(TextConfig(width=16, layers=1, heads=2, merges=100, context_length=16))
    denoiser = Denoiser(unet, {"net": net, "count": Counting(16)}).eval().requires_grad_(False)
    return Models(denoiser, vae.eval(), text.eval(), Schedule(), "eps")


@pytest.fixture
def draw(models: Models) -> Callable[..., Tensor]:
    def call(prompts: list[str], seeds: list[int], *, steps: int = 4, eta: float = 0.0, **options: Any) -> Tensor:
        sampler = DDIM(models.schedule, steps=steps, eta=eta)
        on_step = options.pop("on_step", None)
        return images(models, Request(prompts, seeds, SIZE, **options), sampler, on_step=on_step)

    return call


def unet_calls(models: Models) -> list[tuple[int, Control]]:
    """Filled with (batch size, Control) of every UNet call from now on."""
    calls: list[tuple[int, Control]] = []
    models.denoiser.unet.register_forward_pre_hook(lambda _, args: calls.append((len(args[0]), args[2])))
    return calls


def hint(b: int = 1) -> Tensor:
    return torch.rand(b, 3, *SIZE)


def eight_bit(x: Tensor) -> Tensor:
    return x.mul(255).round()


def test_images_are_in_range_and_keep_no_graph(draw: Callable[..., Tensor]) -> None:
    x = draw(["a", "b", "a"], [0, 1, 2])
    assert x.shape == (3, 3, *SIZE) and x.dtype == torch.float32 and not x.requires_grad
    assert x.min() >= 0 and x.max() <= 1 and x.std() > 0.05


def test_an_image_depends_on_its_own_prompt_seed_and_hint_only(draw: Callable[..., Tensor]) -> None:
    prompts, seeds, hints = ["a", "b", "a", "c"], [5, 5, 6, 7], hint(4)
    together = draw(prompts, seeds, hints={"net": hints}, eta=1.0)
    for batch in (slice(0, 1), slice(1, 3), slice(2, 4)):
        apart = draw(prompts[batch], seeds[batch], hints={"net": hints[batch]}, eta=1.0)
        assert (eight_bit(apart) - eight_bit(together[batch])).abs().max() <= 1
    assert (together[0] - together[2]).abs().max() > 0.05  # the seed matters
    other = draw(["b"], [5], hints={"net": hints[:1]}, eta=1.0)
    assert (together[:1] - other).abs().max() > 0.001  # the prompt matters


def test_guidance_is_two_passes_and_the_samplers_formula(models: Models, draw: Callable[..., Tensor]) -> None:
    hints, text, unet = hint(), models.text, models.denoiser.unet
    assert text is not None
    got = draw(["a"], [3], hints={"net": hints}, guidance=GuidanceConfig(scale=3.0), negative="bad")
    sampler, net = DDIM(models.schedule, steps=4), models.denoiser.adapter("net")
    x, prepared = ImageNoise([3], (4, 8, 8))(), net.prepare(hints)
    for i, t in enumerate(sampler.timesteps):
        eps = {}
        for word in ("a", "bad"):  # reference: separate passes, each with its own text
            base, times = Control(context=text(text.ids([word]))), torch.tensor([int(t)])
            eps[word] = unet(x, times, base + net.control(x, times, base, prepared))
        mixed = eps["bad"] + 3.0 * (eps["a"] - eps["bad"])
        a, b = sampler.levels[i], sampler.levels[i + 1]
        x0 = (x - (1 - a) ** 0.5 * mixed) / a**0.5
        x = b**0.5 * x0 + (1 - b) ** 0.5 * mixed
    want = models.vae.from_latent(x).add(1).div(2).clamp(0, 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_guidance_of_one_is_one_conditional_pass_per_step(models: Models, draw: Callable[..., Tensor]) -> None:
    calls = unet_calls(models)
    off = GuidanceConfig(scale=1.0)
    x = draw(["a", "b"], [0, 1], guidance=off)
    assert [b for b, _ in calls] == [2] * 4
    assert torch.equal(x, draw(["a", "b"], [0, 1], guidance=off, negative="anything"))


def test_guidance_is_one_pass_on_both_halves_within_its_interval(models: Models, draw: Callable[..., Tensor]) -> None:
    calls = unet_calls(models)
    draw(["a", "b"], [0, 1], guidance=GuidanceConfig(scale=4.0, start=0.25, end=0.75))
    assert [b for b, _ in calls] == [2, 4, 4, 2]


def test_negative_may_differ_per_image(draw: Callable[..., Tensor]) -> None:
    both = draw(["a", "a"], [0, 0], negative=["x", "y"])
    assert (both[0] - both[1]).abs().max() > 1e-4
    torch.testing.assert_close(both[1:], draw(["a"], [0], negative="y"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use", [AdapterUse(scale=0.0), AdapterUse(start=0.01, end=0.02)], ids=["scale 0", "no step"])
def test_an_adapter_that_is_off_is_absent_bit_for_bit(
    models: Models, draw: Callable[..., Tensor], use: AdapterUse
) -> None:
    hints = {"net": hint(), "count": hint()}
    absent = draw(["a"], [0])
    assert torch.equal(draw(["a"], [0], hints=hints, uses={"net": use, "count": use}), absent)
    assert not torch.equal(draw(["a"], [0], hints=hints, uses={"count": use}), absent)
    assert models.denoiser.adapter("count").asked == []


@pytest.mark.parametrize(
    ("steps", "start", "end", "active"),
    [(10, 0.2, 0.8, range(2, 8)), (20, 0.1, 0.9, range(2, 18)), (5, 0, 1, range(5))],
)
def test_start_and_end_choose_the_steps(
    models: Models, draw: Callable[..., Tensor], steps: int, start: float, end: float, active: range
) -> None:
    draw(["a"], [0], steps=steps, hints={"count": hint()}, uses={"count": AdapterUse(start=start, end=end)})
    timesteps = DDIM(models.schedule, steps=steps).timesteps
    assert [timesteps.index(t) for t, _ in models.denoiser.adapter("count").asked] == list(active)


def test_hints_are_prepared_once_per_image(models: Models, draw: Callable[..., Tensor]) -> None:
    draw(["a", "b"], [0, 1], hints={"count": hint(2)})
    count = models.denoiser.adapter("count")
    assert count.prepared == [2]
    assert [b for _, b in count.asked] == [4] * 4  # asked with both halves, each with its own text


def test_guess_mode_touches_the_conditional_half_only(models: Models, draw: Callable[..., Tensor]) -> None:
    calls, hints = unet_calls(models), {"net": hint(2), "count": hint(2)}
    draw(
        ["a", "b"], [0, 1], steps=1, hints=hints, uses={"net": AdapterUse(guess=True), "count": AdapterUse(guess=True)}
    )
    _, guessed = calls[-1]
    draw(["a", "b"], [0, 1], steps=1, hints=hints)
    _, plain = calls[-1]
    n = len(plain.skips)
    assert n == len(models.denoiser.unet.spec.skips)
    for k, (a, b) in enumerate(zip(guessed.skips, plain.skips, strict=True)):
        assert not a[:2].any()
        torch.testing.assert_close(a[2:], GUESS_BASE ** (n - k) * b[2:])
    assert guessed.mid is not None and plain.mid is not None and not guessed.mid[:2].any()
    torch.testing.assert_close(guessed.mid[2:], plain.mid[2:])
    assert [b for _, b in models.denoiser.adapter("count").asked] == [2, 4]


def test_guess_mode_mixes_with_an_ordinary_adapter(models: Models, draw: Callable[..., Tensor]) -> None:
    calls, value = unet_calls(models), torch.full((1, 3, *SIZE), 0.5)
    draw(["a"], [0], steps=1, hints={"net": value, "count": value}, uses={"net": AdapterUse(guess=True)})
    mid = calls[-1][1].mid
    assert mid is not None
    torch.testing.assert_close(mid[0], torch.full_like(mid[0], 0.5))  # the ordinary one reaches both halves
    assert (mid[1] - 0.5).abs().max() > 1e-3


def test_texts_are_encoded_once(models: Models, draw: Callable[..., Tensor]) -> None:
    assert models.text is not None
    rows: list[int] = []
    models.text.token_embedding.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    draw(["a", "b", "a"], [0, 1, 2])
    assert rows == [2, 1]  # two different prompts, one negative


def test_half_precision_weights_and_autocast_both_work(models: Models, draw: Callable[..., Tensor]) -> None:
    full = draw(["a"], [0], hints={"net": torch.full((1, 3, *SIZE), 0.5)})
    with torch.autocast("cpu", torch.bfloat16):
        mixed = draw(["a"], [0], hints={"net": torch.full((1, 3, *SIZE), 0.5)})
    assert mixed.dtype == torch.float32 and (mixed - full).abs().mean() < 0.1
    for module in (models.denoiser, models.vae, models.text):
        assert module is not None
        module.to(torch.bfloat16)
    half = draw(["a"], [0], hints={"net": torch.full((1, 3, *SIZE), 0.5)})
    assert half.dtype == torch.float32 and (half - full).abs().mean() < 0.1


def test_training_goes_on_after_a_preview(models: Models, draw: Callable[..., Tensor]) -> None:
    draw(["a"], [0])
    models.denoiser.requires_grad_(True)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    models.denoiser(x, t, Control(context=torch.randn(1, 16, 16)), {"net": hint()}).square().mean().backward()
    assert models.denoiser.unet.decoder.conv_out.weight.grad is not None


def test_what_does_not_fit_is_said(models: Models, draw: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="1 prompts, 2 seeds"):
        draw(["a"], [0, 1])
    with pytest.raises(ValueError, match="hint 'net' has 2 images for 1 prompts"):
        draw(["a"], [0], hints={"net": hint(2)})
    with pytest.raises(ConfigError, match="no adapter; adapters: net, count"):
        draw(["a"], [0], hints={"nut": hint()})
    with pytest.raises(ValueError, match="resize the hint"):
        draw(["a"], [0], hints={"net": torch.rand(1, 3, 32, 32)})
    assert multiple_of(models) == 4
    with pytest.raises(ValueError, match="multiples of 4"):
        images(models, Request(["a"], [0], (18, 16)), DDIM(models.schedule, steps=2))


class Nulled(Counting):
    """Its unconditional branch hears a hint of zeros, as IP-Adapter's does."""

    def null(self, hint: Tensor) -> Tensor:
        return torch.zeros_like(hint)


def test_the_unconditional_branch_hears_the_null_hint(models: Models) -> None:
    adapter = Nulled(16)
    heard: list[Tensor] = []
    control = adapter.control
    denoiser = Denoiser(models.denoiser.unet, {"n": adapter})

    def listen(x_t: Tensor, t: Tensor, base: Control, prepared: Tensor) -> Control:
        heard.append(prepared)
        return control(x_t, t, base, prepared)

    adapter.control = listen
    hint = torch.rand(2, 3, *SIZE) + 0.1
    only = Models(denoiser, models.vae, models.text, models.schedule, models.objective)
    sampler = DDIM(models.schedule, steps=2)
    request = Request(["a", "b"], [0, 1], SIZE, guidance=GuidanceConfig(scale=3.0), hints={"n": hint})
    images(only, request, sampler)
    assert adapter.prepared == [2, 2]  # the hint and the null hint, once each, not once a step
    for prepared in heard:
        assert torch.equal(prepared[:2], torch.zeros(2))
        torch.testing.assert_close(prepared[2:], hint.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("hint", "seen"),
    [
        (torch.linspace(-1, 1, 3), r"\[-1, 1\]"),
        (torch.tensor([0, 128, 255]), r"\[0, 255\]"),
        (torch.tensor([0.0, float("nan"), 1.0]), r"\[nan, nan\]"),
    ],
    ids=["-1..1", "0..255", "nan"],
)
def test_hint_outside_the_adapters_range_is_refused(hint: Tensor, seen: str, draw: Callable[..., Tensor]) -> None:
    hints = {"net": hint.view(1, 3, 1, 1).expand(1, 3, 8, 8)}
    with pytest.raises(ValueError, match=rf"hint 'net' has values in {seen}, must be in \[0, 1\]; divide"):
        draw(["a cat"], [1], hints=hints)


def test_sliced_decoding_draws_the_same(models: Models, draw: Callable[..., Tensor]) -> None:
    batches: list[int] = []
    models.vae.decoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    whole, apart = (draw(["a", "b"], [0, 1], sliced=sliced) for sliced in (False, True))
    assert batches == [2, 1, 1]
    torch.testing.assert_close(apart, whole, atol=1e-5, rtol=0)


def test_an_interval_that_holds_no_step_is_named(draw: Callable[..., Tensor], caplog: pytest.LogCaptureFixture) -> None:
    draw(["a"], [0], steps=4, hints={"net": hint()}, uses={"net": AdapterUse(start=0.3, end=0.4)})
    assert "adapter net is never heard: start 0.3 to end 0.4 holds none of the 4 steps" in caplog.text
    caplog.clear()
    draw(["a"], [0], steps=4, hints={"net": hint()}, uses={"net": AdapterUse(start=0.3, end=0.8)})
    assert "never heard" not in caplog.text
