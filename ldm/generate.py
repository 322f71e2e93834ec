"""Prompts and hints to images: text encoder, adapters, guidance, sampler and VAE put together.

Latent diffusion as in Rombach et al. 2022 (arXiv:2112.10752), adapters as the `Control` contract says.
"""

import dataclasses
import logging
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

log = logging.getLogger(__name__)


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
    with torch.autocast(_home(models.denoiser)[0].type, enabled=False):  # as for decoding below
        start = begin(request.source, models.vae, sampler.levels, noise, inpainting=inpainting)
    guidance = _guidance(models, request)
    branches = _branches(models, request, guidance, len(sampler.timesteps), start)

    def to_prediction(output: Tensor, x_t: Tensor, t: float) -> Prediction:
        return models.schedule.predict(models.objective, output, x_t, models.schedule.a_bar_at(t))

    def after(i: int, x: Tensor) -> Tensor | None:
        branches.step = i + 1
        kept = None if start.blend is None else start.blend(i, x)
        replaced = None if on_step is None else on_step(i, x if kept is None else kept)
        return kept if replaced is None else replaced

    predict = guided(branches, to_prediction, guidance, lambda _: branches.step / branches.steps)
    latent = sampler.sample(predict, start.x, noise, on_step=after, start=start.index)
    with torch.autocast(latent.device.type, enabled=False):  # of a training: in its fp16 SDXL's VAE would overflow
        pictures = models.vae.from_latent(latent, request.tile, one_by_one=request.sliced)
    return pictures.float().add(1).div(2).clamp(0, 1)


