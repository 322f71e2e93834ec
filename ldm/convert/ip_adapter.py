"""Key maps of IP-Adapter and its image encoder, as published by the authors (h94/IP-Adapter) and by transformers.

An adapter's .safetensors is flat (`image_proj.*`, `ip_adapter.<n>.to_k_ip.weight`), its .bin has two dicts of these
names. n is odd: the adapter's layers were numbered among all attention layers, self-attention first in each pair, in
the order down, up, mid; ours are in the order of execution: down, mid, up.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.convert.keymap import KeyMap, Pair, Renamed, count, indices, size
from ldm.convert.tables import TEXT_BLOCK
from ldm.models.unet import CrossAttn, UNetConfig
from ldm.models.vision import OpenCLIPConfig
from ldm.registry import ConfigError

EXECUTION = ("down", "mid", "up")
COUNTS = {16: (6, 1, 9), 70: (24, 10, 36)}  # layers -> those of each part, of the published UNets
LAYER = r"(?:resblocks|layers)\.(\d+)\."
PARTS = ("down", "up", "mid")
RESAMPLER = (("proj_in", "proj_in"), ("proj_out", "proj_out"), ("norm_out", "norm_out"))
RESAMPLER_LAYER = (
    ("norm_x", "0.norm1"),
    ("norm_z", "0.norm2"),
    ("to_q", "0.to_q"),
    ("to_kv", "0.to_kv"),
    ("to_out", "0.to_out"),
    ("ff_norm", "1.0"),
    ("ff_in", "1.1"),
    ("ff_out", "1.3"),
)
PROJECTIONS = {  # variant -> our module and theirs
    "base": (("proj", "proj"), ("norm", "norm")),
    "full": (("fc1", "proj.0"), ("fc2", "proj.2"), ("norm", "proj.3")),
}
VARIANTS = (  # and names in image_proj that tell each: a FaceID projection has "proj.0" too, but no "proj.3"
    ("plus", ("latents", "proj_in.weight")),
    ("base", ("proj.weight", "norm.weight")),
    ("full", ("proj.0.weight", "proj.3.weight")),
    ("full", ("fc1.weight",)),  # our name
)


def numbers(layers: Sequence[CrossAttn]) -> list[int]:
    """The number in published files of each of our layers."""
    order = [i for part in PARTS for i, layer in enumerate(layers) if layer.part == part]
    return [2 * order.index(i) + 1 for i in range(len(layers))]


def published(layers: Sequence[CrossAttn], variant: str, depth: int = 4) -> KeyMap:
    """`IPAdapter` and its published file.

    Args:
        layers: `UNetSpec.cross_attn` of its UNet.
        variant: of the adapter: base | plus | full.
        depth: layers of the resampler in "plus".
    """
    pairs = list(_projection(variant, depth))
    for i, n in enumerate(numbers(layers)):
        pairs += [Pair(f"to_{x}.{i}.weight", (f"ip_adapter.{n}.to_{x}_ip.weight",)) for x in "kv"]
    return KeyMap(tuple(pairs))


def _projection(variant: str, depth: int) -> list[Pair]:
    if variant == "plus":
        rows = [*RESAMPLER, *((f"layers.{i}.{a}", f"layers.{i}.{b}") for i in range(depth) for a, b in RESAMPLER_LAYER)]
        pairs = [Pair("image.proj.latents", ("image_proj.latents",))]
    else:
        rows, pairs = list(PROJECTIONS[variant]), []
    leaves = ("weight", "bias")
    return pairs + [Pair(f"image.proj.{a}.{leaf}", (f"image_proj.{b}.{leaf}",)) for a, b in rows for leaf in leaves]


def transformers_vision(config: OpenCLIPConfig) -> KeyMap:
    """`OpenCLIPTower` and transformers' CLIPVisionModelWithProjection, as the authors publish the encoder."""
    top, ours = "vision_model", "net"
    modules = [(f"{ours}.ln_pre", f"{top}.pre_layrnorm"), (f"{ours}.ln_post", f"{top}.post_layernorm")]
    pairs = [
        Pair(f"{ours}.class_embedding", (f"{top}.embeddings.class_embedding",)),
        Pair(f"{ours}.positional_embedding", (f"{top}.embeddings.position_embedding.weight",)),
        Pair(f"{ours}.conv1.weight", (f"{top}.embeddings.patch_embedding.weight",)),
        Pair(f"{ours}.proj", ("visual_projection.weight",), "transpose"),
    ]
    for i in range(config.layers):
        a, b = f"{ours}.transformer.resblocks.{i}", f"{top}.encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            pairs.append(Pair(f"{a}.attn.in_proj_{leaf}", tuple(f"{b}.self_attn.{x}_proj.{leaf}" for x in "qkv")))
        modules += [(f"{a}.{x}", f"{b}.{y}") for x, y in TEXT_BLOCK]
    pairs += [Pair(f"{a}.{leaf}", (f"{b}.{leaf}",)) for a, b in modules for leaf in ("weight", "bias")]
    return KeyMap(tuple(pairs), ignored=r"position_ids$")


