"""Heun's method on the probability flow in sigma: order 2, two model calls a step (arXiv:2206.00364)."""

import math

from torch import Tensor

from ldm.registry import register
from ldm.samplers.base import Draw, Predict, Trajectory
from ldm.samplers.ddim import ddim_step
from ldm.samplers.sigmas import SigmaSampler, sigma_of


@register("sampler", "heun")
class Heun(SigmaSampler):
    """Karras et al. 2022 (arXiv:2206.00364), Alg. 1: an Euler step, then the mean of the slopes at both its ends.

    A last step to zero sigma stays Euler's, so n steps cost 2n - 1 calls.
    """

    finite = True

    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """See `Sampler.trajectory`."""
        ends = (*self.timesteps[1:], 0)
        for i in range(start, len(self.timesteps)):
            a_t, a_next = self.levels[i], self.levels[i + 1]
            pred = predict(x, self.timesteps[i])
            moved = ddim_step(pred, a_t, a_next)
            if a_next < 1:
                half = (sigma_of(a_next) - sigma_of(a_t)) / 2
                moved = moved + math.sqrt(a_next) * half * (predict(moved, ends[i]).eps - pred.eps)
            x = yield moved
