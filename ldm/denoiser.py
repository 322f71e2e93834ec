"""Denoiser: the UNet and its adapters as one module, the one that DDP and FSDP wrap."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ldm.control import Adapter, Control
from ldm.models.unet import UNet
from ldm.registry import ConfigError

GUESS_BASE = 0.825  # released ControlNet code: each skip closer to the input counts 0.825 times the next


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterUse:
    """How one adapter takes part in sampling: the keys every adapter has in YAML besides its own options."""

    hint: str | None = None  # name of the hint in the data; the adapter's own name when null
    scale: float = 1.0  # weight of everything the adapter adds
    start: float = 0.0  # active part of sampling, fractions of its steps
    end: float = 1.0
    guess: bool = False  # only the conditional branch gets the control, weakened towards the input (ControlNet)
    skip_scales: tuple[float, ...] | None = None  # one weight per skip in encoder order, then the middle
    weights: str | None = None  # safetensors file of the adapter

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; must be a finite number, 0 switches the adapter off")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"start is {self.start} and end {self.end}; must satisfy 0 <= start <= end <= 1")
        if self.guess and self.skip_scales is not None:
            raise ValueError("guess sets the skip scales itself; drop skip_scales or guess")

    def active(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps` (0-based) lies within start..end."""
        return not (step / steps < self.start or (step + 1) / steps > self.end)

    def weigh(self, control: Control) -> Control:
        """Apply scale, guess ladder and skip scales to what the adapter said."""
        if self.guess:
            n = len(control.skips)
            control = weigh_skips(control, [GUESS_BASE ** (n - k) for k in range(n + 1)])
        if self.skip_scales is not None:
            control = weigh_skips(control, self.skip_scales)
        return control if self.scale == 1.0 else control.scaled(self.scale)


def weigh_skips(control: Control, scales: Sequence[float]) -> Control:
    """Weight each skip residual and then the middle one.

    Raises: ConfigError if `scales` is not one longer than `control.skips`.
    """
    if len(scales) != len(control.skips) + 1:
        n = len(control.skips)
        raise ConfigError(
            f"skip_scales has {len(scales)} entries; this adapter has {n} skips and a middle: give {n + 1}"
        )
    skips = tuple(s * x for s, x in zip(scales, control.skips, strict=False))
    return dataclasses.replace(control, skips=skips, mid=None if control.mid is None else scales[-1] * control.mid)


class Denoiser(nn.Module):
    """A UNet with any number of adapters, each under the name that its hint and its config carry."""

    def __init__(self, unet: UNet, adapters: Mapping[str, Adapter[Any]] | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.adapters = nn.ModuleDict(dict(adapters or {}))

    def forward(self, x_t: Tensor, t: Tensor, base: Control, hints: Mapping[str, Tensor]) -> Tensor:
        """Training forward: prepare the hints, add up the controls, run the UNet.

        Args:
            x_t: b c h w, noisy latent.
            t: b, timesteps.
            base: context and vector.
            hints: adapter name -> hint, in the range the adapter documents; adapters without a hint stay silent.

        Returns: b c h w, prediction of the UNet's objective.
        """
        prepared = self.prepare(hints)
        return self.unet(x_t, t, base + self.control(x_t, t, base, prepared))

    def prepare(self, hints: Mapping[str, Tensor]) -> dict[str, Any]:
        """Once per image: adapter name -> what it needs at every step. Raises: ConfigError on an unknown name."""
        if unknown := sorted(hints.keys() - self.adapters.keys()):
            raise ConfigError(f"hints {unknown} have no adapter; adapters: {', '.join(self.adapters) or 'none'}")
        return {name: self.adapter(name).prepare(hint) for name, hint in hints.items()}

    def control(
        self,
        x_t: Tensor,
        t: Tensor,
        base: Control,
        prepared: Mapping[str, Any],
        uses: Mapping[str, AdapterUse] | None = None,
    ) -> Control:
        """Sum of the adapters' Controls, each weighted by its use."""
        total = Control()
        for name, ready in prepared.items():
            said = self.adapter(name).control(x_t, t, base, ready)
            total = total + (uses[name].weigh(said) if uses else said)
        return total

    def adapter(self, name: str) -> Adapter[Any]:
        """The adapter of that name."""
        return self.adapters[name]  # pyright: ignore[reportReturnType]
