"""Denoiser: the UNet and its adapters as one module, the one that DDP and FSDP wrap."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ldm import registry
from ldm.control import Adapter, Control, Fuser
from ldm.models.unet import UNet, UNetSpec
from ldm.registry import ConfigError

NOTHING: Mapping[str, Tensor] = MappingProxyType({})
GUESS_BASE = 0.825  # released ControlNet code: each skip closer to the input counts 0.825 times the next


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterUse:
    """How one adapter takes part in sampling: the keys every adapter has in YAML besides its own options.

    The loss of a training reads hint and weights alone. Its validation pictures and evaluate.py read scale, start, end,
    guess, skip_scales and blocks as sampling does; the others are for sampling.
    """

    hint: str | None = None  # name of the hint in the data; the adapter's own name when null
    image: str | None = None  # what it hears in sampling: picture file, for an image prompt also a folder of references
    scale: float = 1.0  # weight of everything the adapter adds in drawing; the loss of a training hears all of it
    start: float = 0.0  # active part of sampling, fractions of its steps; not of a training
    end: float = 1.0  # see start
    guess: bool = False  # only the conditional branch gets the control, weakened towards the input (ControlNet)
    skip_scales: tuple[float, ...] | None = None  # one weight per skip in encoder order, then the middle
    blocks: Mapping[str, float] | None = None  # place (down, down.1, up.0.1, mid) -> weight, see weigh_blocks
    mask: str | None = None  # picture file, white where the adapter counts in sampling; null = everywhere
    weights: str | None = None  # safetensors file of the adapter
    extractor: str | Mapping[str, Any] | None = None  # makes the hint of the picture given; null: it is the hint

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; must be a finite number, 0 switches the adapter off")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"start is {self.start} and end {self.end}; must satisfy 0 <= start <= end <= 1")
        if not all(math.isfinite(weight) for weight in self.skip_scales or ()):
            raise ValueError(f"skip_scales are {list(self.skip_scales or ())}; must be finite numbers")
        if self.guess and self.skip_scales is not None:
            raise ValueError("guess sets the skip scales itself; drop skip_scales or guess")
        self.extract()

    @property
    def unheard(self) -> list[str]:
        """Keys that are set and that change what the adapter says in pictures, but not in the loss of a training."""
        keys = ("scale", "start", "end", "guess", "skip_scales", "blocks", "mask")
        defaults = AdapterUse()
        return [key for key in keys if getattr(self, key) != getattr(defaults, key)]

    def extract(self) -> Callable[[Tensor], Tensor] | None:
        """What `extractor` names: image b 3 h w in [0, 1] -> hint b c h w in [0, 1]; None if the hint is given.

        Raises: ConfigError on a name that is not registered, or a wrong option.
        """
        if self.extractor is None:
            return None
        node = {"name": self.extractor} if isinstance(self.extractor, str) else self.extractor
        return registry.build("hint", node)

    def active(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps` (0-based) lies within start..end."""
        return not (step / steps < self.start or (step + 1) / steps > self.end)

    def weigh(self, control: Control, scaled: Callable[[Control, float], Control] = Control.scaled) -> Control:
        """Apply scale (as `scaled` does), guess ladder and skip scales to what the adapter said."""
        if self.guess:
            if not control.skips and control.mid is None:
                raise ConfigError("guess weakens skips and the middle; this adapter has neither: drop guess")
            n = len(control.skips)
            control = weigh_skips(control, [GUESS_BASE ** (n - k) for k in range(n + 1)])
        if self.skip_scales is not None:
            control = weigh_skips(control, self.skip_scales)
        return control if self.scale == 1.0 else scaled(control, self.scale)


def weigh_skips(control: Control, scales: Sequence[float]) -> Control:
    """Weight each skip residual and then the middle one.

    Raises: ConfigError if `scales` is not one longer than `control.skips`.
    """
    if len(scales) != len(control.skips) + 1:
        n = len(control.skips)
        raise ConfigError(
            f"skip_scales has {len(scales)} entries; this adapter has {n} skips and a middle: give {n + 1}"
        )
    if not control.skips and control.mid is None:
        raise ConfigError("skip_scales weighs skips and the middle; this adapter has neither: use scale or blocks")
    skips = tuple(s * x for s, x in zip(scales, control.skips, strict=False))
    return dataclasses.replace(control, skips=skips, mid=None if control.mid is None else scales[-1] * control.mid)


