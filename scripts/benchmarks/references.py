"""SeeCoder's tokens of a reference picture, beside the same with transformers' Swin as the backbone."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from adapters.seecoder import SeeCoder, SeeCoderOptions
from ldm.models.swin import Swin, SwinConfig
from ldm.models.unet import UNet, UNetConfig
from scripts.benchmarks.networks import transformers
from scripts.benchmarks.setting import Run, Setting, noise, ready

BACKBONES = {  # width of the UNet's context -> the paper's Swin-L, and a small one whose maps all exceed a window
    768: SwinConfig(384, 4, 192, (2, 2, 18, 2), (6, 12, 24, 48), 12, pyramid=True),
    32: SwinConfig(64, 4, 8, (2, 2, 2), (1, 2, 4), 3, pyramid=True),
}
NAMES = {  # ours -> transformers', in a block
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def seecoder_encoding(setting: Setting) -> dict[str, Run]:
    """A reference at the size of the step: picture to tokens, once per image; behind the backbone both are ours."""
    config = BACKBONES[setting.scale.unet.context_dim]
    swin = _their_swin(config)
    see = _ours(config, setting.scale.unet, _renamed(swin.state_dict(), config))
    see = ready(see.to(setting.device), setting)
    side = setting.scale.step
    picture = noise(setting, 1, 3, side, side).sigmoid()
    runs: dict[str, Run] = {}
    if "ours" in setting.sides:
        runs["ours"] = lambda: _tokens(see, see.encode(picture[:, None]))
    else:
        del see.encoder  # its memory is the other side's
    if "theirs" in setting.sides:
        swin = swin.to(setting.device, setting.dtype)
        runs["theirs"] = lambda: _tokens(see, tuple(x[:, None] for x in swin(picture * 2 - 1).feature_maps))
    else:
        del swin
    return {side: torch.no_grad()(run) for side, run in runs.items()}


def _tokens(see: SeeCoder, maps: tuple[Tensor, ...]) -> Tensor:
    context = see.prepare(maps).context
    assert context is not None
    return context


def _ours(config: SwinConfig, unet: UNetConfig, state: dict[str, Tensor]) -> SeeCoder:
    """Our SeeCoder on a backbone with these weights; the rest is random."""
    with torch.device("meta"):
        base = UNet(unet)  # for the width of its context
    tower = Swin(config)
    tower.load_state_dict(state)
    return SeeCoder(SeeCoderOptions(encoder={"name": "swin"} | asdict(config)), unet=base, tower=tower)


def _their_swin(config: SwinConfig) -> Any:
    """Their Swin with feature maps of the last three stages."""
    stages = len(config.depths)
    options = transformers.SwinConfig(
        image_size=config.image_size,
        patch_size=config.patch,
        embed_dim=config.width,
        depths=list(config.depths),
        num_heads=list(config.heads),
        window_size=config.window,
        out_features=[f"stage{k}" for k in range(stages - 2, stages + 1)],
    )
    return transformers.SwinBackbone(options).requires_grad_(False).eval()


def _renamed(state: dict[str, Tensor], config: SwinConfig) -> dict[str, Tensor]:
    """Weights of transformers' Swin under our names."""
    new: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        new[f"net.patch_embed.proj.{part}"] = state[f"swin.embeddings.patch_embeddings.projection.{part}"]
        new[f"net.patch_embed.norm.{part}"] = state[f"swin.embeddings.norm.{part}"]
    for k, depth in enumerate(config.depths):
        stage = f"swin.encoder.layers.{k}"
        for j in range(depth):
            new |= _block(state, f"{stage}.blocks.{j}", f"net.layers.{k}.blocks.{j}")
        if k + 1 < len(config.depths):
            for name in ("norm.weight", "norm.bias", "reduction.weight"):
                new[f"net.layers.{k + 1}.downsample.{name}"] = state[f"{stage}.downsample.{name}"]
        for part, fill in (("weight", torch.ones), ("bias", torch.zeros)):
            norm = f"hidden_states_norms.stage{k + 1}.{part}"
            new[f"norms.{k}.{part}"] = state[norm] if norm in state else fill(config.width * 2**k)
    return new


def _block(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    new: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        new |= {f"{ours}.{a}.{part}": state[f"{theirs}.{b}.{part}"] for a, b in NAMES.items()}
        new[f"{ours}.attn.qkv.{part}"] = torch.cat([state[f"{theirs}.attention.{x}_proj.{part}"] for x in "qkv"])
    table = "relative_position_bias_table"
    new[f"{ours}.attn.{table}"] = state[f"{theirs}.attention.relative_position_bias.{table}"]
    return new
