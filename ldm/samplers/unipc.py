"""UniPC: a predictor and a corrector of order 2 at one model call a step (Zhao et al. 2023, arXiv:2302.04867)."""

import math

from torch import Tensor

from ldm.registry import register
from ldm.samplers.base import Draw, Predict, Trajectory
from ldm.samplers.sigmas import SigmaSampler, half_log_snr, sigma_of


@register("sampler", "unipc")
class UniPC(SigmaSampler):
    """UniPC-2 on x0 predictions with B2(h) = e^h - 1: Zhao et al. 2023 (arXiv:2302.04867), Alg. 5-8.

    x0 is predicted once per level, at the predicted latent, and not again after the correction. Where `on_step`
    replaces a latent, what it changed is added to the corrected one.
    """

    multistep = True

    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """See `Sampler.trajectory`."""
        n, second = len(self.timesteps), False
        corrected = predicted = x
        before: Tensor | None = None  # x0 of the last step, and of the one before it
        earlier: Tensor | None = None
        for i in range(start, n):
            x0 = predict(x, self.timesteps[i]).x0
            if before is not None:
                added = None if x is predicted else x - predicted
                corrected = unic_step(corrected, (earlier if second else None, before, x0), self._around(i - 1))
                corrected = corrected if added is None else corrected + added
            else:
                corrected = x
            second = before is not None and i < n - 1
            predicted = unip_step(corrected, (before if second else None, x0), self._around(i))
            earlier, before = before, x0
            x = yield predicted

    def _around(self, i: int) -> tuple[float, float, float]:
        """Alpha-bars before, at and after level i."""
        return self.levels[max(i - 1, 0)], self.levels[i], self.levels[i + 1]


def unip_step(x: Tensor, x0: tuple[Tensor | None, Tensor], a_bars: tuple[float, float, float]) -> Tensor:
    """The predictor: Zhao et al. 2023 (arXiv:2302.04867), Alg. 6; of order 1 if the first x0 is None.

    Args:
        x: b c h w, latent at the middle level.
        x0: predictions at the first and the middle level, each b c h w.
        a_bars: of the last level, of this one and of the one to go to.

    Returns: b c h w, the latent at the third level.
    """
    before, now = x0
    a_before, a_t, a_next = a_bars
    toward = now
    if before is not None:
        toward = now + 0.5 * (before - now) / _ratio(a_before, a_t, a_next)
    return _first_order(x, toward, a_t, a_next)


def unic_step(x: Tensor, x0: tuple[Tensor | None, Tensor, Tensor], a_bars: tuple[float, float, float]) -> Tensor:
    """The corrector: Zhao et al. 2023 (arXiv:2302.04867), Alg. 5; of order 1 if the first x0 is None.

    Args:
        x: b c h w, latent at the middle level, which the predictor started from.
        x0: predictions at the three levels, each b c h w; the last one at the predicted latent.
        a_bars: of the three levels.

    Returns: b c h w, the latent at the third level.
    """
    before, now, after = x0
    a_before, a_t, a_next = a_bars
    if before is None:
        return _first_order(x, now + 0.5 * (after - now), a_t, a_next)
    hh = half_log_snr(a_t) - half_log_snr(a_next)
    b = math.expm1(hh)
    phi = b / hh - 1
    first, second = phi / b, 2 * (phi / hh - 0.5) / b  # right-hand side of Eq. 9, solved for the two weights
    ratio = _ratio(a_before, a_t, a_next)
    p = (second - first) / (ratio - 1)
    return _first_order(x, now + p * (before - now) / ratio + (first - p) * (after - now), a_t, a_next)


def _first_order(x: Tensor, toward: Tensor, a_t: float, a_next: float) -> Tensor:
    """The exact solution for a constant x0, `toward`."""
    shrink = sigma_of(a_next) / sigma_of(a_t)
    return math.sqrt((1 - a_next) / (1 - a_t)) * x + math.sqrt(a_next) * (1 - shrink) * toward


def _ratio(a_before: float, a_t: float, a_next: float) -> float:
    """Where the last level lies, in steps from this one: negative (r_m of the paper)."""
    before, now, after = map(half_log_snr, (a_before, a_t, a_next))
    return (before - now) / (after - now)
