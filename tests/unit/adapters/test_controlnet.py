import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.controlnet import ControlNet, ControlNetLite, ControlNetLiteOptions, ControlNetOptions
from ldm import registry
from ldm.config import TrainConfig
from ldm.control import Control
from ldm.convert import diffusers_controlnet
from ldm.denoiser import Denoiser
from ldm.models.unet import UNet, UNetConfig, num_parameters
from ldm.registry import ConfigError
from ldm.training import optim
from ldm.training.checkpoint import load_tensors
from tests.small import SD1, SD15, SDXL, SHALLOW, latents, trained_unet, waken

SMALL = ControlNetOptions(hint_widths=(4, 8))  # hints are twice the latent's size


def make(options: ControlNetOptions = SMALL, config: UNetConfig = SD1) -> tuple[UNet, ControlNet]:
    unet = trained_unet(config)
    return unet, ControlNet(options, unet=unet)


def inputs(config: UNetConfig = SD1) -> tuple[Tensor, Tensor, Control, Tensor]:
    """x_t, t, base, hint."""
    x_t, t, base = latents(config, multiple=1)
    h, w = x_t.shape[-2:]
    return x_t, t, base, torch.rand(2, 3, 2 * h, 2 * w)


def run(net: ControlNet, x_t: Tensor, t: Tensor, base: Control, hint: Tensor) -> Control:
    return net.control(x_t, t, base, net.prepare(hint))


def residuals(control: Control) -> list[Tensor]:
    assert control.mid is not None
    return [*control.skips, control.mid]


def with_gradient(module: nn.Module) -> Iterator[str]:
    return (name for name, p in module.named_parameters() if p.grad is not None and p.grad.any())


def groups(names: Iterator[str]) -> set[str]:
    """encoder | zero | hint.last | hint.first of parameter names."""
    place = {"encoder": "encoder", "zero_convs": "zero", "zero_mid": "zero"}
    return {place.get(name.split(".")[0]) or ("hint.last" if "convs.3" in name else "hint.first") for name in names}


def test_gradients_wake_up_from_the_zero_convolutions_inwards() -> None:
    unet, net = make(ControlNetOptions(hint_widths=(4, 8)))
    assert len(net.hint.convs) == 4
    denoiser = Denoiser(unet, {"a": net})
    parameters = optim.trainable(denoiser, ["adapters.*"])
    optimizer = optim.adamw(parameters, TrainConfig(lr=1e-3))
    x_t, t, base, hint = inputs()
    target = torch.randn_like(x_t)
    seen: list[list[str]] = []
    for _ in range(3):
        optimizer.zero_grad()
        (denoiser(x_t, t, base, {"a": hint}) - target).square().mean().backward()
        seen.append(list(with_gradient(net)))
        optimizer.step()
    every = {name for name, _ in net.named_parameters()}
    zero = {name for name in every if name.startswith("zero_")}
    assert len(zero) == 26 and set(seen[0]) == zero  # weights and biases of 13 convolutions
    assert groups(iter(seen[1])) == {"encoder", "zero", "hint.last"}
    assert {name for name in every if name.startswith("encoder")} <= set(seen[1])
    assert set(seen[2]) == every
    assert all(p.grad is None for p in unet.parameters())


def test_fresh_controlnet_leaves_unet_unchanged() -> None:
    unet, net = make()
    x_t, t, base, hint = inputs()
    control = run(net, x_t, t, base, hint)
    assert not any(r.any() for r in residuals(control))
    assert torch.equal(unet(x_t, t, base + control), unet(x_t, t, base))


