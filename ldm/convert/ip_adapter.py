"""Key maps of IP-Adapter and its image encoder, as published by the authors (h94/IP-Adapter) and by transformers.

An adapter's .safetensors is flat (`image_proj.*`, `ip_adapter.<n>.to_k_ip.weight`), its .bin has two dicts of these
names. n is odd: the adapter's layers were numbered among all attention layers, self-attention first in each pair, in
the order down, up, mid; ours are in the order of execution: down, mid, up.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.convert.keymap import KeyMap, Pair, Renamed
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
VISION_LAYER = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
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
        modules += [(f"{a}.{x}", f"{b}.{y}") for x, y in VISION_LAYER]
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
        return table if naming == "original" else KeyMap(tuple(Pair(p.ours, (p.ours,)) for p in table.pairs))


def ip_adapter(state: Mapping[str, Tensor], naming: str) -> tuple[IPAdapterConfig, Renamed]:
    """Config and our tensors of an IP-Adapter under "original" (published) names or "ours".

    Raises: ConfigError if it is of no UNet or kind that is known.
    """
    mark, pattern = (
        ("image_proj.", r"^ip_adapter\.(\d+)\.to_k_ip") if naming == "original" else ("image.proj.", r"^to_k\.(\d+)\.")
    )
    rows = {int(found[1]): value for key, value in state.items() if (found := re.search(pattern, key))}
    if len(rows) not in COUNTS:
        raise ConfigError(f"IP-Adapter with {len(rows)} cross-attention layers; known: 16 (SD1.x, SD2.x), 70 (SDXL)")
    ordered = [rows[n] for n in sorted(rows)]
    if naming == "original":  # down, up, mid
        down, mid, _ = COUNTS[len(rows)]
        ordered = [*ordered[:down], *ordered[len(rows) - mid :], *ordered[down : len(rows) - mid]]
    image = {key[len(mark) :]: value for key, value in state.items() if key.startswith(mark)}
    config = IPAdapterConfig(tuple(v.shape[0] for v in ordered), ordered[0].shape[1], **_image_part(image))
    return config, config.keymap(naming).rename(state)


def _image_part(image: Mapping[str, Tensor]) -> dict[str, Any]:
    """Kind and sizes of the projection."""
    if "latents" in image and "proj_in.weight" in image:
        _, tokens, width = image["latents"].shape
        depth = 1 + max((int(k.split(".")[1]) for k in image if k.startswith("layers.")), default=0)
        return {
            "variant": "plus",
            "image_dim": image["proj_in.weight"].shape[1],
            "tokens": tokens,
            "width": width,
            "depth": depth,
        }
    if "proj.weight" in image and "norm.weight" in image:
        rows, image_dim = image["proj.weight"].shape
        return {"variant": "base", "image_dim": image_dim, "tokens": rows // len(image["norm.weight"])}
    for first in ("fc1.weight", "proj.0.weight"):
        if first in image and ("proj.3.weight" in image or first == "fc1.weight"):
            return {"variant": "full", "image_dim": image[first].shape[1], "tokens": None}
    raise ConfigError(
        f"IP-Adapter of an unknown kind (image_proj: {', '.join(sorted(image)[:3])}); known: base, plus, full"
    )


def vision(state: Mapping[str, Tensor], naming: str) -> tuple[OpenCLIPConfig, Renamed]:
    """Config and our tensors of an image encoder under "transformers", "open_clip" or "ours" names.

    Heads and activation leave no trace in a file: they follow the published model of that width.
    """
    frame = OpenCLIPConfig(layers=max(2, 1 + max((int(m[1]) for k in state if (m := re.search(LAYER, k))), default=0)))
    renamed = vision_map(frame, naming).rename(state)
    ours = renamed.tensors
    wanted = ("net.conv1.weight", "net.positional_embedding", "net.proj", "net.transformer.resblocks.0.mlp.c_fc.weight")
    if lacking := [name for name in wanted if name not in ours]:
        raise ConfigError(f"image encoder lacks {lacking[0]} (our name): this is part of a checkpoint")
    conv, positions, proj, mlp = (ours[name] for name in wanted)
    width, patch = conv.shape[0], conv.shape[2]
    config = OpenCLIPConfig(
        image_size=patch * math.isqrt(len(positions) - 1),
        patch=patch,
        width=width,
        layers=frame.layers,
        heads=16 if width >= 1024 else max(width // 64, 1),
        mlp=mlp.shape[0],
        embed_dim=proj.shape[1],
        activation="quick_gelu" if width <= 1024 else "gelu",
    )
    return config, renamed


def vision_map(config: OpenCLIPConfig, naming: str) -> KeyMap:
    """The layout of an image encoder under these names."""
    if naming == "open_clip":
        return open_clip_vision(config)
    table = transformers_vision(config)
    return table if naming == "transformers" else KeyMap(tuple(Pair(p.ours, (p.ours,)) for p in table.pairs))
