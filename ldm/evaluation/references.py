"""Features of the real pictures that a set is measured against, kept on disk by the content that they were made of."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.data.reading import pictures, read_image
from ldm.data.transforms import resize
from ldm.evaluation.features import Features
from ldm.registry import ConfigError
from ldm.training.distributed import Rank

Pixels = Callable[[], Iterator[Tensor]]  # this rank's pictures, b 3 h w uint8, every time anew
DATA, EXTRACTOR, FILTER, SIZE = "data", "extractor", "resize", "size"


@dataclass(frozen=True, eq=False)
class Reference:
    """What drawn pictures are measured against.

    Attributes:
        features: n d, float32, on the CPU.
        told: what they are of: hashes of the data and of the extractor, resize filter, size of the pictures.
        file: where they lie.
    """

    features: Tensor
    told: dict[str, str]
    file: Path


def stored(file: Path, features: Features, size: tuple[int, int], where: str) -> Reference:
    """Features from a file that `made` wrote.

    Raises: ConfigError if it cannot be read, or is of another extractor, resize filter or size of pictures.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            told, x = opened.metadata() or {}, opened.get_tensor("features")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{where} {file} has no reference features ({error}); delete it, or name a folder of images"
        ) from error
    wanted = _told(features, size)
    for key, value in wanted.items():
        if told.get(key) != value:
            raise ConfigError(
                f"{where} {file} is of another {key}: {_short(told.get(key))}, here it is {_short(value)}; name the "
                "folder of its images, or set the extractor as there"
            )
    return Reference(x, told, file)


def made(pixels: Pixels, features: Features, size: tuple[int, int], cache: Path, rank: Rank) -> Reference:
    """Features of pictures: from the cache where the same pictures, extractor and filter have been there, else made.

    Args:
        pixels: gives this rank's share, in order of rank.
        features: the extractor.
        size: height and width of the pictures.
        cache: folder, made if need be.
        rank: all ranks call this together.

    Raises: ConfigError if the file in the cache is damaged, or the cache cannot be written.
    """
    digests = [hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest() for batch in pixels() for x in batch]
    data = hashlib.sha256("".join(d for part in rank.gathered(digests) for d in part).encode()).hexdigest()
    told = _told(features, size) | {DATA: data}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    file = cache / f"{key[:32]}.safetensors"
    if not rank.told(file.is_file()):
        x = torch.cat([part for part in rank.gathered(vectors(pixels(), features)) if len(part)])
        if rank.main:
            _save(x, told, file)
        return Reference(x, told, file)
    found = stored(file, features, size, "reference features in the cache")
    if found.told != told:
        raise ConfigError(f"{file} is not of the pictures that its name says; delete it")
    return found


def vectors(batches: Iterator[Tensor], features: Features) -> Tensor:
    """Features n d of all pictures, on the CPU; 0 d of none."""
    return torch.cat([torch.empty(0, features.width), *(features(batch).cpu() for batch in batches)])


def folder(path: Path, size: tuple[int, int], device: torch.device, rank: Rank, where: str) -> tuple[Pixels, int]:
    """The images of a folder at the size of the drawn ones: shorter side resized (bicubic), centre cut.

    Returns: this rank's share, one at a time, and how many there are in all.
    Raises: ConfigError without images, or if the drawn ones are not square.
    """
    if not path.is_dir() or not (found := pictures(path)):
        raise ConfigError(f"{where} is {path}, must be a folder of images, a .safetensors file or a data node")
    if size[0] != size[1]:
        raise ConfigError(f"{where} is a folder, but pictures are {size[0]}x{size[1]}; only square ones are read so")
    mine = rank.part(len(found))

    def read() -> Iterator[Tensor]:
        return (centred(file, size[0])[None].to(device) for file in found[mine.start : mine.stop])

    return read, len(found)


def centred(file: Path, side: int) -> Tensor:
    """An image file as 3 side side uint8. Raises: DataError if it cannot be read."""
    pixels = resize(read_image(file), side, crop="center", hint=False)
    top, left = ((have - side) // 2 for have in pixels.shape[-2:])
    return pixels[:, top : top + side, left : left + side]


def _told(features: Features, size: Sequence[int]) -> dict[str, str]:
    return {EXTRACTOR: features.identity(), FILTER: features.resize, SIZE: f"{size[0]}x{size[1]}"}


def _short(value: Any) -> str:
    return str(value)[:12]


def _save(x: Tensor, told: dict[str, str], file: Path) -> None:
    """Written whole or not at all."""
    temporary = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": x.contiguous()}, temporary, metadata=told)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be written ({error}); set evaluation.cache to another folder") from error
