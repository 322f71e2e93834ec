"""Image-to-image and inpainting: where sampling begins, and what it keeps of a source picture.

SDEdit (Meng et al. 2022, arXiv:2108.01073) for the start; for masks either the blend of RePaint (Lugmayr et al. 2022,
arXiv:2201.09865, Eq. 8, without its resampling) or the inputs of the released Stable Diffusion inpainting weights.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.registry import ConfigError
from ldm.samplers.base import Draw


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A picture to start from.

    Attributes:
        image: b 3 h w in [-1, 1], of the size to draw.
        mask: b 1 h w in [0, 1]; from 0.5 on is drawn anew, the rest is kept. None redraws everything a little.
        strength: in (0, 1], the part of the steps that is run, see `first_step`.
    """

    image: Tensor
    strength: float
    mask: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """Keeps the known region of a UNet that knows nothing of masks.

    The result's known region is the decoded source latent, not the source's pixels: pasting those over it would leave
    a seam wherever the VAE shifts a colour, and published pipelines do not.

    Attributes:
        known: b c h w, clean latent of the source.
        noise: b c h w, the noise that sampling began with.
        redrawn: b 1 h w bool.
        levels: see `Sampler`.
    """

    known: Tensor
    noise: Tensor
    redrawn: Tensor
    levels: Sequence[float]

    def __call__(self, i: int, x: Tensor) -> Tensor:
        """The latent after step i with its known part noised to the same level (clean after the last step)."""
        last = i + 2 == len(self.levels)
        return torch.where(self.redrawn, x, self.known if last else noised(self.known, self.noise, self.levels[i + 1]))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Where sampling begins.

    Attributes:
        x: b c h w, latent at `timesteps[index]`.
        index: first step.
        beside: b c + 1 h w, what an inpainting UNet sees beside x_t at every step: the mask (1 is drawn anew), then
            the latent of the masked image (spec of the released weights).
        blend: keeps the known region of any other UNet.
    """

    x: Tensor
    index: int = 0
    beside: Tensor | None = None
    blend: Blend | None = None


def first_step(steps: int, strength: float) -> int:
    """Index of the first of `steps` that is run: the last int(steps * strength) are, as released pipelines count.

    Raises: ConfigError if strength is outside (0, 1] or leaves no step.
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength is {strength}; allowed: above 0, up to 1; 0.3 stays close to the image, 0.8 far")
    left = int(steps * strength)
    if left == 0:
        raise ConfigError(
            f"strength {strength} leaves none of {steps} steps; allowed: {1 / steps:.3g}..1; raise it or sampler.steps"
        )
    return steps - left


def begin(source: Source | None, vae: VAE, levels: Sequence[float], draw: Draw, *, inpainting: bool) -> Start:
    """The first latent: noise, or the source noised to the level of the first step that its strength leaves.

    As released pipelines do, latents are samples of the posterior, and a strength of 1 is the image noised to
    `levels[0]` (never quite pure noise) without a mask, but pure noise with one. The draws come in their order too
    (image, start, masked image), so equal seeds mean equal pictures.

    Args:
        source: None starts from pure noise.
        vae: encodes the source.
        levels: of the sampler.
        draw: noise of the latent's size, b c h w.
        inpainting: the UNet takes mask and masked image, so nothing is blended.

    Raises: ConfigError as `first_step`.
    """
    if source is None:
        return Start(draw())
    index = first_step(len(levels) - 1, source.strength)
    pure = source.mask is not None and source.strength == 1
    known = _latent(vae, source.image, draw()) if not (pure and inpainting) else None
    noise = draw()
    x = noise if pure or known is None else noised(known, noise, levels[index])
    if source.mask is None:
        return Start(x, index)
    mask = (source.mask >= 0.5).float()
    small = F.interpolate(mask, size=noise.shape[-2:], mode="nearest").to(noise.device)  # b 1 h w
    if known is not None and not inpainting:
        return Start(x, index, blend=Blend(known, noise, small > 0, levels))
    hidden = _latent(vae, source.image * (1 - mask), draw())
    return Start(x, index, beside=torch.cat([small, hidden], dim=1))


def noised(x0: Tensor, noise: Tensor, a_bar: float) -> Tensor:
    """A clean latent at a noise level: DDPM (arXiv:2006.11239), Eq. 4."""
    return math.sqrt(a_bar) * x0 + math.sqrt(1 - a_bar) * noise


def for_inpainting(unet: UNet, vae: VAE, *, masked: bool) -> bool:
    """Whether the UNet takes mask and masked image beside x_t, by its number of input channels.

    Raises: ConfigError if it does and there is no mask, or if its input channels fit no way of sampling.
    """
    channels, latent = unet.spec.in_channels, vae.config.latent_channels
    if channels not in (latent, 2 * latent + 1):
        raise ConfigError(
            f"unet.in_channels is {channels}; sampling knows {latent} (x_t alone) and {2 * latent + 1} (inpainting: "
            "x_t, mask, masked image); choose other weights"
        )
    if channels > latent and not masked:
        raise ConfigError(
            f"unet.in_channels is {channels}: an inpainting UNet without a mask; it always needs image and mask: "
            "set sample.image and sample.mask, or choose other weights"
        )
    return channels > latent


def check_source(source: Source, b: int, size: tuple[int, int]) -> None:
    """Raises: ValueError if image or mask is not b pictures of that (height, width)."""
    for name, channels, x in (("image", 3, source.image), ("mask", 1, source.mask)):
        if x is not None and x.shape != (b, channels, *size):
            raise ValueError(f"source {name} is {tuple(x.shape)}, must be {(b, channels, *size)} (b c h w); resize it")


def _latent(vae: VAE, image: Tensor, noise: Tensor) -> Tensor:
    """A posterior sample, b c h w float32."""
    weight = vae.quant.weight
    return vae.to_latent(image.to(weight.device, weight.dtype), noise).float()
