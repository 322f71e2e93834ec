"""A picture of what the network will see: samples after crop, flip and range conversion, hints beside images."""

import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.data.errors import DataError
from ldm.data.images import ImageData, Sample
from ldm.data.transforms import to_pixels

_SHOWN: Final = 128  # pixels; smaller samples are enlarged to this, pixel by pixel
_GAP: Final = 6
_LINE: Final = 12  # height of one caption line
_LINES: Final = 3


def write_preview(data: ImageData, out: Path, *, count: int = 12, seed: int = 0) -> int:
    """Write a PNG with `count` samples spread over the set, each as image | hints | image prompt over its caption.

    Args:
        data: the set as the config builds it; samples are augmented as in training.
        out: PNG file; it is replaced only once the new one is complete.
        count: number of samples, two per row.
        seed: of the augmentation.

    Returns: number of samples shown.
    Raises: DataError when out is no .png, or cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise DataError(f"preview writes a PNG, out is {out}; give it a name that ends in .png")
    count = min(count, len(data))
    generator = torch.Generator().manual_seed(seed)
    panels = [_panel(data.load(i * len(data) // count, generator)) for i in range(count)]
    _save(_arrange(panels, columns=2), out)
    return count


def _panel(sample: Sample) -> Image.Image:
    pictures = [("image", to_pixels(sample.image))]
    pictures += [(name, to_pixels(2 * hint - 1)) for name, hint in sample.hints.items()]
    if sample.reference is not None:
        pictures.append(("image prompt", to_pixels(sample.reference)))
    tiles = [(name, _tile(pixels)) for name, pixels in pictures]
    width = sum(tile.width + _GAP for _, tile in tiles)
    height = max(tile.height for _, tile in tiles)
    panel = Image.new("RGB", (width, height + (_LINES + 1) * _LINE + _GAP), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=10)
    left = 0
    for name, tile in tiles:
        draw.text((left, 0), name, fill="gray", font=font)
        panel.paste(tile, (left, _LINE))
        left += tile.width + _GAP
    lines = textwrap.wrap(f"{sample.text} [{sample.key}]", max(12, width // 6))[:_LINES]
    draw.multiline_text((0, _LINE + height), "\n".join(lines), fill="black", font=font, spacing=0)
    return panel


def _tile(pixels: Tensor) -> Image.Image:
    _, height, width = pixels.shape
    image = Image.frombytes("RGB", (width, height), bytes(pixels.permute(1, 2, 0).reshape(-1).tolist()))
    scale = max(1, _SHOWN // height)
    return image.resize((width * scale, height * scale), Image.Resampling.NEAREST)


def _arrange(panels: Sequence[Image.Image], columns: int) -> Image.Image:
    width, height = max(p.width for p in panels), max(p.height for p in panels)
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (_GAP + i % columns * (width + _GAP), _GAP + i // columns * (height + _GAP)))
    return sheet


def _save(image: Image.Image, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent, suffix=".png", delete=False) as file:
            part = Path(file.name)
        try:
            image.save(part)
            os.chmod(part, 0o644)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error}; give another --out") from error
