"""Hint extractors: what turns a picture into the map that an adapter reads.

Each is registered under kind "hint" and maps an image, b 3 h w in [0, 1], to a hint, b `channels` h w in [0, 1]. They
run where data is read (`data.hints: {color: {name: color}}`) and where pictures are drawn
(`adapters.color.extractor: color`). Depth, segmentation, poses and drawn lines come from models or hands outside this
project: their extractors take the finished map and bring it to the range and polarity of training.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.registry import ConfigError, register

LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601
FLAT: Final = 1e-3  # strongest edge, or range of brightness, below which maps stay dark instead of stretched


@register("hint", "canny")
@dataclass(frozen=True)
class Canny:
    """Canny 1986 edges by OpenCV, {0, 1}, white on black; needs the `hints` extra.

    Attributes:
        low: hysteresis threshold of the gradient, 0-255 scale; 100 and 200 are those of the released tools.
        high: see `low`.
    """

    low: int = 100
    high: int = 200
    channels: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ConfigError(f"hint canny: low is {self.low} and high {self.high}; must satisfy 0 <= low <= high")

    def __call__(self, image: Tensor) -> Tensor:
        """Edges, b 1 h w. Raises: ConfigError if OpenCV is not installed."""
        try:
            import cv2  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                'hint canny needs OpenCV, which is not installed: pip install "ldm-adapters[hints]", or choose sketch'
            ) from error
        pixels = image.detach().mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
        edges = [torch.from_numpy(cv2.Canny(p.contiguous().numpy(), self.low, self.high)) for p in pixels]
        return torch.stack(edges).unsqueeze(1).to(image) / 255


@register("hint", "sketch")
@dataclass(frozen=True)
class Sketch:
    """Soft edges of the brightness, white on black: Sobel gradient of the blurred luma over its maximum.

    Stands in for PiDiNet, the learned edge detector of the paper, whose output is thresholded at 0.5; so is this.

    Attributes:
        sigma: standard deviation of the Gaussian blur before, pixels; 0 is none.
        threshold: share of the strongest edge from which on a pixel is 1, below 0; null keeps the soft edges.
    """

    sigma: float = 1.0
    threshold: float | None = 0.25
    channels: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sigma <= 100:
            raise ConfigError(f"hint sketch: sigma is {self.sigma} pixels, must be in [0, 100]")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ConfigError(f"hint sketch: threshold is {self.threshold}, must be in (0, 1), or null for soft edges")

    def __call__(self, image: Tensor) -> Tensor:
        """Edges, b 1 h w; all 0 for a picture of one brightness."""
        grey = _blur(luma(image), self.sigma)
        smooth, slope = grey.new_tensor([0.25, 0.5, 0.25]), grey.new_tensor([-0.5, 0.0, 0.5])
        padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
        across = F.conv2d(F.conv2d(padded, slope.view(1, 1, 1, 3)), smooth.view(1, 1, 3, 1))
        down = F.conv2d(F.conv2d(padded, smooth.view(1, 1, 1, 3)), slope.view(1, 1, 3, 1))
        strength = torch.hypot(across, down)
        edges = strength / strength.amax(dim=(-2, -1), keepdim=True).clamp_min(FLAT)
        return edges if self.threshold is None else (edges >= self.threshold).to(image.dtype)


@register("hint", "color")
@dataclass(frozen=True)
class Color:
    """The palette: bicubic shrinking, then nearest enlarging, so every cell has one colour (section 3.3).

    Attributes:
        cell: side of a cell in pixels; 64 of 512 in the paper, so 8 for pictures of 64.
    """

    cell: int = 64
    channels: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.cell < 1:
            raise ConfigError(f"hint color: cell is {self.cell} pixels, must be at least 1")

    def __call__(self, image: Tensor) -> Tensor:
        """Cells, b 3 h w. Raises: ConfigError if the picture is smaller than a cell."""
        height, width = image.shape[-2:]
        small = (height // self.cell, width // self.cell)
        if 0 in small:
            raise ConfigError(
                f"hint color: cell is {self.cell} pixels, the picture {height}x{width} (h w); must fit "
                "at least once: lower cell"
            )
        cells = F.interpolate(image, size=small, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return F.interpolate(cells, size=(height, width), mode="nearest-exact")


@register("hint", "depth")
@dataclass(frozen=True)
class Depth:
    """A finished depth map, spread over [0, 1] picture by picture as the released training did; near is bright.

    Attributes:
        invert: the map has near dark.
    """

    invert: bool = False
    channels: ClassVar[int] = 3

    def __call__(self, image: Tensor) -> Tensor:
        """Three equal channels, b 3 h w, lowest 0 and highest 1; a flat map is 0 throughout."""
        grey = 1 - luma(image) if self.invert else luma(image)
        low, high = grey.amin(dim=(-2, -1), keepdim=True), grey.amax(dim=(-2, -1), keepdim=True)
        spread = (grey - low) / (high - low).clamp_min(FLAT)
        return spread.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Map:
    """A finished map, taken as it is: segmentation colours, drawn poses, drawn lines.

    Attributes:
        invert: the map is dark on white; training had it bright on black.
    """

    invert: bool = False
    channels: ClassVar[int] = 3

    def __call__(self, image: Tensor) -> Tensor:
        """The map, b 3 h w."""
        return 1 - image if self.invert else image


for _name in ("segmentation", "keypose", "openpose", "lineart"):
    register("hint", _name)(Map)


def luma(image: Tensor) -> Tensor:
    """Brightness of b 3 h w in [0, 1]: b 1 h w in [0, 1]."""
    return (image * image.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of b 1 h w with repeated borders."""
    if sigma == 0:
        return x
    reach = max(1, round(3 * sigma))
    steps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))
