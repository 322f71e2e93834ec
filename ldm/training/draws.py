"""Random numbers of a training step as functions of (run seed, purpose, global sample position).

Rank, worker and accumulation split do not enter, so a run is the same however its batch is divided, and resuming
needs no generator state.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, position: int) -> torch.Generator:
    """A CPU generator for one purpose ("noise", "order", "augment", ...) at one position of one run."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Draws:
    """Draws for the rows of one micro-batch; row i belongs to global sample `positions[i]`."""

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.positions = positions
        self.device = device

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal, b *shape, float32."""
        return self._rows(purpose, lambda g: torch.randn(shape, generator=g))

    def uniform(self, purpose: str) -> Tensor:
        """Uniform in [0, 1), b, float32."""
        return self._rows(purpose, lambda g: torch.rand((), generator=g))

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform in 0..high-1, b, int64."""
        return self._rows(purpose, lambda g: torch.randint(high, (), generator=g))

    def _rows(self, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        rows = torch.stack([draw(generator(self.seed, purpose, p)) for p in self.positions])
        if torch.device(self.device).type == "cuda":
            rows = rows.pin_memory()  # from pageable memory the copy would wait for the device
        return rows.to(self.device, non_blocking=True)
