"""Prompts and hints to images: text encoder, adapters, guidance, sampler and VAE put together.

Latent diffusion as in Rombach et al. 2022 (arXiv:2112.10752), adapters as the `Control` contract says.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ldm.conditioning import TextUse, condition
from ldm.control import Control
from ldm.denoiser import AdapterUse, Denoiser
from ldm.guidance import GuidanceConfig, guided
from ldm.models.text import Text
from ldm.models.vae import VAE
from ldm.registry import ConfigError
from ldm.samplers.base import ImageNoise, OnStep, Sampler
from ldm.schedule import Prediction, Schedule
from ldm.source import Source, Start, begin, check_source, for_inpainting


@dataclasses.dataclass(frozen=True, slots=True)
class Models:
    """What an image is made with. Any float dtype, all on one device, in eval mode."""

    denoiser: Denoiser
    vae: VAE
    text: Text | None  # None where an adapter brings the context
    schedule: Schedule
    objective: str  # what the UNet predicts: eps | v | x0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One batch of pictures: image i belongs to prompt i and seed i.

    Attributes:
        prompts: b texts.
        seeds: b seeds.
        size: (height, width) in pixels, multiples of what `multiple_of` says.
        negative: text of the unconditional branch, one for all or one per image.
        text: how prompts and negatives are read; long ones are cut by default (`ldm.sampling` reports them).
        guidance: classifier-free guidance.
        hints: adapter name -> b ..., as `Adapter.encode` takes it (image prompts: b m 3 h w, m references for each
            picture); adapters without a hint stay silent.
        uses: adapter name -> scale, interval and so on; the default where a name is missing.
        masks: adapter name -> b 1 h w in [0, 1], where in the picture it counts; everywhere where a name is missing.
        source: picture to start from (image-to-image) or to complete (inpainting); None starts from noise.
        tile: VAE decoding in square tiles of this many latent pixels; None decodes whole.
        sliced: VAE decoding one image at a time, for less memory.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    size: tuple[int, int]
    negative: str | Sequence[str] = ""
    text: TextUse = dataclasses.field(default_factory=TextUse)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    hints: Mapping[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    uses: Mapping[str, AdapterUse] = dataclasses.field(default_factory=dict[str, AdapterUse])
    masks: Mapping[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    source: Source | None = None
    tile: int | None = None
    sliced: bool = False

    @property
    def masked(self) -> bool:
        """Whether a part of the source is to be kept."""
        return self.source is not None and self.source.mask is not None

    @property
    def negatives(self) -> list[str]:
        """One text of the unconditional branch per image."""
        return [self.negative] * len(self.prompts) if isinstance(self.negative, str) else list(self.negative)


@torch.no_grad()
def images(models: Models, request: Request, sampler: Sampler, *, on_step: OnStep | None = None) -> Tensor:
    """Draw one image per (prompt, seed).

    Image i depends on its own prompt, seed, hints and source only, not on what shares its batch.

    Args:
        models: see `Models`; also under autocast.
        request: what to draw.
        sampler: built for `models.schedule`.
        on_step: see `Sampler.sample`.

    Returns: b 3 h w in [0, 1], float32, on the models' device.
    Raises: ValueError (ConfigError for adapter names and for a source that the UNet cannot use) if lengths, sizes,
        hints or source do not fit.
    """
    _check(models, request)
    h, w = (side // models.vae.factor for side in request.size)
    noise = ImageNoise(request.seeds, (models.vae.config.latent_channels, h, w), _home(models.denoiser)[0])
    inpainting = for_inpainting(models.denoiser.unet, models.vae, masked=request.masked)
    start = begin(request.source, models.vae, sampler.levels, noise, inpainting=inpainting)
    guided_at = request.guidance.scale > 1
    prompts, negatives, size, use = request.prompts, request.negatives, request.size, request.text
    cond = condition(models.text, prompts, size, use, negatives if guided_at else None)
    uncond = condition(models.text, negatives, size, use, prompts) if guided_at else None
    pair = _Pair(models.denoiser, cond, uncond, len(sampler.timesteps), start)
    pair.prepare(request.hints, request.uses, request.masks)

    def to_prediction(output: Tensor, x_t: Tensor, t: float) -> Prediction:
        return models.schedule.predict(models.objective, output, x_t, models.schedule.a_bar_at(t))

    def after(i: int, x: Tensor) -> Tensor | None:
        pair.step = i + 1
        kept = None if start.blend is None else start.blend(i, x)
        replaced = None if on_step is None else on_step(i, x if kept is None else kept)
        return kept if replaced is None else replaced

    predict = guided(pair, to_prediction, request.guidance, lambda _: pair.step / pair.steps)
    latent = sampler.sample(predict, start.x, noise, on_step=after, start=start.index)
    with torch.autocast(latent.device.type, enabled=False):  # of a training: in its fp16 SDXL's VAE would overflow
        pictures = models.vae.from_latent(latent, request.tile, one_by_one=request.sliced)
    return pictures.float().add(1).div(2).clamp(0, 1)


def multiple_of(models: Models) -> int:
    """Image height and width must be multiples of this many pixels."""
    return models.vae.factor * models.denoiser.unet.spec.multiple


class _Pair:
    """The denoiser with all that stays the same over the steps: answers with and without the condition.

    Adapters hear the very input of the UNet, so with an inpainting UNet the mask and masked image too; each takes the
    channels it was built for.

    Attributes:
        step: the sampling step that asks, 0-based, of the whole schedule also where sampling begins later; the caller
            counts (a sampler may ask more than once a step).
        steps: how many there are.
    """

    def __init__(self, denoiser: Denoiser, cond: Control, uncond: Control | None, steps: int, start: Start) -> None:
        self.device, self.dtype = _home(denoiser)
        self._denoiser, self._cond = denoiser, denoiser.unet.project(cond)
        self.step, self.steps = start.index, steps
        self._beside = None if start.beside is None else start.beside.to(self.dtype)
        self._stacked = None if uncond is None else Control.batch(denoiser.unet.project(uncond), self._cond)
        self._uses: dict[str, AdapterUse] = {}
        self._masks: dict[str, Tensor] = {}
        self._single: dict[str, Any] = {}
        self._doubled: dict[str, Any] = {}

    def prepare(self, hints: Mapping[str, Tensor], uses: Mapping[str, AdapterUse], masks: Mapping[str, Tensor]) -> None:
        """Run each adapter's once-per-image part, and double it if there are two branches."""
        self._uses = {name: uses.get(name, AdapterUse()) for name in hints}
        self._masks = {name: mask.to(self.device, self.dtype) for name, mask in masks.items()}
        heard = {n: h.to(self.device, self.dtype) for n, h in hints.items() if self._uses[n].scale != 0}
        needed = self._denoiser.encode(heard)
        self._single = self._denoiser.settle(single := self._denoiser.prepare(needed), self._cond)
        if self._stacked is None:
            return
        shared = {n: h for n, h in needed.items() if not self._uses[n].guess}
        nulls = {n: self._denoiser.adapter(n).null(h) for n, h in shared.items()}
        silent = self._denoiser.prepare({n: null for n, null in nulls.items() if null is not None})
        doubled = {n: _pair(silent.get(n, single[n]), single[n]) for n in shared}
        self._doubled = self._denoiser.settle(doubled, self._stacked)

    def __call__(self, x_t: Tensor, t: float, both: bool) -> tuple[Tensor | None, Tensor]:
        """See `ldm.guidance.PredictPair`: one UNet call, on 2b images if `both`, else on b."""
        x = x_t.to(self.dtype) if self._beside is None else torch.cat([x_t.to(self.dtype), self._beside], dim=1)
        times = torch.full((len(x),), t, device=x.device)
        active = [name for name in self._single if self._uses[name].active(self.step, self.steps)]
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
        masks = {n: m.repeat(len(x) // len(m), 1, 1, 1) for n, m in self._masks.items() if n in names}
        return self._denoiser.control(x, times, base, {name: prepared[name] for name in names}, self._uses, masks)


def _home(denoiser: Denoiser) -> tuple[torch.device, torch.dtype]:
    first = next(denoiser.unet.parameters())
    return first.device, first.dtype


def _pair(uncond: Any, cond: Any) -> Any:
    """What an adapter prepared for the two branches, every tensor (b ...) stacked, (uncond, cond)."""
    return pytree.tree_map(lambda u, c: torch.cat([u, c]) if isinstance(c, Tensor) else c, uncond, cond)


def _check(models: Models, request: Request) -> None:
    b, seeds, negatives = len(request.prompts), len(request.seeds), len(request.negatives)
    if not b or seeds != b or negatives != b:
        raise ValueError(f"{b} prompts, {seeds} seeds and {negatives} negatives; must be as many of each, at least one")
    if min(request.size) < 1 or any(side % multiple_of(models) for side in request.size):
        h, w = request.size
        raise ValueError(f"image size is {h}x{w} (h w), must be multiples of {multiple_of(models)} pixels; change it")
    for name, hint in request.hints.items():
        if len(hint) != b:
            raise ValueError(f"hint {name!r} has {len(hint)} images for {b} prompts; give one per image")
        if name in models.denoiser.adapters:
            _check_range(name, hint, models.denoiser.adapter(name).hint_range)
    if unknown := sorted((request.masks.keys() | request.uses.keys()) - models.denoiser.adapters.keys()):
        known = ", ".join(models.denoiser.adapters) or "none"
        raise ConfigError(f"masks or uses for {unknown}, which are no adapters; adapters: {known}")
    for name, mask in request.masks.items():
        if mask.ndim != 4 or mask.shape[:2] != (b, 1):
            raise ValueError(f"mask of {name!r} is {tuple(mask.shape)}, must be {b} 1 h w: one per image")
    if request.source is not None:
        check_source(request.source, b, request.size)


def _check_range(name: str, hint: Tensor, allowed: tuple[float, float] | None) -> None:
    if allowed is None:
        return
    low, high = (float(v) for v in torch.aminmax(hint))
    if not (low >= allowed[0] and high <= allowed[1]):  # written so that NaN fails too
        raise ValueError(
            f"hint {name!r} has values in [{low:.4g}, {high:.4g}], must be in [{allowed[0]:g}, {allowed[1]:g}]; divide "
            "0..255 by 255, and map [-1, 1] by x / 2 + 0.5"
        )
