"""The order of the data: which sample stands at which global position, for any number of ranks and accumulations."""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ldm.config import TrainConfig
from ldm.data.images import collate
from ldm.registry import ConfigError
from ldm.training.distributed import Rank
from ldm.training.draws import generator
from ldm.training.workers import Workers, read

log = logging.getLogger(__name__)


def groups(data: Any) -> Mapping[str, Sequence[int]]:
    """Indices of the samples of each size, by name (`ImageData.groups`); an encoded set is one group."""
    return data.groups() if hasattr(data, "groups") else {"": range(len(data))}


class Walk:
    """Which sample stands at which position: for each group an endless sequence of epochs, each its own permutation.

    Every batch is of one group. In round r a group of n samples has ceil((r + 1) n / B) - ceil(r n / B) batches of B,
    in an order drawn for the round; each takes the next B of the group's sequence. So behind r rounds every sample was
    taken r times at least, and no group is ahead of its share by a batch: a small one comes round more rarely.

    Stateless: all of it follows from the seed, the position and the groups' sizes.
    """

    def __init__(self, data: Any, seed: int, batch: int) -> None:
        self.groups = [(name, indices) for name, indices in groups(data).items() if len(indices)]
        self.seed = seed
        self.batch = batch
        self._first = 0  # step at which the round begins
        self._plan: list[tuple[int, int]] = []  # of its steps: group, and how many batches of it were before
        self._orders: dict[str, tuple[int, torch.Tensor]] = {}  # group -> epoch, permutation

    def __call__(self, position: int) -> int:
        """Index of the sample at a global position."""
        step, row = divmod(position, self.batch)
        group, before = self._batch(step)
        name, indices = self.groups[group]
        epoch, offset = divmod(before * self.batch + row, len(indices))
        if self._orders.get(name, (-1,))[0] != epoch:
            drawn = generator(self.seed, f"order.{name}" if name else "order", epoch)
            self._orders[name] = epoch, torch.randperm(len(indices), generator=drawn)
        return indices[int(self._orders[name][1][offset])]

    def _batch(self, step: int) -> tuple[int, int]:
        """Group of a step, and how many batches of it were before."""
        if len(self.groups) == 1:
            return 0, step
        if not 0 <= step - self._first < len(self._plan):
            self._draw(step)
        return self._plan[step - self._first]

    def _draw(self, step: int) -> None:
        """Plan the round that a step is in."""
        number = step * self.batch // sum(len(indices) for _, indices in self.groups)
        while (first := sum(self._before(number))) > step:
            number -= 1
        had, behind = self._before(number), self._before(number + 1)
        due = [g for g, (a, b) in enumerate(zip(had, behind, strict=True)) for _ in range(a, b)]
        self._first, self._plan = first, []
        for i in torch.randperm(len(due), generator=generator(self.seed, "buckets", number)).tolist():
            self._plan.append((due[i], had[due[i]]))
            had[due[i]] += 1

    def _before(self, number: int) -> list[int]:
        """How many batches each group has had when a round begins."""
        return [-(-number * len(indices) // self.batch) for _, indices in self.groups]


class Positions(Dataset[tuple[int, Any]]):
    """A data set indexed by global position. The augmentation at p is drawn from (seed, "augment", p)."""

    def __init__(self, data: Any, seed: int, batch: int) -> None:
        self.data = data
        self.seed = seed
        self.walk = Walk(data, seed, batch)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        """The position and its sample, or the error that the user has to see.

        An error raised in a worker process would arrive with that process's traceback for a message.
        """
        try:
            return position, self.data.load(self.walk(position), generator(self.seed, "augment", position))
        except (ValueError, OSError) as error:
            return position, error


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


def batches(
    data: Any, config: TrainConfig, rank: Rank, seed: int, start: int
) -> Generator[list[tuple[list[int], Any]]]:
    """For each optimizer step from `start` on: this rank's micro-batches as (global positions, Batch).

    Closed or at its end, it leaves no worker. Raises: what reading a sample raised, DataError above all.
    """
    micro, accumulation = split_batch(config, rank.world)
    small = [f"{name} ({len(indices)})" for name, indices in groups(data).items() if len(indices) < config.batch]
    if small and len(groups(data)) > 1:
        log.warning(
            "buckets with fewer images than train.batch=%d: %s; their batches have images several times, and come more "
            "rarely: fewer buckets or a smaller batch avoid it",
            config.batch,
            ", ".join(small),
        )
    order = Order(start, config.steps, micro, accumulation, rank)
    join = _Collate(getattr(data, "collate", collate))
    readers = Workers(config.workers, config.worker_timeout)
    pin = rank.device.type == "cuda"
    with closing(read(Positions(data, seed, config.batch), order, join, readers, pin=pin)) as stream:
        for _ in range(start, config.steps):
            found = [next(stream) for _ in range(accumulation)]
            for _, batch in found:
                if isinstance(batch, Exception):
                    raise batch
            yield [(where, batch.to(rank.device)) for where, batch in found]


class Timed:
    """Batches as they come, and how long the caller waited for them."""

    def __init__(self, batches: Generator[list[tuple[list[int], Any]]]) -> None:
        self._batches, self._seconds = batches, 0.0

    def __iter__(self) -> "Timed":
        return self

    def __next__(self) -> list[tuple[list[int], Any]]:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._seconds += time.perf_counter() - started

    def close(self) -> None:
        """No more are wanted."""
        self._batches.close()

    def waited(self) -> float:
        """Seconds since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Order(Sampler[list[int]]):
    """`positions` of every micro-batch from step `start` to `steps`, made as they are asked for."""

    def __init__(self, start: int, steps: int, micro: int, accumulation: int, rank: Rank) -> None:
        self.steps = range(start, steps)
        self.micro = micro
        self.accumulation = accumulation
        self.rank = rank

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield from positions(step, self.micro, self.accumulation, self.rank)

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation


class _Collate:
    def __init__(self, collate_samples: Callable[[list[Any]], Any]) -> None:
        self.collate_samples = collate_samples

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        where, samples = [p for p, _ in items], [s for _, s in items]
        if errors := [s for s in samples if isinstance(s, Exception)]:
            return where, errors[0]
        try:
            return where, self.collate_samples(samples)
        except ValueError as error:  # samples that do not fit together
            return where, error
