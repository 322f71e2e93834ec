"""Procedural captioned scenes of coloured, textured shapes with exact hints: no files, no network, any size.

Scene i of seed s is the same on every machine. Shapes are painted without antialiasing, far to near, so every hint
is exact by construction rather than estimated from the picture.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from ldm.data.errors import DataError
from ldm.data.images import ImageData, Sample
from ldm.data.transforms import to_hint, to_image
from ldm.registry import register, suggest

HINTS: Final = ("edge", "segmentation", "depth", "palette", "keypoint")
PALETTE_CELLS: Final = 8
COLOURS: Final = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (50, 160, 70),
    "cyan": (60, 200, 215),
    "blue": (50, 80, 210),
    "purple": (130, 60, 180),
    "pink": (245, 140, 190),
    "brown": (130, 85, 50),
    "white": (245, 245, 245),
    "grey": (140, 140, 140),
    "black": (30, 30, 30),
}
TEXTURES: Final = ("plain", "striped", "checked", "dotted")
KINDS: Final = {  # kind -> its colour in the segmentation and keypoint hints; the background is black
    "circle": (255, 60, 60),
    "square": (60, 255, 60),
    "triangle": (80, 80, 255),
    "star": (255, 255, 60),
    "cross": (255, 60, 255),
    "diamond": (60, 255, 255),
    "ring": (255, 255, 255),
}
_RING_HOLE: Final = 0.5  # inner radius over outer radius
_ARM: Final = 1 / 3  # half width of the cross's arms
_SHADE: Final = 0.6  # brightness of a texture's second tone
_WORDS: Final = ((0.23, "small "), (0.3, ""), (math.inf, "large "))  # by radius, upper limits


@dataclass(frozen=True, slots=True)
class Shape:
    """One object. Lengths and positions are shares of the picture's side, angles in radians."""

    kind: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float
    depth: float  # in (0, 1], larger is nearer; distinct within a scene


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes from far to near on a plain background. Kinds and colours are distinct within a scene."""

    background: str
    shapes: tuple[Shape, ...]

    @property
    def text(self) -> str:
        """Caption: shapes from near to far, then the background."""
        words = [_describe(shape) for shape in reversed(self.shapes)]
        listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
        return f"{listed} on {_article(self.background)} background"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A painted scene, before ranges are applied.

    Attributes:
        image: 3 h h uint8.
        owner: h h int64, 0 for background, i + 1 where shape i is the visible one.
    """

    image: Tensor
    owner: Tensor


@dataclass(frozen=True)
class SyntheticOptions:
    """Options of the `synthetic` data set.

    Attributes:
        size: side of the square pictures in pixels, at least 16.
        length: number of scenes.
        seed: another seed is another set; scenes of two seeds have nothing in common.
        hints: which hints to draw, from HINTS; a mapping hint name -> one of HINTS renames them.
        max_shapes: 1 to 4.
        reference: give the picture itself as the image prompt.
    """

    size: int
    length: int = 1000
    seed: int = 0
    hints: Sequence[str] | Mapping[str, str] = ()
    max_shapes: int = 3
    reference: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 16:
            raise DataError(f"data.size is {self.size!r}; must be a whole number of at least 16")
        if not isinstance(self.length, int) or self.length < 1:
            raise DataError(f"data.length is {self.length!r}; must be a whole number of at least 1")
        if self.max_shapes not in (1, 2, 3, 4):
            raise DataError(f"data.max_shapes is {self.max_shapes!r}; allowed: 1 to 4")
        for source in self.sources.values():
            if source not in HINTS:
                raise DataError(f"data.hints has {source!r}; allowed: {', '.join(HINTS)}{suggest(str(source), HINTS)}")

    @property
    def sources(self) -> dict[str, str]:
        """Hint name -> which of HINTS it is."""
        return dict(self.hints) if isinstance(self.hints, Mapping) else {name: name for name in self.hints}


