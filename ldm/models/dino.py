"""DINOv2 image towers: timm's vision transformer with ImageNet's pixel normalisation.

Oquab et al. 2023 (arXiv:2304.07193).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.models.clip import ImageTower, check_multiples, check_positive
from ldm.registry import register
from ldm.transfer import send

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DinoConfig:
    """Shape of a tower; the defaults are ViT-B/14's.

    ViT-S/14: width 384, heads 6. ViT-L/14: width 1024, layers 24, heads 16. Weights are timm's
    (vit_base_patch14_dinov2.lvd142m), whose positions are those of 518 pixels; other sizes interpolate them.

    Attributes:
        image_size: side in pixels that pictures are brought to, a multiple of `patch`.
        patch: side of a patch in pixels.
        width: channels, a multiple of `heads`.
        layers: transformer blocks.
        heads: attention heads.
        positions: side in pixels that the weights' position embedding is for.
    """

    image_size: int = 224
    patch: int = 14
    width: int = 768
    layers: int = 12
    heads: int = 12
    positions: int = 518

    def __post_init__(self) -> None:
        check_positive("dino", self, ("image_size", "patch", "width", "layers", "heads", "positions"))
        check_multiples("dino", self, {"image_size": "patch", "positions": "patch", "width": "heads"})


@register("image", "dino", options=DinoConfig)
class DinoTower(ImageTower):
    """Images in [-1, 1] are normalised here, so the tower is used like any."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer  # slow to import: not before a tower is built

        self.config, self.image_size = config, config.image_size
        self.width = self.pooled_width = config.width
        self.zero_colour = (2 * MEAN[0] - 1, 2 * MEAN[1] - 1, 2 * MEAN[2] - 1)
        self.net: Any = VisionTransformer(
            img_size=config.positions,
            patch_size=config.patch,
            num_classes=0,
            global_pool="token",
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            init_values=1e-5,
            dynamic_img_size=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class token behind the last LayerNorm, b width."""
        return self.net(self._normalised(x))

    def tokens(self, x: Tensor, *, last: bool = False) -> Tensor:
        """Output of the last block but one (of the last one) without LayerNorm, class token first: b 1+n width."""
        index = max(self.config.layers - (1 if last else 2), 0)
        parts = self.net.forward_intermediates(
            self._normalised(x), indices=[index], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
        places, prefix = parts[0]
        return torch.cat([prefix, places], dim=1)

    def _normalised(self, x: Tensor) -> Tensor:
        mean, std = (send(torch.tensor(v, dtype=x.dtype), x.device).view(3, 1, 1) for v in (MEAN, STD))
        return (x / 2 + 0.5 - mean) / std
