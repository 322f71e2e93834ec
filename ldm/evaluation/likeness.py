"""Measures of what a picture shows: how well it fits its caption, a reference, or the real picture of its item."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import build
from ldm.evaluation.features import resized, tower
from ldm.evaluation.fidelity import psnr, ssim
from ldm.evaluation.measures import ClipI, Measure
from ldm.models.clip import CLIP, ImageTower
from ldm.models.lpips import LPIPS
from ldm.models.text import TextEncoder
from ldm.registry import ConfigError, register


class _OfPictures(Measure):
    """Compares pixels with those of the real picture."""

    reads = "picture"

    def picture(self, images: Tensor) -> Tensor:
        """The pictures themselves, b 3 h w in [0, 1]."""
        return images.float()


@register("measure", "psnr")
class Psnr(_OfPictures):
    """Peak signal-to-noise ratio in dB, at most 100."""

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """See `psnr`."""
        return psnr(pictures, hints)


@register("measure", "ssim")
class Ssim(_OfPictures):
    """Structural similarity (Wang et al. 2004), in [-1, 1]."""

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """See `ssim`."""
        return ssim(pictures, hints)


@register("measure", "lpips")
class Lpips(_OfPictures):
    """LPIPS with VGG16 and the published heads (Zhang et al. 2018, arXiv:1801.03924), from a weight file."""

    more_is_better = False

    def __init__(self, weights: str) -> None:
        """Args: weights: safetensors file with the keys of `ldm.models.lpips`."""
        self.net = LPIPS.load(weights)

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Distances b."""
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
            return self.net.to(pictures.device)(pictures * 2 - 1, hints * 2 - 1)


@register("measure", "token_distance")
class TokenDistance(Measure):
    """1 - mean cosine of the local features of picture and real picture, in [0, 2]; where LPIPS has no weights.

    In the manner of LPIPS, squared distances of unit features place by place, but of another network, one layer, and
    without heads learned from people: its numbers are no LPIPS.
    """

    more_is_better = False
    reads = "picture"

    def __init__(self, encoder: Mapping[str, Any]) -> None:
        """Args: encoder: kind "image", with `weights`."""
        self.tower = tower(encoder, "token_distance.encoder")
        self.models = [("image", encoder, "encoder")]

    def picture(self, images: Tensor) -> Tensor:
        """Unit vectors b n d."""
        x = resized(images, self.tower.image_size)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return F.normalize(self.tower.to(x.device).tokens(x * 2 - 1), dim=-1)

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Distances b."""
        return 1 - (pictures * hints).sum(dim=-1).mean(dim=-1)


@register("measure", "dino_i")
class DinoI(ClipI):
    """CLIP-I by another name, for a tower that was trained without captions (image tower `dino`)."""


@register("measure", "clip_t")
class ClipT(Measure):
    """Cosine of picture and caption in a CLIP (Hessel et al. 2021, arXiv:2104.08718, without its factor 2.5).

    In [-1, 1]. A model that draws reads captions through a text encoder: another one should judge.
    """

    reads = "caption"

    def __init__(
        self,
        clip: Mapping[str, Any] | None = None,
        image: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
    ) -> None:
        """Take one of our CLIPs whole, or two towers of a published one.

        Args:
            clip: kind "clip", with `weights`.
            image: kind "image", with `weights`, behind its projection (`open_clip`).
            text: kind "text", with `weights` and `projection`.
        """
        given = {"clip": clip, "image": image, "text": text}
        nodes = {key: node for key, node in given.items() if node is not None}
        if list(nodes) not in (["clip"], ["image", "text"]):
            raise ConfigError(f"clip_t has {', '.join(nodes) or 'no model'}; give clip, or both image and text")
        for key, node in nodes.items():
            if not node.get("weights"):
                raise ConfigError(f"clip_t.{key} has no weights: a random network measures nothing; name a weight file")
        self.models = [(key, node, key) for key, node in nodes.items()]
        built: dict[str, Any] = {key: build.component(key, dict(node), f"clip_t.{key}") for key, node in nodes.items()}
        for module in built.values():
            build.frozen(module)
        whole: CLIP | None = built.get("clip")
        self._clip = whole
        self._image: ImageTower = built["image"] if whole is None else whole.image
        self._text: TextEncoder = built["text"] if whole is None else whole.text
        if whole is None and self._text.text_proj is None:
            raise ConfigError("clip_t.text.projection is null, must be the width of the image's features")

    def picture(self, images: Tensor) -> Tensor:
        """Unit vectors b d."""
        x = resized(images, self._image.image_size) * 2 - 1
        self._move(x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return F.normalize(self._image(x), dim=-1) if self._clip is None else self._clip.encode_image(x)

    def hint(self, hint: Sequence[str]) -> Tensor:
        """Unit vectors b d of captions; long ones are cut."""
        ids = self._text.ids(hint)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            if self._clip is not None:
                return self._clip.encode_text(ids)
            pooled = self._text.outputs(ids)[1]
            assert pooled is not None
            return F.normalize(pooled, dim=-1)

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Cosines b."""
        return (pictures * hints.to(pictures.device)).sum(dim=-1)

    def _move(self, device: torch.device) -> None:
        for module in (self._image, self._text) if self._clip is None else (self._clip,):
            module.to(device)
