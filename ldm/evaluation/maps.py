"""Measures of maps: is the hint's segmentation, depth or pose to be found again in the picture?

Most need a network that finds it. `predictor:` names a program of `torch.export.save` (a .pt2 file) that was exported
for one picture, 1 3 side side in [0, 1], and brings its own normalisation. null: pictures are maps themselves, as those
of a model that is asked to draw them. `region_iou` needs none.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import registry
from ldm.evaluation.colour import lab
from ldm.evaluation.features import resized
from ldm.evaluation.fidelity import ssim
from ldm.evaluation.measures import Measure
from ldm.registry import ConfigError, register

Palette = tuple[tuple[int, int, int], ...]
VOID = -1


@register("measure", "region_iou")
class RegionIou(Measure):
    """Mean IoU of the hint's regions and those that the picture's own colours make, in [0, 1].

    Regions are the pixels of one colour of the hint. Each gets the mean colour (CIE Lab) that the picture has there;
    every pixel of the picture then goes to the region whose colour is nearest. It tells whether things stand apart
    where the hint says, not what they are; textures cost some, so read it beside ground truth and chance.
    """

    def __init__(self, least: float = 0.01) -> None:
        """Args: least: share of the picture below which a colour is no region but the mixture of a border."""
        if not 0 <= least < 1:
            raise ConfigError(f"region_iou.least is {least}, must be in [0, 1)")
        self.least = least

    def picture(self, images: Tensor) -> Tensor:
        """Lab colours b h w 3."""
        with torch.autocast(images.device.type, enabled=False):
            return lab(images.float().permute(0, 2, 3, 1))

    def hint(self, hint: Tensor) -> Tensor:
        """Region of each pixel, b h w int64, VOID where none. Raises: ValueError on a map without regions."""
        levels = hint.float().mul(255).round().long()
        return torch.stack([self._regions(one) for one in (levels[:, 0] << 16) + (levels[:, 1] << 8) + levels[:, 2]])

    def _regions(self, codes: Tensor) -> Tensor:
        _, region, count = codes.unique(return_inverse=True, return_counts=True)
        large = count >= max(self.least * codes.numel(), 1)
        if not large.any():
            raise ValueError(f"no colour of the hint covers {self.least:g} of it: a map of regions has few colours")
        return torch.where(large, large.cumsum(dim=0) - 1, VOID)[region]

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Mean IoU b over the regions of each hint."""
        return torch.stack([_region_iou(one, regions) for one, regions in zip(pictures, hints, strict=True)])


def _region_iou(colours: Tensor, regions: Tensor) -> Tensor:
    masks = F.one_hot(regions[regions != VOID]).to(colours.dtype)  # n k
    seen = colours[regions != VOID]  # n 3
    means = masks.T @ seen / masks.sum(dim=0)[:, None]
    found = F.one_hot(torch.cdist(seen, means).argmin(dim=1), masks.shape[1]).to(colours.dtype)
    both = (masks * found).sum(dim=0)
    return (both / (masks.sum(dim=0) + found.sum(dim=0) - both)).mean()


@register("measure", "hint_ssim")
class HintSsim(Measure):
    """SSIM of the hint and of the hint that the same extractor finds in the picture (soft edges, lines), in [-1, 1]."""

    def __init__(self, extractor: str | Mapping[str, Any]) -> None:
        """Args: extractor: kind "hint", what made the hints: canny, sketch, ..."""
        node = {"name": extractor} if isinstance(extractor, str) else extractor
        self.extractor = registry.build("hint", node)

    def picture(self, images: Tensor) -> Tensor:
        """The hint of the picture, b 1 h w."""
        return self.hint(self.extractor(images.float()))

    def hint(self, hint: Tensor) -> Tensor:
        """Mean of its channels, b 1 h w."""
        return hint.float().mean(dim=1, keepdim=True)

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """See `ssim`."""
        return ssim(pictures, hints)


