"""A fixed, spread-out part of a data set for held-out figures."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Subset

from ldm.data.images import Batch, ImageData, Sample, collate


def spread(data: ImageData, items: int) -> Subset[Sample]:
    """At most `items` samples, drawn by one permutation that never changes.

    Folders are listed by style or class, so the first n of them would be of one kind only.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(data, order[:items])


def held_out(data: ImageData, items: int, batch: int, device: torch.device) -> Iterator[Batch]:
    """`spread(data, items)` in batches of at most `batch`, on `device`."""
    for samples in DataLoader(spread(data, items), batch_size=batch, collate_fn=collate):
        yield samples.to(device)
