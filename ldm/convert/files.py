"""Tensors from published weight files and folders, mapped rather than copied, and safetensors written tensor by tensor.

Nothing here runs code from a file: safetensors, `torch.load(weights_only=True)`, or `ldm.convert.pickles`.
"""

import contextlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.convert import pickles
from ldm.registry import ConfigError, suggest

PICKLED = (".ckpt", ".pth", ".pt", ".bin")
FOLDERS = {"unet": "unet", "vae": "vae", "text_encoder": "text", "text_encoder_2": "text_2", "controlnet": "controlnet"}
EXTRAS = "extras"
ALONE = (  # networks that no pipeline file has a place for
    *("t2i_adapter", "t2i_style", "fuser", "ip_adapter", "image"),
    *("seecoder", "swin"),
)
OURS = (*FOLDERS.values(), *ALONE, EXTRAS)  # stems of the files that `import` writes
IP_ADAPTER = ("image_proj", "ip_adapter")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (".safetensors.index.json", ".safetensors", ".fp16.safetensors", ".bin.index.json", ".bin")
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of one file (.safetensors, .ckpt, .pth, .pt, .bin, or the index of a sharded one), mapped from disk.

    Raises: ConfigError if it is missing, of another format, damaged, or holds no tensors.
    """
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        then = suggest(path.name, near) or "; correct the path, or get them: convert.py fetch, or a training run"
        raise ConfigError(f"weights {path} do not exist{then}")
    if path.name.endswith(".index.json"):
        return _sharded(path)
    if path.suffix != ".safetensors" and path.suffix not in PICKLED:
        raise ConfigError(f"{path} is not a weight file; allowed: .safetensors, {', '.join(PICKLED)}, or a folder")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _flat(_unpickled(path))
    except (SafetensorError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):  # a class or function, by name
            raise ConfigError(
                f"{path} holds more than tensors, which could run code, so nothing of it is loaded; look for the same "
                "weights as .safetensors"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0][:120]
        size = path.stat().st_size
        raise ConfigError(
            f"{path} is not readable ({reason}); it has {size} bytes, compare that with the source: download it again"
        ) from error
    if not found:
        raise ConfigError(f"{path} holds no tensors; give a file of model weights")
    return found


def _unpickled(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # damaged, or the format before PyTorch 1.6 cannot be mapped
        with warnings.catch_warnings(action="ignore"):  # of pickle's version
            return torch.load(path, map_location="cpu", weights_only=True)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return pickles.read(path)


def _flat(content: Any) -> dict[str, Tensor]:
    """The tensors of what a pickle held; trainers put the weights under `state_dict`."""
    inner = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    if not isinstance(inner, Mapping):
        return {}
    items = inner.items()
    flat = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    for part in IP_ADAPTER:  # its .bin nests what its .safetensors has flat
        if isinstance(inside := inner.get(part), Mapping):
            flat |= {f"{part}.{key}": value for key, value in inside.items() if isinstance(value, Tensor)}
    return flat


def _sharded(index: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for shard in _shards(index):
        out.update(read(shard))
    return out


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.parent / Path(name).name for name in sorted(names)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index} is not the index of a sharded model ({error}); download it again") from error


def every(path: Path) -> list[Path]:
    """The files whose content a path stands for: itself, the shards of an index, the weight files of a folder.

    Raises: ConfigError as `sources`, or if an index is damaged.
    """
    if path.is_dir():
        return [file for source in sources(path).values() for file in every(source)]
    return _shards(path) if path.name.endswith(".index.json") else [path]


def sources(path: Path) -> dict[str, Path]:
    """What to read: {"": file}, or for a folder, component -> file; our component files or a diffusers pipeline.

    Raises: ConfigError if a folder has neither.
    """
    if not path.is_dir():
        return {"": path}
    if file := _weight_file(path):
        return {"": file}
    ours = {n: path / f"{n}.safetensors" for n in OURS if (path / f"{n}.safetensors").is_file()}
    theirs = {name: _weight_file(path / folder) for folder, name in FOLDERS.items() if (path / folder).is_dir()}
    if found := ours or {name: file for name, file in theirs.items() if file}:
        return found
    raise ConfigError(
        f"{path} has no weights: wanted a diffusers folder (unet/, vae/, ...), one with "
        f"{STEMS[0]}.safetensors, or ours (unet.safetensors, ...)"
    )


def _weight_file(folder: Path) -> Path | None:
    candidates = (folder / f"{stem}{ending}" for ending in ENDINGS for stem in STEMS)
    return next((file for file in candidates if file.is_file()), None)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file one tensor at a time, and rename it into place when it is whole.

    Args:
        path: file to write; its folder is made.
        tensors: name -> tensor, of any layout in memory.
        metadata: strings for the header.

    Returns: bytes written.
    Raises: ConfigError on a dtype that the format does not have, OSError if the disk refuses.
    """
    if odd := sorted({str(v.dtype) for v in tensors.values()} - {str(t) for t in TYPES}):
        raise ConfigError(f"{path}: dtypes {', '.join(odd)} cannot be written; allowed: {', '.join(TYPES.values())}")
    # Wide types first keeps every tensor aligned, as the safetensors library orders them.
    order = sorted(tensors, key=lambda k: (-tensors[k].element_size(), k))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key in order:
        value = tensors[key]
        begin, end = end, end + value.numel() * value.element_size()
        header[key] = {"dtype": TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            flat = tensors[key].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
    return path.stat().st_size


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Any]:
    """A file under a temporary name that takes its place only if nothing went wrong."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
