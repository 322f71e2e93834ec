"""Training the KL-VAE: L1 (+ LPIPS) + KL, with a patch discriminator from `disc_start` on.

Rombach et al. 2022 (arXiv:2112.10752), appendix G; Esser et al. 2021 (arXiv:2012.09841), section 3.1. The released
code sums over pixels and divides by the batch; here every term is divided by the number of image values as well, so
`kl_weight` keeps its meaning and losses do not grow with the image size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.data.images import Batch
from ldm.evaluation.fidelity import psnr
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.lpips import LPIPS
from ldm.models.vae import VAE
from ldm.registry import ConfigError, register
from ldm.training.draws import Draws
from ldm.training.losses import adaptive_weight, hinge_discriminator
from ldm.training.stage import Loss, Report, Stage


@dataclass(frozen=True)
class VAEStageOptions:
    """Weights of the loss terms.

    Attributes:
        kl_weight: factor of the KL term (summed over the latent, as in the released code).
        lpips_weight: factor of the perceptual term; needs `lpips_weights`.
        lpips_weights: safetensors file with VGG16 and LPIPS weights, or None.
        disc_weight: factor of the adversarial term, on top of its adaptive weight; 0 = no discriminator.
        disc_start: optimizer step from which the discriminator plays.
        disc_width: channels of the discriminator's first layer.
        disc_layers: its number of strided layers.
    """

    kl_weight: float = 1e-6
    lpips_weight: float = 0.0
    lpips_weights: str | None = None
    disc_weight: float = 0.0
    disc_start: int = 50_001
    disc_width: int = 64
    disc_layers: int = 3


@register("stage", "vae", options=VAEStageOptions)
class VAEStage(Stage):
    """Autoencoder training; the discriminator is a second player with its own optimizer."""

    partial = True  # each player's forward leaves the other's parameters without a gradient

    def __init__(self, options: VAEStageOptions, *, vae: VAE) -> None:
        super().__init__()
        self.options = options
        self.vae = vae
        self.disc = PatchDiscriminator(options.disc_width, options.disc_layers) if options.disc_weight else None
        self.lpips = LPIPS.load(options.lpips_weights) if options.lpips_weight else None
        if self.lpips is not None:
            self.lpips.requires_grad_(False).eval()

    @property
    def trained(self) -> nn.Module:
        """The VAE."""
        return self.vae

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """The VAE, and the discriminator if there is one."""
        return {"model": self.vae} | ({} if self.disc is None else {"discriminator": self.disc})

    def check(self, batch: Batch) -> None:
        """Raises: ConfigError if the images are of a size that does not fit."""
        height, width = batch.image.shape[-2:]
        if height % self.vae.factor or width % self.vae.factor:
            raise ConfigError(
                f"images are {width}x{height} (w x h), the VAE needs multiples of {self.vae.factor}; change data.size "
                "or data.buckets"
            )

    def forward(self, batch: Batch, draws: Draws, player: str, step: int) -> Loss:
        """Loss of one player. See Stage.forward."""
        x = batch.image
        z = self.vae.config.latent_channels
        noise = draws.normal("posterior", z, *(s // self.vae.factor for s in x.shape[-2:]))
        if player == "discriminator":
            return self._discriminator(x, noise, step)
        return self._autoencoder(x, noise, step)

    def _autoencoder(self, x: Tensor, noise: Tensor, step: int) -> Loss:
        o = self.options
        y, posterior = self.vae(x, noise)
        l1 = (y.float() - x).abs().mean()
        kl = posterior.kl().mean()
        total = l1
        parts = {"l1": l1, "kl": kl}
        if self.lpips is not None:
            parts["lpips"] = self.lpips(x, y).mean()
            total = total + o.lpips_weight * parts["lpips"]
        if self.disc is not None and step >= o.disc_start:
            adversarial = -self.disc(y).float().mean()
            weight = o.disc_weight * adaptive_weight(total, adversarial, self.vae.last_layer)
            total = total + weight * adversarial
            parts |= {"adversarial": adversarial, "adversarial_weight": weight}
        total = total + o.kl_weight * kl / x[0].numel()
        return Loss(total, parts)

    def _discriminator(self, x: Tensor, noise: Tensor, step: int) -> Loss:
        assert self.disc is not None
        if step < self.options.disc_start:  # not playing yet: a zero that touches its parameters
            return Loss(torch.stack([p.sum() for p in self.disc.parameters()]).sum() * 0.0)
        with torch.no_grad():
            y, _ = self.vae(x, noise)
        loss = hinge_discriminator(self.disc(x), self.disc(y))
        return Loss(loss, {"discriminator": loss})

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch], images: int, seed: int) -> Report:
        """Held-out PSNR of the posterior mode, and 1 / std of its latents: `scale_factor` for the config."""
        scores: list[Tensor] = []
        latents: list[Tensor] = []
        pictures: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            y, posterior = self.vae(batch.image)
            real, fake = ((v.float() * 0.5 + 0.5).clamp(0, 1) for v in (batch.image, y))
            scores.append(psnr(real, fake))
            latents.append(posterior.mode().flatten())
            pictures.append((real, fake))
        columns = {
            "image": torch.cat([p[0] for p in pictures])[:images],
            "reconstruction": torch.cat([p[1] for p in pictures])[:images],
        }
        scale = 1.0 / torch.cat(latents).float().std().item()
        return Report({"psnr": torch.cat(scores).mean().item(), "scale_factor": scale}, columns)
