"""DDPM ancestral sampling, on all training steps or a subset (arXiv:2006.11239)."""

import math

from torch import Tensor

from ldm.registry import ConfigError, register
from ldm.samplers.base import Draw, Predict, Sampler, Trajectory
from ldm.schedule import Schedule, timesteps

_VARIANCES = ("fixed_small", "fixed_large")


@register("sampler", "ddpm")
class DDPM(Sampler):
    """Ho et al. 2020 (arXiv:2006.11239), Alg. 2, with both variances of its section 3.2.

    x0 is never clipped: latents have no bounds. The last step adds no noise whatever timestep it starts at (diffusers
    adds it unless that is 0; for fixed_large after leading spacing with offset 1 that leaves visible noise).
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        steps: int = 1000,
        variance: str = "fixed_small",
        spacing: str = "leading",
        offset: int = 0,
        final: str = "one",
    ) -> None:
        """Build for a schedule.

        Args:
            schedule: of the model that will be sampled.
            steps: 1..T.
            variance: fixed_small (posterior variance, right for data that is one point) or fixed_large (beta, right
                for standard normal data).
            spacing: leading, trailing or linspace, see `ldm.schedule.timesteps`.
            offset: at least 0, see there.
            final: first or one, see `Sampler`.

        Raises: ConfigError for values outside these.
        """
        super().__init__(schedule, timesteps(spacing, steps, schedule.steps, offset), final=final)
        if variance not in _VARIANCES:
            raise ConfigError(
                f"sampler.variance is {variance!r}; allowed: {', '.join(_VARIANCES)}; choose one of these"
            )
        self.variance = variance

    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """See `Sampler.trajectory`."""
        last = len(self.timesteps) - 1
        for i in range(start, last + 1):
            a_t, a_prev = self.levels[i], self.levels[i + 1]
            mean = posterior_mean(x, predict(x, self.timesteps[i]).x0, a_t, a_prev)
            if i < last:
                mean = mean + math.sqrt(posterior_variance(a_t, a_prev, self.variance)) * draw()
            x = yield mean


def posterior_mean(x_t: Tensor, x0: Tensor, a_t: float, a_prev: float) -> Tensor:
    """Mean of q(x_prev | x_t, x0): Ho et al. 2020 (arXiv:2006.11239), Eq. 7, for any two levels.

    Args:
        x_t: b c h w.
        x0: b c h w.
        a_t: alpha-bar of x_t, in [0, 1).
        a_prev: alpha-bar to go to, in [a_t, 1] and above 0.

    Returns: b c h w.
    """
    alpha = a_t / a_prev
    return math.sqrt(a_prev) * (1 - alpha) / (1 - a_t) * x0 + math.sqrt(alpha) * (1 - a_prev) / (1 - a_t) * x_t


def posterior_variance(a_t: float, a_prev: float, kind: str) -> float:
    """Variance of one ancestral step: beta-tilde (Ho et al. 2020, Eq. 7) for fixed_small, beta for fixed_large."""
    beta = 1 - a_t / a_prev
    return beta if kind == "fixed_large" else (1 - a_prev) / (1 - a_t) * beta
