"""Aspect-ratio buckets: pictures of like shape are cut to one size, and every batch is of one size.

NovelAI 2022 ("Improvements on Stable Diffusion"); Podell et al. 2023 (arXiv:2307.01952), section 2.3 and appendix I.
"""

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ldm.data.errors import DataError

Shape = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Buckets:
    """Which sizes there are beside the square of `data.size`.

    Attributes:
        step: sides are multiples of this; each shorter side up to `data.size` gets the longest other one that keeps
            the picture within size * size pixels, upright and across.
        ratio: longer side over shorter, at most.
        sizes: [width, height] each, in place of those that step and ratio make.
    """

    step: int = 64
    ratio: float = 4.0
    sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.step < 8:
            raise DataError(f"data.buckets.step is {self.step}, must be at least 8, a multiple of what the models need")
        if not 1 <= self.ratio < math.inf:
            raise DataError(f"data.buckets.ratio is {self.ratio}, must be at least 1 and finite")
        shapes: dict[float, str] = {}
        for width, height in self.sizes:
            if min(width, height) < 8:
                raise DataError(f"data.buckets.sizes has {width}x{height}; both sides must be at least 8")
            if (other := shapes.setdefault(width / height, f"{width}x{height}")) != f"{width}x{height}":
                raise DataError(f"data.buckets.sizes has {other} and {width}x{height}, of one shape; drop one")

    def shapes(self, size: int) -> tuple[Shape, ...]:
        """All sizes, from the most upright to the broadest. Raises: DataError if `size` is no multiple of step."""
        if self.sizes:
            return tuple(sorted({(h, w) for w, h in self.sizes}, key=_breadth))
        if size % self.step:
            raise DataError(f"data.size is {size}, must be a multiple of data.buckets.step ({self.step}); change either")
        sides = [(short, size * size // short // self.step * self.step) for short in range(self.step, size + 1, self.step)]
        upright = [(long, short) for short, long in sides if long <= self.ratio * short]
        return tuple(sorted({*upright, *((short, long) for long, short in upright)}, key=_breadth))


class Shelves:
    """Which size each of n pictures gets. Two flat blocks, which worker processes share."""

    def __init__(self, shapes: Sequence[Shape], sizes: Iterable[tuple[int, int] | None]) -> None:
        """Take the pictures.

        Args:
            shapes: of `Buckets.shapes`.
            sizes: (width, height) of each picture; None of one that cannot be read, which is on no shelf.
        """
        self.shapes = shapes
        wanted = [_breadth(shape) for shape in shapes]
        self._number = array("h")
        filled = [array("q") for _ in shapes]
        for index, size in enumerate(sizes):
            number = -1
            if size is not None:
                own = math.log(size[0] / size[1])
                number = min(range(len(shapes)), key=lambda i: abs(wanted[i] - own))
                filled[number].append(index)
            self._number.append(number)
        self.groups: dict[str, Sequence[int]] = {
            f"{w}x{h}": indices for (h, w), indices in zip(shapes, filled, strict=True) if indices
        }

    def shape(self, index: int) -> Shape:
        """(height, width) of that picture's shelf."""
        return self.shapes[self._number[index]]

    def alike(self, index: int) -> Iterator[int]:
        """The picture and then the others of its shelf, in a circle; of one that cannot be read those of the next."""
        while self._number[index] < 0:
            index = (index + 1) % len(self._number)
        height, width = self.shape(index)
        shelf = self.groups[f"{width}x{height}"]
        first = bisect_left(shelf, index)
        yield from (shelf[(first + i) % len(shelf)] for i in range(len(shelf)))


def _breadth(shape: Shape) -> float:
    return math.log(shape[1] / shape[0])
