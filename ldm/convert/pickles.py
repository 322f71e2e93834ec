"""Tensors of a PyTorch zip checkpoint whose pickle names foreign classes, read without running any of its code.

Lightning files (`.ckpt`) hold callbacks and configs beside the weights, which `torch.load(weights_only=True)` refuses.
Here every global but a few tensor constructors of our own becomes an inert stub: nothing is imported, nothing called.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


class Stub:
    """Stands for an object of a foreign class: swallows its arguments, state and items."""

    def __new__(cls, *_args: Any, **_words: Any) -> "Stub":
        """Make one from any arguments."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_words: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _item: Any) -> None:
        """Drop an item."""

    def extend(self, _items: Any) -> None:
        """Drop items."""


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Tensor:
    """What torch's pickles call to rebuild a tensor; set_ checks the bounds."""
    flat = storage if isinstance(storage, Tensor) else torch.empty(0)
    return torch.empty(0, dtype=flat.dtype).set_(flat.untyped_storage(), flat.storage_offset() + offset, size, stride)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


class _Reader(pickle.Unpickler):
    known: ClassVar[dict[tuple[str, str], Any]] = {
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("collections", "OrderedDict"): OrderedDict,
        **{("torch", name): dtype for name, dtype in DTYPES.items()},
    }

    def __init__(self, file: Any, path: Path, offsets: dict[str, int]) -> None:
        super().__init__(file)
        self._bytes = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
        self._offsets = offsets

    def find_class(self, module: str, name: str) -> Any:
        return self.known.get((module, name), Stub)

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype) or key not in self._offsets:
            raise pickle.UnpicklingError(f"storage {key!r} is of an unknown type or not in the file")
        start = self._offsets[key]
        part = self._bytes[start : start + count * dtype.itemsize]  # a view of the mapped file, not a copy
        return torch.empty(0, dtype=dtype).set_(part)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _offsets(archive: zipfile.ZipFile, path: Path, folder: str) -> dict[str, int]:
    """Storage key -> where its bytes begin in the file."""
    out: dict[str, int] = {}
    with path.open("rb") as file:
        for entry in archive.infolist():
            if entry.filename.startswith(folder) and entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset)
                header = file.read(LOCAL_HEADER)
                lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                out[entry.filename.removeprefix(folder)] = entry.header_offset + LOCAL_HEADER + lengths
    return out


def read(path: Path) -> Any:
    """The pickled object of a zip checkpoint: plain containers, tensors mapped from the file, stubs for the rest.

    Raises:
        pickle.UnpicklingError: if it is no zip checkpoint or its pickle is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
            if name is None:
                raise pickle.UnpicklingError("no data.pkl inside")
            offsets = _offsets(archive, path, name.removesuffix("data.pkl") + "data/")
            with archive.open(name) as file:
                return _Reader(file, path, offsets).load()
    except zipfile.BadZipFile as error:
        raise pickle.UnpicklingError(f"not a zip checkpoint: {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError, EOFError) as error:
        raise pickle.UnpicklingError(f"damaged pickle: {error}") from error
