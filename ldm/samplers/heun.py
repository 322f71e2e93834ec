"""Heun's method on the probability flow in sigma: order 2, two model calls a step (arXiv:2206.00364)."""

import math

from torch import Tensor

from ldm.registry import register
from ldm.samplers.base import Draw, Predict, Sampler, Trajectory
from ldm.samplers.ddim import ddim_step
from ldm.samplers.sigmas import refuse_infinite, sigma_of, sigma_times
from ldm.schedule import Schedule


@register("sampler", "heun")
class Heun(Sampler):
    """Karras et al. 2022 (arXiv:2206.00364), Alg. 1: an Euler step, then the mean of the slopes at both its ends.

    A last step to zero sigma stays Euler's, so n steps cost 2n - 1 calls.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        steps: int = 20,
        spacing: str = "linspace",
        offset: int = 0,
        sigmas: str = "schedule",
        final: str = "one",
    ) -> None:
        """Build for a schedule. Arguments and errors: see `ldm.samplers.sigmas.sigma_times`."""
        refuse_infinite(schedule, "sampler.name is 'heun'")
        times = sigma_times(schedule, steps, spacing=spacing, offset=offset, sigmas=sigmas, final=final)
        super().__init__(schedule, times, final=final)

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
