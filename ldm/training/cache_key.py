"""What an encoded data set was made from, in words and sums. Caches of one key hold the same numbers, to rounding."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ldm.data.images import ImageData

HASHED: Final = 2 * 2**30  # bytes of a data set whose files are read to tell their content, in about 2 seconds
INDIFFERENT: Final = ("root", "memory", "max_bad")  # options of data that change no sample


def key(
    data: ImageData, device: torch.device, networks: Mapping[str, nn.Module], features: Mapping[str, Any]
) -> dict[str, str]:
    """Everything that the numbers come from.

    Args:
        data: what is encoded.
        device: where; autocast's type there is part of the key, the device is not.
        networks: name -> what encodes it.
        features: adapter -> features of one image prompt, whose shapes count.

    Raises: OSError as `content`.
    """
    auto = torch.is_autocast_enabled(device.type)
    precision = torch.get_autocast_dtype(device.type) if auto else torch.float32
    found = {"precision": str(precision)} | content(data)
    found |= {f"{name} weights": weights(network) for name, network in networks.items()}
    shapes = {name: [tuple(x.shape[1:]) for x in pytree.tree_leaves(tree)] for name, tree in features.items()}
    return found | {f"features of {name}": str(shape) for name, shape in shapes.items()}


def content(data: ImageData) -> dict[str, str]:
    """Options of a data set, and sums over its captions and files. Raises: OSError if a file is gone.

    Where the files have at most `HASHED` bytes in all, their bytes count; in larger sets the names, sizes and times of
    change, which copying may alter. A set that moved as a whole is the same.
    """
    options = getattr(data, "options", None)
    found = dataclasses.asdict(options) if dataclasses.is_dataclass(options) else {}  # pyright: ignore[reportArgumentType]
    key = {f"data.{name}": json.dumps(v, default=str) for name, v in found.items() if name not in INDIFFERENT}
    kind = type(data if options is None else options).__name__
    return {"kind of data": kind} | key | {"captions": _words(data.table()), "data files": _files(data.files())}


def weights(module: nn.Module) -> str:
    """Sha256 of a network's configs, and of its weights as they are stored now."""
    configs = [own for part in module.modules() if dataclasses.is_dataclass(own := getattr(part, "config", None))]
    return _tensors(module.state_dict().items(), *map(repr, configs))


def frozen(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name -> sha256 of the weights that take no gradient, of the networks that have such."""
    held = {n: [(k, p) for k, p in module.named_parameters() if not p.requires_grad] for n, module in networks.items()}
    return {name: _tensors(found) for name, found in held.items() if found}


def outline(data: ImageData) -> str:
    """Sum over a data set's captions and the names and sizes of its files: cheap, and the same wherever it lies."""
    return _words([*data.table(), _files(data.files(), read=False)])


def differences(theirs: Mapping[str, Any], ours: Mapping[str, str]) -> list[str]:
    """Each part that differs, with both values, sums cut short; the first ones explain most."""

    def said(value: object) -> str:
        return " ".join(w[:12] if len(w) == 64 else w for w in str(value).split())

    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    return [f"{name} (was {said(theirs.get(name, 'none'))}, is {said(ours.get(name, 'none'))})" for name in names]


def _words(lines: Iterable[str]) -> str:
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode(errors="surrogatepass") + b"\n")
    return total.hexdigest()


def _tensors(named: Iterable[tuple[str, torch.Tensor]], *words: str) -> str:
    total = hashlib.sha256("".join(words).encode())
    for name, tensor in named:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _files(paths: Sequence[Path], *, read: bool = True) -> str:
    """Sum over names, sizes and, with `read`, the bytes or times of change."""
    if not paths:
        return "none"
    stats = [path.stat() for path in paths]
    base = os.path.commonpath([path.absolute().parent for path in paths])
    small = sum(stat.st_size for stat in stats) <= HASHED
    total = hashlib.sha256()
    for path, stat in zip(paths, stats, strict=True):
        total.update(f"{os.path.relpath(path.absolute(), base)}\0{stat.st_size}\0".encode(errors="surrogateescape"))
        if not read:
            continue
        if small:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        else:
            total.update(str(stat.st_mtime_ns).encode())
    return total.hexdigest()
