"""Image-to-image and both ways of inpainting against diffusers' pipelines, same random weights, seed to picture."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import condition
from ldm.convert import diffusers_unet, diffusers_vae
from ldm.denoiser import Denoiser
from ldm.generate import Models, Request, images
from ldm.guidance import GuidanceConfig
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.samplers import DDIM
from ldm.schedule import Schedule
from ldm.source import Source

diffusers = pytest.importorskip("diffusers")

SEEDS, SIZE, STEPS = [3, 8], (16, 24), 5
VAE_CONFIG = VAEConfig(channels=(8, 16), blocks=1, groups=4)


def reference_models(in_channels: int) -> tuple[nn.Module, nn.Module]:
    """Small ones in diffusers' words, with weights that make every part matter."""
    unet = diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        sample_size=64,
        block_out_channels=(16, 16),
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=[2, 2],
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    for name, parameter in (*unet.named_parameters(), *vae.named_parameters()):
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.1)
    return unet.eval(), vae.eval()


def our_models(unet: nn.Module, vae: nn.Module, in_channels: int) -> Models:
    config = UNetConfig(
        in_channels=in_channels, channels=(16, 16), blocks=1, depth=(0, 1), context_dim=12, num_heads=2, groups=4
    )
    ours, encoder = UNet(config), VAE(VAE_CONFIG)
    ours.load_state_dict(diffusers_unet(config).to_ours(unet.state_dict()))
    encoder.load_state_dict(diffusers_vae(VAE_CONFIG).to_ours(vae.state_dict()))
    text = TextEncoder(TextConfig(width=12, layers=1, heads=2, merges=50, context_length=8))
    return Models(Denoiser(ours).eval(), encoder.eval(), text.eval(), Schedule(), "eps")


def reference(unet: nn.Module, vae: nn.Module, models: Models, source: Source, eta: float) -> Tensor:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    name = "StableDiffusionImg2ImgPipeline" if source.mask is None else "StableDiffusionInpaintPipeline"
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "scheduler": scheduler}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = getattr(diffusers, name)(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    words = [condition(models.text, [word] * len(SEEDS), SIZE).context for word in ("a", "bad")]
    masked = {} if source.mask is None else {"mask_image": source.mask, "height": SIZE[0], "width": SIZE[1]}
    return pipeline(
        image=source.image.add(1).div(2),
        strength=source.strength,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        eta=eta,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        prompt_embeds=words[0],
        negative_prompt_embeds=words[1],
        output_type="pt",
        **masked,
    ).images


@pytest.mark.parametrize(
    ("in_channels", "masked", "strength", "eta"),
    [
        (4, False, 0.6, 0.0),
        (4, False, 1.0, 1.0),
        (4, True, 0.6, 0.0),
        (4, True, 1.0, 0.0),
        (9, True, 0.6, 1.0),
        (9, True, 1.0, 1.0),
    ],
)
@torch.no_grad()
def test_pictures_are_those_of_the_published_pipelines(
    in_channels: int, masked: bool, strength: float, eta: float
) -> None:
    unet, vae = reference_models(in_channels)
    models = our_models(unet, vae, in_channels)
    mask = (torch.rand(len(SEEDS), 1, *SIZE) < 0.5).float() if masked else None
    source = Source(torch.rand(len(SEEDS), 3, *SIZE) * 2 - 1, strength, mask)
    expected = reference(unet, vae, models, source, eta)
    request = Request(["a", "a"], SEEDS, SIZE, negative="bad", guidance=GuidanceConfig(scale=3.0), source=source)
    got = images(models, request, DDIM(models.schedule, steps=STEPS, eta=eta))
    assert got.std() > 0.02
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
