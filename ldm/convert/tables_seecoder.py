"""Key maps of SeeCoder and its Swin backbone: ours and the released files (Prompt-Free Diffusion), which hold both.

Names there begin with `ctx.image.`; a file with another prefix is read alike. Attention heads leave no trace (8), nor
does which queries are global (the first 4). Relative positions, which follow from the window, are not read but written.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.convert.keymap import KeyMap, Pair, Renamed, count, indices, size
from ldm.models.swin import SwinConfig
from ldm.models.unet import UNetConfig
from ldm.registry import ConfigError

OUTER = "ctx.image."
GLOBAL, HEADS = 4, 8
INDEX = "attn.relative_position_index"
TABLE = "attn.relative_position_bias_table"
BLOCKS = r"^(?:net\.)?layers\.(\d+)\.blocks\.(\d+)\."
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")  # the same names in both
SWINS = {(96, 6): "Swin-T", (96, 18): "Swin-S", (128, 18): "Swin-B", (192, 18): "Swin-L"}
DECODER = (("attn.out_proj", "self_attn.out_proj"), ("norm1", "norm1"), ("norm2", "norm2"))
DECODER += (("ff.linear1", "linear1"), ("ff.linear2", "linear2"))
QUERY = (  # our module in a layer of the query transformer, theirs with the layer's number
    ("self_attn.out_proj", "transformer_selfatt_layers.{}.self_attn.out_proj"),
    ("self_norm", "transformer_selfatt_layers.{}.norm"),
    ("cross_attn.out_proj", "transformer_crossatt_layers.{}.multihead_attn.out_proj"),
    ("cross_norm", "transformer_crossatt_layers.{}.norm"),
    ("ff.linear1", "transformer_feedforward_layers.{}.linear1"),
    ("ff.linear2", "transformer_feedforward_layers.{}.linear2"),
    ("ff_norm", "transformer_feedforward_layers.{}.norm"),
)


@dataclass(frozen=True)
class SeeCoderConfig:
    """A SeeCoder without its backbone, from its file.

    Attributes:
        channels: of the feature maps, finest first.
        dim: width of the tokens.
        tokens: how many, global ones among them.
        layers: of the query transformer.
        hidden: inner width of its feed-forward.
        decoder_layers: of the decoder.
        decoder_hidden: inner width of its feed-forward.
        position: whether it is a SeeCoder-PA.
    """

    channels: tuple[int, ...] = (384, 768, 1536)
    dim: int = 768
    tokens: int = 148
    layers: int = 9
    hidden: int = 2048
    decoder_layers: int = 6
    decoder_hidden: int = 1024
    position: bool = False

    @property
    def node(self) -> dict[str, Any]:
        """YAML that builds it, with a backbone of the right widths, where they double."""
        ones = [1] * len(self.channels)
        encoder = {"name": "swin", "image_size": 32, "width": self.channels[0], "depths": ones, "heads": ones}
        own = ("layers", "hidden", "decoder_layers", "decoder_hidden", "position")
        return {
            "name": "seecoder",
            "encoder": encoder,
            "levels": len(ones),
            "global_queries": min(GLOBAL, self.tokens - 1),
            "local_queries": self.tokens - min(GLOBAL, self.tokens - 1),
            "heads": HEADS if self.dim % HEADS == 0 else 1,
            **{name: getattr(self, name) for name in own},
        }

    @property
    def unet(self) -> UNetConfig:
        """A UNet with this context; the rest is as small as can be."""
        return UNetConfig(channels=(1,), blocks=1, depth=(0,), mid_depth=0, context_dim=self.dim, groups=1)

    @property
    def words(self) -> str:
        """What it is, for people."""
        name = "SeeCoder-PA" if self.position else "SeeCoder"
        return f"{name} ({self.tokens} tokens of {self.dim}, features {self.channels})"

    def keymap(self, naming: str) -> KeyMap:
        """Its layout under the "original" (published) names or "ours"."""
        pairs = (*_decoder(self), *_query_transformer(self))
        table = KeyMap(pairs, ignored=r"^imencoder\.")
        return table if naming == "original" else KeyMap(pairs).identity()


def _leaves(modules: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    for ours, theirs in modules:
        yield from (Pair(f"{ours}.{leaf}", (f"{theirs}.{leaf}",)) for leaf in ("weight", "bias"))


def _decoder(config: SeeCoderConfig) -> Iterator[Pair]:
    ours, theirs, levels = "image_decoder", "imdecoder", len(config.channels)
    yield Pair(f"{ours}.level_embed", (f"{theirs}.level_embed",))
    for i in range(levels):
        name = f"res{6 - levels + i}"  # theirs are named by the backbone's stages, of which res5 is the last
        yield from _leaves(
            (f"{ours}.inputs.{i}.{a}", f"{theirs}.inproj_layers.{name}.{b}") for a, b in (("conv", 0), ("norm", 1))
        )
        yield Pair(f"{ours}.laterals.{i}.conv.weight", (f"{theirs}.lateral_layers.{name}.weight",))
        yield from _leaves([(f"{ours}.laterals.{i}.norm", f"{theirs}.lateral_layers.{name}.norm")])
    for k in range(config.decoder_layers):
        a, b = f"{ours}.layers.{k}", f"{theirs}.transformer.layers.{k}"
        for leaf in ("in_proj_weight", "in_proj_bias"):
            yield Pair(f"{a}.attn.{leaf}", (f"{b}.self_attn.{leaf}",))
        yield from _leaves((f"{a}.{x}", f"{b}.{y}") for x, y in DECODER)


def _query_transformer(config: SeeCoderConfig) -> Iterator[Pair]:
    ours, theirs = "query_transformer", "qtransformer"
    for a, b in (("queries", "init_query"), ("query_position", "query_pos_embedding"), ("level_embed", "level_embed")):
        yield Pair(f"{ours}.{a}", (f"{theirs}.{b}.weight",))
    for k in range(config.layers):
        for a, b in (
            ("self_attn", f"selfatt_layers.{k}.self_attn"),
            ("cross_attn", f"crossatt_layers.{k}.multihead_attn"),
        ):
            for leaf in ("in_proj_weight", "in_proj_bias"):
                yield Pair(f"{ours}.layers.{k}.{a}.{leaf}", (f"{theirs}.transformer_{b}.{leaf}",))
        yield from _leaves((f"{ours}.layers.{k}.{a}", f"{theirs}.{b.format(k)}") for a, b in QUERY)
    yield from _leaves((f"{ours}.position.mlp.{n}", f"{theirs}.pe_layer.mlp.{n}") for n in (0, 2, 4))


def seecoder(state: Mapping[str, Tensor], naming: str) -> tuple[SeeCoderConfig, Renamed]:
    """Config and our tensors of a SeeCoder. Raises: ConfigError if the tensors that tell its shape are missing."""
    theirs = naming == "original"
    inputs = r"^imdecoder\.inproj_layers\.res(\d+)\.0\." if theirs else r"^image_decoder\.inputs\.(\d+)\.conv\."
    layers = r"^qtransformer\.\w+_layers\.(\d+)\." if theirs else r"^query_transformer\.layers\.(\d+)\."
    decoder = r"^imdecoder\.transformer\.layers\.(\d+)\." if theirs else r"^image_decoder\.layers\.(\d+)\."
    levels = max(len(set(indices(state, inputs))), 1)
    frame = SeeCoderConfig((1,) * levels, layers=max(count(state, layers), 1), decoder_layers=count(state, decoder))
    renamed = frame.keymap(naming).rename(state)
    ours, depth = renamed.tensors, frame.decoder_layers
    found = dataclasses.replace(
        frame,
        channels=tuple(size(ours, f"image_decoder.inputs.{i}.conv.weight", 1) for i in range(levels)),
        dim=size(ours, "query_transformer.queries", 1),
        tokens=max(size(ours, "query_transformer.queries", 0), 2),
        hidden=size(ours, "query_transformer.layers.0.ff.linear1.weight", 0),
        decoder_hidden=size(ours, "image_decoder.layers.0.ff.linear1.weight", 0) if depth else 1,
        position=any(key.startswith("query_transformer.position.") for key in ours),
    )
    return found, renamed


def places(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The networks of a released file, each with what its names begin with, whatever stands before `imencoder.`."""
    found: dict[str, str] = {}
    for key in state:
        if match := re.match(r"(|.*?\.)(imencoder|imdecoder|qtransformer)\.", key):
            backbone = match[2] == "imencoder"
            found.setdefault("swin" if backbone else "seecoder", match[0] if backbone else match[1])
    return found