@torch.no_grad()
def rehearse(models: Models, request: Request) -> None:
    """Encode texts and hints and ask each adapter once, so that what does not fit is refused before anything is drawn.

    Neither UNet nor VAE runs.

    Raises: as `images`.
    """
    _check(models, request)
    h, w = (side // models.vae.factor for side in request.size)
    device, dtype = _home(models.denoiser)
    x = torch.zeros(len(request.seeds), models.denoiser.unet.spec.in_channels, h, w, device=device, dtype=dtype)
    branches = _branches(models, request, _guidance(models, request), 1, Start(x))
    branches.control(x, 0.0, 1, branches.heard)


def multiple_of(models: Models) -> int:
    """Image height and width must be multiples of this many pixels."""
    return models.vae.factor * models.denoiser.unet.spec.multiple


def _guidance(models: Models, request: Request) -> GuidanceConfig:
    """The request's guidance; the image prompt is no branch of its own where none is heard."""
    adapters, uses = models.denoiser.adapters, request.uses
    heard = [name for name in request.hints if name in adapters and uses.get(name, AdapterUse()).scale != 0]
    if any(models.denoiser.adapter(name).image_prompt for name in heard):
        return request.guidance
    return dataclasses.replace(request.guidance, image=None)


def _branches(models: Models, request: Request, guidance: GuidanceConfig, steps: int, start: Start) -> "_Branches":
    """Texts and hints of a request, encoded, for all branches that its guidance needs."""
    prompts, negatives, size, use = request.prompts, request.negatives, request.size, request.text
    cond = condition(models.text, prompts, size, use, negatives if guidance.on else None)
    uncond = condition(models.text, negatives, size, use, prompts) if guidance.on else None
    branches = _Branches(models.denoiser, cond, uncond, steps, start, apart=guidance.image is not None)
    branches.prepare(request.hints, request.uses, request.masks)
    return branches


class _Branches:
    """The denoiser with all that stays the same over the steps: answers with and without the condition.

    The last branch has the whole condition, the others the negative text and null hints; but the middle one of three
    has the image prompts. In guess mode an adapter speaks in the last branch alone.

    Adapters hear the very input of the UNet, so with an inpainting UNet the mask and masked image too; each takes the
    channels it was built for.

    Attributes:
        step: the sampling step that asks, 0-based, of the whole schedule also where sampling begins later; the caller
            counts (a sampler may ask more than once a step).
        steps: how many there are.
    """

    def __init__(
        self, denoiser: Denoiser, cond: Control, uncond: Control | None, steps: int, start: Start, apart: bool = False
    ) -> None:
        """Args: apart: guide text and image prompts apart, with three branches."""
        self.device, self.dtype = _home(denoiser)
        self._denoiser = denoiser
        self.step, self.steps = start.index, steps
        self._beside = None if start.beside is None else start.beside.to(self.dtype)
        self._bases = {1: denoiser.unet.project(cond)}  # k -> text of the last k branches
        if uncond is not None:
            negative = denoiser.unet.project(uncond)
            for k in (2, 3) if apart else (2,):
                self._bases[k] = Control.batch(negative, self._bases[k - 1])
        self._given = False  # whether an adapter stands for the text
        self._uses: dict[str, AdapterUse] = {}
        self._masks: dict[str, Tensor] = {}
        self._ready: dict[int, dict[str, Any]] = {}  # k -> what adapters prepared for the last k branches

    def prepare(self, hints: Mapping[str, Tensor], uses: Mapping[str, AdapterUse], masks: Mapping[str, Tensor]) -> None:
        """Run each adapter's once-per-image part, and stack it for the branches that hear it."""
        self._uses = {name: uses.get(name, AdapterUse()) for name in hints}
        self._masks = {name: mask.to(self.device, self.dtype) for name, mask in masks.items()}
        for name, use in self._uses.items():
            if use.scale != 0 and not any(use.active(step, self.steps) for step in range(self.step, self.steps)):
                log.warning(
                    "adapter %s is never heard: start %g to end %g holds none of the %d steps; widen it",
                    name,
                    use.start,
                    use.end,
                    self.steps - self.step,
                )
        heard = {n: h.to(self.device, self.dtype) for n, h in hints.items() if self._uses[n].scale != 0}
        needed, most = self._denoiser.encode(heard), max(self._bases)
        scales = {name: self._uses[name].scale for name in needed}
        told = self._denoiser.fuse(self._denoiser.prepare(needed), scales)  # of the whole condition, for all branches
        shared = {n: h for n, h in needed.items() if most > 1 and not self._uses[n].guess}
        nulls = {n: self._denoiser.adapter(n).null(h) for n, h in shared.items()}
        silent = told | self._denoiser.prepare({n: null for n, null in nulls.items() if null is not None})
        self._given = any(self._denoiser.adapter(name).gives_context for name in told)
        for k in self._bases:
            stacked: dict[str, Any] = {}
            for name in told if k == 1 else shared:
                full = max(k - 1, 1) if self._denoiser.adapter(name).image_prompt else 1
                stacked[name] = _stack([silent[name]] * (k - full) + [told[name]] * full)
            base, stacked = self._denoiser.tell(self._bases[k], stacked)
            self._bases[k] = self._denoiser.unet.project(base) if self._given else base
            self._ready[k] = self._denoiser.settle(stacked, base)

    @property
    def heard(self) -> list[str]:
        """Adapters that have a hint and a weight, and speak at every step."""
        return list(self._ready[1])

    def __call__(self, x_t: Tensor, t: float, guided: bool) -> tuple[Tensor, ...]:
        """See `ldm.guidance.Branches`: one UNet call on all branches.

        A middle branch is left out where no image prompt is active: it would be the unconditional one.
        """
        x = x_t.to(self.dtype) if self._beside is None else torch.cat([x_t.to(self.dtype), self._beside], dim=1)
        active = [name for name in self.heard if self._uses[name].active(self.step, self.steps)]
        n = max(self._bases) if guided else 1
        if n == 3 and not (self._given or any(self._denoiser.adapter(name).image_prompt for name in active)):
            n = 2
        return self._denoiser.unet(_stack([x] * n), self._times(x, t, n), self.control(x, t, n, active)).chunk(n)

    def control(self, x: Tensor, t: float, n: int, active: Sequence[str]) -> Control:
        """Text and adapters for n branches; x: b c h w, input of the UNet."""
        total = self._bases[n]
        for k in dict.fromkeys((n, 1)):
            if ready := {name: self._ready[k][name] for name in active if k == (1 if self._uses[name].guess else n)}:
                masks = {name: mask.repeat(k, 1, 1, 1) for name, mask in self._masks.items() if name in ready}
                xs, times = _stack([x] * k), self._times(x, t, k)
                said = self._denoiser.control(xs, times, self._bases[k], ready, self._uses, masks)
                total = total + _after_silence(said, (n - k) * len(x))
        return total

    def _times(self, x: Tensor, t: float, k: int) -> Tensor:
        return torch.full((k * len(x),), t, device=x.device)


def _home(denoiser: Denoiser) -> tuple[torch.device, torch.dtype]:
    first = next(denoiser.unet.parameters())
    return first.device, first.dtype


def _stack(parts: Sequence[Any]) -> Any:
    """The same thing of several branches as one, every tensor (b ...) stacked."""
    if len(parts) == 1:
        return parts[0]
    return pytree.tree_map(lambda *xs: torch.cat(xs) if isinstance(xs[0], Tensor) else xs[0], *parts)


def _after_silence(said: Control, rows: int) -> Control:
    """A Control with that many rows of zeros before its own."""
    if rows == 0:
        return said
    return pytree.tree_map(
        lambda x: torch.cat([x.new_zeros(rows, *x.shape[1:]), x]) if isinstance(x, Tensor) else x, said
    )


def _check(models: Models, request: Request) -> None:
    b, seeds, negatives = len(request.prompts), len(request.seeds), len(request.negatives)
    if not b or seeds != b or negatives != b:
        raise ValueError(f"{b} prompts, {seeds} seeds and {negatives} negatives; must be as many of each, at least one")
    if models.text is None and (unread := [text for text in (*request.prompts, *request.negatives) if text]):
        raise ValueError(f"a prompt is {unread[0]!r:.60}, but there is no text encoder to read it; leave it empty")
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
