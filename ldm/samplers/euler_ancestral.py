"""Euler's method with fresh noise after each step: the ancestral sampler in sigma (DDPM, arXiv:2006.11239)."""

import math

from torch import Tensor

from ldm.registry import register
from ldm.samplers.base import Draw, Predict, Sampler, Trajectory
from ldm.samplers.sigmas import sigma_of, sigma_times
from ldm.schedule import Schedule


@register("sampler", "euler_ancestral")
class EulerAncestral(Sampler):
    """Steps down to sigma_down, then adds noise of sigma_up so that the level is right.

    Same posterior variance as DDPM (Ho et al. 2020, arXiv:2006.11239, section 3.2, fixed_small), written in sigma as in
    Song et al. 2021 (arXiv:2011.13456, appendix F, ancestral sampling). Order 1.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        steps: int = 30,
        spacing: str = "linspace",
        offset: int = 0,
        sigmas: str = "schedule",
        final: str = "one",
    ) -> None:
        """Build for a schedule. Arguments and errors: see `ldm.samplers.sigmas.sigma_times`."""
        times = sigma_times(schedule, steps, spacing=spacing, offset=offset, sigmas=sigmas, final=final)
        super().__init__(schedule, times, final=final)

    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """See `Sampler.trajectory`."""
        for i in range(start, len(self.timesteps)):
            pred = predict(x, self.timesteps[i])
            down, up = ancestral_split(sigma_of(self.levels[i]), sigma_of(self.levels[i + 1]))
            clean = pred.x0 + down * pred.eps
            x = yield math.sqrt(self.levels[i + 1]) * (clean + up * draw() if up > 0 else clean)


def ancestral_split(sigma: float, sigma_next: float) -> tuple[float, float]:
    """Sigma to step down to and sigma of the noise to add; their squares sum to sigma_next^2, at most sigma^2."""
    up = sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0))
    return math.sqrt(max(sigma_next**2 - up**2, 0.0)), up
