"""DDIM inversion: from a latent to the noise that DDIM turns into it (Song et al. 2021, arXiv:2010.02502)."""

import math

import torch
from torch import Tensor

from ldm.samplers.base import OnStep, Predict, Prediction, Sampler
from ldm.samplers.ddim import ddim_step


def ddim_inversion(predict: Predict, x0: Tensor, sampler: Sampler, *, on_step: OnStep | None = None) -> Tensor:
    """Walk a sampler's levels upwards with DDIM's update.

    Song et al. 2021 (arXiv:2010.02502), section 4.3 and Eq. 14. The way down asks for the noise at the upper end of
    each step, so here too the model hears the upper end's time, though x is still at the lower one; the round trip is
    exact in the limit of many steps.

    Args:
        predict: the model, usually without guidance (guidance amplifies the error).
        x0: b c h w, latent at the sampler's final level: a clean one.
        sampler: its `timesteps` and `levels` are used; eta 0 on the way down.
        on_step: called with the index of the level reached (n-1 first, 0 last) and the latent there; a returned tensor
            replaces it.

    Returns: b c h w at `levels[0]`, in float32 or wider; `sampler.sample` takes it as x_T.
    """
    x = x0.to(torch.promote_types(x0.dtype, torch.float32))
    for i in reversed(range(len(sampler.timesteps))):
        a_low, a_high = sampler.levels[i + 1], sampler.levels[i]
        eps = predict(x, sampler.timesteps[i]).eps
        clean = (x - math.sqrt(1 - a_low) * eps) / math.sqrt(a_low)
        x = ddim_step(Prediction(clean, eps), a_low, a_high)
        if on_step is not None and (replaced := on_step(i, x)) is not None:
            x = replaced
    return x
