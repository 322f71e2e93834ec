"""Our IP-Adapter against diffusers' with equal random weights; diffusers loads the published layout itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.ip_adapter import IPAdapter, IPAdapterOptions
from adapters.layers import Resampler
from ldm.control import Control
from ldm.convert import diffusers_unet
from ldm.convert.ip_adapter import published
from ldm.models.blocks import timestep_embedding
from ldm.models.unet import UNet, UNetConfig
from tests.parity.test_controlnet_diffusers import SMALL, TIME_IDS, shared_config
from tests.small import waken

diffusers = pytest.importorskip("diffusers")

ATOL = 1e-5
VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 32, "layers": 2, "heads": 2}
VARIANTS = {
    "base": IPAdapterOptions(VIT),
    "plus": IPAdapterOptions(VIT, variant="plus", width=128, tokens=6),
    "full": IPAdapterOptions(VIT, variant="full"),
}
SHAPES = {"sd1": SMALL["sd1"], "sdxl": SMALL["sdxl"]}


def theirs(config: UNetConfig) -> Any:
    levels = range(len(config.channels))
    up = ["CrossAttnUpBlock2D" if config.depth[i] else "UpBlock2D" for i in reversed(levels)]
    blocks = {"out_channels": 4, "up_block_types": up}
    return diffusers.UNet2DConditionModel(**shared_config(config), **blocks).eval()


def nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The flat names of .safetensors as the two dicts of .bin."""
    out: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in flat.items():
        part, _, rest = key.partition(".")
        out[part][rest] = value
    return out


def pair(name: str, options: IPAdapterOptions) -> tuple[UNet, IPAdapter, Any]:
    config = SHAPES[name]
    unet = waken(UNet(config)).requires_grad_(False).eval()
    adapter = IPAdapter(options, unet=unet).requires_grad_(False)
    for p in adapter.parameters():
        p.add_(0.2 * torch.randn_like(p))
    other = theirs(config)
    other.load_state_dict(diffusers_unet(config).to_theirs(unet.state_dict()))
    flat = published(unet.spec.cross_attn, options.variant, options.depth).to_theirs(adapter.state_dict())
    other._load_ip_adapter_weights([nested(flat)], low_cpu_mem_usage=False)
    return unet, adapter, other


def inputs(config: UNetConfig) -> tuple[Tensor, Tensor, Control, dict[str, Tensor]]:
    side = 2 ** len(config.channels)
    x_t, t = torch.randn(2, 4, side, 2 * side), torch.tensor([10, 700])
    added = {}
    vector = None
    if config.vector_dim:
        pooled, ids = torch.randn(2, 24), torch.rand(2, TIME_IDS)
        vector = torch.cat([pooled, timestep_embedding(ids.flatten(), 8).view(2, -1)], dim=1)
        added = {"text_embeds": pooled, "time_ids": ids}
    return x_t, t, Control(context=torch.randn(2, 7, config.context_dim), vector=vector), added


@pytest.mark.parametrize(("name", "variant"), [*(("sd1", variant) for variant in VARIANTS), ("sdxl", "base")])
@pytest.mark.parametrize("references", [1, 2])
@torch.no_grad()
def test_unet_with_image_prompt(name: str, variant: str, references: int) -> None:
    unet, adapter, other = pair(name, VARIANTS[variant])
    x_t, t, base, added = inputs(SHAPES[name])
    n = 1 if variant == "base" else 6
    features = torch.randn(2, references, n, 32)
    embeds = features[:, :, 0] if variant == "base" else features  # theirs: b m d and b m n d
    for scale in (1.0, 0.4):
        for processor in other.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [scale]
        expected = other(
            x_t, t, base.context, added_cond_kwargs={**added, "image_embeds": [embeds]}, return_dict=False
        )[0]
        control = adapter.control(x_t, t, base, adapter.prepare(features)).scaled(scale)
        assert (expected - unet(x_t, t, base)).abs().max() > 1e-3  # the adapter matters
        torch.testing.assert_close(unet(x_t, t, base + control), expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_projections() -> None:
    for variant, options in VARIANTS.items():
        _, adapter, other = pair("sd1", options)
        features = torch.randn(3, 1, 1 if variant == "base" else 6, 32)
        layer = other.encoder_hid_proj.image_projection_layers[0]
        expected = layer(features[:, 0, 0] if variant == "base" else features[:, 0])
        torch.testing.assert_close(adapter.image(features), expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_swapped_keys_and_values_of_the_resampler_are_noticed() -> None:
    net = Resampler(8, 16, 12, tokens=3, depth=1, head_dim=8)
    x = torch.randn(2, 5, 8)
    before = net(x)
    weight = net.layers[0].to_kv.weight
    weight.copy_(weight.roll(16, 0))
    assert (net(x) - before).abs().max() > 1e-2