def open_clip_vision(config: OpenCLIPConfig) -> KeyMap:
    """`OpenCLIPTower` and `visual.*` of open_clip's own files, whose text half is not read."""
    names = [pair.ours for pair in transformers_vision(config).pairs]
    pairs = tuple(Pair(name, ("visual" + name.removeprefix("net"),)) for name in names)
    return KeyMap(pairs, ignored=r"^(?!visual\.)")


@dataclass(frozen=True)
class IPAdapterConfig:
    """An IP-Adapter, from its file.

    Attributes:
        layers: inner width of each cross-attention layer, in order of execution.
        context_dim: width of the tokens.
        variant: base | plus | full.
        image_dim: width of the encoder's features.
        tokens: per reference; None in "full".
        width: of the resampler; None without one.
        depth: its layers.
    """

    layers: tuple[int, ...]
    context_dim: int
    variant: str
    image_dim: int
    tokens: int | None
    width: int | None = None
    depth: int = 4

    @property
    def cross_attn(self) -> list[CrossAttn]:
        """As `UNetSpec.cross_attn`, with the parts of the published UNet that has so many layers."""
        parts = [part for part, count in zip(EXECUTION, COUNTS[len(self.layers)], strict=True) for _ in range(count)]
        return [CrossAttn(inner, 1, part) for inner, part in zip(self.layers, parts, strict=True)]

    @property
    def unet(self) -> UNetConfig:
        """A UNet with these layers."""
        xl = len(self.layers) == sum(COUNTS[70])
        down = self.layers[: COUNTS[len(self.layers)][0]]
        channels = (down[0], down[0], down[-1]) if xl else (down[0], down[2], down[4], down[4])
        depth, mid = ((0, 2, 10), 10) if xl else ((1, 1, 1, 0), 1)
        return UNetConfig(
            channels=channels, depth=depth, mid_depth=mid, context_dim=self.context_dim, num_heads=1, groups=1
        )

    @property
    def node(self) -> dict[str, Any]:
        """YAML that builds it, with an encoder of the right width."""
        encoder = {"name": "vit", "image_size": 8, "patch": 8, "width": self.image_dim, "layers": 2, "heads": 1}
        node: dict[str, Any] = {
            "name": "ip_adapter",
            "variant": self.variant,
            "encoder": encoder,
            "tokens": self.tokens,
        }
        if self.width is not None:
            node |= {"width": self.width, "depth": self.depth, "head_dim": math.gcd(64, self.width)}
        return node

    @property
    def words(self) -> str:
        """What it is, for people."""
        family = {(16, 768): "SD1.x", (16, 1024): "SD2.x", (70, 2048): "SDXL"}
        base = family.get((len(self.layers), self.context_dim), "a custom UNet")
        shape = f"{len(self.layers)} layers, context {self.context_dim}, image features {self.image_dim}"
        return f"IP-Adapter {self.variant} for {base} ({shape})"

    def keymap(self, naming: str) -> KeyMap:
        """Its layout under the "original" (published) names or "ours"."""
        table = published(self.cross_attn, self.variant, self.depth)
        return table if naming == "original" else table.identity()


