"""Losses: diffusion, autoencoder, adversarial."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.schedule import Schedule


def diffusion_loss(
    output: Tensor, target: Tensor, schedule: Schedule, objective: str, t: Tensor, min_snr_gamma: float | None
) -> Tensor:
    """Mean squared error of each sample, weighted by min-SNR.

    Ho et al. 2020 (arXiv:2006.11239), Eq. 14; Hang et al. 2023 (arXiv:2303.09556), section 3.4.

    Args:
        output: b c h w, of the UNet.
        target: b c h w, what it should be.
        schedule: gives SNR.
        objective: eps | v | x0, what `output` predicts.
        t: b, timesteps.
        min_snr_gamma: e.g. 5; None weights all timesteps equally.

    Returns: b, float32.
    Raises: ValueError if output and target differ in shape.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"the UNet's output is {tuple(output.shape)} (b c h w), its target {tuple(target.shape)}; must be the "
            "same: set model.unet.out_channels to the channels of the latent"
        )
    per_sample = (output.float() - target.float()).pow(2).mean(dim=(1, 2, 3))
    return per_sample * schedule.loss_weight(objective, t, min_snr_gamma)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of a discriminator from its logits on real and fake images (Lim & Ye 2017, arXiv:1705.02894)."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def gradients_at(layer: Tensor, *losses: Tensor) -> Tensor:
    """Each loss's gradient at a layer's weight, n *layer, detached; their graphs stay for backward."""
    return torch.stack([torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in losses])


def adaptive_weight(gradients: Tensor) -> Tensor:
    """Balance of the adversarial loss: ratio of gradient norms at the decoder's last layer, in [0, 1e4].

    Esser et al. 2021 (arXiv:2012.09841), Eq. 7.

    Args:
        gradients: 2 *layer, of the reconstruction's loss and of the adversarial one, over the whole global batch.
    """
    reconstruction, adversarial = gradients
    return (reconstruction.norm() / (adversarial.norm() + 1e-4)).clamp(0.0, 1e4)
