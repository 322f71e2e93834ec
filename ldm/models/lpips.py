"""LPIPS, a perceptual distance between images: Zhang et al. 2018 (arXiv:1801.03924), VGG16 "lin" variant.

The network has no meaning without trained weights, so it is only ever built from a file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.registry import ConfigError

TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in torchvision's vgg16().features
CHANNELS = (64, 128, 256, 512, 512)
# ImageNet's mean and std (0.485.. and 0.229..) for images in [0, 1], rewritten for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
UNIT_EPS = 1e-10


class LPIPS(nn.Module):
    """Weighted squared distance of unit-normalised VGG16 features; frozen.

    State dict: `features.<i>.weight|bias` as in torchvision's `vgg16().features`, and `heads.<k>.weight`, the five
    learned 1x1 convolutions (1 c 1 1, no bias, non-negative; called `lin<k>.model.1.weight` in the published file).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16  # slow to import, and only this class needs it

        with torch.device("meta"):  # never initialised: the weights come from a file
            self.features = nn.Sequential(*list(vgg16(weights=None).features.children())[: TAPS[-1] + 1])
            self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in CHANNELS)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    @classmethod
    def load(cls, weights: Path | str | None) -> LPIPS:
        """Build the network from a safetensors file, which is not read while models are built on the meta device.

        Args:
            weights: path of a file with the keys listed above.

        Raises:
            ConfigError: if there is no such file, or it holds other tensors.
        """
        if torch.get_default_device().type == "meta":  # a dry run: shapes are all that is wanted
            return cls().requires_grad_(False).eval()
        if weights is None or not Path(weights).is_file():
            raise ConfigError(
                f"LPIPS is unavailable: its weights file is {str(weights)!r}, which is not a file; give a safetensors "
                "file of VGG16 features and LPIPS heads, or set the LPIPS weight of the loss to 0"
            )
        model = cls()
        try:
            model.load_state_dict(load_file(weights), assign=True)
        except (RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"LPIPS weights {str(weights)!r} do not fit: {reason}; see ldm/models/lpips.py"
            ) from error
        return model.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair.

        Args:
            x: b 3 h w in [-1, 1], sides of at least 16 pixels.
            y: the same.

        Returns: b, at least 0; 0 for equal images.
        """
        total = x.new_zeros(x.shape[0])
        for head, a, b in zip(self.heads, self._taps(x), self._taps(y), strict=True):
            total = total + head((_unit(a) - _unit(b)) ** 2).mean(dim=(1, 2, 3))
        return total

    def _taps(self, x: Tensor) -> list[Tensor]:
        h = (x - self.shift) / self.scale
        taps = []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in TAPS:
                taps.append(h)
        return taps


def _unit(features: Tensor) -> Tensor:
    features = features.float()  # the epsilon underflows in half precision
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + UNIT_EPS)
