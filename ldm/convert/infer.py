"""A network's config from its tensor names and shapes alone.

Heads, activation and padding leave no trace in a file: they follow the published models of that width.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm.convert import tables, tables_seecoder
from ldm.convert.ip_adapter import IPAdapterConfig, vision_map
from ldm.convert.keymap import KeyMap, Renamed, count, indices, size
from ldm.convert.tables_coadapter import FuserConfig, StyleConfig
from ldm.convert.tables_seecoder import SeeCoderConfig
from ldm.convert.tables_t2i import T2I_MAPS, T2IConfig
from ldm.models.swin import SwinConfig
from ldm.models.text import ALL_MERGES, ALPHABET, TextConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.models.vision import OpenCLIPConfig
from ldm.registry import ConfigError


@dataclass(frozen=True)
class ControlNetConfig:
    """A ControlNet: the UNet it belongs to and the shape of its hint encoder."""

    unet: UNetConfig
    hint_channels: int
    hint_widths: tuple[int, ...]


@dataclass(frozen=True)
class ProjectedTextConfig:
    """A text tower with a projection behind it (SDXL's second)."""

    text: TextConfig
    dim: int


Config = (
    UNetConfig
    | VAEConfig
    | TextConfig
    | ControlNetConfig
    | ProjectedTextConfig
    | T2IConfig
    | StyleConfig
    | FuserConfig
    | IPAdapterConfig
    | OpenCLIPConfig
    | SeeCoderConfig
    | SwinConfig
)
State = Mapping[str, Tensor]

UNET_PATTERNS = {
    "diffusers": (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", r"^down_blocks\.(\d+)\.att.*\.transformer_blocks\.(\d+)\."),
    "ours": (r"^encoder\.levels\.(\d+)\.blocks\.(\d+)\.res\.", r"^encoder\.levels\.(\d+)\..*\.attn\.blocks\.(\d+)\."),
}
VAE_PATTERNS = {
    "original": r"^encoder\.down\.(\d+)\.block\.(\d+)\.",
    "diffusers": r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.",
    "ours": r"^encoder\.levels\.(\d+)\.blocks\.(\d+)\.",
}
HINT_PATTERNS = {
    "original": r"^input_hint_block\.(\d+)\.weight",
    "diffusers": r"^controlnet_cond_embedding\.(.*)\.weight",
    "ours": r"^hint\.convs\.(\d+)\.weight",
}
MID_PATTERN = r"^(?:encoder\.mid\.attn\.blocks|mid_block\.attentions\.0\.transformer_blocks)\.(\d+)\."


def _counts(keys: Collection[str], pattern: str) -> dict[int, int]:
    """Level -> one more than the highest index that it has."""
    out: dict[int, int] = {}
    for level, index in indices(keys, pattern):
        out[level] = max(out.get(level, 0), index + 1)
    return out


def _unet_levels(keys: set[str], naming: str) -> tuple[list[int], list[int], int]:
    """Residual blocks and transformer depth of each level, and the depth in the middle."""
    if naming != "original":
        blocks, depth = (_counts(keys, pattern) for pattern in UNET_PATTERNS[naming])
        levels = range(max(blocks, default=0) + 1)
        return [blocks.get(i, 0) for i in levels], [depth.get(i, 0) for i in levels], count(keys, MID_PATTERN)
    blocks, depth = [0], [0]
    for n in range(1, count(keys, r"^input_blocks\.(\d+)\.")):
        if f"input_blocks.{n}.0.op.weight" in keys:
            blocks.append(0)
            depth.append(0)
        else:
            blocks[-1] += 1
            depth[-1] = max(depth[-1], count(keys, rf"^input_blocks\.{n}\.1\.transformer_blocks\.(\d+)\."))
    return blocks, depth, count(keys, r"^middle_block\.1\.transformer_blocks\.(\d+)\.")


def _frame(state: State, naming: str) -> UNetConfig:
    """A config with the right names; its widths are not known yet."""
    blocks, depth, mid = _unet_levels(set(state), naming)
    if 0 in blocks:
        raise ConfigError(f"UNet blocks per level are {blocks}: some are missing, this is part of a checkpoint")
    return UNetConfig(
        channels=(1,) * len(blocks), blocks=tuple(blocks), depth=tuple(depth), mid_depth=mid, num_heads=1, groups=1
    )


def _unet_config(ours: State, frame: UNetConfig) -> UNetConfig:
    levels = len(frame.channels)
    channels = tuple(size(ours, f"encoder.levels.{i}.blocks.0.res.conv1.weight", 0) for i in range(levels))
    blocks = frame.blocks[0] if isinstance(frame.blocks, tuple) and len(set(frame.blocks)) == 1 else frame.blocks
    text = next((k for k in ours if k.endswith("attn2.to_k.weight")), None)
    linear = any(k.endswith("attn.proj_in.weight") and v.ndim == 2 for k, v in ours.items())
    vector, last = "encoder.vector_embed.0.weight", "decoder.conv_out.weight"
    head_dim = math.gcd(64, *channels) if linear else None  # SD2 and SDXL; SD1 has 8 heads everywhere
    return UNetConfig(
        in_channels=size(ours, "encoder.conv_in.weight", 1),
        out_channels=size(ours, last, 0) if last in ours else 4,
        channels=channels,
        blocks=blocks,
        depth=frame.depth,
        mid_depth=frame.mid_depth,
        context_dim=size(ours, text, 1) if text else 1,
        num_heads=None if linear else math.gcd(8, *channels),
        head_dim=head_dim,
        linear_proj=linear,
        vector_dim=size(ours, vector, 1) if vector in ours else None,
        groups=math.gcd(32, *channels),
    )


def unet(state: State, naming: str) -> tuple[UNetConfig, Renamed]:
    """Config and our tensors of a UNet under "original", "diffusers" or "ours" names."""
    frame = _frame(state, naming)
    renamed = keymap(frame, naming).rename(state)
    return _unet_config(renamed.tensors, frame), renamed


def controlnet(state: State, naming: str) -> tuple[ControlNetConfig, Renamed]:
    """Config and our tensors of a ControlNet."""
    frame = _frame(state, naming)
    convs = len([key for key in state if re.search(HINT_PATTERNS[naming], key)])
    widths = (1,) * max(convs // 2, 1)
    renamed = keymap(ControlNetConfig(frame, 1, widths), naming).rename(state)
    ours = renamed.tensors
    hint = tuple(size(ours, f"hint.convs.{2 * i}.weight", 0) for i in range(len(widths)))
    return ControlNetConfig(_unet_config(ours, frame), size(ours, "hint.convs.0.weight", 1), hint), renamed


def vae(state: State, naming: str) -> tuple[VAEConfig, Renamed]:
    """Config and our tensors of a KL-VAE; the latent scale is not in the file."""
    blocks = _counts(state, VAE_PATTERNS[naming])
    frame = VAEConfig(channels=(1,) * (max(blocks, default=0) + 1), blocks=max(blocks.values(), default=1), groups=1)
    renamed = keymap(frame, naming).rename(state)
    ours = renamed.tensors
    channels = tuple(size(ours, f"encoder.levels.{i}.blocks.0.conv1.weight", 0) for i in range(len(frame.channels)))
    config = VAEConfig(
        in_channels=size(ours, "encoder.conv_in.weight", 1),
        channels=channels,
        blocks=frame.blocks,
        latent_channels=size(ours, "decoder.conv_in.weight", 1),
        groups=math.gcd(32, *channels),
    )
    return config, renamed


def text(state: State, naming: str) -> tuple[TextConfig, Renamed]:
    """Config and our tensors of a text tower without its projection."""
    return _text(state, naming, projection=False)


def projected_text(state: State, naming: str) -> tuple[ProjectedTextConfig, Renamed]:
    """Config and our tensors of a text tower with its projection."""
    config, renamed = _text(state, naming, projection=True)
    return ProjectedTextConfig(config, size(renamed.tensors, "text_proj", 1)), renamed


def _text(state: State, naming: str, projection: bool) -> tuple[TextConfig, Renamed]:
    frame = TextConfig(width=1, heads=1, layers=max(count(state, r"(?:resblocks|layers)\.(\d+)\."), 1))
    renamed = _text_map(frame, naming, projection).rename(state)
    ours = renamed.tensors
    width, words = (size(ours, "token_embedding.weight", axis) for axis in (1, 0))
    merges = words - ALPHABET - 2
    if not 0 <= merges <= ALL_MERGES:
        raise ConfigError(f"text vocabulary has {words} words, must be {ALPHABET + 2}..49408 of CLIP's encoding")
    openai = width <= 768  # CLIP ViT-L/14; OpenCLIP's towers are wider
    config = TextConfig(
        width=width,
        layers=frame.layers,
        heads=max(width // 64, 1) if width % 64 == 0 else 1,
        activation="quick_gelu" if openai else "gelu",
        context_length=size(ours, "positional_embedding", 0),
        merges=None if merges == ALL_MERGES else merges,
        pad="eos" if openai else "zero",
    )
    return config, renamed


def _text_map(config: TextConfig, naming: str, projection: bool) -> KeyMap:
    make = tables.transformers_text if naming == "transformers" else tables.open_clip_text
    table = make(config, projection)
    return table.identity() if naming == "ours" else table


def keymap(config: Config, naming: str) -> KeyMap:
    """The layout of a network under these names: original | diffusers | transformers | open_clip | ours."""
    if isinstance(config, T2IConfig):
        return T2I_MAPS[naming](config)
    if isinstance(config, IPAdapterConfig | StyleConfig | FuserConfig | SeeCoderConfig):
        return config.keymap(naming)
    if isinstance(config, SwinConfig):
        return tables_seecoder.swin_map(config, naming)
    if isinstance(config, OpenCLIPConfig):
        return vision_map(config, naming)
    if isinstance(config, TextConfig):
        return _text_map(config, naming, projection=False)
    if isinstance(config, ProjectedTextConfig):
        return _text_map(config.text, naming, projection=True)
    old = naming == "original"
    if isinstance(config, UNetConfig):
        table = (tables.original_unet if old else tables.diffusers_unet)(config)
    elif isinstance(config, VAEConfig):
        table = (tables.original_vae if old else tables.diffusers_vae)(config)
    else:
        make = tables.original_controlnet if old else tables.diffusers_controlnet
        table = make(config.unet, 2 * len(config.hint_widths))
    return table.identity() if naming == "ours" else table
