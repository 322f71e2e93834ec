"""Small networks of the real classes, with inputs that fit them; what several test files start from."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldm.control import Control
from ldm.models.unet import UNet, UNetConfig, UNetSpec
from ldm.training import checkpoint

M = TypeVar("M", bound=nn.Module)

SD1 = UNetConfig(channels=(8, 16, 32, 32), context_dim=12, num_heads=4, groups=4)  # SD1.5's layout
SHALLOW = UNetConfig(
    channels=(8, 16), blocks=1, depth=(0, 1), context_dim=12, num_heads=None, head_dim=8, groups=4, linear_proj=True
)
SD15 = UNetConfig()  # full size: on the meta device only
SDXL = UNetConfig(
    channels=(320, 640, 1280),
    depth=(0, 2, 10),
    mid_depth=10,
    context_dim=2048,
    num_heads=None,
    head_dim=64,
    linear_proj=True,
    vector_dim=2816,
)


@torch.no_grad()
def waken(module: M) -> M:
    """Fill every all-zero parameter with small noise, as training would."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    return module


def trained_unet(config: UNetConfig = SHALLOW) -> UNet:
    """A UNet whose output is not zero, frozen and in eval mode."""
    return waken(UNet(config)).requires_grad_(False).eval()


def latents(config: UNetConfig = SHALLOW, b: int = 2, multiple: int = 2) -> tuple[Tensor, Tensor, Control]:
    """x_t, t and a Control with the context (and vector) that a UNet of this config needs. x_t is not square."""
    side = multiple * 2 ** (len(config.channels) - 1)
    x_t = torch.randn(b, config.in_channels, side, 2 * side)
    vector = torch.randn(b, config.vector_dim) if config.vector_dim else None
    return x_t, torch.randint(1000, (b,)), Control(context=torch.randn(b, 5, config.context_dim), vector=vector)


def random_control(spec: UNetSpec, h: int, w: int, b: int = 2) -> Control:
    """Residuals for every stage, every skip and the bottleneck of a latent of h x w."""

    def noise(channels: int, stride: int) -> Tensor:
        return torch.randn(b, channels, h // stride, w // stride)

    return Control(
        stages=tuple(noise(tap.channels, tap.stride) for tap in spec.stages),
        downs=tuple(noise(a.channels, b.stride) for a, b in pairwise(spec.stages)),
        skips=tuple(noise(tap.channels, tap.stride) for tap in spec.skips),
        mid=noise(spec.mid.channels, spec.mid.stride),
    )


def figures(run: Path) -> dict[str, float]:
    """All that a run's metrics.jsonl says, by step and name ("3 val_loss"), but for how fast it was."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {f"{line['step']} {name}": value for line in lines for name, value in line.items()}
    return {name: value for name, value in found.items() if not name.endswith(("images_per_s", "data_wait"))}


def unlike(a: Path, b: Path) -> list[str]:
    """What of two complete checkpoints is not the same bit for bit: weights to share, and all of the training state."""
    files = [{file.name: load_file(file) for file in sorted(folder.rglob("*.safetensors"))} for folder in (a, b)]
    states = [checkpoint.read_state(folder) for folder in (a, b)]
    named: list[dict[str, Any]] = []
    for found, state in zip(files, states, strict=True):
        kept = {key: value for key, value in state.items() if key not in ("config", "cwd")}
        leaves, _ = pytree.tree_flatten_with_path({"files": found, **kept})
        named.append({pytree.keystr(path): leaf for path, leaf in leaves})
    return [name for name in sorted({**named[0], **named[1]}) if not _equal(*(found.get(name) for found in named))]


def _equal(x: object, y: object) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    return type(x) is type(y) and x == y
