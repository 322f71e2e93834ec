"""Euler's method on the probability flow in sigma (Karras et al. 2022, arXiv:2206.00364)."""

from torch import Tensor

from ldm.registry import register
from ldm.samplers.base import Draw, Predict, Trajectory
from ldm.samplers.ddim import ddim_step
from ldm.samplers.sigmas import SigmaSampler


@register("sampler", "euler")
class Euler(SigmaSampler):
    """Karras et al. 2022 (arXiv:2206.00364), Alg. 1 without its second-order part and churn. Order 1.

    On x0 + sigma eps the slope is eps, so the step is DDIM's; what differs is where it ends (no noise left) and which
    levels it may visit. Like every sampler here it starts from standard normal noise in the variance-preserving scale;
    diffusers does so for leading spacing, and elsewhere starts from sigma / sqrt(1 + sigma^2) (0.998) times as much.
    """

    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """See `Sampler.trajectory`."""
        for i in range(start, len(self.timesteps)):
            x = yield ddim_step(predict(x, self.timesteps[i]), self.levels[i], self.levels[i + 1])
