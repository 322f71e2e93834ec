"""Euler's method on the probability flow in sigma (Karras et al. 2022, arXiv:2206.00364)."""

from torch import Tensor

from ldm.registry import register
from ldm.samplers.base import Draw, Predict, Sampler, Trajectory
from ldm.samplers.ddim import ddim_step
from ldm.samplers.sigmas import sigma_times
from ldm.schedule import Schedule


@register("sampler", "euler")
class Euler(Sampler):
    """Karras et al. 2022 (arXiv:2206.00364), Alg. 1 without its second-order part and churn. Order 1.

    On x0 + sigma eps the slope is eps, so the step is DDIM's; what differs is where it ends (no noise left) and which
    levels it may visit. Like every sampler here it starts from standard normal noise in the variance-preserving scale;
    diffusers does so for leading spacing, and elsewhere starts from sigma / sqrt(1 + sigma^2) (0.998) times as much.
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
            x = yield ddim_step(predict(x, self.timesteps[i]), self.levels[i], self.levels[i + 1])
