"""T2I-Adapter: published sizes, where features go, subsets of scales, the time option, wrong options."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.t2i_adapter import T2IAdapter, T2IAdapterOptions, places
from ldm import registry
from ldm.control import Control
from ldm.models.unet import UNet, UNetConfig, num_parameters
from ldm.registry import ConfigError
from ldm.training.checkpoint import load_tensors
from tests.small import SD1, SD15, SDXL, latents, trained_unet, waken

THREE = UNetConfig(channels=(8, 16, 32), depth=(0, 1, 1), context_dim=12, num_heads=4, groups=4)  # SDXL's three levels
FULL = ((320, 64), (640, 32), (1280, 16), (1280, 8))  # channels and side at 512 pixels
XL = ((320, 64), (640, 64), (1280, 32), (1280, 32))  # at 1024


def make(config: UNetConfig = SD1, **options: Any) -> T2IAdapter:
    return T2IAdapter(T2IAdapterOptions(**{"vae_factor": 2, **options}), unet=UNet(config))


def hint_for(net: T2IAdapter, x_t: Tensor, b: int = 2) -> Tensor:
    h, w = (net.options.vae_factor * side for side in x_t.shape[-2:])
    return torch.rand(b, net.options.hint_channels, h, w)


def said(net: T2IAdapter, config: UNetConfig = SD1) -> tuple[Control, tuple[Tensor, ...]]:
    """The Control and the features it was made of."""
    x_t, t, base = latents(config)
    features = net.prepare(hint_for(net, x_t))
    return net.control(x_t, t, base, features), features


@pytest.mark.parametrize(
    ("options", "config", "parameters", "tensors", "shapes"),
    [
        ({"hint_channels": 1}, SD15, 77_000_640, 38, FULL),
        ({}, SD15, 77_369_280, 38, FULL),
        ({"variant": "light"}, SD15, 18_689_200, 80, FULL),
        ({"variant": "light", "hint_channels": 1}, SD15, 18_678_960, 80, FULL),
        ({"variant": "light", "divisor": 8}, SD15, 5_083_960, 80, FULL),
        ({"variant": "light", "divisor": 8, "hint_channels": 1}, SD15, 5_078_840, 80, FULL),
        ({"variant": "xl", "hint_channels": 1}, SDXL, 77_553_600, 38, XL),
        ({"variant": "xl"}, SDXL, 79_028_160, 38, XL),
    ],
    ids=str,
)
def test_published_sizes(
    options: dict[str, Any], config: UNetConfig, parameters: int, tensors: int, shapes: tuple[tuple[int, int], ...]
) -> None:
    with torch.device("meta"):
        net = T2IAdapter(T2IAdapterOptions(**options), unet=UNet(config))
        side = 1024 if config is SDXL else 512
        features = net.prepare(torch.zeros(1, net.options.hint_channels, side, side))
    assert num_parameters(net) == parameters
    assert len(net.state_dict()) == tensors
    assert [tuple(f.shape[1:]) for f in features] == [(c, s, s) for c, s in shapes]


def test_pixels_are_folded_channel_by_channel_then_row_by_row() -> None:
    net = make(hint_channels=3, vae_factor=2)
    assert net.conv_in is not None
    seen: list[Tensor] = []
    net.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hint = torch.rand(1, 3, 16, 16)
    net.prepare(hint)
    for c, dy, dx in ((0, 0, 1), (1, 1, 0), (2, 1, 1)):
        assert torch.equal(seen[0][:, c * 4 + dy * 2 + dx], hint[:, c, dy::2, dx::2])


def test_odd_sizes_are_halved_upwards_as_the_unet_halves_them() -> None:
    features = make(vae_factor=2).prepare(torch.rand(1, 3, 34, 34))
    assert [f.shape[-1] for f in features] == [17, 9, 5, 3]


def test_level_is_pooling_then_blocks_of_two_convolutions_and_an_identity() -> None:
    net = make()
    level = net.levels[1]
    x = torch.randn(1, 8, 6, 6)
    h = level.in_conv(F.avg_pool2d(x, 2))
    for block in level.blocks:
        h = h + block.conv2(torch.relu(block.conv1(h)))
    torch.testing.assert_close(level(x), h)


def test_features_enter_the_last_block_of_each_resolution_and_its_skip() -> None:
    unet = trained_unet(SD1)
    net = make()
    x_t, t, base = latents(SD1)
    features = net.prepare(hint_for(net, x_t))
    plain = unet.encoder(x_t, t, base)
    first = unet.encoder(x_t, t, base + Control(stages=(features[0], *map(torch.zeros_like, features[1:]))))
    for i in (0, 1):
        assert torch.equal(first.skips[i], plain.skips[i])
    torch.testing.assert_close(first.skips[2] - plain.skips[2], features[0], atol=1e-5, rtol=0)
    assert not torch.equal(first.skips[3], plain.skips[3])  # the stream carries it on
    assert net.control(x_t, t, base, features).stages == features


def test_unused_scales_are_silent_and_have_no_weights() -> None:
    net = make(scales=(0, 2))
    control, features = said(net)
    assert len(net.levels) == 3
    assert control.stages[0] is features[0] and control.stages[2] is features[1]
    for i, tap in ((1, SD1.channels[1]), (3, SD1.channels[3])):
        assert control.stages[i].shape[1] == tap and not control.stages[i].any()


def test_decoder_alone_leaves_the_encoder_as_it_is() -> None:
    unet = trained_unet(SD1)
    net = make(guide="decoder")
    x_t, t, base = latents(SD1)
    control = net.control(x_t, t, base, net.prepare(hint_for(net, x_t)))
    assert control.stages == ()
    assert [i for i, skip in enumerate(control.skips) if skip.any()] == [2, 5, 8, 11]
    plain, guided = unet.encoder(x_t, t, base), unet.encoder(x_t, t, base + control)
    assert all(torch.equal(a, b) for a, b in zip(plain.skips, guided.skips, strict=True))
    assert not torch.equal(unet(x_t, t, base), unet(x_t, t, base + control))


def test_both_halves_get_the_same_features() -> None:
    control, features = said(make(guide="both"))
    assert control.stages == features
    assert [control.skips[i] for i in (2, 5, 8, 11)] == list(features)


def test_xl_speaks_behind_the_first_downsampling_at_each_further_resolution_and_in_the_middle() -> None:
    net = make(THREE, variant="xl")
    control, features = said(net, THREE)
    assert net.factor == 4
    assert control.downs[0] is features[0] and not control.downs[1].any()
    assert not control.stages[0].any() and control.stages[1:] == features[1:3]
    assert control.mid is features[3]
    assert [f.shape[-2] for f in features] == [4, 4, 2, 2]  # of a latent that is 8 high


def test_xl_of_the_first_scale_says_nothing_in_the_middle() -> None:
    control, features = said(make(THREE, variant="xl", scales=(0,)), THREE)
    assert control.downs[0] is features[0]
    assert control.mid is None


def test_places_are_the_published_encoder_entries() -> None:
    with torch.device("meta"):
        sd, xl = UNet(SD15).spec, UNet(SDXL).spec
    assert [(tap.channels, tap.stride) for tap in places(sd, "full")] == [(320, 1), (640, 2), (1280, 4), (1280, 8)]
    assert [(tap.channels, tap.stride) for tap in places(xl, "xl")] == [(320, 2), (640, 2), (1280, 4), (1280, 4)]


def test_grey_adapter_reads_the_mean_of_three_channels() -> None:
    net = make(hint_channels=1)
    lines = torch.rand(1, 1, 16, 16)
    for a, b in zip(net.prepare(lines), net.prepare(lines.expand(-1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(a, b)


def test_time_option_starts_as_the_plain_adapter_and_then_follows_t() -> None:
    net = make(time=True)
    x_t, _, base = latents(SD1)
    ready = net.prepare(hint_for(net, x_t))

    def at(t: int) -> tuple[Tensor, ...]:
        return net.control(x_t, torch.full((2,), t), base, ready).stages

    assert all(torch.equal(a, b) for a, b in zip(at(900), ready, strict=True))
    waken(net)
    assert not torch.equal(at(900)[0], at(10)[0])


def test_convolutions_run_in_prepare_alone() -> None:
    net = make(time=True)
    x_t, t, base = latents(SD1)
    ready = net.prepare(hint_for(net, x_t))
    calls: list[int] = []
    for level in net.levels:
        level.register_forward_hook(lambda *_: calls.append(1))
    net.control(x_t, t, base, ready)
    assert calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "ful"}, r"variant is 'ful'; allowed: full, light, xl; did you mean 'full'"),
        ({"guide": "middle"}, r"guide is 'middle'; allowed: encoder, decoder, both"),
        ({"hint_channels": 2}, r"hint_channels is 2; allowed: 1 .*3"),
        ({"divisor": 0}, r"divisor is 0, must be at least 1"),
        ({"scales": [0, 4]}, r"scales is \(0, 4\); this UNet has 0\.\.3"),
        ({"scales": []}, r"scales is \(\); this UNet has 0\.\.3"),
        ({"scales": [1, 1]}, r"scales is \(1, 1\); this UNet has 0\.\.3"),
        ({"variant": "xl", "guide": "both"}, r"guide is 'both'; variant xl allows encoder only"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.build("adapter", {"name": "t2i_adapter", **options}, unet=UNet(SD1))


def test_weights_of_another_base_are_refused_with_the_mismatch() -> None:
    with torch.device("meta"):
        sd = T2IAdapter(T2IAdapterOptions(hint_channels=1), unet=UNet(SD15))
        xl = T2IAdapter(T2IAdapterOptions(hint_channels=1, variant="xl"), unet=UNet(SDXL))
    with pytest.raises(ConfigError, match=r"conv_in.weight \(320, 256, 3, 3\) \(expected \(320, 64, 3, 3\)\)"):
        load_tensors(sd, xl.state_dict(), "xl.safetensors")


def test_xl_features_enter_behind_the_first_downsampling() -> None:
    unet = trained_unet(THREE)
    net = make(THREE, variant="xl")
    x_t, t, base = latents(THREE)
    features = net.prepare(hint_for(net, x_t))
    control = net.control(x_t, t, base, features)
    plain = unet.encoder(x_t, t, base)
    first = unet.encoder(x_t, t, base + Control(downs=control.downs))
    for i in (0, 1, 2):
        assert torch.equal(first.skips[i], plain.skips[i])
    torch.testing.assert_close(first.skips[3] - plain.skips[3], features[0], atol=1e-5, rtol=0)
    assert not torch.equal(first.skips[4], plain.skips[4])  # the stream carries it on
    with pytest.raises(ValueError, match=r"Control.downs has 1 entries; this UNet has 2 downsamplings"):
        unet.encoder(x_t, t, base + Control(downs=control.downs[:1]))


def test_shapes_that_this_unet_cannot_have_are_refused() -> None:
    narrow = UNet(UNetConfig(channels=(8,), blocks=1, depth=(0,), mid_depth=0, context_dim=8, groups=4, num_heads=2))
    with pytest.raises(ConfigError, match="variant is 'xl', which needs a UNet that halves its input"):
        T2IAdapter(T2IAdapterOptions(variant="xl"), unet=narrow)
    with pytest.raises(ConfigError, match="divisor is 16, must be at most 8"):
        T2IAdapter(T2IAdapterOptions(variant="light", divisor=16), unet=narrow)
