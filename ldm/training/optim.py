"""What is trained, with which optimizer, at which learning rate."""

import fnmatch
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ldm.config import TrainConfig
from ldm.registry import ConfigError
from ldm.training.distributed import whole
from ldm.training.moments import BFloat16AdamW


def trainable(module: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Set `requires_grad` on exactly the parameters whose names match a pattern.

    Args:
        module: usually a `Denoiser`; names look like `unet.decoder.conv_out.weight`.
        patterns: shell patterns, e.g. ["adapters.*"].

    Returns: the trainable parameters.
    Raises: ConfigError if a pattern matches nothing.
    """
    named = dict(module.named_parameters())
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            heads = sorted({name.partition(".")[0] for name in named})
            raise ConfigError(f"train.trainable: {pattern!r} matches no parameter; groups: {', '.join(heads)}")
    for name, parameter in named.items():
        parameter.requires_grad_(any(fnmatch.fnmatch(name, p) for p in patterns))
    return [p for p in named.values() if p.requires_grad]


def table(module: nn.Module) -> str:
    """Trainable and frozen parameters per group, as aligned text."""
    rows: dict[str, list[int]] = {}
    for name, p in module.named_parameters():
        parts = name.split(".")
        group = ".".join(parts[: 2 if parts[0] == "adapters" else 1])
        rows.setdefault(group, [0, 0])[0 if p.requires_grad else 1] += p.numel()
    rows["total"] = [sum(r[0] for r in rows.values()), sum(r[1] for r in rows.values())]
    lines = [f"{'parameters':<24}{'trainable':>16}{'frozen':>16}"]
    lines += [f"{group:<24}{on:>16,}{off:>16,}" for group, (on, off) in rows.items()]
    return "\n".join(lines)


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused: one kernel per update, step counters on the device.

    Two groups: matrices and kernels decay; gains, biases and lone numbers like CLIP's temperature do not (Radford et
    al. 2021, arXiv:2103.00020, section 2.5). `train.moments` of bf16: see BFloat16AdamW.
    """
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = BFloat16AdamW if config.moments == "bf16" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, fused=True)


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then as `TrainConfig.decay` says."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.decay == "constant":
        return config.lr * warm
    if config.decay == "cosine":
        done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
        return config.lr * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    if config.decay == "step":
        return config.lr * warm * (0.1 if 2 * step >= config.steps else 1.0)
    raise ConfigError(f"train.decay is {config.decay!r}; allowed: constant, cosine, step")


def guarded_step(optimizer: torch.optim.AdamW, parameters: Sequence[nn.Parameter], clip: float | None) -> Tensor:
    """Clip, then step, unless the gradient norm is not finite: then weights and moments stay. No host sync.

    Args:
        optimizer: a fused AdamW.
        parameters: what it updates.
        clip: largest global L2 norm, or None.

    Returns: the gradient norm before clipping, a scalar on the device; not finite means the step was skipped.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], clip, norm)
    # The fused kernel's own switch, set and removed as GradScaler does: step() takes it from the attribute only.
    setattr(optimizer, "found_inf", (~torch.isfinite(norm)).float())  # noqa: B010
    optimizer.step()
    delattr(optimizer, "found_inf")
    return norm


def store_frozen(module: nn.Module, dtype: torch.dtype, exported: Iterable[nn.Module] = ()) -> None:
    """Keep the frozen linear and convolution weights in the autocast dtype, in place.

    Autocast rounds them to it at every use, so nothing changes but time and memory: one copy of half the size, none
    kept for backward. Only for modules that run under autocast of this dtype.

    Args:
        module: what is trained, with its frozen parts.
        dtype: of autocast.
        exported: modules whose weights are written to files: they stay as they are.
    """
    kept = {id(part) for network in exported for part in network.modules()}
    for part in module.modules():
        fixed = isinstance(part, nn.Linear | nn.Conv2d) and not any(p.requires_grad for p in part.parameters())
        if fixed and id(part) not in kept:
            part.to(dtype)
