import os
import signal
import time
from itertools import chain, islice
from typing import Any

import pytest
import torch

from ldm.config import TrainConfig
from ldm.data.errors import DataError
from ldm.data.images import ImageData, Sample
from ldm.registry import ConfigError
from ldm.training.distributed import Rank
from ldm.training.stream import Order, Positions, batches, positions, split_batch

SIZE = 10  # samples, so that a batch of 4 straddles epochs


class Numbers(ImageData):
    """Sample i is an image of value i / 100, plus augmentation noise in the first pixel."""

    def __len__(self) -> int:
        return SIZE

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        image = torch.full((3, 2, 2), index / 100)
        if generator is not None:
            image[0, 0, 0] = torch.rand((), generator=generator)
        return Sample(key=str(index), image=image, text="")


def rank(index: int = 0, world: int = 1) -> Rank:
    return Rank(index, world, torch.device("cpu"))


def run(
    config: TrainConfig, world: int = 1, start: int = 0, seed: int = 0
) -> list[dict[int, tuple[str, torch.Tensor]]]:
    """For each step: global position -> key and image, over all ranks."""
    streams = [batches(Numbers(), config, rank(i, world), seed, start) for i in range(world)]
    steps: list[dict[int, tuple[str, torch.Tensor]]] = []
    for parts in zip(*streams, strict=True):
        found: dict[int, tuple[str, torch.Tensor]] = {}
        for where, batch in chain.from_iterable(parts):
            found.update({p: (k, x) for p, k, x in zip(where, batch.keys, batch.image, strict=True)})
        steps.append(found)
    return steps


def same(a: list[dict[int, Any]], b: list[dict[int, Any]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(x[p][0] == y[p][0] and torch.equal(x[p][1], y[p][1]) for p in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("world", "batch", "micro", "expected"),
    [(1, 8, None, (8, 1)), (1, 8, 2, (2, 4)), (2, 8, 2, (2, 2)), (4, 8, None, (2, 1)), (2, 8, 64, (4, 1))],
)
def test_batch_is_split_over_ranks_and_accumulation(
    world: int, batch: int, micro: int | None, expected: tuple[int, int]
) -> None:
    assert split_batch(TrainConfig(batch=batch, micro_batch=micro), world) == expected


@pytest.mark.parametrize(
    ("world", "batch", "micro", "message"),
    [
        (3, 8, None, "train.batch is 8, must be a multiple of the 3 ranks"),
        (2, 8, 3, "train.micro_batch is 3, must divide the 4 images of a rank"),
    ],
)
def test_batch_that_does_not_divide_is_refused(world: int, batch: int, micro: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_batch(TrainConfig(batch=batch, micro_batch=micro), world)


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (2, 2), (4, 1)])
def test_every_position_is_seen_once_a_step(world: int, micro: int) -> None:
    _, accumulation = split_batch(TrainConfig(batch=8, micro_batch=micro), world)
    for step in (0, 3):
        seen = [p for i in range(world) for part in positions(step, micro, accumulation, rank(i, world)) for p in part]
        assert sorted(seen) == list(range(8 * step, 8 * step + 8))


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (1, 1), (2, None), (2, 1), (4, None)])
def test_data_do_not_depend_on_ranks_or_accumulation(world: int, micro: int | None) -> None:
    whole = run(TrainConfig(batch=4, steps=5))
    assert same(run(TrainConfig(batch=4, steps=5, micro_batch=micro), world), whole)
    assert [sorted(step) for step in whole] == [list(range(4 * i, 4 * i + 4)) for i in range(5)]


def test_each_epoch_is_its_own_permutation() -> None:
    everything = {p: key for step in run(TrainConfig(batch=5, steps=6)) for p, (key, _) in step.items()}
    epochs = [[everything[p] for p in range(SIZE * e, SIZE * (e + 1))] for e in range(3)]
    assert all(sorted(epoch) == sorted(map(str, range(SIZE))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_starting_later_gives_the_rest_of_the_same_stream() -> None:
    config = TrainConfig(batch=4, steps=6)
    assert same(run(config, start=4), run(config)[4:])
    assert run(config, start=6) == []


def test_seed_changes_order_and_augmentation() -> None:
    config = TrainConfig(batch=4, steps=2)
    one, two = run(config, seed=0), run(config, seed=1)
    assert [k for k, _ in one[0].values()] != [k for k, _ in two[0].values()]
    same_sample = Positions(Numbers(), 0)[3], Positions(Numbers(), 0)[3 + SIZE]
    assert same_sample[0][0] == 3 and same_sample[1][0] == 3 + SIZE
    first_pixels = {float(sample.image[0, 0, 0]) for _, sample in same_sample}
    assert len(first_pixels) == 2


def test_positions_can_be_read_in_any_order() -> None:
    there, back = Positions(Numbers(), 0), Positions(Numbers(), 0)
    forth = {p: there[p][1].key for p in range(25)}
    assert {p: back[p][1].key for p in reversed(range(25))} == forth


def test_worker_processes_change_nothing() -> None:
    whole = run(TrainConfig(batch=4, steps=3))
    assert same(run(TrainConfig(batch=4, steps=3, workers=2)), whole)


def test_micro_batches_of_a_step_come_together() -> None:
    stream = batches(Numbers(), TrainConfig(batch=4, micro_batch=2, steps=3), rank(), 0, 0)
    steps = list(islice(stream, 2))
    assert [[where for where, _ in step] for step in steps] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_order_is_not_made_before_it_is_asked_for() -> None:
    order = Order(start=2, steps=10**12, micro=2, accumulation=2, rank=rank(1, world=2))
    assert len(order) == 2 * (10**12 - 2)
    assert list(islice(order, 2)) == list(islice(order, 2)) == positions(2, 2, 2, rank(1, world=2))
    endless = batches(Numbers(), TrainConfig(batch=4, steps=10**12), rank(), 0, 0)
    assert [where for where, _ in next(endless)] == [[0, 1, 2, 3]]


class Damaged(Numbers):
    """One sample cannot be read; another is of another size, if `odd`."""

    def __init__(self, odd: bool = False) -> None:
        self.odd = odd

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        if index == 3 and self.odd:
            return Sample(key="odd", image=torch.zeros(3, 4, 4), text="")
        if index == 3:
            raise DataError("images/3.png cannot be decoded; replace or remove it")
        return super().load(index, generator)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("odd", "said"), [(False, r"^images/3.png cannot .* it$"), (True, r"^.* one batch has .*$")])
def test_unreadable_sample_is_one_line_from_any_process(workers: int, odd: bool, said: str) -> None:
    config = TrainConfig(batch=SIZE, steps=1, workers=workers)
    with pytest.raises(DataError, match=said) as caught:
        list(batches(Damaged(odd), config, rank(), 0, 0))
    assert "\n" not in str(caught.value)


class Stuck(Numbers):
    """A worker that reads sample 3 sleeps for a minute, or is killed."""

    def __init__(self, killed: bool) -> None:
        self.killed = killed

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        if index == 3 and self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3:
            time.sleep(60)
        return super().load(index, generator)


@pytest.mark.parametrize(("killed", "said"), [(False, r"gave no batch for 1 s \(train"), (True, "died")])
def test_workers_that_hang_or_die_end_the_run_in_one_line(killed: bool, said: str) -> None:
    config = TrainConfig(batch=SIZE, steps=1, workers=1, worker_timeout=1.0)
    with pytest.raises(DataError, match=f"^data workers {said}.*train.workers is 1"):
        list(batches(Stuck(killed), config, rank(), 0, 0))
