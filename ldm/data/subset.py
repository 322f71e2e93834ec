"""A fixed, spread-out part of a data set for held-out figures."""

import torch
from torch.utils.data import Subset

from ldm.data.images import ImageData, Sample


def spread(data: ImageData, items: int) -> Subset[Sample]:
    """At most `items` samples, drawn by one permutation that never changes.

    Folders are listed by style or class, so the first n of them would be of one kind only.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(data, order[:items])