def test_residuals_have_the_shapes_of_the_skips() -> None:
    unet, net = make()
    x_t, t, base, hint = inputs()
    h, w = x_t.shape[-2:]
    taps = (*unet.spec.skips, unet.spec.mid)
    shapes = [tuple(r.shape) for r in residuals(run(net, x_t, t, base, hint))]
    assert shapes == [(2, tap.channels, h // tap.stride, w // tap.stride) for tap in taps]


@pytest.mark.parametrize("k", range(13))
def test_zero_convolution_k_feeds_residual_k_alone(k: int) -> None:
    _, net = make()
    conv = (*net.zero_convs, net.zero_mid)[k]
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    nn.init.constant_(conv.bias, 0.5)
    found = residuals(run(net, *inputs()))
    assert [r.unique().tolist() for r in found] == [[0.5] if i == k else [0.0] for i in range(13)]


def test_hint_is_added_once_after_the_first_convolution() -> None:
    _, net = make()
    first = net.zero_convs[0]
    assert isinstance(first, nn.Conv2d)
    nn.init.dirac_(first.weight)  # residual 0 is skip 0 itself
    waken(net.hint)
    x_t, t, base, hint = inputs()
    features = net.prepare(hint).features
    assert features.std() > 1e-3
    skip = run(net, x_t, t, base, hint).skips[0]
    torch.testing.assert_close(skip - net.encoder.conv_in(x_t), features, atol=1e-6, rtol=0)
    enc = net.encoder.encode(net.encoder.conv_in(x_t) + features, t, base)
    waken(net.zero_convs)
    for conv, got, expected in zip(net.zero_convs, run(net, x_t, t, base, hint).skips, enc.skips, strict=True):
        torch.testing.assert_close(got, conv(expected), atol=1e-6, rtol=0)


def test_controlnet_reads_the_noise_the_time_and_the_text() -> None:
    _, net = make()
    waken(net)
    x_t, t, base, hint = inputs()
    plain = residuals(run(net, x_t, t, base, hint))
    assert base.context is not None
    for other in (
        (x_t + 1, t, base, hint),
        (x_t, 999 - t, base, hint),
        (x_t, t, Control(context=base.context + 1), hint),
        (x_t, t, base, 1 - hint),
    ):
        assert not torch.equal(residuals(run(net, *other))[-1], plain[-1])


def test_two_equal_controlnets_at_half_strength_equal_one() -> None:
    unet, net = make()
    waken(net)
    x_t, t, base, hint = inputs()
    both = Denoiser(unet, {"a": net, "b": net})
    half = both.control(x_t, t, base, both.prepare({"a": hint, "b": hint})).scaled(0.5)
    one = run(net, x_t, t, base, hint)
    assert all(torch.equal(a, b) for a, b in zip(residuals(half), residuals(one), strict=True))
    assert torch.equal(unet(x_t, t, base + half), unet(x_t, t, base + one))


def test_a_control_can_be_used_twice() -> None:
    unet, net = make()
    waken(net)
    x_t, t, base, hint = inputs()
    control = base + run(net, x_t, t, base, hint)
    first, n = unet(x_t, t, control), len(control.skips)
    assert torch.equal(unet(x_t, t, control), first) and len(control.skips) == n


def test_strength_zero_is_no_control_and_strength_is_linear() -> None:
    unet, net = make()
    waken(net)
    x_t, t, base, hint = inputs()
    control = run(net, x_t, t, base, hint)
    assert torch.equal(unet(x_t, t, base + control.scaled(0.0)), unet(x_t, t, base))
    for once, twice in zip(residuals(control), residuals(control.scaled(2.0)), strict=True):
        assert torch.equal(2 * once, twice)


def test_middle_only_says_the_middle_of_the_full_net() -> None:
    unet, net = make()
    waken(net)
    middle = ControlNet(dataclasses.replace(SMALL, middle_only=True), unet=unet)
    assert len(middle.zero_convs) == 0
    x_t, t, base, hint = inputs()
    assert torch.equal(unet(x_t, t, base + run(middle, x_t, t, base, hint)), unet(x_t, t, base))
    shared = {k: v for k, v in net.state_dict().items() if not k.startswith("zero_convs")}
    load_tensors(middle, shared, "the full net")
    full, only = run(net, x_t, t, base, hint), run(middle, x_t, t, base, hint)
    assert only.skips == () and full.mid is not None and only.mid is not None
    assert torch.equal(full.mid, only.mid)
    assert not torch.equal(unet(x_t, t, base + full), unet(x_t, t, base + only))


def test_copy_starts_from_the_unets_weights_and_lives_on_its_own() -> None:
    unet, net = make()
    theirs = unet.encoder.state_dict()
    assert theirs.keys() == net.encoder.state_dict().keys()
    assert all(torch.equal(v, theirs[k]) for k, v in net.encoder.state_dict().items())
    nn.init.zeros_(net.encoder.conv_in.weight)
    assert unet.encoder.conv_in.weight.any()


def test_random_trunk_has_the_shapes_but_not_the_weights() -> None:
    unet, net = make(dataclasses.replace(SMALL, init="random"))
    theirs = unet.encoder.state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in net.encoder.state_dict().items()}
    assert not torch.equal(net.encoder.conv_in.weight, unet.encoder.conv_in.weight)


def test_gaussian_start_disturbs_the_unet() -> None:
    unet, net = make(dataclasses.replace(SMALL, zero_conv="gaussian"))
    x_t, t, base, hint = inputs()
    control = run(net, x_t, t, base, hint)
    assert all(r.any() for r in residuals(control))
    assert not torch.equal(unet(x_t, t, base + control), unet(x_t, t, base))
    conv = net.zero_mid
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    assert conv.weight.std().item() == pytest.approx(conv.in_channels**-0.5, rel=0.15) and not conv.bias.any()


def test_training_the_decoder_too_is_a_matter_of_patterns() -> None:
    unet, net = make()
    denoiser = Denoiser(unet, {"a": net})
    optim.trainable(denoiser, ["adapters.*", "unet.decoder.*"])
    x_t, t, base, hint = inputs()
    denoiser(x_t, t, base, {"a": hint}).square().mean().backward()
    assert all(p.grad is None for p in unet.encoder.parameters())
    assert all(p.grad is not None for p in unet.decoder.parameters())


def test_lite_reads_neither_noise_nor_time_nor_text() -> None:
    unet = trained_unet(SD1)
    net = waken(ControlNetLite(ControlNetLiteOptions(hint_widths=(4, 8)), unet=unet))
    x_t, t, base, hint = inputs()
    ready = net.prepare(hint)
    assert net.control(x_t, t, base, ready) is ready is net.control(-x_t, 999 - t, Control(), ready)
    assert [tuple(r.shape[1:]) for r in residuals(ready)] == [
        (tap.channels, x_t.shape[-2] // tap.stride, x_t.shape[-1] // tap.stride)
        for tap in (*unet.spec.skips, unet.spec.mid)
    ]
    assert num_parameters(net.convs) < num_parameters(unet.encoder) / 2


def test_vector_conditioning_reaches_the_copy() -> None:
    config = dataclasses.replace(SHALLOW, vector_dim=6)
    _, net = make(config=config)
    waken(net)
    x_t, t, base, hint = inputs(config)
    assert base.vector is not None
    other = dataclasses.replace(base, vector=base.vector + 1)
    assert not torch.equal(residuals(run(net, x_t, t, base, hint))[-1], residuals(run(net, x_t, t, other, hint))[-1])


def test_wider_input_than_the_trunks_is_cut_to_the_latent() -> None:
    _, net = make()
    waken(net)
    x_t, t, base, hint = inputs()
    wide = torch.cat([x_t, torch.randn_like(x_t), torch.randn_like(x_t[:, :1])], dim=1)  # nine channels: inpainting
    for got, expected in zip(
        residuals(run(net, wide, t, base, hint)), residuals(run(net, x_t, t, base, hint)), strict=True
    ):
        assert torch.equal(got, expected)


def test_published_trunk_of_four_channels_fits_an_inpainting_unet() -> None:
    nine = dataclasses.replace(SD1, in_channels=9)
    unet, net = make(dataclasses.replace(SMALL, in_channels=4), nine)
    assert torch.equal(net.encoder.conv_in.weight, unet.encoder.conv_in.weight[:, :4])
    assert torch.equal(net.encoder.mid.res1.conv1.weight, unet.encoder.mid.res1.conv1.weight)
    published = waken(make(config=SD1)[1])
    load_tensors(net, published.state_dict(), "published")
    x_t, t, base, hint = inputs(nine)
    control = run(net, x_t, t, base, hint)
    expected = run(published, x_t[:, :4], t, base, hint)
    assert all(torch.equal(a, b) for a, b in zip(residuals(control), residuals(expected), strict=True))
    assert unet(x_t, t, base + control).shape == (2, 4, *x_t.shape[2:])
    random = ControlNet(dataclasses.replace(SMALL, in_channels=4, init="random"), unet=unet)
    assert {k: v.shape for k, v in random.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


@pytest.mark.parametrize("channels", [0, 5])
def test_trunk_reads_no_more_channels_than_there_are(channels: int) -> None:
    with pytest.raises(ConfigError, match=rf"controlnet.in_channels is {channels}; allowed: 1..4, or null") as caught:
        make(dataclasses.replace(SMALL, in_channels=channels))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("latent", [(8, 16), (16, 8)])
def test_latents_need_not_be_square(latent: tuple[int, int]) -> None:
    unet, net = make()
    waken(net)
    _, t, base, _ = inputs()
    h, w = latent
    x_t, hint = torch.randn(2, 4, h, w), torch.rand(2, 3, 2 * h, 2 * w)
    assert unet(x_t, t, base + run(net, x_t, t, base, hint)).shape == x_t.shape


def test_latent_that_does_not_halve_often_enough_is_refused() -> None:
    unet, net = make()
    _, t, base, _ = inputs()
    with pytest.raises(ValueError, match="latent is 12x20"):
        Denoiser(unet, {"a": net})(torch.randn(2, 4, 12, 20), t, base, {"a": torch.rand(2, 3, 24, 40)})


def test_diffusers_layout_gives_the_same_module() -> None:
    _, net = make()
    waken(net)
    _, other = make()
    keys = diffusers_controlnet(SD1, hint_convs=len(net.hint.convs))
    load_tensors(other, keys.to_ours(keys.to_theirs(net.state_dict())), "diffusers")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "controlnet", "init": "clone"}, "controlnet.init is 'clone'; allowed: copy, random"),
        ({"name": "controlnet", "zero_conv": "ones"}, "controlnet.zero_conv is 'ones'; allowed: zero, gaussian"),
        ({"name": "controlnet_lite", "zero_conv": "ones"}, "zero_conv is 'ones'; allowed: zero, gaussian"),
        ({"name": "controlnet_light"}, "did you mean 'controlnet_lite'"),
    ],
)
def test_wrong_option_gets_one_line(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        registry.build("adapter", node, unet=UNet(SHALLOW))
    assert "\n" not in str(caught.value)


def counts(config: UNetConfig) -> tuple[int, int, int, int]:
    """Parameters of a full-size ControlNet, of its hint encoder and zero convolutions; zero convolutions."""
    with torch.device("meta"):
        net = ControlNet(ControlNetOptions(), unet=UNet(config))
    zero = num_parameters(net.zero_convs) + num_parameters(net.zero_mid)
    return num_parameters(net), num_parameters(net.hint), zero, len(net.zero_convs) + 1


def test_full_size_sd15_has_the_published_counts() -> None:
    assert counts(SD15) == (361_279_120, 1_086_480, 11_479_680, 13)


def test_full_size_sdxl_has_the_published_counts() -> None:
    assert counts(SDXL) == (1_251_014_160, 1_086_480, 6_560_640, 10)


def test_42_tensors_are_not_the_unets() -> None:
    unet = trained_unet(SD1)
    net = ControlNet(ControlNetOptions(), unet=unet)
    new = net.state_dict().keys() - unet.state_dict().keys()
    assert len(new) == 42
    assert {key.split(".")[0] for key in new} == {"hint", "zero_convs", "zero_mid"}
    assert len(net.state_dict()) == 340
