"""Does it learn? Figures beside the loss: by timestep, size of the updates, and how loud adapters have become."""

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.control import Control, Encoded
from ldm.denoiser import Denoiser
from ldm.models.unet import UNetSpec
from ldm.training.distributed import Rank, is_shard, local

BINS = 4


def by_time(losses: Tensor, t: Tensor, steps: int) -> dict[str, float]:
    """Mean loss, and that of each quarter of the schedule: loss, loss_t0 (least noise) ... loss_t3.

    Args:
        losses: b, one per sample.
        t: b, its timesteps in 0..steps-1.
        steps: of the schedule.

    Returns: figures; a quarter without samples has none.
    """
    part = t * BINS // steps
    quarters = {f"loss_t{i}": losses[part == i] for i in range(BINS)}
    return {name: x.mean().item() for name, x in ({"loss": losses} | quarters).items() if len(x)}


@torch.no_grad()
def step_figures(optimizers: Mapping[str, torch.optim.AdamW], trained: nn.Module, rank: Rank) -> dict[str, float]:
    """Figures of the step just made, over all ranks. One host sync; for logged steps only.

    Args:
        optimizers: player -> its AdamW.
        trained: of a denoiser the adapters have figures of their own.
        rank: this process; where weights are sharded, all must ask.

    Returns: `update_ratio`, |change| / |weights| of all that a player trains, by the newest step that was taken (of
        other players than the model with their name before it); ADAPTER.zero_norm, see `Adapter.zero_layers`. L2 norms.
    """
    adapters = {name: trained.adapter(name) for name in trained.adapters} if isinstance(trained, Denoiser) else {}
    zeros = {name: _trained(adapter.zero_layers) for name, adapter in adapters.items()}
    zeros = {name: parameters for name, parameters in zeros.items() if parameters}
    sets = [parts for optimizer in optimizers.values() for parts in (_changes(optimizer), _weights(optimizer))]
    squares = torch.stack([_square(parts, rank.device) for parts in (*sets, *zeros.values())])
    if any(is_shard(p) for optimizer in optimizers.values() for p in _weights(optimizer)):
        squares = rank.mean(squares) * rank.world  # all that is trained is in shards then
    norms = iter(squares.sqrt().tolist())
    figures: dict[str, float] = {}
    for player in optimizers:
        change, weights = next(norms), next(norms)
        prefix = "" if player == "model" else f"{player}_"
        figures[f"{prefix}update_ratio"] = change / weights if weights else 0.0
    return figures | {f"{name}.zero_norm": norm for name, norm in zip(zeros, norms, strict=True)}


def _trained(layers: Iterable[nn.Module]) -> list[Tensor]:
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]


def _weights(optimizer: torch.optim.AdamW) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _changes(optimizer: torch.optim.AdamW) -> Iterator[Tensor]:
    """AdamW's last change of each weight, this rank's shard of it, up to its sign.

    Worked out from the moments, one tensor at a time: a copy of the weights before the step would be as large as they
    are. With w = lr * weight_decay, p' = (1 - w) p - lr u, so p' - p = -(lr u + w p') / (1 - w).
    """
    for group in optimizer.param_groups:
        lr, w = group["lr"], group["lr"] * group["weight_decay"]
        for p in group["params"]:
            if state := optimizer.state.get(p):  # none: it never had a gradient
                begun = [(1 - beta ** state["step"].double()).float() for beta in group["betas"]]  # 1 after many steps
                mean, square = (
                    local(state[m]).float() / b for m, b in zip(("exp_avg", "exp_avg_sq"), begun, strict=True)
                )
                u = mean / (square.sqrt() + group["eps"])
                yield (lr * u + w * local(p)) / (1 - w)


def _square(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Squared L2 norm of all of them together, of this rank's shards, on the device."""
    norms = [torch.linalg.vector_norm(local(x).float()) for x in tensors]
    return torch.stack([torch.zeros((), device=device), *norms]).square().sum()


@torch.no_grad()
def loudness(denoiser: Denoiser, x_t: Tensor, t: Tensor, base: Control, hints: Mapping[str, Any]) -> dict[str, Tensor]:
    """How loud each adapter is in the UNet: squared L2 norms of its residuals and of the features they are added to.

    Args:
        denoiser: under the autocast that it is trained in.
        x_t: as for its forward, and the rest too.
        t: b.
        base: context and vector.
        hints: adapter name -> hint, encoded.

    Returns: adapter -> both, over all places and samples, 2; those that speak through attention alone have none.
    """
    base, prepared = denoiser.tell(base, denoiser.fuse(denoiser.prepare(hints), dropped=hints))
    said = {name: denoiser.control(x_t, t, base, {name: ready}) for name, ready in prepared.items()}
    loud = [name for name, c in said.items() if c.skips or c.stages or c.downs or c.mid is not None]
    if not loud:
        return {}
    total = functools.reduce(operator.add, said.values(), base)
    features = denoiser.unet.encoder(x_t, t, total)
    met = {name: zip(*_met(said[name], total, features, denoiser.unet.spec), strict=True) for name in loud}
    return {name: torch.stack([_square(side, x_t.device) for side in sides]) for name, sides in met.items()}


def _met(said: Control, total: Control, features: Encoded, spec: UNetSpec) -> list[tuple[Tensor, Tensor]]:
    """Residuals of one adapter, each with the features that it is added to.

    Stages and downs are part of the skips that the encoder stores, see `UNetEncoder.encode`: behind a level's last
    block, and behind a downsampling.
    """
    strides = [tap.stride for tap in spec.skips]
    behind = [len(strides) - 1 - strides[::-1].index(tap.stride) for tap in spec.stages]
    below = [strides.index(tap.stride) for tap in spec.stages[1:]]
    met = list(zip(said.skips, features.skips, strict=False))
    for own, every, places in ((said.stages, total.stages, behind), (said.downs, total.downs, below)):
        met += [(x, features.skips[i] - added) for x, added, i in zip(own, every, places, strict=False)]
    return met if said.mid is None else [*met, (said.mid, features.mid)]
