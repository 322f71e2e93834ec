"""Training the KL-VAE: L1 (+ LPIPS) + KL, with a patch discriminator from `disc_start` on.

Rombach et al. 2022 (arXiv:2112.10752), appendix G; Esser et al. 2021 (arXiv:2012.09841), section 3.1. The released
code sums over pixels and divides by the batch; here every term is divided by the number of image values as well, so
`kl_weight` keeps its meaning and losses do not grow with the image size.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.data.images import Batch
from ldm.evaluation.fidelity import psnr
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.lpips import LPIPS
from ldm.models.vae import VAE, Posterior
from ldm.registry import ConfigError, register
from ldm.training.draws import Draws
from ldm.training.losses import adaptive_weight, gradients_at, hinge_discriminator
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
        disc_norm: its normalisation: group, of each picture alone, or batch as published, over a rank's part of a
            micro-batch, so that the run depends on how a batch is split.
    """

    kl_weight: float = 1e-6
    lpips_weight: float = 0.0
    lpips_weights: str | None = None
    disc_weight: float = 0.0
    disc_start: int = 50_001
    disc_width: int = 64
    disc_layers: int = 3
    disc_norm: str = "group"


@register("stage", "vae", options=VAEStageOptions)
class VAEStage(Stage):
    """Autoencoder training; the discriminator is a second player with its own optimizer."""

    partial = True  # each player's forward leaves the other's parameters without a gradient

    def __init__(self, options: VAEStageOptions, *, vae: VAE) -> None:
        super().__init__()
        self.options = options
        self.vae = vae
        o = options
        self.disc = PatchDiscriminator(o.disc_width, o.disc_layers, norm=o.disc_norm) if o.disc_weight else None
        self.surveyed: Tensor | None = None  # `gradients_at` the last layer by the whole global batch of this step
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

    def survey(self, parts: Sequence[tuple[Batch, Draws]], player: str, step: int) -> None:
        """What the weight of the adversarial term goes by, of the whole batch. See Stage.survey."""
        if player != "model" or not self._playing(step):
            return
        others = [p for p in self.vae.parameters() if p.requires_grad and p is not self.vae.last_layer]
        for p in others:  # nothing is kept for what comes before that layer
            p.requires_grad_(False)
        try:
            found = [self._gradients(*self._terms(batch, draws, step)) for batch, draws in parts]
        finally:
            for p in others:
                p.requires_grad_(True)
        self.surveyed = _over_ranks(torch.stack(found).mean(dim=0))

    def forward(self, batch: Batch, draws: Draws, player: str, step: int) -> Loss:
        """Loss of one player. See Stage.forward."""
        return self._discriminator(batch, draws, step) if player == "discriminator" else self._vae(batch, draws, step)

    def _playing(self, step: int) -> bool:
        return self.disc is not None and step >= self.options.disc_start

    def _reconstruct(self, batch: Batch, draws: Draws) -> tuple[Tensor, Posterior]:
        sides = (s // self.vae.factor for s in batch.image.shape[-2:])
        return self.vae(batch.image, draws.normal("posterior", self.vae.config.latent_channels, *sides))

    def _terms(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the reconstruction, and all that is logged."""
        y, posterior = self._reconstruct(batch, draws)
        total = (y.float() - batch.image).abs().mean()
        parts = {"l1": total, "kl": posterior.kl().mean()}
        if self.lpips is not None:
            parts["lpips"] = self.lpips(batch.image, y).mean()
            total = total + self.options.lpips_weight * parts["lpips"]
        if self.disc is not None and self._playing(step):
            parts["adversarial"] = -self.disc(y).float().mean()
        return total, parts

    def _gradients(self, total: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        if not self.vae.last_layer.requires_grad:
            raise ConfigError(
                "train.trainable leaves out decoder.conv_out, at which the discriminator's loss is balanced; add it, "
                "or set stage.disc_weight=0"
            )
        return gradients_at(self.vae.last_layer, total, parts["adversarial"])

    def _vae(self, batch: Batch, draws: Draws, step: int) -> Loss:
        o = self.options
        total, parts = self._terms(batch, draws, step)
        if self._playing(step):
            gradients = _over_ranks(self._gradients(total, parts)) if self.surveyed is None else self.surveyed
            parts["adversarial_weight"] = o.disc_weight * adaptive_weight(gradients)
            total = total + parts["adversarial_weight"] * parts["adversarial"]
        return Loss(total + o.kl_weight * parts["kl"] / batch.image[0].numel(), parts)

    def _discriminator(self, batch: Batch, draws: Draws, step: int) -> Loss:
        assert self.disc is not None
        if not self._playing(step):  # not playing yet: a zero that touches its parameters
            return Loss(torch.stack([p.sum() for p in self.disc.parameters()]).sum() * 0.0)
        with torch.no_grad():
            y, _ = self._reconstruct(batch, draws)
        loss = hinge_discriminator(self.disc(batch.image), self.disc(y))
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


def _over_ranks(x: Tensor) -> Tensor:
    """Mean over ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