def weigh_blocks(control: Control, blocks: Mapping[str, float] | None, spec: UNetSpec) -> Control:
    """Weight what an adapter says by its place in the UNet: attention sources, stages and what comes with them.

    Args:
        control: of one adapter.
        blocks: place -> weight; None changes nothing. The longest name that fits a layer counts, 1 where none does, so
            {down: 0, mid: 0, up: 0, up.0.1: 1} leaves one attention (InstantStyle, arXiv:2404.02733, on SDXL).
        spec: of the UNet; a layer's place is `CrossAttn.name`, that of a map at resolution i down.i wherever it enters,
            and of the bottleneck mid.

    Raises: ConfigError as `check_blocks`, if the control has neither, or says nothing at one of the places.
    """
    if blocks is None:
        return control
    check_blocks(blocks, spec)
    if not (control.attn or control.stages or control.skips):
        raise ConfigError("blocks weighs image prompts, stages and skips; this adapter has none of them: use scale")

    def weight(place: str) -> float:
        fitting = [name for name in blocks if place == name or place.startswith(f"{name}.")]
        return blocks[max(fitting, key=len)] if fitting else 1.0

    _check_read(blocks, control, spec)
    layers = [weight(layer.name) for layer in spec.cross_attn]
    attn = tuple(  # attention is linear in its values
        dataclasses.replace(e, v=tuple(w * v for w, v in zip(layers, e.v, strict=True))) for e in control.attn
    )
    stages, downs = (tuple(weight(f"down.{i}") * x for i, x in enumerate(xs)) for xs in (control.stages, control.downs))
    levels = {tap.stride: i for i, tap in enumerate(spec.stages)}
    taps = spec.skips if control.skips else ()
    skips = tuple(weight(f"down.{levels[tap.stride]}") * x for tap, x in zip(taps, control.skips, strict=True))
    mid = None if control.mid is None else weight("mid") * control.mid
    return dataclasses.replace(control, attn=attn, stages=stages, downs=downs, skips=skips, mid=mid)