@register("data", "synthetic", options=SyntheticOptions)
class SyntheticData(ImageData):
    """Scenes drawn when asked for. There is nothing to augment: a longer set is as cheap as a mirrored one."""

    def __init__(self, options: SyntheticOptions) -> None:
        self.options = options

    def __len__(self) -> int:
        return self.options.length

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """Scene `index`; the generator is not used. See ImageData.load."""
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}; the set has {len(self)} samples")
        o = self.options
        scene = draw_scene(o.seed, index, o.max_shapes)
        rendered = render(scene, o.size)
        image = to_image(rendered.image)
        return Sample(
            key=f"{o.seed}-{index}",
            image=image,
            text=scene.text,
            hints={name: draw_hint(source, scene, rendered) for name, source in o.sources.items()},
            reference=image.clone() if o.reference else None,
        )


    def references(self, key: str) -> tuple[str, ...]:
        """See ImageData.references: the scene itself."""
        return (key.rpartition("-")[2],) if self.options.reference else ()

    def reference(self, name: str) -> Tensor:
        """See ImageData.reference."""
        o = self.options
        return to_image(render(draw_scene(o.seed, int(name), o.max_shapes), o.size).image)


def draw_scene(seed: int, index: int, max_shapes: int = 3) -> Scene:
    """The scene of (seed, index): 1 to `max_shapes` shapes, one per quadrant so that none is wholly hidden."""
    rng = random.Random(f"scene {seed} {index}")
    count = rng.randint(1, max_shapes)
    colours = rng.sample(sorted(COLOURS), count + 1)
    kinds = rng.sample(sorted(KINDS), count)
    places = rng.sample([(0.33, 0.33), (0.67, 0.33), (0.33, 0.67), (0.67, 0.67)], count)
    shapes = tuple(
        Shape(
            kind=kinds[i],
            colour=colours[i],
            texture=rng.choice(TEXTURES),
            x=places[i][0] + rng.uniform(-0.06, 0.06),
            y=places[i][1] + rng.uniform(-0.06, 0.06),
            radius=rng.uniform(0.18, 0.36),
            angle=rng.uniform(0, 2 * math.pi),
            depth=(i + 1 + rng.uniform(-0.4, 0)) / count,
        )
        for i in range(count)
    )
    return Scene(colours[count], shapes)


def render(scene: Scene, size: int) -> Rendered:
    """Paint the shapes far to near at `size` pixels."""
    x, y = _grid(size)
    image = torch.tensor(COLOURS[scene.background], dtype=torch.uint8).view(3, 1, 1).expand(3, size, size)
    owner = torch.zeros(size, size, dtype=torch.int64)
    for number, shape in enumerate(scene.shapes, start=1):
        u, v = _local(shape, x, y)
        mask = _covers(shape.kind, u, v)
        light = torch.tensor(COLOURS[shape.colour], dtype=torch.uint8).view(3, 1, 1)
        paint = light
        if shape.texture != "plain":
            dark = (light.float() * _SHADE).to(torch.uint8)
            paint = torch.where(_second_tone(shape.texture, u, v), dark, light)
        image = torch.where(mask, paint, image)
        owner = torch.where(mask, number, owner)
    return Rendered(image.contiguous(), owner)


def draw_hint(source: str, scene: Scene, rendered: Rendered) -> Tensor:
    """One of HINTS for a rendered scene, 3 h h in [0, 1].

    edge: 1 where the pixel's owner differs from that of its right or lower neighbour (outlines, not textures).
    segmentation: the colour of the visible shape's kind, black for the background.
    depth: the visible shape's depth, larger is nearer, 0 for the background.
    palette: the picture's mean colour in each of 8 x 8 cells.
    keypoint: dots in the kind's colour at the visible key points of each shape.
    """
    if source == "edge":
        return _edges(rendered.owner).float().expand(3, -1, -1).contiguous()
    if source == "segmentation":
        table = torch.tensor([(0, 0, 0), *(KINDS[s.kind] for s in scene.shapes)], dtype=torch.uint8)
        return to_hint(table[rendered.owner].permute(2, 0, 1).contiguous())
    if source == "depth":
        table = torch.tensor([0.0, *(s.depth for s in scene.shapes)])
        return table[rendered.owner].expand(3, -1, -1).contiguous()
    return _palette(rendered.image) if source == "palette" else _keypoints(scene, rendered.owner)


