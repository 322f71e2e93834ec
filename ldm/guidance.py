"""Classifier-free guidance as a wrapper around the model (Ho & Salimans 2022, arXiv:2207.12598)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.registry import ConfigError
from ldm.samplers.base import Predict
from ldm.schedule import Prediction

Branches = Callable[[Tensor, float, bool], tuple[Tensor, ...]]
"""x_t, t, guided -> raw outputs, each b c h w: (conditional,) where not guided, else (unconditional, conditional), or
(unconditional, image prompt alone, conditional) where text and image prompt are guided apart."""


@dataclass(frozen=True, slots=True)
class GuidanceConfig:
    """Strength of guidance and where it acts.

    Attributes:
        scale: at least 0; w of `combine`. 1 and below mean the conditional output alone (no second pass), unless
            `image` is above 1.
        rescale: phi of `rescale`, in [0, 1]; 0 is off.
        start, end: guidance acts where start <= progress < end, 0 <= start < end <= 1; an end of 1 includes 1
            (Kynkaanniemi et al. 2024, arXiv:2404.07724). Elsewhere the conditional output is used.
        image: at least 0; strength of image prompts apart from that of the text, which is then `scale`: see
            `combine_apart`. None guides both together.
    """

    scale: float = 7.5
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0
    image: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ConfigError(f"guidance.scale is {self.scale}; allowed: 0 or more; 7.5 is usual, 1 turns it off")
        if self.image is not None and not 0 <= self.image < math.inf:
            raise ConfigError(f"guidance.image is {self.image}; allowed: 0 or more, or null for that of guidance.scale")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance.rescale is {self.rescale}; allowed: 0..1; 0 turns it off, 0.7 is usual")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(
                f"guidance.start, end are {self.start}, {self.end}; allowed: 0 <= start < end <= 1; 0, 1 is always"
            )

    @property
    def on(self) -> bool:
        """Whether guidance acts anywhere, so that an unconditional output is needed."""
        return max(self.scale, self.image or 0) > 1

    def active(self, progress: float) -> bool:
        """Whether guidance acts at this fraction of the way from noise to image."""
        inside = self.start <= progress and (progress < self.end or self.end == 1)
        return self.on and inside


def combine(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Extrapolate: uncond + scale (cond - uncond); Ho & Salimans 2022, Eq. 6, whose 1 + w is our scale.

    Args:
        cond: b c h w, raw output (any objective: at fixed x_t all three are affine in each other).
        uncond: b c h w, likewise.
        scale: 1 gives `cond`, 0 gives `uncond`.
    """
    return torch.lerp(uncond, cond, scale)  # one operation, and exact at 0 and 1


def combine_apart(cond: Tensor, image: Tensor, uncond: Tensor, *, text_scale: float, image_scale: float) -> Tensor:
    """Extrapolate along image prompt and text apart: uncond + s_I (image - uncond) + s_T (cond - image).

    Brooks et al. 2023 (InstructPix2Pix, arXiv:2211.09800), Eq. 3. Their image is an input of the UNet and ours an image
    prompt, so `uncond` hears the adapters' null image. Equal scales are `combine`, up to rounding.

    Args:
        cond: b c h w, raw output with text and image prompt.
        image: b c h w, with the image prompt and the negative text.
        uncond: b c h w, with neither.
        text_scale: s_T.
        image_scale: s_I.
    """
    return combine(image, uncond, image_scale) + text_scale * (cond - image)


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
    branches: Branches,
    to_prediction: Callable[[Tensor, Tensor, float], Prediction],
    config: GuidanceConfig,
    progress: Callable[[float], float],
) -> Predict:
    """Turn a model that can answer with and without its condition into a sampler's `predict`.

    Args:
        branches: the model; asked for one output only where guidance does not act.
        to_prediction: raw output (float32 or wider), x_t, t -> x0 and eps.
        config: strength and interval.
        progress: t -> fraction of the way from noise (0) to image (1).
    """

    def predict(x_t: Tensor, t: float) -> Prediction:
        *others, cond = (y.to(x_t.dtype) for y in branches(x_t, t, config.active(progress(t))))
        if not others:
            return to_prediction(cond, x_t, t)
        uncond, *image = others
        if image and config.image is not None:
            output = combine_apart(cond, image[0], uncond, text_scale=config.scale, image_scale=config.image)
        else:
            output = combine(cond, uncond, config.scale)
        return to_prediction(rescale(output, cond, config.rescale), x_t, t)

    return predict
