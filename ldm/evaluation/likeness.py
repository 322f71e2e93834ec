"""Measures of what a picture shows: how well it fits its caption, a reference, or the real picture of its item."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import build
from ldm.evaluation.features import resized, tower
from ldm.evaluation.fidelity import psnr, ssim
from ldm.evaluation.measures import ClipI, Measure
from ldm.models.clip import CLIP
from ldm.models.lpips import LPIPS
from ldm.registry import ConfigError, register, suggest


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
        self, clip: Mapping[str, Any] | None = None, model: str | None = None, weights: str | None = None
    ) -> None:
        """Take one of our CLIPs, or a published one.

        Args:
            clip: kind "clip", with `weights`.
            model: instead, a name of open_clip's list, e.g. "ViT-H-14" or "ViT-L-14-quickgelu" (OpenAI's weights).
            weights: its weight file; nothing is downloaded.
        """
        if (clip is None) == (model is None) or (model is None) != (weights is None):
            raise ConfigError("clip_t takes clip, or model and weights: give one of the two")
        if clip is not None and not clip.get("weights"):
            raise ConfigError("clip_t.clip has no weights: a random network measures nothing; name a weight file")
        if clip is not None:
            self.models = [("clip", clip, "clip")]
            self._clip: Any = _Ours(build.component("clip", dict(clip), "clip_t.clip"))
        else:
            assert model is not None and weights is not None
            self.models = [("file", {"weights": weights}, "weights")]
            self._clip = _Published(model, weights)
        build.frozen(self._clip)

    def picture(self, images: Tensor) -> Tensor:
        """Unit vectors b d."""
        self._clip.to(images.device)
        x = resized(images, self._clip.side)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return F.normalize(self._clip.image(x), dim=-1)

    def hint(self, hint: Sequence[str]) -> Tensor:
        """Unit vectors b d of captions; long ones are cut."""
        device = next(self._clip.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return F.normalize(self._clip.text(hint), dim=-1)

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        """Cosines b."""
        return (pictures * hints).sum(dim=-1)


class _Ours(nn.Module):
    """A CLIP of this project: pictures in [0, 1] and captions to vectors."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip, self.side = clip, clip.image.image_size

    def image(self, x: Tensor) -> Tensor:
        return self.clip.encode_image(x * 2 - 1)

    def text(self, captions: Sequence[str]) -> Tensor:
        return self.clip.encode_text(self.clip.text.ids(captions))


class _Published(nn.Module):
    """The same of one of open_clip's models."""

    def __init__(self, model: str, weights: str) -> None:
        super().__init__()
        import open_clip  # slow to import: not before a model is built

        if model not in (known := open_clip.list_models()):
            raise ConfigError(f"clip_t.model is {model!r}, none of open_clip's names{suggest(model, known)}")
        meta = torch.get_default_device().type == "meta"
        if not meta and not Path(weights).is_file():
            raise ConfigError(f"clip_t.weights {weights} does not exist; download the weights of {model} there")
        try:
            self.clip: Any = open_clip.create_model(model, pretrained=None if meta else weights)
            self.words = open_clip.get_tokenizer(model)
        except (RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"clip_t.weights {weights} are not those of {model} ({reason})") from error
        told = open_clip.get_model_preprocess_cfg(self.clip)
        self.side: int = self.clip.visual.image_size[0]
        mean, std = (torch.tensor(told[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.mean, self.std = nn.Buffer(mean), nn.Buffer(std)

    def image(self, x: Tensor) -> Tensor:
        return self.clip.encode_image((x - self.mean) / self.std)

    def text(self, captions: Sequence[str]) -> Tensor:
        return self.clip.encode_text(self.words(list(captions)).to(self.mean.device))
