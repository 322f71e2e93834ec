"""One sample of every data set, with declared shapes and ranges, and the batch made of them.

Files hold [0, 1]; inside, images are [-1, 1] and hints stay [0, 1] (ControlNet's convention: edges and lines are white
on black, single-channel maps are repeated to three channels).
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training example. Shapes and ranges are checked when it is made.

    Attributes:
        key: unique and stable within its data set.
        image: 3 h w, in [-1, 1].
        text: caption.
        hints: name -> 3 h w, in [0, 1], same h and w as the image.
        reference: image prompt, 3 h w in [-1, 1], or None.
        origin: height and width of its file, top and left of what was cut out after resizing (SDXL is told); None
            where there was no file: as if it had been of this size.

    Raises: DataError on a wrong shape or range.
    """

    key: str
    image: Tensor
    text: str
    hints: dict[str, Tensor] = field(default_factory=dict)
    reference: Tensor | None = None
    origin: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        _check(self.key, "image", self.image, -1.0)
        for name, hint in self.hints.items():
            _check(self.key, f"hint {name!r}", hint, 0.0)
            if hint.shape != self.image.shape:
                sizes = f"{_size(hint)}, its image {_size(self.image)}"
                raise DataError(f"{self.key}: hint {name!r} is {sizes} (w x h); both must be the same size")
        if self.reference is not None:
            _check(self.key, "reference", self.reference, -1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples stacked on a first axis b. Ranges as in Sample; origin is b 4 int64."""

    keys: list[str]
    image: Tensor
    text: list[str]
    hints: dict[str, Tensor] = field(default_factory=dict)
    reference: Tensor | None = None
    origin: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from where `to` copies in the background; DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            keys=self.keys,
            image=change(self.image),
            text=self.text,
            hints={name: change(hint) for name, hint in self.hints.items()},
            reference=None if self.reference is None else change(self.reference),
            origin=None if self.origin is None else change(self.origin),
        )


class ImageData(Dataset[Sample], ABC):
    """A map-style set of samples. `data[i]` is never augmented; `load` augments with the generator it is given."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """Sample `index`; crop and flip come from `generator` (CPU) and are the same for image and hints.

        Raises: IndexError outside 0 .. len-1; DataError past the share of unreadable images.
        """

    def __getitem__(self, index: int) -> Sample:
        return self.load(index)

    def groups(self) -> Mapping[str, Sequence[int]]:
        """Indices of the samples of each size; a batch is of one group. One without a name where all are alike."""
        return {"": range(len(self))}

    def files(self) -> Sequence[Path]:
        """The files that samples are read from; none where they are made."""
        return ()

    def table(self) -> Iterable[str]:
        """What decides the samples besides their options and the content of `files`: a line each, without the root."""
        return ()

    def references(self, key: str) -> Sequence[str]:
        """Names of the image prompts of which `load` gives the sample of that key one; none where the set has none."""
        del key
        return ()

    def reference(self, name: str) -> Tensor:
        """The image prompt of that name, 3 h w in [-1, 1]. Raises: KeyError on a name that is none of `references`."""
        raise KeyError(name)

    def once(self) -> None:
        """From now on nothing is kept that may be read again: what follows reads every sample a single time."""


def choose(count: int, key: str, generator: torch.Generator | None) -> int:
    """Which of `count` image prompts a sample gets: drawn, or without a generator always the same by its key."""
    if generator is not None and count > 1:
        return int(torch.randint(count, (), generator=generator))
    return zlib.crc32(key.encode()) % count


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a Batch.

    Raises: DataError when there are none, or sizes, hint names or the presence of an image prompt differ.
    """
    if not samples:
        raise DataError("collate got 0 samples; a batch needs at least 1")
    first = samples[0]
    for sample in samples[1:]:
        if sample.image.shape != first.image.shape:
            raise DataError(
                f"{sample.key} is {_size(sample.image)}, {first.key} is {_size(first.image)}; one batch has one size"
            )
        if sample.hints.keys() != first.hints.keys() or (sample.reference is None) != (first.reference is None):
            raise DataError(
                f"{sample.key} has hints {sorted(sample.hints)}, {first.key} has {sorted(first.hints)}; "
                "hints and image prompts must be in all samples of a batch or in none"
            )
    references = [s.reference for s in samples if s.reference is not None]
    origins = [s.origin for s in samples if s.origin is not None]
    return Batch(
        keys=[s.key for s in samples],
        image=torch.stack([s.image for s in samples]),
        text=[s.text for s in samples],
        hints={name: torch.stack([s.hints[name] for s in samples]) for name in first.hints},
        reference=torch.stack(references) if references else None,
        origin=torch.tensor(origins) if len(origins) == len(samples) else None,
    )


def _check(key: str, what: str, value: Tensor, low: float) -> None:
    if value.dim() != 3 or value.shape[0] != 3 or not value.is_floating_point():
        raise DataError(f"{key}: {what} is {tuple(value.shape)} {value.dtype}, must be 3 h w and floating point")
    least, most = (float(v) for v in torch.aminmax(value))
    if not (least >= low and most <= 1.0):  # written so that NaN fails too
        raise DataError(f"{key}: {what} has values in [{least:.4g}, {most:.4g}], must be in [{low:g}, 1]; rescale it")


def _size(value: Tensor) -> str:
    return f"{value.shape[-1]}x{value.shape[-2]}"
