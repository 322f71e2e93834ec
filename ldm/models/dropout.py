"""Dropout that treats a picture alike whatever shares its batch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Dropout whose mask for a picture is drawn by that picture's own generator.

    Attributes:
        generators: one for each picture of the next batch, on its device (`ldm.training.draws` sets them ahead of each
            training step); none: torch's own draws for all.
    """

    def __init__(self, p: float) -> None:
        """Args: p: probability in [0, 1) that a value becomes zero in training."""
        super().__init__()
        self.p = p
        self.generators: Sequence[torch.Generator] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Rows (b m) ..., the m of each picture side by side -> the same shape.

        Raises: ValueError if b generators do not share the rows evenly.
        """
        if not (self.training and self.p):
            return x
        if not self.generators:
            return F.dropout(x, self.p)
        if len(x) % len(self.generators):
            raise ValueError(f"dropout got {len(x)} rows for {len(self.generators)} pictures; give each as many")
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for rows, generator in zip(keep.chunk(len(self.generators)), self.generators, strict=True):
            rows.bernoulli_(1 - self.p, generator=generator)
        return x * keep / (1 - self.p)
