"""Our T2I-Adapter against diffusers' T2IAdapter with the same random weights, through the key maps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.t2i_adapter import T2IAdapter, T2IAdapterOptions
from ldm.convert.tables_t2i import T2I_MAPS, T2IConfig, t2i
from ldm.models.unet import UNet, UNetConfig
from tests.parity.test_controlnet_diffusers import SMALL, inputs, unets
from tests.small import SDXL

diffusers = pytest.importorskip("diffusers")

SD = UNetConfig(channels=(16, 32, 64, 64), depth=(0,) * 4, mid_depth=0, blocks=1, num_heads=1, groups=4)
XL = UNetConfig(channels=(16, 32, 64), depth=(0,) * 3, mid_depth=0, blocks=1, num_heads=1, groups=4)
KINDS: dict[str, tuple[str, UNetConfig, int, int]] = {  # variant -> diffusers' name, UNet, folding, blocks
    "full": ("full_adapter", SD, 8, 2),
    "light": ("light_adapter", SD, 8, 4),
    "xl": ("full_adapter_xl", XL, 16, 2),
}
variants = pytest.mark.parametrize("variant", KINDS)


def reference(variant: str, hint_channels: int, channels: tuple[int, ...]) -> Any:
    kind, _, factor, blocks = KINDS[variant]
    listed = list(channels[:-1] if variant == "light" else channels)
    return diffusers.T2IAdapter(hint_channels, listed, blocks, factor, kind)


def pair(variant: str, hint_channels: int) -> tuple[T2IAdapter, Any, T2IConfig]:
    _, unet, factor, blocks = KINDS[variant]
    ours = T2IAdapter(T2IAdapterOptions(variant=variant, hint_channels=hint_channels), unet=UNet(unet))
    channels = unet.channels if variant != "xl" else (*unet.channels, unet.channels[-1])
    divisor = 4 if variant == "light" else None
    config = T2IConfig(channels, hint_channels * factor**2, blocks, divisor)
    return ours.eval(), reference(variant, hint_channels, channels).eval(), config


@variants
@pytest.mark.parametrize("hint_channels", [1, 3])
@pytest.mark.parametrize("size", [(128, 64), (144, 80)], ids=["even", "odd latent"])
@torch.no_grad()
def test_features_are_those_of_diffusers(variant: str, hint_channels: int, size: tuple[int, int]) -> None:
    ours, theirs, config = pair(variant, hint_channels)
    ours.load_state_dict(T2I_MAPS["diffusers"](config).to_ours(theirs.state_dict()))
    hint = torch.rand(2, hint_channels, *size)
    for a, b in zip(ours.prepare(hint), theirs(hint), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "variant"), [("sd1", "full"), ("sdxl", "xl")])
@torch.no_grad()
def test_features_enter_where_diffusers_adds_them(name: str, variant: str) -> None:
    ours, theirs = unets(SMALL[name])
    net = T2IAdapter(T2IAdapterOptions(variant=variant), unet=ours)
    x_t, hint, t, base, words = inputs(SMALL[name])
    features, plain = net.prepare(hint), ours(x_t, t, base)
    alone = [[f if i == k else torch.zeros_like(f) for i, f in enumerate(features)] for k in range(4)]
    for some in (list(features), *alone):  # together, and each at its place
        expected = theirs(x_t, t, **words, down_intrablock_additional_residuals=list(some), return_dict=False)[0]
        got = ours(x_t, t, base + net.control(x_t, t, base, tuple(some)))
        assert (expected - plain).abs().max() > 1e-3  # it matters
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@variants
@pytest.mark.parametrize("naming", T2I_MAPS)
def test_every_layout_gives_back_the_same_tensors_and_says_what_it_is(variant: str, naming: str) -> None:
    ours, _, config = pair(variant, 1)
    state = ours.state_dict()
    theirs = T2I_MAPS[naming](config).to_theirs(state)
    found, renamed = t2i(theirs, naming)
    assert found == config
    assert (renamed.unknown, renamed.lacking) == ([], [])
    assert renamed.tensors.keys() == state.keys()
    assert all(torch.equal(renamed.tensors[k], v) for k, v in state.items())


def names(variant: str) -> set[str]:
    ours, _, config = pair(variant, 3)
    return set(T2I_MAPS["original"](config).to_theirs(ours.state_dict()))


def test_original_names_are_tencents() -> None:
    blocks = {f"body.{n}.block{k}.{leaf}" for n in range(8) for k in (1, 2) for leaf in ("weight", "bias")}
    rest = {f"{m}.{leaf}" for m in ("conv_in", "body.2.in_conv", "body.4.in_conv") for leaf in ("weight", "bias")}
    assert names("full") == names("xl") == blocks | rest
    light = {f"body.{i}.body.{j}.block{k}" for i in range(4) for j in range(4) for k in (1, 2)}
    light |= {f"body.{i}.{name}" for i in range(4) for name in ("in_conv", "out_conv")}
    assert names("light") == {f"{m}.{leaf}" for m in light for leaf in ("weight", "bias")}


@pytest.mark.parametrize(
    ("folded", "divisor", "node"),
    [
        (64, None, {"variant": "full", "hint_channels": 1, "vae_factor": 8}),
        (192, None, {"variant": "full", "hint_channels": 3, "vae_factor": 8}),
        (256, None, {"variant": "xl", "hint_channels": 1, "vae_factor": 8}),
        (768, None, {"variant": "xl", "hint_channels": 3, "vae_factor": 8}),
        (192, 4, {"variant": "light", "hint_channels": 3, "vae_factor": 8, "divisor": 4}),
        (16, None, {"variant": "full", "hint_channels": 1, "vae_factor": 4}),
        (48, None, {"variant": "full", "hint_channels": 3, "vae_factor": 4}),
    ],
)
def test_first_convolution_tells_channels_and_base(folded: int, divisor: int | None, node: dict[str, Any]) -> None:
    config = T2IConfig((320, 640, 1280, 1280), folded, 2, divisor)
    assert config.node == {"name": "t2i_adapter", "depth": 2, **node}


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@variants
def test_full_size_has_the_tensors_of_diffusers(variant: str) -> None:
    channels = (320, 640, 1280, 1280)
    with torch.device("meta"):
        unet = UNet(SDXL if variant == "xl" else UNetConfig())
        ours = T2IAdapter(T2IAdapterOptions(variant=variant), unet=unet)
        theirs = reference(variant, 3, channels)
    _, _, factor, blocks = KINDS[variant]
    config = T2IConfig(channels, 3 * factor**2, blocks, 4 if variant == "light" else None)
    assert shapes(T2I_MAPS["diffusers"](config).to_theirs(ours.state_dict())) == shapes(theirs.state_dict())