def check_blocks(blocks: Mapping[str, float], spec: UNetSpec) -> None:
    """Raise ConfigError on a place that this UNet does not have, or a weight that is no finite number."""
    places = [layer.name for layer in spec.cross_attn] + [f"down.{i}" for i in range(len(spec.stages))]
    known = dict.fromkeys(place.rsplit(".", cut)[0] for cut in (2, 1, 0) for place in places)
    for name, value in blocks.items():
        if name not in known:
            raise ConfigError(f"blocks has {name!r}; this UNet has {', '.join(known)}{registry.suggest(name, known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"blocks.{name} is {value!r}, must be a finite number")


def _check_read(blocks: Mapping[str, float], control: Control, spec: UNetSpec) -> None:
    """Raise ConfigError on a place at which a control says nothing."""
    places = [layer.name for layer in spec.cross_attn] if control.attn else []
    places += [f"down.{i}" for i in range(len(spec.stages))] if control.stages or control.skips else []
    places += ["mid"] if control.mid is not None else []
    for name in blocks:
        if not any(place == name or place.startswith(f"{name}.") for place in places):
            raise ConfigError(
                f"blocks has {name!r}, where this adapter says nothing; it speaks at {', '.join(places)}: drop the key"
            )


def check_use(name: str, use: AdapterUse, adapter: Adapter[Any], spec: UNetSpec) -> None:
    """Refuse what adapter `name` would leave unread, or what this UNet does not have. Raises: ConfigError."""
    check_blocks(use.blocks or {}, spec)
    asked = {"scale": use.scale not in (0, 1), "mask": bool(use.mask), "blocks": bool(use.blocks)}
    if any(on and key not in adapter.weighable for key, on in asked.items()):
        allowed = "any number" if "scale" in adapter.weighable else "0, 1"
        raise ConfigError(
            f"adapters.{name} speaks through the text's own attention: its scale is {use.scale:g}, allowed: {allowed}; "
            "mask and blocks cannot act on it: drop them"
        )
    if adapter.gives_context and (use.start, use.end) != (0.0, 1.0):
        raise ConfigError(
            f"adapters.{name} stands for the text, but start is {use.start:g} and end {use.end:g}; it must be heard at "
            "every step: drop both keys"
        )
    if adapter.gives_context and (use.guess or use.skip_scales is not None):
        raise ConfigError(f"adapters.{name} stands for the text; guess and skip_scales cannot act on it: drop them")
    if adapter.image_prompt and use.extractor is not None:
        raise ConfigError(f"adapters.{name}.extractor is set, but its hint is a picture as it is; drop the key")


def _plain(base: Control) -> Control:
    """What adapters are told: context and vector only."""
    return Control(context=base.context, vector=base.vector)


class Denoiser(nn.Module):
    """A UNet with any number of adapters, each under the name that its hint and its config carry.

    A fuser changes what adapters prepared, in view of the others; without one each is on its own.
    """

    def __init__(
        self, unet: UNet, adapters: Mapping[str, Adapter[Any]] | None = None, fuser: Fuser | None = None
    ) -> None:
        super().__init__()
        self.unet = unet
        self.adapters = nn.ModuleDict(dict(adapters or {}))
        self.fuser = fuser

    def forward(self, x_t: Tensor, t: Tensor, base: Control, hints: Mapping[str, Any]) -> Tensor:
        """Training forward: prepare the hints, add up the controls, run the UNet.

        Args:
            x_t: b c h w, noisy latent.
            t: b, timesteps.
            base: context and vector.
            hints: adapter name -> hint, in the range the adapter documents; adapters without a hint stay silent.
                For a fuser a sample's hint of zeros is a dropped one.

        Returns: b c h w, prediction of the UNet's objective.
        """
        base, prepared = self.tell(base, self.fuse(self.prepare(hints), dropped=hints))
        return self.unet(x_t, t, base + self.control(x_t, t, base, prepared))

    @property
    def heard(self) -> dict[str, nn.Module]:
        """Adapter name -> the networks that it hears but does not own, of those that hear any; see `Adapter.heard`."""
        every = {name: self.adapter(name).heard for name in self.adapters}
        return {name: nn.ModuleList(heard) for name, heard in every.items() if heard}

    def prepare(self, hints: Mapping[str, Any]) -> dict[str, Any]:
        """Once per image: adapter name -> what it needs at every step. Raises: ConfigError on an unknown name."""
        self._check_names(hints)
        return {name: self.adapter(name).prepare(hint) for name, hint in hints.items()}

    def encode(self, hints: Mapping[str, Tensor]) -> dict[str, Any]:
        """Once per image: adapter name -> hint as `prepare` takes it, see `Adapter.encode`. Raises: as `prepare`."""
        self._check_names(hints)
        return {name: self.adapter(name).encode(hint) for name, hint in hints.items()}

    def fuse(
        self,
        prepared: Mapping[str, Any],
        scales: Mapping[str, float] | None = None,
        dropped: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Any]:
        """Once per image, behind `prepare`: what the fuser makes of it, if there is one.

        Args:
            prepared: of the adapters that take part.
            scales: adapter name -> its scale in `control`, where it is not 1.
            dropped: adapter name -> hint b ...; rows of zeros are dropped ones. Missing: none is dropped.
        """
        if self.fuser is None:
            return dict(prepared)
        given = {name: hint.flatten(1).any(dim=1) for name, hint in dropped.items() if isinstance(hint, Tensor)}
        return self.fuser(prepared, scales or {}, given)

    def tell(self, base: Control, prepared: Mapping[str, Any]) -> tuple[Control, dict[str, Any]]:
        """Once per image: `base` with what stands for the text, and what the other adapters prepared.

        They hear that base; context that they add themselves (IP-Adapter's simple form) no adapter hears.
        """
        givers = [name for name in prepared if self.adapter(name).gives_context]
        for name in givers:
            base = base + prepared[name]
        return base, {name: ready for name, ready in prepared.items() if name not in givers}

    def settle(self, prepared: Mapping[str, Any], base: Control) -> dict[str, Any]:
        """Once per image, for a `base` that is the same at every step: see `Adapter.settle`."""
        base = _plain(base)
        return {name: self.adapter(name).settle(ready, base) for name, ready in prepared.items()}

    def control(
        self,
        x_t: Tensor,
        t: Tensor,
        base: Control,
        prepared: Mapping[str, Any],
        uses: Mapping[str, AdapterUse] | None = None,
        masks: Mapping[str, Tensor] = NOTHING,
    ) -> Control:
        """Sum of the adapters' Controls, each weighted by its use, and by its mask (b 1 h w, see Control.masked)."""
        total, base = Control(), _plain(base)
        for name, ready in prepared.items():
            adapter = self.adapter(name)
            said = adapter.control(x_t, t, base, ready)
            if uses:
                said = uses[name].weigh(said, functools.partial(adapter.scaled, prepared=ready))
                said = weigh_blocks(said, uses[name].blocks, self.unet.spec)
            total = total + (said.masked(masks[name]) if name in masks else said)
        return total

    def _check_names(self, hints: Mapping[str, Tensor]) -> None:
        if unknown := sorted(hints.keys() - self.adapters.keys()):
            raise ConfigError(f"hints {unknown} have no adapter; adapters: {', '.join(self.adapters) or 'none'}")

    def adapter(self, name: str) -> Adapter[Any]:
        """The adapter of that name."""
        return self.adapters[name]  # pyright: ignore[reportReturnType]
