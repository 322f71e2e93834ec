"""Key maps of T2I-Adapter's style adapter and of CoAdapter's fuser: ours and TencentARC's files.

Both have CLIP's transformer blocks under `transformer_layes` (as it is spelled there). Heads leave no trace: 8.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.convert.keymap import KeyMap, Pair, Renamed, count, size
from ldm.models.unet import UNetConfig

HEADS = 8
BLOCK = (  # our module, their module, and what joins it to weight and bias
    ("norm1", "ln_1."),
    ("to_qkv", "attn.in_proj_"),
    ("to_out", "attn.out_proj."),
    ("norm2", "ln_2."),
    ("fc1", "mlp.c_fc."),
    ("fc2", "mlp.c_proj."),
)
LAYERS = r"^(?:layers|transformer_layes)\.(\d+)\."
LEVELS = r"^(?:write|spatial_ch_projs)\.(\d+)\."


@dataclass(frozen=True)
class StyleConfig:
    """A style adapter, from its file.

    Attributes:
        width: of the encoder's tokens.
        context_dim: of the tokens made.
        tokens: made of a reference.
        depth: blocks.
    """

    width: int = 1024
    context_dim: int = 768
    tokens: int = 8
    depth: int = 3

    @property
    def kind(self) -> str:
        """In the registry."""
        return "adapter"

    @property
    def node(self) -> dict[str, Any]:
        """YAML that builds it, with an encoder of the right width."""
        encoder = {"name": "vit", "image_size": 8, "patch": 8, "width": self.width, "layers": 2, "heads": 1}
        heads = HEADS if self.width % HEADS == 0 else 1
        return {"name": "t2i_style", "encoder": encoder, "tokens": self.tokens, "depth": self.depth, "heads": heads}

    @property
    def unet(self) -> UNetConfig:
        """A UNet with this text; the rest is as small as can be."""
        return UNetConfig(channels=(1,), blocks=1, depth=(0,), mid_depth=0, context_dim=self.context_dim, groups=1)

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"T2I-Adapter style ({self.tokens} tokens of {self.context_dim}, image features {self.width})"

    def keymap(self, naming: str) -> KeyMap:
        """Its layout under the "original" names or "ours"."""
        pairs = [Pair("queries", ("style_embedding",)), Pair("proj", ("proj",)), *_transformer(self.depth)]
        return KeyMap(tuple(pairs)) if naming == "original" else KeyMap(tuple(pairs)).identity()


@dataclass(frozen=True)
class FuserConfig:
    """A CoAdapter fuser, from its file.

    Attributes:
        width: of its tokens and of the text's.
        channels: of the feature maps, from the largest resolution.
        depth: blocks.
    """

    width: int = 768
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depth: int = 3

    @property
    def kind(self) -> str:
        """In the registry."""
        return "fuser"

    @property
    def node(self) -> dict[str, Any]:
        """YAML that builds it."""
        return {"name": "coadapter", "depth": self.depth, "heads": HEADS if self.width % HEADS == 0 else 1}

    @property
    def unet(self) -> UNetConfig:
        """A UNet with these levels and this text."""
        depth = (0,) * len(self.channels)
        return UNetConfig(
            channels=self.channels, blocks=1, depth=depth, mid_depth=0, context_dim=self.width, num_heads=1, groups=1
        )

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"CoAdapter fuser ({self.width} wide, features {self.channels})"

    def keymap(self, naming: str) -> KeyMap:
        """Its layout under the "original" names or "ours"."""
        pairs = [
            Pair("task", ("task_embedding",)),
            Pair("level", ("positional_embedding",)),
            Pair("write_tokens", ("seq_proj",)),
            *_transformer(self.depth),
        ]
        for i in range(len(self.channels)):
            for leaf in ("weight", "bias"):
                pairs.append(Pair(f"read.{i}.{leaf}", (f"spatial_feat_mapping.{i}.1.{leaf}",)))
                pairs.append(Pair(f"write.{i}.{leaf}", (f"spatial_ch_projs.{i}.{leaf}",)))
        return KeyMap(tuple(pairs)) if naming == "original" else KeyMap(tuple(pairs)).identity()


def _transformer(depth: int) -> Iterator[Pair]:
    modules = [("norm_in.", "ln_pre."), ("norm_out.", "ln_post.")]
    modules += [(f"layers.{i}.{a}.", f"transformer_layes.{i}.{b}") for i in range(depth) for a, b in BLOCK]
    for ours, theirs in modules:
        yield from (Pair(ours + leaf, (theirs + leaf,)) for leaf in ("weight", "bias"))


def style(state: Mapping[str, Tensor], naming: str) -> tuple[StyleConfig, Renamed]:
    """Config and our tensors of a style adapter. Raises: ConfigError if the tensors that tell its shape are missing."""
    frame = StyleConfig(depth=max(count(state, LAYERS), 1))
    renamed = frame.keymap(naming).rename(state)
    tokens, width = (size(renamed.tensors, "queries", axis) for axis in (1, 2))
    found = {"tokens": tokens, "width": width, "context_dim": size(renamed.tensors, "proj", 1)}
    return dataclasses.replace(frame, **found), renamed


def fuser(state: Mapping[str, Tensor], naming: str) -> tuple[FuserConfig, Renamed]:
    """Config and our tensors of a fuser. Raises: as `style`."""
    levels = max(count(state, LEVELS), 1)
    frame = FuserConfig(channels=(1,) * levels, depth=max(count(state, LAYERS), 1))
    renamed = frame.keymap(naming).rename(state)
    channels = tuple(size(renamed.tensors, f"write.{i}.weight", 0) for i in range(levels))
    return dataclasses.replace(frame, width=size(renamed.tensors, "task", 1), channels=channels), renamed
