"""Labelled picture grids."""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

PAD = 4
LABEL = 14


def compose(columns: Mapping[str, Tensor], scale: int = 1) -> Image.Image:
    """Columns of images side by side, row i showing item i, each column's name above it.

    Args:
        columns: label -> b 3 h w (or b 1 h w) in [0, 1]; all of the same b, h and w.
        scale: whole-number enlargement, nearest.

    Raises: ValueError if there are no columns or their shapes differ.
    """
    shapes = {tuple(c.shape[0:1] + c.shape[2:]) for c in columns.values()}
    if len(shapes) != 1:
        raise ValueError(f"grid columns have sizes {sorted(shapes)} (b h w); all must be the same, and at least one")
    rows, h, w = shapes.pop()
    h, w = h * scale, w * scale
    sheet = Image.new("RGB", (len(columns) * (w + PAD) + PAD, LABEL + rows * (h + PAD) + PAD), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (label, images) in enumerate(columns.items()):
        draw.text((PAD + x * (w + PAD), 1), label, fill="black")
        for y, image in enumerate(images):
            tile = to_pil(image).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(tile, (PAD + x * (w + PAD), LABEL + PAD + y * (h + PAD)))
    return sheet


def save(columns: Mapping[str, Tensor], path: Path, scale: int = 2) -> None:
    """Write `compose(columns)` as PNG, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compose(columns, scale).save(path)


def to_pil(image: Tensor) -> Image.Image:
    """One image 3 h w (or 1 h w) in [0, 1] -> 8-bit RGB."""
    pixels = image.detach().float().cpu().expand(3, -1, -1)
    pixels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy())
