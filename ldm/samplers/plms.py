"""PLMS: pseudo linear multistep on DDIM's update (PNDM, Liu et al. 2022, arXiv:2202.09778)."""

import math

from torch import Tensor

from ldm.registry import register
from ldm.samplers.base import Draw, Predict, Prediction, Sampler, Trajectory
from ldm.samplers.ddim import ddim_step
from ldm.samplers.sigmas import refuse_infinite
from ldm.schedule import Schedule, timesteps

_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@register("sampler", "plms")
class PLMS(Sampler):
    """Liu et al. 2022 (arXiv:2202.09778), Eq. 12, as Stable Diffusion uses it.

    Instead of the paper's three Runge-Kutta steps the first step is taken twice, the second time with the mean of the
    noise at both its ends (ldm's released code), so n steps cost n + 1 calls.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        steps: int = 50,
        spacing: str = "leading",
        offset: int = 1,
        final: str = "first",
    ) -> None:
        """Build for a schedule; the defaults are Stable Diffusion's.

        Args:
            schedule: of the model that will be sampled.
            steps: 1..T.
            spacing: leading, trailing or linspace, see `ldm.schedule.timesteps`.
            offset: at least 0, see there.
            final: first or one, see `Sampler`.

        Raises: ConfigError for values outside these, or zero-terminal SNR.
        """
        refuse_infinite(schedule, "sampler.name is 'plms'")
        super().__init__(schedule, timesteps(spacing, steps, schedule.steps, offset), final=final)

    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """See `Sampler.trajectory`."""
        past: list[Tensor] = []  # newest first
        for i in range(start, len(self.timesteps)):
            a_t, a_next = self.levels[i], self.levels[i + 1]
            past = [predict(x, self.timesteps[i]).eps, *past[:3]]
            eps = past[0]
            if len(past) > 1:
                weights = _ADAMS_BASHFORTH[len(past) - 1]
                eps = sum((w * e for w, e in zip(weights[1:], past[1:], strict=True)), weights[0] * eps)
            elif i + 1 < len(self.timesteps):
                tried = _toward(x, eps, a_t, a_next)
                eps = (eps + predict(tried, self.timesteps[i + 1]).eps) / 2
            x = yield _toward(x, eps, a_t, a_next)


def _toward(x: Tensor, eps: Tensor, a_t: float, a_next: float) -> Tensor:
    """DDIM's deterministic step with this noise."""
    x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    return ddim_step(Prediction(x0, eps), a_t, a_next)