def keypoints(shape: Shape) -> list[tuple[float, float]]:
    """Key points (x, y) in shares of the side: corners drawn in a little so that they lie on the shape.

    A circle has its centre, a ring four points on its band.
    """
    if shape.kind == "circle":
        local = [(0.0, 0.0)]
    elif shape.kind == "ring":
        middle = (1 + _RING_HOLE) / 2
        local = [(middle, 0.0), (0.0, middle), (-middle, 0.0), (0.0, -middle)]
    else:
        local = [(0.75 * u, 0.75 * v) for u, v in _corners(shape.kind) if math.hypot(u, v) > 0.8]
    c, s = math.cos(shape.angle) * shape.radius, math.sin(shape.angle) * shape.radius
    return [(shape.x + c * u - s * v, shape.y + s * u + c * v) for u, v in local]


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Pixel centres in shares of the side: x is 1 h, y is h 1."""
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    return axis.view(1, size), axis.view(size, 1)


def _local(shape: Shape, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in the shape's own frame, where its outer radius is 1."""
    c, s = math.cos(shape.angle) / shape.radius, math.sin(shape.angle) / shape.radius
    dx, dy = x - shape.x, y - shape.y
    return c * dx + s * dy, c * dy - s * dx


def _corners(kind: str) -> list[tuple[float, float]]:
    """Outline of a straight-edged kind, inside the unit circle."""
    if kind == "diamond":
        return [(1.0, 0.0), (0.0, 0.55), (-1.0, 0.0), (0.0, -0.55)]
    if kind == "cross":
        a, b = _ARM, math.sqrt(1 - _ARM**2)
        return [
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
        ]
    count = {"triangle": 3, "square": 4, "star": 10}[kind]
    radii = (1.0, 0.45) if kind == "star" else (1.0,)
    steps = [(radii[i % len(radii)], 2 * math.pi * i / count) for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in steps]


def _covers(kind: str, u: Tensor, v: Tensor) -> Tensor:
    """Which points of the shape's frame belong to it: h h bool."""
    if kind == "circle":
        return u * u + v * v <= 1
    if kind == "ring":
        r = u * u + v * v
        return (r <= 1) & (r >= _RING_HOLE**2)
    inside = torch.zeros(torch.broadcast_shapes(u.shape, v.shape), dtype=torch.bool)
    corners = _corners(kind)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):  # even-odd rule, ray to the right
        if v0 != v1:
            inside ^= ((v >= v0) != (v >= v1)) & (u < u0 + (v - v0) * ((u1 - u0) / (v1 - v0)))
    return inside


def _second_tone(texture: str, u: Tensor, v: Tensor) -> Tensor:
    if texture == "striped":
        return (u * 2.5).floor().remainder(2) == 1
    if texture == "checked":
        return ((u * 2).floor() + (v * 2).floor()).remainder(2) == 1
    return (u * 2).frac().abs().sub(0.5).square() + (v * 2).frac().abs().sub(0.5).square() < 0.09


def _edges(owner: Tensor) -> Tensor:
    edges = torch.zeros_like(owner, dtype=torch.bool)
    edges[:, :-1] |= owner[:, :-1] != owner[:, 1:]
    edges[:-1, :] |= owner[:-1, :] != owner[1:, :]
    return edges


def _palette(image: Tensor) -> Tensor:
    """Mean colour per cell, cells of h / 8 pixels (rounded to whole pixels where 8 does not divide h)."""
    size = image.shape[-1]
    cell = torch.arange(size) * PALETTE_CELLS // size
    sums = to_hint(image).new_zeros(3, PALETTE_CELLS, size).index_add_(1, cell, to_hint(image))
    sums = sums.new_zeros(3, PALETTE_CELLS, PALETTE_CELLS).index_add_(2, cell, sums)
    count = torch.bincount(cell, minlength=PALETTE_CELLS)
    means = sums / (count.view(-1, 1) * count)
    return means[:, cell][:, :, cell].clamp_(0, 1)


def _keypoints(scene: Scene, owner: Tensor) -> Tensor:
    size = owner.shape[-1]
    x, y = _grid(size)
    hint = torch.zeros(3, size, size)
    radius = max(0.5, size / 40) / size
    for number, shape in enumerate(scene.shapes, start=1):
        colour = to_hint(torch.tensor(KINDS[shape.kind], dtype=torch.uint8)).view(3, 1, 1)
        for px, py in keypoints(shape):
            column, row = int(px * size), int(py * size)
            if 0 <= column < size and 0 <= row < size and int(owner[row, column]) == number:
                cx, cy = (column + 0.5) / size, (row + 0.5) / size  # the dot is centred on the pixel that holds it
                dot = (x - cx).square() + (y - cy).square() <= radius**2
                hint = torch.where(dot, colour, hint)
    return hint


def _describe(shape: Shape) -> str:
    size = next(word for limit, word in _WORDS if shape.radius < limit)
    texture = "" if shape.texture == "plain" else f"{shape.texture} "
    return _article(f"{size}{texture}{shape.colour} {shape.kind}")


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
