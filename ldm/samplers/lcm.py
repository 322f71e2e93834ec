"""Sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378)."""

import math

from torch import Tensor

from ldm.registry import ConfigError, register
from ldm.samplers.base import Draw, Predict, Sampler, Trajectory
from ldm.schedule import Schedule

_SIGMA_DATA = 0.5  # arXiv:2310.04378, section 4.1 (after arXiv:2303.01469, appendix C)
_TIME_SCALE = 10.0  # the released models' timestep_scaling


@register("sampler", "lcm")
class LCM(Sampler):
    """Luo et al. 2023 (arXiv:2310.04378), Alg. 3: jump to the clean latent, noise it again to the next level.

    For weights distilled for it (LCM, LCM-LoRA) only: with others each jump ends at the mean of what is possible.
    """

    def __init__(self, schedule: Schedule, *, steps: int = 4, original_steps: int = 50) -> None:
        """Build for a schedule.

        Args:
            schedule: of the model that will be sampled.
            steps: 1..original_steps; 2 to 8 suit distilled models.
            original_steps: 1..T, number of the teacher's timesteps, of which `steps` are picked.

        Raises: ConfigError for values outside these.
        """
        T = schedule.steps
        if not 1 <= original_steps <= T:
            raise ConfigError(f"sampler.original_steps is {original_steps}; allowed 1..{T}; released models use 50")
        if not 1 <= steps <= original_steps:
            raise ConfigError(f"sampler.steps is {steps}; allowed 1..{original_steps} (original_steps); 4 suits LCM")
        teacher = [k * (T // original_steps) - 1 for k in range(original_steps, 0, -1)]
        super().__init__(schedule, [teacher[k * original_steps // steps] for k in range(steps)], final="one")

    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """See `Sampler.trajectory`."""
        for i in range(start, len(self.timesteps)):
            skip, out = boundary(self.timesteps[i])
            clean = out * predict(x, self.timesteps[i]).x0 + skip * x
            a_next = self.levels[i + 1]
            x = yield clean if a_next == 1 else math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * draw()


def boundary(t: float) -> tuple[float, float]:
    """c_skip and c_out (Luo et al. 2023, section 4.1): 1 and 0 at t = 0, so that there x is its own clean latent."""
    scaled = _TIME_SCALE * t
    total = scaled**2 + _SIGMA_DATA**2
    return _SIGMA_DATA**2 / total, scaled / math.sqrt(total)
