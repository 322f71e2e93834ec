"""The order of the data: which sample stands at which global position, for any number of ranks and accumulations."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ldm.config import TrainConfig
from ldm.data.images import collate
from ldm.registry import ConfigError
from ldm.training.distributed import Rank
from ldm.training.draws import generator


class Positions(Dataset[tuple[int, Any]]):
    """A data set indexed by global position: an endless sequence of epochs, each its own permutation.

    Position p is sample `permutation(p // n)[p % n]`; its augmentation is drawn from (seed, "augment", p).
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data = data
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> tuple[int, Any]:
        """The position and its sample."""
        epoch, offset = divmod(position, len(self.data))
        if epoch != self._epoch:
            self._order = torch.randperm(len(self.data), generator=generator(self.seed, "order", epoch)).tolist()
            self._epoch = epoch
        return position, self.data.load(self._order[offset], generator(self.seed, "augment", position))


def split_batch(config: TrainConfig, world: int) -> tuple[int, int]:
    """(images per rank and forward, accumulation steps). Raises: ConfigError if the batch does not divide evenly."""
    per_rank, left = divmod(config.batch, world)
    if left:
        raise ConfigError(f"train.batch is {config.batch}, must be a multiple of the {world} ranks; change either")
    micro = min(config.micro_batch or per_rank, per_rank)
    if per_rank % micro:
        raise ConfigError(f"train.micro_batch is {micro}, must divide the {per_rank} images of a rank; change either")
    return micro, per_rank // micro


def positions(step: int, micro: int, accumulation: int, rank: Rank) -> list[list[int]]:
    """Global sample positions of one rank's micro-batches at one optimizer step."""
    first = step * micro * accumulation * rank.world
    starts = (first + (m * rank.world + rank.index) * micro for m in range(accumulation))
    return [list(range(start, start + micro)) for start in starts]


def batches(data: Any, config: TrainConfig, rank: Rank, seed: int, start: int) -> Iterator[list[tuple[list[int], Any]]]:
    """For each optimizer step from `start` on: this rank's micro-batches as (global positions, Batch)."""
    micro, accumulation = split_batch(config, rank.world)
    order = [p for step in range(start, config.steps) for p in positions(step, micro, accumulation, rank)]
    loader = DataLoader(
        Positions(data, seed),
        batch_sampler=order,
        collate_fn=_Collate(getattr(data, "collate", collate)),
        num_workers=config.workers,
        pin_memory=rank.device.type == "cuda",
        persistent_workers=config.workers > 0,
    )
    stream = iter(loader)
    for _ in range(start, config.steps):
        yield [(where, batch.to(rank.device)) for where, batch in (next(stream) for _ in range(accumulation))]


class _Collate:
    def __init__(self, collate_samples: Callable[[list[Any]], Any]) -> None:
        self.collate_samples = collate_samples

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        return [p for p, _ in items], self.collate_samples([s for _, s in items])