def ip_adapter(state: Mapping[str, Tensor], naming: str) -> tuple[IPAdapterConfig, Renamed]:
    """Config and our tensors of an IP-Adapter under "original" (published) names or "ours".

    Raises: ConfigError if it is of no UNet or kind that is known.
    """
    original = naming == "original"
    mark = "image_proj." if original else "image.proj."
    image = {key.removeprefix(mark) for key in state if key.startswith(mark)}
    if not image:
        raise ConfigError(f"half of an IP-Adapter: no {mark}* tensors, which read the picture")
    layers = len(indices(state, r"^ip_adapter\.(\d+)\.to_k_ip\.weight$" if original else r"^to_k\.(\d+)\.weight$"))
    if layers not in COUNTS:
        raise ConfigError(f"IP-Adapter with {layers} cross-attention layers; known: 16 (SD1.x, SD2.x), 70 (SDXL)")
    variant = next((kind for kind, marks in VARIANTS if image.issuperset(marks)), None)
    if variant is None:
        some = ", ".join(sorted(image)[:3])
        raise ConfigError(f"IP-Adapter of an unknown kind (image_proj: {some}); known: base, plus, full")
    frame = IPAdapterConfig((1,) * layers, 1, variant, 1, None, depth=count(image, r"^layers\.(\d+)\.") or 1)
    renamed = frame.keymap(naming).rename(state)
    ours = renamed.tensors
    config = dataclasses.replace(
        frame,
        layers=tuple(size(ours, f"to_k.{i}.weight", 0) for i in range(layers)),
        context_dim=size(ours, "to_k.0.weight", 1),
        **_image_part(ours, variant),
    )
    return config, renamed


def _image_part(ours: Mapping[str, Tensor], variant: str) -> dict[str, int]:
    """Sizes of the projection."""
    at = "image.proj."
    if variant == "plus":
        tokens, width = (size(ours, at + "latents", axis) for axis in (1, 2))
        return {"image_dim": size(ours, at + "proj_in.weight", 1), "tokens": tokens, "width": width}
    if variant == "full":
        return {"image_dim": size(ours, at + "fc1.weight", 1)}
    rows, image_dim = (size(ours, at + "proj.weight", axis) for axis in (0, 1))
    return {"image_dim": image_dim, "tokens": max(rows // size(ours, at + "norm.weight", 0), 1)}


def vision(state: Mapping[str, Tensor], naming: str) -> tuple[OpenCLIPConfig, Renamed]:
    """Config and our tensors of an image encoder under "transformers", "open_clip" or "ours" names.

    Heads and activation leave no trace in a file: they follow the published model of that width.
    """
    frame = OpenCLIPConfig(layers=max(2, count(state, LAYER)))
    renamed = vision_map(frame, naming).rename(state)
    ours = renamed.tensors
    width, patch = (size(ours, "net.conv1.weight", axis) for axis in (0, 2))
    config = OpenCLIPConfig(
        image_size=patch * math.isqrt(size(ours, "net.positional_embedding", 0) - 1),
        patch=patch,
        width=width,
        layers=frame.layers,
        heads=16 if width >= 1024 else max(width // 64, 1),
        mlp=size(ours, "net.transformer.resblocks.0.mlp.c_fc.weight", 0),
        embed_dim=size(ours, "net.proj", 1),
        activation="quick_gelu" if width <= 1024 else "gelu",
    )
    return config, renamed


def vision_map(config: OpenCLIPConfig, naming: str) -> KeyMap:
    """The layout of an image encoder under these names."""
    if naming == "open_clip":
        return open_clip_vision(config)
    table = transformers_vision(config)
    return table if naming == "transformers" else table.identity()
