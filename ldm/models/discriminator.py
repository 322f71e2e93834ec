"""PatchGAN discriminator for the adversarial part of the autoencoder's loss.

Isola et al. 2017 (arXiv:1611.07004), section 3.2.2; Esser et al. 2021 (arXiv:2012.09841) for its use in a first stage.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Final

from torch import Tensor, nn

from ldm.registry import suggest

KERNEL = 4
SLOPE = 0.2
MAX_GROWTH = 8
INIT_STD = 0.02
NORMS: Final[dict[str, Callable[[int], nn.Module]]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
}


class PatchDiscriminator(nn.Module):
    """Convolutional critic: one real/fake logit per overlapping patch."""

    def __init__(self, width: int = 64, layers: int = 3, in_channels: int = 3, norm: str = "batch") -> None:
        """Build the critic.

        Args:
            width: channels after the first convolution; they double per layer, up to eight times.
            layers: stride-2 convolutions; the patch is 70 pixels wide with 3, 34 with 2.
            in_channels: image channels.
            norm: "batch" as published, over whatever shares the call; or "group" (Wu & He 2018, arXiv:1803.08494) of
                up to 32 groups, of each picture alone.

        Raises:
            ValueError: if a count is below 1, or `norm` neither.
        """
        super().__init__()
        for name, value in (("width", width), ("layers", layers), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"discriminator: {name} is {value}, must be at least 1; the usual net is 64, 3, 3")
        if norm not in NORMS:
            raise ValueError(f"discriminator: norm is {norm!r}; allowed: {', '.join(NORMS)}{suggest(norm, NORMS)}")
        self.layers = layers
        widths = [width * min(2**i, MAX_GROWTH) for i in range(layers + 1)]
        net: list[nn.Module] = [nn.Conv2d(in_channels, width, KERNEL, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            stride = 2 if i + 1 < layers else 1
            net += [
                nn.Conv2d(c_in, c_out, KERNEL, stride=stride, padding=1, bias=False),  # the norm has the bias
                NORMS[norm](c_out),
                nn.LeakyReLU(SLOPE),
            ]
        self.net = nn.Sequential(*net, nn.Conv2d(widths[-1], 1, KERNEL, padding=1))
        self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        """Score images.

        Args:
            x: b c h w in [-1, 1]; sides of at least 2 ** (layers + 2) pixels.

        Returns: logits b 1 h' w', positive for "real"; h' is h / 2 ** layers - 2.

        Raises:
            ValueError: if the image is too small for one logit.
        """
        if min(x.shape[2:]) < (smallest := 2 ** (self.layers + 2)):
            raise ValueError(
                f"discriminator: image is {x.shape[2]}x{x.shape[3]} (h w), sides must be at least {smallest} with "
                f"{self.layers} layers; use fewer layers"
            )
        return self.net(x)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, INIT_STD)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, INIT_STD)
        nn.init.zeros_(module.bias)
