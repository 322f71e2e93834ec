"""A network's config from its tensor names and shapes alone.

Heads, activation and padding leave no trace in a file: they follow the published models of that width.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm.convert import tables
from ldm.convert.ip_adapter import IPAdapterConfig, vision_map
from ldm.convert.keymap import KeyMap, Renamed
from ldm.convert.tables_t2i import T2I_MAPS, T2IConfig
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
    | IPAdapterConfig
    | OpenCLIPConfig
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


def _counts(keys: Iterable[str], pattern: str) -> dict[int, int]:
    """Level -> one more than the highest index that it has."""
    out: dict[int, int] = {}
    for key in keys:
        if found := re.search(pattern, key):
            level, index = int(found[1]), int(found[2])
            out[level] = max(out.get(level, 0), index + 1)
    return out


def _depth(keys: Iterable[str], pattern: str) -> int:
    return max((int(found[1]) + 1 for key in keys if (found := re.search(pattern, key))), default=0)


def _unet_levels(keys: set[str], naming: str) -> tuple[list[int], list[int], int]:
    """Residual blocks and transformer depth of each level, and the depth in the middle."""
    if naming != "original":
        blocks, depth = (_counts(keys, pattern) for pattern in UNET_PATTERNS[naming])
        levels = range(max(blocks, default=0) + 1)
        return [blocks.get(i, 0) for i in levels], [depth.get(i, 0) for i in levels], _depth(keys, MID_PATTERN)
    blocks, depth = [0], [0]
    for n in range(1, _depth(keys, r"^input_blocks\.(\d+)\.")):
        if f"input_blocks.{n}.0.op.weight" in keys:
            blocks.append(0)
            depth.append(0)
        else:
            blocks[-1] += 1
            depth[-1] = max(depth[-1], _depth(keys, rf"^input_blocks\.{n}\.1\.transformer_blocks\.(\d+)\."))
    return blocks, depth, _depth(keys, r"^middle_block\.1\.transformer_blocks\.(\d+)\.")


def _frame(state: State, naming: str) -> UNetConfig:
    """A config with the right names; its widths are not known yet."""
    blocks, depth, mid = _unet_levels(set(state), naming)
    if 0 in blocks:
        raise ConfigError(f"UNet blocks per level are {blocks}: some are missing, this is part of a checkpoint")
    return UNetConfig(
        channels=(1,) * len(blocks), blocks=tuple(blocks), depth=tuple(depth), mid_depth=mid, num_heads=1, groups=1
    )


def _size(state: State, key: str, axis: int) -> int:
    if key not in state or state[key].ndim <= axis:
        raise ConfigError(f"{key} (our name) is missing or has too few axes: this is part of a checkpoint")
    return state[key].shape[axis]


def _unet_config(ours: State, frame: UNetConfig) -> UNetConfig:
    levels = len(frame.channels)
    channels = tuple(_size(ours, f"encoder.levels.{i}.blocks.0.res.conv1.weight", 0) for i in range(levels))
    blocks = frame.blocks[0] if isinstance(frame.blocks, tuple) and len(set(frame.blocks)) == 1 else frame.blocks
    context = next((v.shape[1] for k, v in ours.items() if k.endswith("attn2.to_k.weight")), 1)
    linear = any(k.endswith("attn.proj_in.weight") and v.ndim == 2 for k, v in ours.items())
    vector = "encoder.vector_embed.0.weight"
    head_dim = math.gcd(64, *channels) if linear else None  # SD2 and SDXL; SD1 has 8 heads everywhere
    return UNetConfig(
        in_channels=_size(ours, "encoder.conv_in.weight", 1),
        out_channels=ours["decoder.conv_out.weight"].shape[0] if "decoder.conv_out.weight" in ours else 4,
        channels=channels,
        blocks=blocks,
        depth=frame.depth,
        mid_depth=frame.mid_depth,
        context_dim=context,
        num_heads=None if linear else math.gcd(8, *channels),
        head_dim=head_dim,
        linear_proj=linear,
        vector_dim=_size(ours, vector, 1) if vector in ours else None,
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
    hint = tuple(_size(ours, f"hint.convs.{2 * i}.weight", 0) for i in range(len(widths)))
    return ControlNetConfig(_unet_config(ours, frame), _size(ours, "hint.convs.0.weight", 1), hint), renamed


def vae(state: State, naming: str) -> tuple[VAEConfig, Renamed]:
    """Config and our tensors of a KL-VAE; the latent scale is not in the file."""
    blocks = _counts(state, VAE_PATTERNS[naming])
    frame = VAEConfig(channels=(1,) * (max(blocks, default=0) + 1), blocks=max(blocks.values(), default=1), groups=1)
    renamed = keymap(frame, naming).rename(state)
    ours = renamed.tensors
    channels = tuple(_size(ours, f"encoder.levels.{i}.blocks.0.conv1.weight", 0) for i in range(len(frame.channels)))
    config = VAEConfig(
        in_channels=_size(ours, "encoder.conv_in.weight", 1),
        channels=channels,
        blocks=frame.blocks,
        latent_channels=_size(ours, "decoder.conv_in.weight", 1),
        groups=math.gcd(32, *channels),
    )
    return config, renamed


def text(state: State, naming: str) -> tuple[TextConfig, Renamed]:
    """Config and our tensors of a text tower without its projection."""
    return _text(state, naming, projection=False)


def projected_text(state: State, naming: str) -> tuple[ProjectedTextConfig, Renamed]:
    """Config and our tensors of a text tower with its projection."""
    config, renamed = _text(state, naming, projection=True)
    return ProjectedTextConfig(config, _size(renamed.tensors, "text_proj", 1)), renamed


def _text(state: State, naming: str, projection: bool) -> tuple[TextConfig, Renamed]:
    frame = TextConfig(width=1, heads=1, layers=max(_depth(state, r"(?:resblocks|layers)\.(\d+)\."), 1))
    renamed = _text_map(frame, naming, projection).rename(state)
    ours = renamed.tensors
    width, words = (_size(ours, "token_embedding.weight", axis) for axis in (1, 0))
    merges = words - ALPHABET - 2
    if not 0 <= merges <= ALL_MERGES:
        raise ConfigError(f"text vocabulary has {words} words, must be {ALPHABET + 2}..49408 of CLIP's encoding")
    openai = width <= 768  # CLIP ViT-L/14; OpenCLIP's towers are wider
    config = TextConfig(
        width=width,
        layers=frame.layers,
        heads=max(width // 64, 1) if width % 64 == 0 else 1,
        activation="quick_gelu" if openai else "gelu",
        context_length=_size(ours, "positional_embedding", 0),
        merges=None if merges == ALL_MERGES else merges,
        pad="eos" if openai else "zero",
    )
    return config, renamed


def _text_map(config: TextConfig, naming: str, projection: bool) -> KeyMap:
    make = tables.transformers_text if naming == "transformers" else tables.open_clip_text
    table = make(config, projection)
    return identity(table, table.ignored) if naming == "ours" else table


def identity(table: KeyMap, ignored: str = r"$^") -> KeyMap:
    """A layout's tensors under our own names."""
    pairs = tuple(type(pair)(pair.ours, (pair.ours,)) for pair in table.pairs)
    return KeyMap(pairs, ignored=ignored)


def keymap(config: Config, naming: str) -> KeyMap:
    """The layout of a network under these names: original | diffusers | transformers | open_clip | ours."""
    if isinstance(config, T2IConfig):
        return T2I_MAPS[naming](config)
    if isinstance(config, IPAdapterConfig):
        return config.keymap(naming)
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
    return identity(table) if naming == "ours" else table
