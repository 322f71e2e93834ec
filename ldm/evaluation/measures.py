"""Measures: how well a picture does what a hint says. Each is registered under kind "measure" and one line of YAML.

A measure turns pictures and hints into features that can be compared, so that every picture can be scored against every
hint (`chance` is a picture beside the hint of its neighbour). Edge maps are taken under the autocast of the drawing, as
they always were; colours and embeddings in float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.evaluation.colour import cell_means, lab, projections
from ldm.evaluation.edges import edge_map
from ldm.evaluation.features import resized, tower
from ldm.evaluation.fidelity import edge_f1
from ldm.registry import ConfigError, register

BY_HINT: Mapping[str, tuple[str, ...]] = {  # hint or extractor -> its measures
    **dict.fromkeys(("canny", "edge", "edges", "lineart", "outline", "sketch"), ("edge_f1",)),
    **dict.fromkeys(("color", "palette"), ("palette", "palette_lab")),
    "segmentation": ("region_iou",),
}
Model = tuple[str, Mapping[str, Any], str]  # kind, YAML node with `weights`, its key


class Measure(ABC):
    """One score per item, from features of its picture and of its hint.

    Attributes:
        more_is_better: whether higher scores mean more obedience.
        image_prompt: whether it reads image prompts or maps of the picture to draw, as `Adapter.image_prompt`.
        reads: what it compares pictures with: an adapter's "hint", the real "picture" of the item, or its "caption".
            The last two stand in `evaluation.pictures` alone; there the real picture serves those that read hints.
        models: networks that it reads.
    """

    more_is_better: ClassVar[bool] = True
    image_prompt: ClassVar[bool] = False
    reads: ClassVar[str] = "hint"
    models: Sequence[Model] = ()

    @abstractmethod
    def picture(self, images: Tensor) -> Tensor:
        """Features b ... of pictures b 3 h w in [0, 1]."""

    def hint(self, hint: Any) -> Tensor:
        """Features b ... of hints as adapters take them, in [0, 1]: maps b c h w, or image prompts b m 3 h w.

        Of captions, a list of b texts.
        """
        return self.picture(hint)

    @abstractmethod
    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Scores b of features of pictures and of hints, row by row."""


@register("measure", "edge_f1")
class EdgeF1(Measure):
    """F1 of the picture's edges and the edges of a line map, matched within 1 pixel, in [0, 1]."""

    def picture(self, images: Tensor) -> Tensor:
        """Edges b 1 h w, bool; of a hint too, whose strokes have two edges each."""
        return edge_map(images)

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """See `edge_f1`."""
        return edge_f1(pictures, hints)


@register("measure", "palette")
class Palette(Measure):
    """Mean distance of cell colours in RGB, in [0, sqrt(3)]; 0 is the palette asked for."""

    more_is_better = False

    def __init__(self, cells: int = 8) -> None:
        """Args: cells: per side of the picture; the paper's palette has 8."""
        if cells < 1:
            raise ConfigError(f"palette.cells is {cells}, must be at least 1")
        self.cells = cells

    def picture(self, images: Tensor) -> Tensor:
        """Mean colours b n 3, n = cells squared."""
        return cell_means(images, self.cells)

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Euclidean distance per cell, averaged over the cells."""
        return (pictures - hints).norm(dim=-1).mean(dim=-1)


@register("measure", "palette_lab")
class PaletteLab(Palette):
    """The same in CIE Lab: mean colour difference Delta E of CIE 1976; about 2.3 is just noticeable."""

    def picture(self, images: Tensor) -> Tensor:
        """Mean colours b n 3, in Lab."""
        return lab(super().picture(images))


@register("measure", "palette_reference")
class PaletteReference(Measure):
    """Distance of the colours of picture and reference, wherever they are: sliced Wasserstein-1 in CIE Lab.

    Twice that, so that a shift of all colours by Delta E (CIE 1976) has about this distance.
    """

    more_is_better = False
    image_prompt = True
    SIDE: ClassVar = 32  # pixels that a picture is averaged to, so that sets have as many colours

    def picture(self, images: Tensor) -> Tensor:
        """Sorted projections b d n of the Lab colours."""
        colours = F.adaptive_avg_pool2d(images.float(), self.SIDE).flatten(2).mT
        with torch.autocast(images.device.type, enabled=False):
            return projections(lab(colours))

    def hint(self, hint: Tensor) -> Tensor:
        """The same, of the first reference of each item."""
        return self.picture(hint[:, 0])

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Distances b."""
        return 2 * (pictures - hints).abs().mean(dim=(1, 2))


@register("measure", "clip_i")
class ClipI(Measure):
    """Cosine between the pooled image features of picture and reference (Ye et al. 2023, section 4.1.3), in [-1, 1].

    Towers of ours have no projection, so it is that of their features, whose level differs from tower to tower: read it
    beside chance and ground truth.
    """

    image_prompt = True

    def __init__(self, encoder: Mapping[str, Any]) -> None:
        """Args: encoder: kind "image", with `weights`: a model that no adapter reads."""
        self.models = [("image", encoder, "encoder")]
        self.tower = tower(encoder, "clip_i.encoder")

    def picture(self, images: Tensor) -> Tensor:
        """Unit vectors b d, in float32."""
        self.tower.to(images.device)
        x = resized(images, self.tower.image_size)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return F.normalize(self.tower(x * 2 - 1), dim=-1)

    def hint(self, hint: Tensor) -> Tensor:
        """The same, of the first reference of each item."""
        return self.picture(hint[:, 0])

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Cosines b."""
        return (pictures * hints).sum(dim=-1)


def by_hint(adapter: str, words: Iterable[str]) -> tuple[str, ...]:
    """Names of the measures for the first word that is known.

    Args:
        adapter: its name, for the message.
        words: what its hint is called, the data's extractor first.

    Raises: ConfigError if none is known.
    """
    words = list(words)
    for word in words:
        if word in BY_HINT:
            return BY_HINT[word]
    raise ConfigError(
        f"adapter {adapter!r} has hint {' or '.join(words)}, without a known measure; known: {', '.join(BY_HINT)}; "
        f"set evaluation.measures.{adapter}, e.g. to edge_f1, or to [] for none"
    )
