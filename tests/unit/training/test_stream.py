from collections import Counter
from collections.abc import Generator
from itertools import chain, islice
from typing import Any, ClassVar

import pytest
import torch

from ldm.config import TrainConfig
from ldm.data.errors import DataError
from ldm.data.images import ImageData, Sample
from ldm.data.subset import Part
from ldm.registry import ConfigError
from ldm.training.distributed import Rank
from ldm.training.stream import Order, Positions, Timed, Walk, batches, positions, split_batch

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
    config: TrainConfig, world: int = 1, start: int = 0, seed: int = 0, data: ImageData | None = None
) -> list[dict[int, tuple[str, torch.Tensor]]]:
    """For each step: global position -> key and image, over all ranks."""
    streams = [batches(data or Numbers(), config, rank(i, world), seed, start) for i in range(world)]
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
    same_sample = Positions(Numbers(), 0, 4)[3], Positions(Numbers(), 0, 4)[3 + SIZE]
    assert same_sample[0][0] == 3 and same_sample[1][0] == 3 + SIZE
    first_pixels = {float(sample.image[0, 0, 0]) for _, sample in same_sample}
    assert len(first_pixels) == 2


def test_positions_can_be_read_in_any_order() -> None:
    there, back = Positions(Numbers(), 0, 4), Positions(Numbers(), 0, 4)
    forth = {p: there[p][1].key for p in range(25)}
    assert {p: back[p][1].key for p in reversed(range(25))} == forth


def test_worker_processes_change_nothing() -> None:
    whole = run(TrainConfig(batch=4, steps=3))
    assert same(run(TrainConfig(batch=4, steps=3, workers=2)), whole)


def test_micro_batches_of_a_step_come_together() -> None:
    stream = batches(Numbers(), TrainConfig(batch=4, micro_batch=2, steps=3), rank(), 0, 0)
    steps = list(islice(stream, 2))
    assert [[where for where, _ in step] for step in steps] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


class Shapes(Numbers):
    """19 samples of three sizes; one size has fewer than a batch."""

    sizes: ClassVar = {"2x2": range(11), "4x2": range(11, 17), "2x4": range(17, 19)}

    def __len__(self) -> int:
        return 19

    def groups(self) -> dict[str, range]:
        return self.sizes

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        plain = super().load(index, generator)
        (name,) = (name for name, indices in self.sizes.items() if index in indices)
        width, height = map(int, name.split("x"))
        return Sample(plain.key, plain.image[:, :1, :1].expand(3, height, width), "")


def walked(steps: int, batch: int = 4, seed: int = 0) -> list[list[int]]:
    """Indices of each step's samples."""
    walk = Walk(Shapes(), seed, batch)
    return [[walk(p) for p in range(batch * step, batch * (step + 1))] for step in range(steps)]


def test_every_batch_is_of_one_size_on_any_ranks_accumulation_and_workers() -> None:
    whole = run(TrainConfig(batch=4, steps=12), data=Shapes())
    assert all(len({x.shape for _, x in step.values()}) == 1 for step in whole)
    assert len({tuple(x.shape) for step in whole for _, x in step.values()}) == 3
    for world, micro, workers in ((2, None, 0), (2, 1, 0), (4, 1, 0), (1, 2, 2)):
        config = TrainConfig(batch=4, steps=12, micro_batch=micro, workers=workers)
        assert same(run(config, world, data=Shapes()), whole)
    assert same(run(TrainConfig(batch=4, steps=12), start=7, data=Shapes()), whole[7:])


@pytest.mark.parametrize("batch", [1, 4, 7, 32])
def test_every_sample_is_seen_once_a_round_and_no_size_is_ahead_by_a_batch(batch: int) -> None:
    steps = walked(40, batch)
    seen, rounds = Counter[int](), 0
    for step, indices in enumerate(steps, start=1):
        seen.update(indices)
        while step == sum(-(-(rounds + 1) * len(group) // batch) for group in Shapes.sizes.values()):
            rounds += 1
            assert all(seen[i] >= rounds for i in range(19))
            for group in Shapes.sizes.values():
                assert 0 <= sum(seen[i] for i in group) - rounds * len(group) < batch
    assert rounds >= 2


def test_buckets_come_mixed_by_the_seed_and_can_be_had_in_any_order() -> None:
    steps = walked(30)
    assert steps != walked(30, seed=1)
    kinds = [next(name for name, group in Shapes.sizes.items() if step[0] in group) for step in steps]
    assert kinds != sorted(kinds) and kinds[:6] != kinds[6:12]
    walk = Walk(Shapes(), 0, 4)
    assert [[walk(p) for p in range(4 * step, 4 * step + 4)] for step in reversed(range(30))] == steps[::-1]
    assert Walk(Shapes(), 0, 4)(4 * 10**9) in range(19)  # far out: nothing is counted up to there


def test_part_of_a_set_has_the_rest_of_its_buckets() -> None:
    part = Part(Shapes(), 12)
    groups = part.groups()
    assert sorted(i for indices in groups.values() for i in indices) == list(range(12))
    for name, indices in groups.items():
        assert {part[i].image.shape for i in indices} == {(3, *map(int, reversed(name.split("x"))))}
    assert Part(Numbers(), 4).groups() == {"": [0, 1, 2, 3]}


def test_buckets_smaller_than_a_batch_are_named(caplog: pytest.LogCaptureFixture) -> None:
    run(TrainConfig(batch=4, steps=1), data=Shapes())
    assert "fewer images than train.batch=4: 2x4 (2);" in caplog.text


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


def test_time_waited_for_batches_is_counted_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def arriving() -> Generator[list[tuple[list[int], Any]]]:
        for seconds in (1.0, 2.0, 4.0):
            clock[0] += seconds
            yield []

    monkeypatch.setattr("ldm.training.stream.time.perf_counter", lambda: clock[0])
    timed, waited = Timed(arriving()), []
    for i, _ in enumerate(timed):
        clock[0] += 100.0  # the step
        if i:
            waited.append(timed.waited())
    assert waited == [3.0, 4.0]
