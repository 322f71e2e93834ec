"""DDIM: deterministic to fully stochastic sampling on a subset of the training steps (arXiv:2010.02502)."""

import math

from torch import Tensor

from ldm.registry import ConfigError, register
from ldm.samplers.base import Draw, Predict, Prediction, Sampler, Trajectory
from ldm.schedule import Schedule, timesteps


@register("sampler", "ddim")
class DDIM(Sampler):
    """Song et al. 2021 (arXiv:2010.02502).

    Each step goes to the next entry of `timesteps`. diffusers goes to t - T // n instead, which is the same for
    leading spacing, and for trailing when n divides T; elsewhere it denoises to a level it does not evaluate next.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        steps: int = 50,
        eta: float = 0.0,
        spacing: str = "leading",
        offset: int = 1,
        final: str = "first",
    ) -> None:
        """Build for a schedule; the defaults are Stable Diffusion's.

        Args:
            schedule: of the model that will be sampled.
            steps: 1..T.
            eta: in [0, 1]; 0 is deterministic, 1 has DDPM's variance.
            spacing: leading, trailing or linspace, see `ldm.schedule.timesteps`.
            offset: at least 0, see there.
            final: first or one, see `Sampler`.

        Raises: ConfigError for values outside these.
        """
        super().__init__(schedule, timesteps(spacing, steps, schedule.steps, offset), final=final)
        if not 0 <= eta <= 1:
            raise ConfigError(f"sampler.eta is {eta}; allowed: 0..1; 0 is deterministic")
        self.eta = eta

    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """See `Sampler.trajectory`."""
        for i in range(start, len(self.timesteps)):
            pred = predict(x, self.timesteps[i])
            noise = draw() if self.eta > 0 else None
            x = yield ddim_step(pred, self.levels[i], self.levels[i + 1], eta=self.eta, noise=noise)


def ddim_step(pred: Prediction, a_t: float, a_prev: float, *, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """One DDIM update.

    Song et al. 2021 (arXiv:2010.02502), Eq. 12; sigma from Eq. 16. `a` is that paper's alpha, i.e. DDPM's alpha-bar.

    Args:
        pred: x0 and eps at a_t, each b c h w.
        a_t: in [0, 1), alpha-bar of the prediction.
        a_prev: in [0, 1], alpha-bar to go to; above a_t for noise to be added.
        eta: in [0, 1].
        noise: b c h w, standard normal; required when eta > 0.

    Returns: b c h w, the latent at a_prev.
    Raises: ValueError if eta is positive without noise.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta is {eta} and noise is None; allowed: noise of x_t's shape when eta is above 0; pass it")
    sigma = 0.0
    if eta > 0 and a_t < a_prev:
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
    direction = math.sqrt(max(1 - a_prev - sigma**2, 0.0))
    x = math.sqrt(a_prev) * pred.x0 + direction * pred.eps
    return x if noise is None or sigma == 0 else x + sigma * noise
