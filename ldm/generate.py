"""Prompts and hints to images: text encoder, adapters, guidance, sampler and VAE put together.

Latent diffusion as in Rombach et al. 2022 (arXiv:2112.10752), adapters as the `Control` contract says.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ldm.control import Control
from ldm.denoiser import AdapterUse, Denoiser
from ldm.guidance import GuidanceConfig, guided
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE
from ldm.samplers.base import ImageNoise, OnStep, Sampler
from ldm.schedule import Prediction, Schedule


@dataclasses.dataclass(frozen=True, slots=True)
class Models:
    """What an image is made with. Any float dtype, all on one device, in eval mode."""

    denoiser: Denoiser
    vae: VAE
    text: TextEncoder | None  # None where an adapter brings the context
    schedule: Schedule
    objective: str  # what the UNet predicts: eps | v | x0


@torch.no_grad()
def images(
    models: Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    sampler: Sampler,
    guidance: GuidanceConfig | None = None,
    hints: Mapping[str, Tensor] | None = None,
    uses: Mapping[str, AdapterUse] | None = None,
    negative: str | Sequence[str] = "",
    tile: int | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw one image per (prompt, seed).

    Image i depends on its own prompt, seed and hints only, not on what shares its batch. Prompts longer than the text
    encoder's context are cut (`ldm.sampling` reports them).

    Args:
        models: see `Models`; also under autocast.
        prompts: b texts.
        seeds: b seeds, one per image.
        size: (height, width) in pixels, multiples of what `multiple_of` says.
        sampler: built for `models.schedule`.
        guidance: classifier-free guidance; None is its default strength.
        hints: adapter name -> b ..., in the range the adapter documents; adapters without a hint stay silent.
        uses: adapter name -> scale, interval and so on; the default where a name is missing.
        negative: text of the unconditional branch, one for all or one per image.
        tile: VAE decoding in square tiles of this many latent pixels.
        on_step: see `Sampler.sample`.

    Returns: b 3 h w in [0, 1], float32, on the models' device.
    Raises: ValueError (ConfigError for adapter names) if lengths, sizes or hints do not fit.
    """
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    _check(models, prompts, seeds, negatives, size, hints or {})
    guidance = guidance or GuidanceConfig()
    cond = Control(context=_context(models.text, prompts))
    uncond = Control(context=_context(models.text, negatives)) if guidance.scale > 1 else None
    pair = _Pair(models.denoiser, cond, uncond, sampler.timesteps)
    pair.prepare(hints or {}, uses or {})

    def to_prediction(output: Tensor, x_t: Tensor, t: float) -> Prediction:
        return models.schedule.predict(models.objective, output, x_t, models.schedule.a_bar_at(t))

    predict = guided(pair, to_prediction, guidance, lambda t: pair.step(t) / len(sampler.timesteps))
    h, w = (side // models.vae.factor for side in size)
    noise = ImageNoise(seeds, (models.vae.config.latent_channels, h, w), pair.device)
    latent = sampler.sample(predict, noise(), noise, on_step=on_step)
    return models.vae.from_latent(latent, tile).float().add(1).div(2).clamp(0, 1)


def multiple_of(models: Models) -> int:
    """Image height and width must be multiples of this many pixels."""
    return models.vae.factor * models.denoiser.unet.spec.multiple


class _Pair:
    """The denoiser with all that stays the same over the steps: answers with and without the condition."""

    def __init__(self, denoiser: Denoiser, cond: Control, uncond: Control | None, timesteps: Sequence[float]) -> None:
        first = next(denoiser.unet.parameters())
        self.device, self.dtype = first.device, first.dtype
        self._denoiser, self._cond, self._timesteps = denoiser, cond, timesteps
        self._stacked = None if uncond is None else Control.batch(uncond, cond)
        self._uses: dict[str, AdapterUse] = {}
        self._single: dict[str, Any] = {}
        self._doubled: dict[str, Any] = {}

    def prepare(self, hints: Mapping[str, Tensor], uses: Mapping[str, AdapterUse]) -> None:
        """Run each adapter's once-per-image part, and double it if there are two branches."""
        self._uses = {name: uses.get(name, AdapterUse()) for name in hints}
        needed = {n: h.to(self.device, self.dtype) for n, h in hints.items() if self._uses[n].scale != 0}
        self._single = self._denoiser.prepare(needed)
        if self._stacked is None:
            return
        shared = {n: h for n, h in needed.items() if not self._uses[n].guess}
        nulls = {n: self._denoiser.adapter(n).null(h) for n, h in shared.items()}
        silent = self._denoiser.prepare({n: null for n, null in nulls.items() if null is not None})
        self._doubled = {n: _pair(silent.get(n, self._single[n]), self._single[n]) for n in shared}

    def step(self, t: float) -> int:
        """Index of the sampling step that asks at time t; times between two levels belong to the earlier step."""
        return max(sum(level >= t for level in self._timesteps) - 1, 0)

    def __call__(self, x_t: Tensor, t: float, both: bool) -> tuple[Tensor | None, Tensor]:
        """See `ldm.guidance.PredictPair`: one UNet call, on 2b images if `both`, else on b."""
        x = x_t.to(self.dtype)
        times = torch.full((len(x),), t, device=x.device)
        step, steps = self.step(t), len(self._timesteps)
        active = [name for name in self._single if self._uses[name].active(step, steps)]
        if not both or self._stacked is None:
            return None, self._denoiser.unet(x, times, self._cond + self._said(x, times, self._cond, active))
        guess = [name for name in active if self._uses[name].guess]
        shared = [name for name in active if name not in guess]
        alone = self._said(x, times, self._cond, guess)  # in guess mode the conditional half alone hears the adapter
        x, times = torch.cat([x, x]), torch.cat([times, times])
        control = self._stacked + self._said(x, times, self._stacked, shared) + Control.batch(Control(), alone)
        uncond, cond = self._denoiser.unet(x, times, control).chunk(2)
        return uncond, cond

    def _said(self, x: Tensor, times: Tensor, base: Control, names: Sequence[str]) -> Control:
        """What these adapters add, on one branch or on both (then `base` is the stacked one)."""
        prepared = self._single if base is self._cond else self._doubled
        return self._denoiser.control(x, times, base, {name: prepared[name] for name in names}, self._uses)


def _pair(uncond: Any, cond: Any) -> Any:
    """What an adapter prepared for the two branches, every tensor (b ...) stacked, (uncond, cond)."""
    return pytree.tree_map(lambda u, c: torch.cat([u, c]) if isinstance(c, Tensor) else c, uncond, cond)


def _context(text: TextEncoder | None, prompts: Sequence[str]) -> Tensor | None:
    """Tokens for cross-attention, b n d; each different prompt is encoded once."""
    if text is None:
        return None
    different = list(dict.fromkeys(prompts))
    device = text.token_embedding.weight.device
    tokens = text(text.tokenizer(different).ids.to(device))
    return tokens[[different.index(prompt) for prompt in prompts]]


def _check(
    models: Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    negatives: Sequence[str],
    size: tuple[int, int],
    hints: Mapping[str, Tensor],
) -> None:
    b = len(prompts)
    if not b or len(seeds) != b or len(negatives) != b:
        raise ValueError(
            f"{b} prompts, {len(seeds)} seeds and {len(negatives)} negatives; must be as many of each, at least one"
        )
    if min(size) < 1 or any(side % multiple_of(models) for side in size):
        h, w = size
        raise ValueError(f"image size is {h}x{w} (h w), must be multiples of {multiple_of(models)} pixels; change it")
    for name, hint in hints.items():
        if len(hint) != b:
            raise ValueError(f"hint {name!r} has {len(hint)} images for {b} prompts; give one per image")
