"""Random numbers of a training step as functions of (run seed, purpose, global sample position).

Rank, worker and accumulation split do not enter, so a run is the same however its batch is divided, and resuming
needs no generator state. Layers that draw for themselves draw by position too (dropout), or by optimizer step.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.models.dropout import Dropout
from ldm.transfer import send

SAMPLINGS = ("uniform", "cubic")  # of timesteps


def generator(seed: int, purpose: str, position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose ("noise", "order", "augment", ...) at one position of one run."""
    return torch.Generator(device).manual_seed(_hashed(seed, purpose, position))


def _hashed(seed: int, purpose: str, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def cubic(r: Tensor, steps: int) -> Tensor:
    """Uniform r in [0, 1) to times t = (1 - r^3) T, whole and at most T - 1: r of 0 would give T itself.

    T2I-Adapter (arXiv:2302.08453), section 3.4: the beginning of sampling decides structure and colour.
    """
    return ((1 - r.double() ** 3) * steps).long().clamp(max=steps - 1)


class Draws:
    """Draws for the rows of one micro-batch; row i belongs to global sample `positions[i]`."""

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.positions = positions
        self.device = device

    def seed_layers(self, network: nn.Module, step: int) -> None:
        """Seed what layers draw for themselves: a `Dropout` by the rows' positions, torch's own generators by step.

        Args:
            network: whose layers they are, about to see these rows.
            step: of the optimizer, 0-based: what is drawn once for all pictures is the same in all its micro-batches.
        """
        torch.manual_seed(_hashed(self.seed, "layers", step))
        generators = [generator(self.seed, "dropout", p, self.device) for p in self.positions]
        for layer in network.modules():
            if isinstance(layer, Dropout):
                layer.generators = generators

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal, b *shape, float32."""
        return self._rows(purpose, lambda g: torch.randn(shape, generator=g))

    def uniform(self, purpose: str) -> Tensor:
        """Uniform in [0, 1), b, float32."""
        return self._rows(purpose, lambda g: torch.rand((), generator=g))

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform in 0..high-1, b, int64."""
        return self._rows(purpose, lambda g: torch.randint(high, (), generator=g))

    def timesteps(self, sampling: str, steps: int) -> Tensor:
        """Times of training, b int64 in 0..steps-1. `sampling`: one of SAMPLINGS; cubic prefers the noisy end."""
        if sampling == "uniform":
            return self.integers("timestep", steps)
        return cubic(self.uniform("timestep"), steps)

    def _rows(self, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        rows = torch.stack([draw(generator(self.seed, purpose, p)) for p in self.positions])
        return send(rows, self.device)
