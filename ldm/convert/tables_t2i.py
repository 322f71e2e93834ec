"""Key maps of T2I-Adapters: ours, TencentARC's files (SD1.x, light, SDXL) and diffusers' T2IAdapter.

TencentARC numbers the residual blocks of full and XL networks in one row, those of light ones by level.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.convert.keymap import KeyMap, Pair, Renamed, indices, size
from ldm.models.unet import UNetConfig
from ldm.registry import ConfigError

LEVELS = 4  # of every published network: where they are not numbered, names do not tell
KINDS = {
    (8, 1): "SD1.x, 1 channel",
    (8, 3): "SD1.x, 3 channels",
    (16, 1): "SDXL, 1 channel",
    (16, 3): "SDXL, 3 channels",
}
BLOCKS = {  # naming, light -> pattern of a residual block's first convolution
    ("ours", False): r"^levels\.(\d+)\.blocks\.(\d+)\.conv1\.weight$",
    ("diffusers", False): r"^adapter\.body\.(\d+)\.resnets\.(\d+)\.block1\.weight$",
    ("original", True): r"^body\.(\d+)\.body\.(\d+)\.block1\.weight$",
    ("original", False): r"^body\.(\d+)()\.block1\.weight$",
}


@dataclass(frozen=True)
class T2IConfig:
    """A T2I-Adapter, from its file.

    Attributes:
        channels: of the features, from the largest resolution.
        folded: channels behind the pixel folding: the hint's times the factor squared.
        blocks: residual blocks per level.
        divisor: of a light network: how much narrower its levels are inside; None for the others.
    """

    channels: tuple[int, ...]
    folded: int
    blocks: int
    divisor: int | None = None

    @property
    def hint_channels(self) -> int:
        """1 or 3: squares are no multiples of three times a square."""
        return 3 if math.isqrt(self.folded // 3) ** 2 * 3 == self.folded else 1

    @property
    def factor(self) -> int:
        """Pixels of the hint folded into one, along a side."""
        return math.isqrt(self.folded // self.hint_channels)

    @property
    def xl(self) -> bool:
        """Whether it is one of SDXL; the folding alone tells."""
        return self.factor == 16 and self.divisor is None

    @property
    def node(self) -> dict[str, Any]:
        """Its YAML, less its name in the run."""
        shape = (
            {"variant": "light", "divisor": self.divisor} if self.divisor else {"variant": "xl" if self.xl else "full"}
        )
        factor = self.factor // 2 if self.xl else self.factor
        common = {
            "name": "t2i_adapter",
            "hint_channels": self.hint_channels,
            "vae_factor": factor,
            "depth": self.blocks,
        }
        return common | shape

    @property
    def unet(self) -> UNetConfig:
        """A UNet of the widths that it is for; the rest is left out."""
        channels = self.channels[:-1] if self.xl else self.channels
        depth = (0,) * len(channels)
        return UNetConfig(channels=channels, blocks=1, depth=depth, mid_depth=0, num_heads=1, groups=1)

    @property
    def words(self) -> str:
        """What of the published adapters it is."""
        base = KINDS.get((self.factor, self.hint_channels), f"folding by {self.factor}, {self.hint_channels} channels")
        return f"T2I-Adapter{f' light (1/{self.divisor})' if self.divisor else ''} for {base}, features {self.channels}"


def diffusers_t2i(config: T2IConfig) -> KeyMap:
    """`T2IAdapter` and diffusers' class of that name."""
    return KeyMap(tuple(_pairs(config, "diffusers")))


def original_t2i(config: T2IConfig) -> KeyMap:
    """`T2IAdapter` and TencentARC's files."""
    return KeyMap(tuple(_pairs(config, "original")))


def our_t2i(config: T2IConfig) -> KeyMap:
    """`T2IAdapter` under its own names."""
    return original_t2i(config).identity()


T2I_MAPS = {"diffusers": diffusers_t2i, "original": original_t2i, "ours": our_t2i}


def _pairs(config: T2IConfig, naming: str) -> Iterator[Pair]:
    head = "adapter." if naming == "diffusers" else ""
    modules = [("conv_in", f"{head}conv_in")]
    for i in range(len(config.channels)):
        row = naming == "original" and config.divisor is None
        level = f"{head}body.{i * config.blocks if row else i}"
        modules += [(f"levels.{i}.{name}", f"{level}.{name}") for name in ("in_conv", "out_conv")]
        inside = "resnets" if naming == "diffusers" else "body"
        for j in range(config.blocks):
            block = f"body.{i * config.blocks + j}" if row else f"{level}.{inside}.{j}"
            modules += [(f"levels.{i}.blocks.{j}.conv{k}", f"{block}.block{k}") for k in (1, 2)]
    for ours, theirs in modules:
        yield from (Pair(f"{ours}.{leaf}", (f"{theirs}.{leaf}",)) for leaf in ("weight", "bias"))


def t2i(state: Mapping[str, Tensor], naming: str) -> tuple[T2IConfig, Renamed]:
    """Config and our tensors of a T2I-Adapter under "original", "diffusers" or "ours" names.

    Raises: ConfigError if the tensors that tell its shape are missing.
    """
    light = not any(re.search(r"(^|\.)conv_in\.weight$", key) for key in state)
    pattern = BLOCKS[naming, naming == "original" and light]
    found = indices(state, pattern)
    if not found:
        raise ConfigError(f"no residual block {pattern} is there: this is part of a checkpoint")
    levels, blocks = (1 + max(column) for column in zip(*found, strict=True))
    if naming == "original" and not light:
        levels, blocks = LEVELS, max(levels // LEVELS, 1)
    frame = T2IConfig((1,) * levels, 1, blocks, 1 if light else None)
    renamed = T2I_MAPS[naming](frame).rename(state)
    ours = renamed.tensors
    last = "out_conv" if light else "blocks.0.conv1"
    channels = tuple(size(ours, f"levels.{i}.{last}.weight", 0) for i in range(levels))
    folded = size(ours, "levels.0.in_conv.weight" if light else "conv_in.weight", 1)
    divisor = max(channels[0] // size(ours, "levels.0.blocks.0.conv1.weight", 0), 1) if light else None
    return T2IConfig(channels, folded, blocks, divisor), renamed
