"""DPM-Solver++ of order 2, multistep, deterministic and stochastic (Lu et al. 2022, arXiv:2211.01095)."""

import math

from torch import Tensor

from ldm.registry import register
from ldm.samplers.base import Draw, Predict, Trajectory
from ldm.samplers.sigmas import SigmaSampler, half_log_snr, sigma_of

_FEW_STEPS = 15  # below this many steps the last one is of first order (the authors' lower_order_final)


@register("sampler", "dpmpp_2m")
class DPMpp2M(SigmaSampler):
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), Alg. 2. One model call a step."""

    stochastic = False

    multistep = True

    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """See `Sampler.trajectory`."""
        last, before = len(self.timesteps) - 1, None
        for i in range(start, last + 1):
            a_t, a_next = self.levels[i], self.levels[i + 1]
            x0 = predict(x, self.timesteps[i]).x0
            change = None
            if before is not None and not (i == last and (a_next == 1 or len(self.timesteps) < _FEW_STEPS)):
                change = (x0 - before) * _step_ratio(self.levels[i - 1], a_t, a_next)
            noise = draw() if self.stochastic and a_next < 1 else None
            x, before = (yield dpmpp_step(x, x0, change, a_t, a_next, noise)), x0


@register("sampler", "dpmpp_2m_sde")
class DPMpp2MSDE(DPMpp2M):
    """SDE-DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), section 5 and appendix; fresh noise at every step."""

    stochastic = True


def dpmpp_step(x: Tensor, x0: Tensor, change: Tensor | None, a_t: float, a_next: float, noise: Tensor | None) -> Tensor:
    """One update of order 1, or 2 with `change`.

    Lu et al. 2022 (arXiv:2211.01095): Eq. 9 and Alg. 2 without noise, Eq. 18 and its multistep form with it.

    Args:
        x: b c h w, latent at a_t.
        x0: b c h w, predicted from it.
        change: b c h w, by how much x0 grows over this step if it goes on as over the last one.
        a_t: alpha-bar of x, in [0, 1).
        a_next: alpha-bar to go to, above a_t.
        noise: b c h w, standard normal, for the stochastic solver.

    Returns: b c h w, the latent at a_next.
    """
    shrink = sigma_of(a_next) / sigma_of(a_t)  # exp(-h), h the step in half log SNR
    toward = x0 if change is None else x0 + change / 2
    kept = math.sqrt((1 - a_next) / (1 - a_t))
    if noise is None:
        return kept * x + math.sqrt(a_next) * (1 - shrink) * toward
    rest = 1 - shrink**2
    return kept * shrink * x + math.sqrt(a_next) * rest * toward + math.sqrt((1 - a_next) * rest) * noise


def _step_ratio(a_before: float, a_t: float, a_next: float) -> float:
    """Length of this step over that of the last one, in half log SNR."""
    before, now, after = map(half_log_snr, (a_before, a_t, a_next))
    return (after - now) / (now - before)