def swin_map(config: SwinConfig, naming: str) -> KeyMap:
    """The layout of a Swin under the "original" names, without `imencoder.`, or "ours"."""
    modules = [("net.patch_embed.proj", "patch_embed.proj"), ("net.patch_embed.norm", "patch_embed.norm")]
    plain: list[tuple[str, str]] = []
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            modules += [(f"net.{block}.{name}", f"{block}.{name}") for name in BLOCK]
            plain.append((f"net.{block}.{TABLE}", f"{block}.{TABLE}"))
        if i:  # timm, whose names ours are, has it at the start of the next stage
            ours, theirs = f"net.layers.{i}.downsample", f"layers.{i - 1}.downsample"
            modules.append((f"{ours}.norm", f"{theirs}.norm"))
            plain.append((f"{ours}.reduction.weight", f"{theirs}.reduction.weight"))
        if config.pyramid:
            modules.append((f"norms.{i}", f"norm{i}"))
    if naming == "ours" and not config.pyramid:  # released files have a norm behind every stage
        modules.append(("net.norm", "norm"))
    table = KeyMap((*_leaves(modules), *(Pair(a, (b,)) for a, b in plain)), ignored=rf"{INDEX}$")
    return table if naming == "original" else table.identity()


def swin(state: Mapping[str, Tensor], naming: str) -> tuple[SwinConfig, Renamed]:
    """Config and our tensors of a Swin; its own image size leaves no trace and is that of the released ones.

    Raises: ConfigError if the tensors that tell its shape are missing.
    """
    found = indices(state, BLOCKS)
    stages = range(max((i for i, _ in found), default=0) + 1)
    depths = tuple(max((j + 1 for stage, j in found if stage == i), default=0) for i in stages)
    if 0 in depths:
        raise ConfigError(f"Swin blocks per stage are {depths}: some are missing, this is part of a checkpoint")
    norm = "norm0.weight" if naming == "original" else "norms.0.weight"
    pyramid = norm in state
    frame = SwinConfig(width=1, depths=depths, heads=(1,) * len(depths), pyramid=pyramid, unit_range=pyramid)
    renamed = swin_map(frame, naming).rename(state)
    ours = renamed.tensors
    width, patch = (size(ours, "net.patch_embed.proj.weight", axis) for axis in (0, 2))
    window = (math.isqrt(size(ours, f"net.layers.0.blocks.0.{TABLE}", 0)) + 1) // 2
    heads = tuple(size(ours, f"net.layers.{i}.blocks.0.{TABLE}", 1) for i in stages)
    shape = {"image_size": 8 * patch * window, "patch": patch, "width": width, "window": window, "heads": heads}
    return dataclasses.replace(frame, **shape), renamed


def swin_words(config: SwinConfig) -> str:
    """What a Swin is, for people."""
    name = SWINS.get((config.width, max(config.depths)), "Swin")
    return f"{name} ({config.width} wide, blocks {config.depths}, window {config.window})"


def swin_buffers(config: SwinConfig) -> dict[str, Tensor]:
    """What a released file has besides weights: for each pair of tokens of a window, its row in the bias table.

    Returns: name, without `imencoder.` -> window**2 window**2, int64.
    """
    side, place = config.window, torch.arange(config.window**2)
    down, right = (n[:, None] - n[None] + side - 1 for n in (place // side, place % side))
    index = down * (2 * side - 1) + right
    names = (f"layers.{i}.blocks.{j}.{INDEX}" for i, depth in enumerate(config.depths) for j in range(depth))
    return dict.fromkeys(names, index)
