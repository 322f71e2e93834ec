"""What the loop trains: a Stage computes a loss from a batch, and says what to export and how it is doing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from ldm.data.images import Batch, ImageData
from ldm.denoiser import Denoiser
from ldm.training import optim
from ldm.training.distributed import Rank
from ldm.training.draws import Draws
from ldm.training.workers import NONE, Workers


@dataclass(frozen=True, slots=True)
class Loss:
    """`total` is what backward gets; `parts` are logged. All scalars on the device."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures that validation drew of n held-out items, n 3 h w in [0, 1].

    Attributes:
        hints: adapter -> what it was told, n ..., as `Adapter.encode` takes it.
        base: without adapters; None where they stand for the text.
        adapted: with all of them; None where there are none.
        real: the items themselves.
    """

    hints: dict[str, Tensor]
    base: Tensor | None
    adapted: Tensor | None
    real: Tensor

    def columns(self) -> dict[str, Tensor]:
        """All of it, labelled; of image prompts the first reference."""
        hints = {f"hint: {name}": hint[:, 0] if hint.ndim == 5 else hint for name, hint in self.hints.items()}
        drawn = {"base": self.base, "with adapter": self.adapted, "ground truth": self.real}
        return hints | {label: pictures for label, pictures in drawn.items() if pictures is not None}


pytree.register_dataclass(Drawn)


@dataclass(frozen=True, slots=True)
class Report:
    """Held-out figures, pictures as labelled columns, each b 3 h w in [0, 1], and what a diffusion stage drew."""

    figures: dict[str, float] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    drawn: Drawn | None = None


class Stage(nn.Module, ABC):
    """One kind of training. The loop wraps it whole, so its forward sees every trainable parameter (DDP)."""

    partial = False  # True: some trainable parameters get no gradient in some forwards
    whole_batch = False  # True: the loss couples the samples of a batch, so it must not be accumulated in parts

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The module that `train.trainable` patterns, EMA and exports speak of."""

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """Modules with an optimizer of their own, updated in turn from the same batch (a GAN has two)."""
        return {"model": self.trained}

    def survey(self, parts: Sequence[tuple[Batch, Draws]], player: str, step: int) -> None:
        """Hook: see all micro-batches of this rank's step before `forward` does; not called if there is only one."""
        del parts, player, step

    @abstractmethod
    def forward(self, batch: Batch, draws: Draws, player: str, step: int) -> Loss:
        """Mean loss of a micro-batch for one player at optimizer step `step` (0-based)."""

    @property
    def autocast(self) -> Sequence[nn.Module]:
        """Modules that run under autocast and nowhere else: frozen weights in them may be kept in its type."""
        return (self.trained,)

    def exports(self) -> Mapping[str, nn.Module]:
        """File stem -> module whose weights are shared."""
        return {"model": self.trained}

    def check(self, batch: Batch) -> None:
        """Hook: refuse a batch that lacks what this stage reads, before training starts. Raises: ConfigError."""
        del batch

    def cached(
        self, data: ImageData, rank: Rank, workers: Workers = NONE, keep: Callable[..., Any] | None = None
    ) -> Dataset:
        """Hook: replace the data by precomputed inputs. Items must be collated by their own `collate`.

        All ranks call it; `workers` of each read the data; `keep` keeps it in memory (`cache.Keep`), None: as it is.

        Raises: signals.Stopped if one was asked to stop.
        """
        del rank, workers, keep
        return data

    @abstractmethod
    def validate(self, batches: Iterable[Batch], images: int, seed: int) -> Report:
        """Figures over all batches and pictures of the first `images` items, on seeds that never change."""


def choose_trainable(stage: Stage, patterns: Sequence[str]) -> None:
    """Set `requires_grad` on what `train.trainable` names and on every other player, and on nothing else.

    Raises: ConfigError if a pattern matches nothing.
    """
    stage.requires_grad_(False)
    for module in stage.players.values():
        optim.trainable(module, patterns if module is stage.trained else ["*"])


def networks(stage: Stage) -> dict[str, nn.Module]:
    """The stage's models by the names that configs give them: unet, adapters, vae, text, clip, ...

    What an adapter hears but does not own stands beside it, as encoder_NAME.
    """
    found: dict[str, nn.Module] = {}
    for name, child in stage.named_children():
        if isinstance(child, Denoiser):
            found |= dict(child.named_children()) | {f"encoder_{name}": heard for name, heard in child.heard.items()}
        else:
            found[name] = child
    return found


def store_frozen(stage: Stage, dtype: torch.dtype) -> None:
    """Keep frozen weights in the type that autocast rounds them to (float32: there is none), in place."""
    for module in stage.autocast:
        optim.store_frozen(module, dtype, stage.exports().values())
