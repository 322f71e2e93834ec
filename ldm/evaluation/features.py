"""Feature extractors of set metrics, registered under kind "features": pictures to vectors, by weights on this disk.

Nothing is downloaded. What decides the numbers is the `identity` of an extractor, and the filter that brings pictures
to the size of its network.
"""

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import build
from ldm.convert import files
from ldm.models.clip import ImageTower
from ldm.registry import ConfigError, register
from ldm.sampling.output import file_digest

FILTERS = ("bicubic", "bilinear")  # both antialiased, where they shrink


def resized(images: Tensor, side: int, resize: str = "bicubic") -> Tensor:
    """Pictures b 3 h w in [0, 1] at side x side, with an antialiased filter; untouched where they have that size."""
    x = images.float()
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode=resize, antialias=True).clamp(0, 1)


def in_8_bits(images: Tensor) -> Tensor:
    """Pictures in [0, 1] -> uint8, as they are in files."""
    return images.float().mul(255).round().clamp(0, 255).to(torch.uint8)


def tower(encoder: Mapping[str, Any], slot: str) -> ImageTower:
    """An image tower with its weights, frozen.

    Args:
        encoder: kind "image".
        slot: where it stands, for messages.

    Raises: ConfigError without weights, or as `build.component`.
    """
    if not encoder.get("weights"):
        raise ConfigError(f"{slot} has no weights: a random network measures nothing; name a weight file")
    built: ImageTower = build.component("image", dict(encoder), slot)
    build.frozen(built)
    return built


class Features(ABC):
    """Vectors of pictures.

    Attributes:
        width: of the vectors.
        resize: filter that brings pictures to the network's size.
        node: the model and its weights as YAML has them.
        models: the same with its kind and key, as `Measure.models`.
    """

    width: int
    resize: str
    node: Mapping[str, Any]
    models: Sequence[tuple[str, Mapping[str, Any], str]]

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Vectors b d, float32, of pictures b 3 h w uint8."""

    @abstractmethod
    def weights(self) -> Path:
        """The file that it read."""

    def identity(self) -> str:
        """Digest of the network: its options and the content of its weights."""
        said = {k: v for k, v in self.node.items() if k != "weights"}
        plain = json.dumps([type(self).__name__, said, file_digest(self.weights())], sort_keys=True, default=list)
        return hashlib.sha256(plain.encode()).hexdigest()


@register("features", "tower")
class TowerFeatures(Features):
    """Pooled features of a tower of kind "image": CLIP (`open_clip`), DINOv2 (`dino`), our own (`vit`, `swin`)."""

    def __init__(self, encoder: Mapping[str, Any], resize: str = "bicubic") -> None:
        """Args: encoder: kind "image", with `weights`. resize: bicubic | bilinear, antialiased."""
        if resize not in FILTERS:
            raise ConfigError(f"tower.resize is {resize!r}; allowed: {', '.join(FILTERS)}")
        self.node, self.resize, self.models = encoder, resize, [("image", encoder, "encoder")]
        self.tower = tower(encoder, "tower.encoder")
        self.width = self.tower.pooled_width

    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Features`."""
        self.tower.to(pixels.device)
        x = resized(pixels / 255, self.tower.image_size, self.resize)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.tower(x * 2 - 1).float()

    def weights(self) -> Path:
        """See `Features`."""
        file = build.weights_file("image", dict(self.node), "tower.encoder")
        assert file is not None
        return file


@register("features", "inception")
class Inception(Features):
    """The Inception network of published FIDs, 2048 pooled features, as torch-fidelity has it (extra `fid`).

    Its weights are TensorFlow's of 2015; torchvision's Inception gives other numbers. Resizing: "tf_bilinear" is what
    the network of the FID paper did itself, not antialiased; "bicubic" is antialiased, before the network, as in
    clean-fid.
    """

    SIDE = 299
    width = 2048

    def __init__(self, weights: str, resize: str = "tf_bilinear") -> None:
        """Args: weights: torch-fidelity's weights-inception-2015-12-05-6726825d.pth. resize: tf_bilinear | bicubic."""
        if resize not in ("tf_bilinear", "bicubic"):
            raise ConfigError(f"inception.resize is {resize!r}; allowed: tf_bilinear, bicubic")
        self.node, self.resize = {"weights": weights}, resize
        self.models = [("file", self.node, "weights")]
        if torch.get_default_device().type != "meta":
            self.net = build.frozen(_inception(Path(weights)))

    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Features`."""
        if self.resize != "tf_bilinear":
            pixels = in_8_bits(resized(pixels / 255, self.SIDE, self.resize))
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return self.net.to(pixels.device)(pixels)[0]

    def weights(self) -> Path:
        """See `Features`."""
        return Path(self.node["weights"])


def _inception(weights: Path) -> nn.Module:
    """torch-fidelity's network. It unpickles whatever it is given, so it is given tensors that were read safely."""
    tensors = files.read(weights)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError(
            'features inception needs torch-fidelity, which is not installed: pip install "ldm-adapters[fid]", or use '
            "features {name: tower, encoder: ...}"
        ) from error
    safe = io.BytesIO()
    torch.save(tensors, safe)
    safe.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=safe)
    except RuntimeError as error:
        raise ConfigError(
            f"weights {weights} are not those of the FID Inception ({str(error).splitlines()[0]}); get "
            "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        ) from error
