"""Exponential moving average of trainable weights, with the warm-up of the original latent diffusion code."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.training.distributed import local


class EMA:
    """Averages the parameters of a module that require grad when it is built; buffers and frozen weights are not kept.

    The decay of update n = 1, 2, ... is min(decay, (1 + n) / (10 + n)) (Rombach et al. 2022, arXiv:2112.10752,
    released code): 2/11 at first, so early averages forget the initialisation. Averages are float32 or wider.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999) -> None:
        """Start from the module's weights as they are now.

        Args:
            module: on its final device, not wrapped (give DDP's `.module`); its parameters must stay the same objects.
            decay: in [0, 1); the limit of the warm-up. 0 follows the weights exactly.

        Raises: ValueError if decay is outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay is {decay}; allowed: 0 <= decay < 1; 0.9999 is usual, 0.999 for short runs")
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.decay = decay
        self.updates = 0
        self._params: list[Tensor] = list(trainable.values())
        self.weights: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in trainable.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the module's weights; call once per optimizer step. Never waits for the device."""
        self.updates += 1
        if not self._params:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [local(a) for a in self.weights.values()]
        current = [local(p).to(a.dtype) for p, a in zip(self._params, averages, strict=True)]
        torch._foreach_lerp_(averages, current, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the `with` block the module holds the averages; its own weights come back after it, bit for bit."""
        own = [local(p).detach().clone() for p in self._params]
        self._fill([local(a) for a in self.weights.values()])
        try:
            yield
        finally:
            self._fill(own)

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, and the number of updates made. Tensors are not copied."""
        return {"updates": self.updates, "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; the decay stays that of this object.

        Raises: ValueError if it holds other names or shapes than this module's trainable parameters.
        """
        weights: Mapping[str, Tensor] = state["weights"]
        missing, unexpected = self.weights.keys() - weights.keys(), weights.keys() - self.weights.keys()
        shared = self.weights.keys() & weights.keys()
        reshaped = {name for name in shared if self.weights[name].shape != weights[name].shape}
        if missing or unexpected or reshaped:
            raise ValueError(
                f"EMA state does not fit the trainable parameters: missing {sorted(missing)[:3]} ({len(missing)}), "
                f"unexpected {sorted(unexpected)[:3]} ({len(unexpected)}), other shape {sorted(reshaped)[:3]} "
                f"({len(reshaped)}); allowed: exactly the same; check the model and train.trainable"
            )
        self.updates = int(state["updates"])
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        """Copy values into the module's parameters, which stay the same objects with the same storage."""
        if self._params:
            torch._foreach_copy_([local(p) for p in self._params], values)  # pyright: ignore[reportPrivateImportUsage]
