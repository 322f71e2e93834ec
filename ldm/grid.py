"""Labelled picture grids."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAD = 4
LABEL = 14  # height of one line of text
HEADER_LINES = 4
MARGIN = 170  # width of the labels beside the rows
LETTER = 7  # about the width of one letter


def compose(columns: Mapping[str, Tensor], scale: int = 1, rows: Sequence[str] = ()) -> Image.Image:
    """Columns of images side by side, row i showing item i, each column's name above it, wrapped.

    Args:
        columns: label -> b 3 h w (or b 1 h w) in [0, 1]; all of the same b, h and w.
        scale: whole-number enlargement, nearest.
        rows: b labels on the left, each wrapped and cut to its row's height; none leave no margin.

    Raises: ValueError if there are no columns or their shapes differ.
    """
    shapes = {tuple(c.shape[0:1] + c.shape[2:]) for c in columns.values()}
    if len(shapes) != 1:
        raise ValueError(f"grid columns have sizes {sorted(shapes)} (b h w); all must be the same, and at least one")
    count, h, w = shapes.pop()
    h, w = h * scale, w * scale
    names = [_wrapped(label, w, HEADER_LINES) for label in columns]
    left, top = MARGIN if rows else 0, LABEL * max(map(len, names)) + PAD
    sheet = Image.new("RGB", (left + len(columns) * (w + PAD) + PAD, top + count * (h + PAD)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(rows):
        _write(draw, PAD, top + i * (h + PAD), _wrapped(label, MARGIN, h // LABEL))
    for i, (name, images) in enumerate(zip(names, columns.values(), strict=True)):
        x = left + PAD + i * (w + PAD)
        _write(draw, x, 0, name)
        for j, image in enumerate(images):
            tile = to_pil(image).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, top + j * (h + PAD)))
    return sheet


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two sheets of tiles of one size as one, their last rows level."""
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    for x, part in ((0, left), (left.width, right)):
        sheet.paste(part, (x, sheet.height - part.height))
    return sheet


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str]) -> None:
    font = ImageFont.load_default(size=12)
    for i, line in enumerate(lines):
        draw.text((x, y + i * LABEL), line, "black", font)


def _wrapped(label: str, width: int, most: int) -> list[str]:
    """At least one line, at most `most`, of about that many pixels; PIL's own font may have no more than Latin-1."""
    plain = label.encode("latin-1", "replace").decode("latin-1")
    most, letters = max(most, 1), max(width // LETTER, 1)
    lines = [line for part in plain.split("\n") for line in textwrap.wrap(part, letters) or [""]]
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][: letters - 3]}..."]


def save(columns: Mapping[str, Tensor], path: Path, scale: int = 2) -> None:
    """Write `compose(columns)` as PNG, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compose(columns, scale).save(path)


def to_pil(image: Tensor) -> Image.Image:
    """One image 3 h w (or 1 h w) in [0, 1] -> 8-bit RGB."""
    pixels = image.detach().float().cpu().expand(3, -1, -1)
    pixels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy())
