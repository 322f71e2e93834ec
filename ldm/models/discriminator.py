"""PatchGAN discriminator for the adversarial part of the autoencoder's loss.

Isola et al. 2017 (arXiv:1611.07004), section 3.2.2; Esser et al. 2021 (arXiv:2012.09841) for its use in a first stage.
"""

from itertools import pairwise

from torch import Tensor, nn

KERNEL = 4
SLOPE = 0.2
MAX_GROWTH = 8
INIT_STD = 0.02


class PatchDiscriminator(nn.Module):
    """Convolutional critic: one real/fake logit per overlapping patch.

    Uses batch statistics: under several ranks convert it with `nn.SyncBatchNorm` or accept per-rank statistics.
    """

    def __init__(self, width: int = 64, layers: int = 3, in_channels: int = 3) -> None:
        """Build the critic.

        Args:
            width: channels after the first convolution; they double per layer, up to eight times.
            layers: stride-2 convolutions; the patch is 70 pixels wide with 3, 34 with 2.
            in_channels: image channels.

        Raises:
            ValueError: if a count is below 1.
        """
        super().__init__()
        for name, value in (("width", width), ("layers", layers), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"discriminator: {name} is {value}, must be at least 1; the usual net is 64, 3, 3")
        self.layers = layers
        widths = [width * min(2**i, MAX_GROWTH) for i in range(layers + 1)]
        net: list[nn.Module] = [nn.Conv2d(in_channels, width, KERNEL, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            stride = 2 if i + 1 < layers else 1
            net += [
                nn.Conv2d(c_in, c_out, KERNEL, stride=stride, padding=1, bias=False),  # BatchNorm has the bias
                nn.BatchNorm2d(c_out),
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
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INIT_STD)
        nn.init.zeros_(module.bias)
