"""Euler's method with fresh noise after each step: the ancestral sampler in sigma (DDPM, arXiv:2006.11239)."""

import math

from torch import Tensor

from ldm.registry import register
from ldm.samplers.base import Draw, Predict, Trajectory
from ldm.samplers.sigmas import SigmaSampler, sigma_of


@register("sampler", "euler_ancestral")
class EulerAncestral(SigmaSampler):
    """Steps down to sigma_down, then adds noise of sigma_up so that the level is right.

    Same posterior variance as DDPM (Ho et al. 2020, arXiv:2006.11239, section 3.2, fixed_small), written in sigma as in
    Song et al. 2021 (arXiv:2011.13456, appendix F, ancestral sampling). Order 1.
    """

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
