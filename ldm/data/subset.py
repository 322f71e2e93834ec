"""A fixed, spread-out part of a data set: for held-out figures, and for training on less."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ldm.data.images import Batch, ImageData, Sample, collate


def spread(data: ImageData, items: int) -> Subset[Sample]:
    """At most `items` samples, drawn by one permutation that never changes.

    Folders are listed by style or class, so the first n of them would be of one kind only.
    """
    return Subset(data, _order(data)[:items])


def _order(data: ImageData) -> list[int]:
    return torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()


class Part(ImageData):
    """At most `items` samples of a set to train on, those of `spread`: a smaller part lies within a larger one."""

    def __init__(self, data: ImageData, items: int) -> None:
        self.data = data
        self.rows = _order(data)[:items]

    @property
    def options(self) -> Any:
        """Those of the whole set, None where it has none."""
        return getattr(self.data, "options", None)

    def __len__(self) -> int:
        return len(self.rows)

    def groups(self) -> Mapping[str, Sequence[int]]:
        """See ImageData."""
        place = {row: index for index, row in enumerate(self.rows)}
        every = {name: sorted(place[row] for row in rows if row in place) for name, rows in self.data.groups().items()}
        return {name: indices for name, indices in every.items() if indices}

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """See ImageData."""
        return self.data.load(self.rows[index], generator)

    def files(self) -> Sequence[Path]:
        """See ImageData: those of the whole set."""
        return self.data.files()

    def table(self) -> Iterable[str]:
        """See ImageData: that of the whole set, and how many samples of it these are."""
        yield str(len(self))
        yield from self.data.table()

    def references(self, key: str) -> Sequence[str]:
        """See ImageData; references are not left out."""
        return self.data.references(key)

    def reference(self, name: str) -> Tensor:
        """See ImageData."""
        return self.data.reference(name)

    def once(self) -> None:
        """See ImageData."""
        self.data.once()


def held_out(
    data: ImageData, items: int, batch: int, device: torch.device, part: Callable[[int], range] = range
) -> Iterator[Batch]:
    """`spread(data, items)` in batches of at most `batch`, on `device`.

    Args:
        data: all of it.
        items: at most this many.
        batch: items of a batch.
        device: where batches go.
        part: number of batches -> which of them are given, consecutive ones; `Rank.part` shares them out.
    """
    for samples in DataLoader(shared(data, items, batch, part), batch_size=batch, collate_fn=collate):
        yield samples.to(device)


def shared(data: ImageData, items: int, batch: int, part: Callable[[int], range]) -> Subset[Sample]:
    """The items of `held_out` with that part, in order."""
    whole = spread(data, items)
    mine = part(-(-len(whole) // batch))
    return Subset(data, whole.indices[mine.start * batch : mine.stop * batch])