class _Predicted(Measure):
    """Compares the hint with what a network finds in the picture."""

    def __init__(self, predictor: str | None, side: int) -> None:
        """Take the network that judges.

        Args:
            predictor: its file, made by torch.export.save; null where the pictures are maps themselves.
            side: of the pictures that it was exported for, in pixels.
        """
        self.side, self._program = side, None
        if predictor is None:
            return
        if not Path(predictor).is_file() and torch.get_default_device().type != "meta":
            raise ConfigError(
                f"predictor {predictor} does not exist; export a network with torch.export.save, or set null where "
                "pictures are maps themselves"
            )
        self.models = [("file", {"weights": predictor}, "predictor")]
        if torch.get_default_device().type != "meta":
            self._program = torch.export.load(predictor).module()

    def picture(self, images: Tensor) -> Tensor:
        """What is found in pictures."""
        if self._program is None:
            return self.hint(images)
        x = resized(images, self.side)
        self._program.to(x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            found = torch.cat([self._program(one[None]) for one in x]).float()
        return self.found(found, (images.shape[-2], images.shape[-1]))

    @abstractmethod
    def found(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """Features of the network's output b k h w for pictures of that height and width."""


@register("measure", "miou")
class MeanIou(_Predicted):
    """Mean IoU over the classes that hint or picture has, in [0, 1].

    The hint's colours are decoded by the nearest of `palette`. The predictor gives scores b k h w, a plane per colour.
    """

    def __init__(self, palette: Palette, predictor: str | None = None, side: int = 512) -> None:
        """Args: palette: colours of the classes, [r, g, b] from 0 to 255, at least two. Others: see the base class."""
        super().__init__(predictor, side)
        self._colours = _palette("miou", palette, 2)

    def hint(self, hint: Tensor) -> Tensor:
        """Class of each pixel, b h w int64."""
        return torch.cdist(hint.float().permute(0, 2, 3, 1), self._colours.to(hint.device)).argmin(dim=-1)

    def found(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """See `hint`. Raises: ValueError on another number of planes than colours."""
        if output.shape[1] != len(self._colours):
            raise ValueError(f"miou: the predictor gives {output.shape[1]} planes, palette has {len(self._colours)}")
        return F.interpolate(output, size=size, mode="bilinear").argmax(dim=1)

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Mean IoU b."""
        a, b = (F.one_hot(x.flatten(1), len(self._colours)).float() for x in (pictures, hints))  # b n k
        both = (a * b).sum(dim=1)
        either = a.sum(dim=1) + b.sum(dim=1) - both
        return (both / either.clamp_min(1)).sum(dim=1) / (either > 0).sum(dim=1)


@register("measure", "depth_rmse")
class DepthRmse(_Predicted):
    """Root mean square difference of depth maps, in units of the hint's range [0, 1].

    Networks give depth up to scale and shift, so a found map is first fitted to the hint by least squares, picture by
    picture (Ranftl et al. 2020, arXiv:1907.01341, Eq. 4); that also forgives a picture a flat depth, so read it beside
    chance. A network other than that which made the hints should judge.
    """

    more_is_better = False

    def __init__(self, predictor: str | None = None, side: int = 384, align: bool = True) -> None:
        """Args: align: fit scale and shift first. Others: see the base class."""
        super().__init__(predictor, side)
        self.align = align

    def hint(self, hint: Tensor) -> Tensor:
        """Mean of the channels, b h w."""
        return hint.float().mean(dim=1)

    def found(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """The first plane at that size, b h w."""
        return F.interpolate(output[:, :1], size=size, mode="bilinear")[:, 0]

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Differences b."""
        x, y = pictures.flatten(1).double(), hints.flatten(1).double()
        if self.align:
            x, mean = x - x.mean(dim=1, keepdim=True), y.mean(dim=1, keepdim=True)
            x = x * ((x * y).sum(dim=1, keepdim=True) / x.square().sum(dim=1, keepdim=True).clamp_min(1e-12)) + mean
        return (x - y).square().mean(dim=1).sqrt().float()


@register("measure", "pck")
class Pck(_Predicted):
    """Share of the hint's key points that are found within `alpha` of the picture's longer side (PCK), in [0, 1].

    A key point is the centre of all pixels of its colour; the predictor gives a heat map for each, b k h w. A hint
    without key points counts as obeyed.
    """

    NEAR = 0.25  # distance in RGB within which a pixel has a key point's colour

    def __init__(self, palette: Palette, predictor: str | None = None, side: int = 256, alpha: float = 0.1) -> None:
        """Take the colours.

        Args:
            palette: a colour [r, g, b] per key point, none black.
            predictor: its file, see the base class; null where the pictures are maps themselves.
            side: of the pictures that it was exported for, in pixels.
            alpha: share of the picture's longer side within which a point counts as found.
        """
        super().__init__(predictor, side)
        if not 0 < alpha < 1:
            raise ConfigError(f"pck.alpha is {alpha}, must be in (0, 1)")
        self._colours, self.alpha = _palette("pck", palette, 1), alpha

    def hint(self, hint: Tensor) -> Tensor:
        """Places b k 3: x, y in shares of the longer side, and whether the point is there; (0, 0, 0) where not."""
        h, w = hint.shape[-2:]
        near = torch.cdist(hint.float().permute(0, 2, 3, 1), self._colours.to(hint.device)) < self.NEAR  # b h w k
        weight = near.float()
        count = weight.sum(dim=(1, 2))
        x = (weight * torch.arange(w, device=hint.device)[:, None]).sum(dim=(1, 2))
        y = (weight * torch.arange(h, device=hint.device)[:, None, None]).sum(dim=(1, 2))
        places = torch.stack([x, y], dim=-1) / count.clamp_min(1)[..., None] / max(h, w)
        return torch.cat([places, (count > 0).float()[..., None]], dim=-1)

    def found(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """See `hint`: the peak of each heat map. Raises: ValueError on another number of planes than colours."""
        if output.shape[1] != len(self._colours):
            raise ValueError(f"pck: the predictor gives {output.shape[1]} planes, palette has {len(self._colours)}")
        h, w = output.shape[-2:]
        peak = output.flatten(2).argmax(dim=-1)
        x, y = (peak % w + 0.5) / w * size[1], (peak // w + 0.5) / h * size[0]
        places = torch.stack([x - 0.5, y - 0.5], dim=-1) / max(size)
        return torch.cat([places, torch.ones_like(x)[..., None]], dim=-1)

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Shares b."""
        asked = hints[..., 2]
        close = (pictures[..., :2] - hints[..., :2]).norm(dim=-1) <= self.alpha
        hits = (close & (pictures[..., 2] > 0)).float() * asked
        return torch.where(asked.sum(dim=1) > 0, hits.sum(dim=1) / asked.sum(dim=1).clamp_min(1), 1.0)


def _palette(owner: str, colours: Sequence[Sequence[int]], least: int) -> Tensor:
    if len(colours) < least or any(not 0 <= value <= 255 for colour in colours for value in colour):
        raise ConfigError(f"{owner}.palette is {colours}, must be at least {least} colours [r, g, b] from 0 to 255")
    return torch.tensor(colours, dtype=torch.float32) / 255
