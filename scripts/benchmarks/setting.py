"""Where and at which size a workload is built, and what every workload builds from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm import fast
from scripts.benchmarks.networks import Scale

GUIDANCE = 7.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """Where and at which size a workload is built.

    Attributes:
        scale, device, dtype: of the networks.
        sides: which are wanted.
        prepack: whether our weights are laid out as sampling does it (`ldm.fast`); off for training and compiling.
    """

    scale: Scale
    device: torch.device
    dtype: torch.dtype
    sides: tuple[str, ...] = ("ours", "theirs")
    prepack: bool = True


def ready(module: Any, setting: Setting) -> Any:
    """Ours as `ldm.sampling` sets models up: frozen, in the dtype, channels last, prepacked."""
    module = module.requires_grad_(False).eval().to(setting.dtype).to(memory_format=torch.channels_last)
    if setting.prepack:
        fast.prepack(module)
    return module


def both(setting: Setting, theirs: Callable[[], nn.Module], ours: Callable[[Any], Any]) -> tuple[Any, Any]:
    """(theirs, ours) with one set of weights; None for a side that is not wanted."""
    their = theirs() if "theirs" in setting.sides else None
    mine = ours(their) if "ours" in setting.sides else None
    return (None if their is None else their.requires_grad_(False).to(setting.dtype)), mine


def noise(setting: Setting, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the shape alone."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(setting.device, setting.dtype)
