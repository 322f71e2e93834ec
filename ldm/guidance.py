"""Classifier-free guidance as a wrapper around the model (Ho & Salimans 2022, arXiv:2207.12598)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.registry import ConfigError
from ldm.samplers.base import Predict
from ldm.schedule import Prediction

PredictPair = Callable[[Tensor, float, bool], tuple[Tensor | None, Tensor]]
"""x_t, t, both -> raw (unconditional, conditional) outputs, b c h w; the first is None when `both` is False."""


@dataclass(frozen=True, slots=True)
class GuidanceConfig:
    """Strength of guidance and where it acts.

    Attributes:
        scale: at least 0; w of `combine`. 1 and below mean the conditional output alone (no second pass).
        rescale: phi of `rescale`, in [0, 1]; 0 is off.
        start, end: guidance acts where start <= progress < end, 0 <= start < end <= 1; an end of 1 includes 1
            (Kynkaanniemi et al. 2024, arXiv:2404.07724). Elsewhere the conditional output is used.
    """

    scale: float = 7.5
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ConfigError(f"guidance.scale is {self.scale}; allowed: 0 or more; 7.5 is usual, 1 turns it off")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance.rescale is {self.rescale}; allowed: 0..1; 0 turns it off, 0.7 is usual")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(
                f"guidance.start, end are {self.start}, {self.end}; allowed: 0 <= start < end <= 1; 0, 1 is always"
            )

    def active(self, progress: float) -> bool:
        """Whether guidance acts at this fraction of the way from noise to image."""
        inside = self.start <= progress and (progress < self.end or self.end == 1)
        return self.scale > 1 and inside


def combine(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Extrapolate: uncond + scale (cond - uncond); Ho & Salimans 2022, Eq. 6, whose 1 + w is our scale.

    Args:
        cond: b c h w, raw output (any objective: at fixed x_t all three are affine in each other).
        uncond: b c h w, likewise.
        scale: 1 gives `cond`, 0 gives `uncond`.
    """
    return torch.lerp(uncond, cond, scale)  # one operation, and exact at 0 and 1


def rescale(guided_output: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Pull the guided output's spread back to the conditional one's.

    Lin et al. 2023 (arXiv:2305.08891), Eq. 15 and 16; std over all dimensions but the batch.

    Args:
        guided_output: b c h w.
        cond: b c h w.
        phi: in [0, 1]; 0 returns `guided_output`, 1 gives it exactly the std of `cond`.
    """
    if phi == 0:
        return guided_output
    dims = tuple(range(1, cond.ndim))
    ratio = cond.std(dims, keepdim=True) / guided_output.std(dims, keepdim=True)
    return guided_output * (phi * ratio + 1 - phi)


def guided(
    pair: PredictPair,
    to_prediction: Callable[[Tensor, Tensor, float], Prediction],
    config: GuidanceConfig,
    progress: Callable[[float], float],
) -> Predict:
    """Turn a model that can answer with and without its condition into a sampler's `predict`.

    Args:
        pair: the model; asked for one output only where guidance does not act.
        to_prediction: raw output (float32 or wider), x_t, t -> x0 and eps.
        config: strength and interval.
        progress: t -> fraction of the way from noise (0) to image (1).
    """

    def predict(x_t: Tensor, t: float) -> Prediction:
        both = config.active(progress(t))
        uncond, cond = pair(x_t, t, both)
        cond = cond.to(x_t.dtype)
        if not both or uncond is None:
            return to_prediction(cond, x_t, t)
        output = combine(cond, uncond.to(x_t.dtype), config.scale)
        return to_prediction(rescale(output, cond, config.rescale), x_t, t)

    return predict
