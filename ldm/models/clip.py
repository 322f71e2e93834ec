"""Contrastive pairs of a text tower and an image tower: Radford et al. 2021 (arXiv:2103.00020).

The text tower is what cross-attention reads; the image towers serve image prompts (ViT: IP-Adapter, Swin: SeeCoder).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.text import TextEncoder
from ldm.registry import ConfigError, build, register

INITIAL_TEMPERATURE = 0.07
MAX_LOGIT_SCALE = 100.0  # section 2.5 of the paper: clipped for stability


class ImageTower(nn.Module, ABC):
    """Image to features.

    Attributes:
        width: of the tokens.
        pooled_width: of the pooled features.
        image_size: side in pixels that it was trained at.
        zero_colour: the colour in [-1, 1] that is zero behind the tower's own normalisation.
    """

    width: int
    pooled_width: int
    image_size: int
    zero_colour: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Pooled features b d of images b 3 h w in [-1, 1]."""

    @abstractmethod
    def tokens(self, x: Tensor, *, last: bool = False) -> Tensor:
        """Local features b n d of images b 3 h w in [-1, 1], for adapters that read more than one vector.

        `last`: of a vision transformer, those behind the last block instead of the one before.
        """


@dataclass(frozen=True)
class ViTConfig:
    """Vision transformer at one image size.

    Attributes:
        image_size: side in pixels, a multiple of `patch`.
        patch: side of a patch in pixels.
        width: channels.
        layers: transformer blocks.
        heads: attention heads; divides `width`.
    """

    image_size: int = 64
    patch: int = 8
    width: int = 192
    layers: int = 6
    heads: int = 3

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: if a number is below 1, or one does not divide the other.
        """
        check_positive("vit", self, ("image_size", "patch", "width", "layers", "heads"))
        check_multiples("vit", self, {"image_size": "patch", "width": "heads"})


def tokens_of(net: Any, x: Tensor, block: int) -> Tensor:
    """Output of one block of an open_clip VisionTransformer, without LayerNorm, class token first: b 1+n d."""
    out = net.forward_intermediates(
        x,
        indices=[block],
        stop_early=True,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)


@register("image", "vit", options=ViTConfig)
class ViT(ImageTower):
    """open_clip's vision transformer without its projection. Dosovitskiy et al. 2021 (arXiv:2010.11929)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        from open_clip.transformer import VisionTransformer  # slow to import: not before a tower is built

        self.config = config
        self.width = self.pooled_width = config.width
        self.image_size = config.image_size
        self.net = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=4.0,
            output_dim=config.width,
        )
        self.net.prune_intermediate_layers(indices=1, prune_head=True)  # keeps every block, drops the projection

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features: the class token after the last LayerNorm, b d."""
        return self.net(self._sized(x))

    def tokens(self, x: Tensor, *, last: bool = False) -> Tensor:
        """Penultimate block's output without LayerNorm, class token first: b 1+n d, as IP-Adapter Plus reads it."""
        return tokens_of(self.net, self._sized(x), max(self.config.layers - (1 if last else 2), 0))

    def _sized(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.config.image_size, self.config.image_size):
            raise ValueError(
                f"vit: image is {x.shape[2]}x{x.shape[3]} (h w), must be {self.config.image_size} on both sides; "
                "resize it"
            )
        return x


@dataclass(frozen=True)
class CLIPConfig:
    """A text tower, an image tower and the size of the space they meet in.

    Attributes:
        text: options of a registered text tower; `name` defaults to "clip".
        image: options of a registered image tower; `name` is "vit" (default) or "swin".
        embed_dim: size of the shared embedding.
    """

    text: Mapping[str, Any] = field(default_factory=dict)
    image: Mapping[str, Any] = field(default_factory=dict)
    embed_dim: int = 128


@register("clip", "clip", options=CLIPConfig)
class CLIP(nn.Module):
    """Two towers trained to agree on pairs. Images are b 3 h w in [-1, 1], without CLIP's mean and std."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        check_positive("clip", config, ("embed_dim",))
        self.config = config
        self.text: TextEncoder = build("text", {"name": "clip", **config.text})
        self.image: ImageTower = build("image", {"name": "vit", **config.image})
        self.text_proj = _projection(self.text.config.width, config.embed_dim)
        self.image_proj = _projection(self.image.pooled_width, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE)))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image embeddings b d, text embeddings b d (unit length) and the logit scale (at most 100) of the loss."""
        return self.encode_image(x), self.encode_text(ids), self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def encode_image(self, x: Tensor) -> Tensor:
        """Images b 3 h w in [-1, 1] -> embeddings b d of unit length."""
        return F.normalize(self.image(x) @ self.image_proj, dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids b n int64 -> embeddings b d of unit length, whatever layer the text tower gives to others."""
        tokens = self.text.ln_final(self.text.hidden(ids))  # b n d
        return F.normalize(self.text.pooled(tokens, ids) @ self.text_proj, dim=-1)

    def image_tokens(self, x: Tensor) -> Tensor:
        """Images b 3 h w in [-1, 1] -> local features b n d of the image tower."""
        return self.image.tokens(x)


def _projection(width: int, embed_dim: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))


def check_positive(owner: str, config: object, names: tuple[str, ...]) -> None:
    """Raise ConfigError where one of these numbers is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{owner}.{name} is {getattr(config, name)}, must be at least 1")


def check_multiples(owner: str, config: object, pairs: Mapping[str, str]) -> None:
    """Raise ConfigError where a number is no multiple of the one that is named for it."""
    for name, by in pairs.items():
        value, divisor = getattr(config, name), getattr(config, by)
        if value % divisor:
            raise ConfigError(f"{owner}.{name} is {value}, must be a multiple of {owner}.{by}={divisor}")
