"""Geometry shared by an image and its hints: one window is drawn per sample and cut from all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.errors import DataError
from ldm.data.reading import MAX_PIXELS

CROPS: Final = ("center", "random", "none")


@dataclass(frozen=True, slots=True)
class Window:
    """A cut and an optional mirror image, in pixels."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    def cut(self, x: Tensor) -> Tensor:
        """Apply to x: c h w, any type; returns c height width."""
        x = x[:, self.top : self.top + self.height, self.left : self.left + self.width]
        return x.flip(-1) if self.flip else x


def draw_window(
    height: int, width: int, size: tuple[int, int], *, crop: str, flip: bool, generator: torch.Generator | None
) -> Window:
    """Choose the window for one sample.

    Args:
        height: of the resized image, at least that of `size`.
        width: as height.
        size: (height, width) of the cut.
        crop: "random" places the window with the generator; everything else centres it.
        flip: mirror half of the samples.
        generator: CPU generator; None means no augmentation: centred, not mirrored.
    """
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    if generator is None:
        return Window(top, left, *size)
    if crop == "random":
        top = int(torch.randint(height - size[0] + 1, (), generator=generator))
        left = int(torch.randint(width - size[1] + 1, (), generator=generator))
    return Window(top, left, *size, flip and bool(torch.rand((), generator=generator) < 0.5))


def centred(pixels: Tensor, side: int) -> Tensor:
    """The square of that side in the middle of c h w."""
    height, width = pixels.shape[-2:]
    return Window((height - side) // 2, (width - side) // 2, side, side).cut(pixels)


def resize(
    image: Image.Image, size: int | tuple[int, int], *, crop: str, hint: bool, source: object = "image"
) -> Tensor:
    """As small as covers `size` (crop "none": exactly that, squeezed), as 3 h w uint8.

    Images use antialiased bicubic; hints use the area average, which never overshoots and invents no values
    outside a line's own two.

    Args:
        image: RGB or grey.
        size: (height, width), or the side of a square, which the shorter side gets.
        crop: one of CROPS.
        hint: it is a map, no picture.
        source: where it is from, for the message.

    Raises: DataError for a strip so thin that it would not fit in memory.
    """
    width, height = image.size
    h, w = (size, size) if isinstance(size, int) else size
    scale = max(h / height, w / width)
    target = (w, h) if crop == "none" else (max(w, round(width * scale)), max(h, round(height * scale)))
    if target[0] * target[1] > MAX_PIXELS:
        raise DataError(
            f"{source} of {width}x{height} would become {target[0]}x{target[1]}; crop it to a fuller shape first"
        )
    if image.size != target:
        image = image.resize(target, Image.Resampling.BOX if hint else Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(target[1], target[0], 3).permute(2, 0, 1).contiguous()


def varied(image: Tensor, least: float, flip: bool, generator: torch.Generator) -> Tensor:
    """A random square of a square picture in [-1, 1], from `least` of its side on, at its size; perhaps mirrored."""
    size = image.shape[-1]
    side = round(size * (least + (1 - least) * float(torch.rand((), generator=generator))))
    side = max(side, 1)
    part = draw_window(size, size, (side, side), crop="random", flip=flip, generator=generator).cut(image)
    return F.interpolate(part[None], size=(size, size), mode="bicubic", antialias=True)[0].clamp(-1, 1)


def to_image(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], same shape."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_hint(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1], same shape."""
    return pixels.float().div_(255.0)


def extracted(extract: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """The hint that an extractor (adapters/hints.py) makes of a picture: 3 h w uint8 -> 3 h w float32 in [0, 1]."""
    return extract(to_hint(pixels)[None])[0].expand(3, -1, -1)


def to_pixels(image: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 0..255, rounded and clamped, same shape."""
    return image.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
