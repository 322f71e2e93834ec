import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Maker = Callable[..., Path]


@pytest.fixture
def picture() -> Callable[..., Path]:
    """Write a small image whose left half is `left` and whose right half is `right`."""

    def write(path: Path, size=(24, 24), left=(255, 0, 0), right=(0, 0, 255), mode="RGB", **save) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", size, right)
        image.paste(left, (0, 0, size[0] // 2, size[1]))
        image.convert(mode).save(path, **save)
        return path

    return write


@pytest.fixture
def folder_set(tmp_path: Path, picture) -> Maker:
    """A folder data set with `count` images, a hint each, and alternating splits."""

    def make(count: int = 4, size=(24, 24)) -> Path:
        rows = []
        for i in range(count):
            picture(tmp_path / f"images/{i}.png", size)
            picture(tmp_path / f"hints/{i}.png", size, (255, 255, 255), (0, 0, 0))
            split = "heldout" if i % 2 else "train"
            rows.append({"file": f"images/{i}.png", "text": f"picture {i}", "edges": f"hints/{i}.png", "split": split})
        write_rows(tmp_path, rows)
        return tmp_path

    return make


def write_rows(root: Path, rows: list[dict], name: str = "metadata.jsonl") -> None:
    (root / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def keys(data: Any) -> list[str]:
    """Keys of all samples, in order."""
    return [data[i].key for i in range(len(data))]


def picture_bytes(left=(255, 0, 0), right=(0, 0, 255), size=(24, 24), kind="png") -> bytes:
    """A small file whose left half is `left` and whose right half is `right`."""
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], layout: int = tarfile.PAX_FORMAT) -> Path:
    """A tar as webdataset's writer makes it: Python's tarfile, with fractions of seconds in a pax header each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    return path
