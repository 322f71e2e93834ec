"""Swin: a window transformer with feature maps of several resolutions, on images of any size.

Liu et al. 2021 (arXiv:2103.14030). The blocks are timm's, set so that they compute what the first released code does
at every size: windows never shrink to the map, and maps are padded to whole windows before they are shifted.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.clip import ImageTower, check_positive
from ldm.registry import ConfigError, register


@dataclass(frozen=True)
class SwinConfig:
    """Hierarchical window transformer for images of any size.

    Attributes:
        image_size: side in pixels that it is trained at.
        patch: side of a patch in pixels; stage k works at 1 / (patch * 2**k) of the image.
        width: channels of the first stage; they double per stage.
        depths: blocks per stage.
        heads: attention heads per stage.
        window: side of an attention window, in tokens.
        pyramid: a learned LayerNorm behind every stage, as SeeCoder's backbone has; else behind the last alone.
        unit_range: the network reads pixels in [0, 1], as SeeCoder's backbone does; else in [-1, 1].
    """

    image_size: int = 64
    patch: int = 4
    width: int = 48
    depths: tuple[int, ...] = (2, 2, 4)
    heads: tuple[int, ...] = (2, 4, 8)
    window: int = 4
    pyramid: bool = False
    unit_range: bool = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: if a number is below 1, or the lists have different lengths.
        """
        check_positive("swin", self, ("image_size", "patch", "width", "window"))
        if not self.depths or len(self.depths) != len(self.heads):
            raise ConfigError(f"swin.depths is {self.depths}, heads {self.heads}; give one number per stage in both")
        if bad := [h for k, h in enumerate(self.heads) if h < 1 or (self.width * 2**k) % h]:
            raise ConfigError(f"swin.heads has {bad}, must divide the stage's width, {self.width} * 2**stage")


@cache
def _pad_first() -> Any:
    """The class of timm's blocks, changed; made late, for timm is slow to import."""
    from timm.models.swin_transformer import SwinTransformerBlock

    class PadFirst(SwinTransformerBlock):
        """Pads the map to whole windows, then shifts it; timm shifts first."""

        def _attn(self, x: Tensor) -> Tensor:
            h, w = x.shape[1:3]
            tall, wide = self.window_size
            return super()._attn(F.pad(x, (0, 0, 0, -w % wide, 0, -h % tall)))[:, :h, :w]

    return PadFirst


@register("image", "swin", options=SwinConfig)
class Swin(ImageTower):
    """timm's Swin transformer as one function of images of every size: sides are padded to whole patches."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer  # slow to import: not before a tower is built

        self.config = config
        self.widths = tuple(config.width * 2**k for k in range(len(config.depths)))
        self.width = self.pooled_width = self.widths[-1]
        self.image_size = config.image_size
        self.zero_colour = (-1.0, -1.0, -1.0) if config.unit_range else (0.0, 0.0, 0.0)
        self.net = SwinTransformer(
            img_size=config.image_size,
            patch_size=config.patch,
            num_classes=0,
            embed_dim=config.width,
            depths=config.depths,
            num_heads=config.heads,
            window_size=config.window,
            always_partition=True,
            strict_img_size=False,
            drop_path_rate=0.0,
        )
        cast("Any", self.net.patch_embed).dynamic_img_pad = True
        for stage in self.net.layers:
            for block in cast("Any", stage).blocks:
                block.__class__ = _pad_first()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths if config.pyramid)
        if config.pyramid:
            self.net.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features: the mean over the last stage after its LayerNorm, b d."""
        return self.tokens(x).mean(dim=1)

    def tokens(self, x: Tensor, *, last: bool = False) -> Tensor:
        """Last stage after its LayerNorm, b n d in row order; there is no choice."""
        del last
        y = self.net.forward_features(self._pixels(x))
        return rearrange(self.norms[-1](y) if self.norms else y, "b h w d -> b (h w) d")

    def stages(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps b c h w of every stage, full resolution first, behind a LayerNorm.

        It is the learned one of a `pyramid`, else one without weights: the features of a residual stream grow with
        depth. x: b 3 h w in [-1, 1].
        """
        y, maps = self.net.patch_embed(self._pixels(x)), []
        for k, stage in enumerate(self.net.layers):
            y = stage(y)
            normed = self.norms[k](y) if self.norms else F.layer_norm(y, y.shape[-1:])
            maps.append(rearrange(normed, "b h w c -> b c h w"))
        return tuple(maps)

    def _pixels(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.config.patch:
            raise ValueError(
                f"swin: image is {x.shape[2]}x{x.shape[3]} (h w), sides must be at least {self.config.patch}"
            )
        return x / 2 + 0.5 if self.config.unit_range else x
