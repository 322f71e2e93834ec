"""Our IP-Adapter against diffusers' with equal random weights; diffusers loads the published layout itself."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.ip_adapter import IPAdapter, IPAdapterOptions
from adapters.layers import Resampler
from ldm.control import Control
from ldm.convert import diffusers_unet
from ldm.convert.ip_adapter import published
from ldm.denoiser import AdapterUse, Denoiser
from ldm.generate import Models, Request, images
from ldm.guidance import GuidanceConfig
from ldm.models.blocks import timestep_embedding
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.samplers import DDIM, ImageNoise
from ldm.schedule import Schedule
from tests.parity.test_controlnet_diffusers import SMALL, TIME_IDS, shared_config
from tests.parity.test_samplers_diffusers import SD
from tests.small import waken

diffusers = pytest.importorskip("diffusers")

ATOL = 1e-5
VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 32, "layers": 2, "heads": 2}
VARIANTS = {
    "base": IPAdapterOptions(VIT),
    "plus": IPAdapterOptions(VIT, variant="plus", width=128, tokens=6),
    "full": IPAdapterOptions(VIT, variant="full"),
}
BASES = ("sd1", "sdxl")
STEPS = 10


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


@functools.cache
def pair(name: str, variant: str) -> tuple[UNet, IPAdapter, Any]:
    """Our UNet and adapter, and their UNet with both."""
    torch.manual_seed(0)
    config, options = SMALL[name], VARIANTS[variant]
    unet = waken(UNet(config)).requires_grad_(False).eval()
    adapter = IPAdapter(options, unet=unet).requires_grad_(False).eval()
    for p in adapter.parameters():
        p.add_(0.2 * torch.randn_like(p))
    other = theirs(config)
    other.load_state_dict(diffusers_unet(config).to_theirs(unet.state_dict()))
    flat = published(unet.spec.cross_attn, options.variant, options.depth).to_theirs(adapter.state_dict())
    other._load_ip_adapter_weights([nested(flat)], low_cpu_mem_usage=False)
    return unet, adapter, other


def weigh(other: Any, scale: float) -> None:
    for processor in other.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]


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


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("references", [1, 2])
@torch.no_grad()
def test_unet_with_image_prompt(name: str, variant: str, references: int) -> None:
    unet, adapter, other = pair(name, variant)
    x_t, t, base, added = inputs(SMALL[name])
    n = 1 if variant == "base" else 6
    features = torch.randn(2, references, n, 32)
    embeds = features[:, :, 0] if variant == "base" else features  # theirs: b m d and b m n d
    for scale in (1.0, 0.4):
        weigh(other, scale)
        expected = other(
            x_t, t, base.context, added_cond_kwargs={**added, "image_embeds": [embeds]}, return_dict=False
        )[0]
        control = adapter.control(x_t, t, base, adapter.prepare(features)).scaled(scale)
        assert (expected - unet(x_t, t, base)).abs().max() > 1e-3  # the adapter matters
        torch.testing.assert_close(unet(x_t, t, base + control), expected, atol=ATOL, rtol=0)


def told(adapter: IPAdapter, references: Tensor) -> Tensor:
    """Image embeddings as diffusers' pipelines make them for guidance: the null image first, then the references."""
    image, tower = adapter.encode(references)[:, 0], adapter.image.encoder.tower
    if adapter.image.pooled:
        return torch.cat([torch.zeros_like(image), image])  # b 1 d
    return torch.cat([tower.tokens(torch.zeros(2, 3, 16, 16)), image])[:, None]  # b 1 n d


@pytest.mark.parametrize("variant", ["base", "plus"])
@torch.no_grad()
def test_a_guided_run_takes_the_same_path(variant: str) -> None:
    unet, adapter, other = pair("sd1", variant)
    text = TextEncoder(TextConfig(width=24, layers=1, heads=2, merges=100, context_length=8)).eval()
    vae = VAE(VAEConfig(channels=(4, 4), blocks=1, groups=2)).eval()
    models = Models(Denoiser(unet, {"ip": adapter}).eval(), vae, text, Schedule(), "v")
    seeds, references, uses = [1, 2], torch.rand(2, 1, 3, 16, 16), {"ip": AdapterUse(scale=0.7)}
    paths: dict[bool, list[Tensor]] = {True: [], False: []}
    for heard, path in paths.items():
        hints, guidance = {"ip": references} if heard else {}, GuidanceConfig(scale=2.0)
        request = Request(["a", "b"], seeds, (16, 32), guidance=guidance, hints=hints, uses=uses)
        images(models, request, DDIM(models.schedule, steps=STEPS), on_step=lambda _, x, path=path: path.append(x))
    words, embeds = text(text.ids(["", "", "a", "b"])), told(adapter, references)
    settings = {**SD, "prediction_type": "v_prediction"}  # eps of untrained weights lets latents grow to 40
    scheduler = diffusers.DDIMScheduler(**settings, steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(STEPS)
    weigh(other, 0.7)
    x = ImageNoise(seeds, (4, 8, 16))()
    for t, ours in zip(scheduler.timesteps, paths[True], strict=True):
        eps = other(torch.cat([x, x]), t, words, added_cond_kwargs={"image_embeds": [embeds]}, return_dict=False)[0]
        nothing, everything = eps.chunk(2)
        x = scheduler.step(nothing + 2.0 * (everything - nothing), t, x).prev_sample
        torch.testing.assert_close(ours, x, atol=ATOL, rtol=0)
    assert (paths[False][-1] - x).abs().max() > 1e-2  # the image prompt matters


@torch.no_grad()
def test_projections() -> None:
    for variant in VARIANTS:
        _, adapter, other = pair("sd1", variant)
        features = torch.randn(3, 1, 1 if variant == "base" else 6, 32)
        layer = other.encoder_hid_proj.image_projection_layers[0]
        expected = layer(features[:, 0, 0] if variant == "base" else features[:, 0])
        torch.testing.assert_close(adapter.image(features), expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_swapped_keys_and_values_of_the_resampler_are_noticed() -> None:
    net = Resampler(8, 16, 12, tokens=3, depth=1, head_dim=8)
    x = torch.randn(2, 5, 8)
    before = net(x)
    weight = net.get_parameter("layers.0.to_kv.weight")
    weight.copy_(weight.roll(16, 0))
    assert (net(x) - before).abs().max() > 1e-2
