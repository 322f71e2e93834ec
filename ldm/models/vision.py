"""Published CLIP image towers: open_clip's vision transformer with its projection and its own pixel normalisation.

Radford et al. 2021 (arXiv:2103.00020); OpenCLIP ViT-H/14 and ViT-bigG/14 (arXiv:2212.07143) serve image prompts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.models.clip import ImageTower, check_multiples, check_positive, tokens_of
from ldm.registry import ConfigError, register
from ldm.transfer import send

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = ("gelu", "quick_gelu")


@dataclass(frozen=True)
class OpenCLIPConfig:
    """Shape of a published tower; the defaults are OpenCLIP ViT-H/14's.

    ViT-bigG/14: width 1664, layers 48, heads 16, mlp 8192, embed_dim 1280. OpenAI ViT-L/14: width 1024, layers 24,
    heads 16, mlp 4096, embed_dim 768, activation quick_gelu.

    Attributes:
        image_size: side in pixels, a multiple of `patch`.
        patch: side of a patch in pixels.
        width: channels, a multiple of `heads`.
        layers: transformer blocks, at least 2.
        heads: attention heads.
        mlp: inner width of the feed-forward.
        embed_dim: width of the projected features.
        activation: "gelu" (exact; OpenCLIP's weights) or "quick_gelu" (OpenAI's).
    """

    image_size: int = 224
    patch: int = 14
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp: int = 5120
    embed_dim: int = 1024
    activation: str = "gelu"

    def __post_init__(self) -> None:
        check_positive("open_clip", self, ("image_size", "patch", "width", "heads", "mlp", "embed_dim"))
        if self.layers < 2:
            raise ConfigError(
                f"open_clip.layers is {self.layers}, must be at least 2: image prompts read the last but one"
            )
        check_multiples("open_clip", self, {"image_size": "patch", "width": "heads"})
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"open_clip.activation is {self.activation!r}; allowed: {', '.join(ACTIVATIONS)}")


@register("image", "open_clip", options=OpenCLIPConfig)
class OpenCLIPTower(ImageTower):
    """Images in [-1, 1] are normalised with CLIP's mean and standard deviation here, so the tower is used like any."""

    def __init__(self, config: OpenCLIPConfig) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, VisionTransformer  # slow to import: not before a tower is built

        self.config = config
        self.width, self.pooled_width, self.image_size = config.width, config.embed_dim, config.image_size
        self.zero_colour = (2 * MEAN[0] - 1, 2 * MEAN[1] - 1, 2 * MEAN[2] - 1)
        self.net = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=config.mlp / config.width,
            output_dim=config.embed_dim,
            act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Projected class token, b embed_dim; not of unit length, as image prompts take it."""
        return self.net(self._normalised(x))

    def tokens(self, x: Tensor, *, last: bool = False) -> Tensor:
        """Output of the last block but one (of the last one) without LayerNorm, class token first: b 1+n width."""
        return tokens_of(self.net, self._normalised(x), self.config.layers - (1 if last else 2))

    def _normalised(self, x: Tensor) -> Tensor:
        side = self.config.image_size
        if x.shape[2:] != (side, side):
            raise ValueError(
                f"open_clip: image is {x.shape[2]}x{x.shape[3]} (h w), must be {side} on both sides; resize it"
            )
        mean, std = (send(torch.tensor(v, dtype=x.dtype), x.device).view(3, 1, 1) for v in (MEAN, STD))
        return (x / 2 + 0.5 - mean) / std
