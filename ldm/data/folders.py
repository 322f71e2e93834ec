"""Readers of image folders: `folder` (metadata.jsonl), `sidecar` (image + .txt) and `fill50k` (prompt.json)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.errors import DataError
from ldm.data.images import ImageData, Sample
from ldm.data.reading import image_size, inside, read_image
from ldm.data.records import Record, read_records, select
from ldm.data.transforms import CROPS, Window, draw_window, resize, to_hint, to_image
from ldm.registry import register, suggest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderOptions:
    """What the three folder readers share.

    Attributes:
        root: data folder.
        size: side of the square samples in pixels.
        hints: hint name -> column with its file (sidecar: -> folder with files of the same names).
        where: column -> wanted value or list of values, e.g. {split: train, style: [flat, noto]}.
        reference: column with the image prompt's file ("file" is the image itself), or None; never augmented.
        crop: "center" or "random" (shorter side to `size`, then a square), or "none" (squeezed to a square).
        oversize: the shorter side is first resized to oversize * size, which gives random crops room; at least 1.
        flip: mirror half of the samples when augmenting; mind captions that say left or right.
        max_bad: share of unreadable images that is skipped and counted; more than that is an error.
        memory: keep the resized images in memory as 8 bit after the first read.
    """

    root: str
    size: int
    hints: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    crop: str = "center"
    oversize: float = 1.0
    flip: bool = False
    max_bad: float = 0.01
    memory: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 8:
            raise DataError(f"data.size is {self.size!r}; must be a whole number of at least 8")
        if not self.oversize >= 1.0:
            raise DataError(f"data.oversize is {self.oversize}; must be at least 1")
        if self.crop not in CROPS:
            raise DataError(f"data.crop is {self.crop!r}; allowed: {', '.join(CROPS)}{suggest(str(self.crop), CROPS)}")
        if not isinstance(self.max_bad, float | int) or not 0.0 <= self.max_bad <= 1.0:
            raise DataError(f"data.max_bad is {self.max_bad!r}; must be a share in [0, 1]")
        if not isinstance(self.hints, Mapping) or not isinstance(self.where, Mapping):
            raise DataError("data.hints and data.where must be mappings, e.g. hints: {lineart: lineart}")


class HintSizeError(DataError):
    """A hint and its image differ in size: a mistake in the set, never skipped."""


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    image: Path
    text: str
    hints: dict[str, Path]
    reference: Path | None


@dataclass(frozen=True, slots=True)
class _Pixels:
    """One decoded entry: 3 h w uint8, all the same size."""

    image: Tensor
    hints: dict[str, Tensor]
    reference: Tensor | None


class FolderData(ImageData):
    """Images from a list of files. Headers are checked when it is built, pixels are decoded when first asked for."""

    def __init__(self, options: FolderOptions, entries: list[_Entry]) -> None:
        self.options = options
        self._total = len(entries)
        self._kept: dict[int, _Pixels] = {}
        self.bad: dict[Path, str] = {}
        self._entries = [entry for entry in entries if self._readable(entry)]
        if not self._entries:
            raise DataError(
                f"none of the {self._total} images in {options.root} can be read; run prepare_data.py check"
            )

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """Sample `index`, or the next readable one if its file turns out to be damaged. See ImageData.load."""
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}; the set has {len(self)} samples")
        for step in range(len(self)):
            position = (index + step) % len(self)
            if pixels := self._pixels(position):
                return self._sample(self._entries[position], pixels, generator)
        raise DataError(f"none of the {self._total} images in {self.options.root} can be decoded")

    def _sample(self, entry: _Entry, pixels: _Pixels, generator: torch.Generator | None) -> Sample:
        o = self.options
        height, width = pixels.image.shape[-2:]
        window = draw_window(height, width, o.size, crop=o.crop, flip=o.flip, generator=generator)
        return Sample(
            key=entry.key,
            image=to_image(window.cut(pixels.image)),
            text=entry.text,
            hints={name: to_hint(window.cut(hint)) for name, hint in pixels.hints.items()},
            reference=None if pixels.reference is None else to_image(_centred(pixels.reference, o.size)),
        )

    def _pixels(self, index: int) -> _Pixels | None:
        entry = self._entries[index]
        if entry.image in self.bad:
            return None
        if (kept := self._kept.get(index)) is not None:
            return kept
        try:
            pixels = self._decode(entry)
        except HintSizeError:
            raise
        except DataError as error:
            self._skip(entry, error)
            return None
        if self.options.memory:
            self._kept[index] = pixels
        return pixels

    def _decode(self, entry: _Entry) -> _Pixels:
        size, crop = round(self.options.oversize * self.options.size), self.options.crop
        picture = read_image(entry.image)
        drawn = {name: read_image(path, hint=True) for name, path in entry.hints.items()}
        for name, hint in drawn.items():
            if hint.size != picture.size:
                raise HintSizeError(_mismatch(entry, name, hint.size, picture.size))
        image = resize(picture, size, crop=crop, hint=False)
        reference = image if entry.reference == entry.image else None
        if entry.reference is not None and reference is None:
            reference = resize(read_image(entry.reference), size, crop=crop, hint=False)
        hints = {name: resize(hint, size, crop=crop, hint=True) for name, hint in drawn.items()}
        return _Pixels(image, hints, reference)

    def _readable(self, entry: _Entry) -> bool:
        """Check an entry's headers: unreadable files are skipped, a hint of another size is an error."""
        try:
            size = image_size(entry.image)
            sizes = {name: image_size(path) for name, path in entry.hints.items()}
            if entry.reference is not None:
                image_size(entry.reference)
        except DataError as error:
            self._skip(entry, error)
            return False
        for name, seen in sizes.items():
            if sorted(seen) != sorted(size):  # EXIF may turn either; the decoded sizes are compared exactly
                raise HintSizeError(_mismatch(entry, name, seen, size))
        return True

    def _skip(self, entry: _Entry, error: DataError) -> None:
        self.bad[entry.image] = str(error)
        logger.warning("skipped (%d of %d): %s", len(self.bad), self._total, error)
        if len(self.bad) > self.options.max_bad * self._total:
            listed = ", ".join(str(path) for path in list(self.bad)[:5])
            raise DataError(
                f"{len(self.bad)} of {self._total} images cannot be read, data.max_bad is {self.options.max_bad:g}: "
                f"{listed}{', ...' if len(self.bad) > 5 else ''}; last: {error}"
            ) from error


@register("data", "folder", options=FolderOptions)
def folder(options: FolderOptions) -> FolderData:
    """A folder with metadata.jsonl. Rows whose wanted hint is null are left out.

    Raises: DataError on unusable files or columns.
    """
    return _build(options, "folder")


@register("data", "sidecar", options=FolderOptions)
def sidecar(options: FolderOptions) -> FolderData:
    """Images with a .txt of the same name; hints are files of the same names in their own folders.

    Raises: DataError on unusable files or columns.
    """
    return _build(options, "sidecar")


@register("data", "fill50k", options=FolderOptions)
def fill50k(options: FolderOptions) -> FolderData:
    """ControlNet's toy set: prompt.json, source/, target/. The hint's column is "source".

    Raises: DataError on unusable files or columns.
    """
    return _build(options, "fill50k")


def _build(options: FolderOptions, layout: str) -> FolderData:
    root = Path(options.root)
    rows = read_records(root, layout, skip=tuple(options.hints.values()))
    if layout == "sidecar":
        rows = [_with_sibling_hints(row, options.hints, root) for row in rows]
    rows = select(rows, options.where, root)
    wanted = [*options.hints.values(), *([options.reference] if options.reference else [])]
    columns = sorted({name for row in rows for name in row.columns})
    for column in wanted:
        if column not in columns:
            raise DataError(
                f"data.hints or data.reference names column {column!r}; {root} has {', '.join(columns)}"
                f"{suggest(column, columns)}"
            )
    usable = [row for row in rows if all(row.columns.get(column) is not None for column in wanted)]
    if not usable:
        raise DataError(f"none of the {len(rows)} selected images of {root} has all of {', '.join(wanted)}")
    if len(usable) < len(rows):
        logger.info("%s: %d of %d images have no %s", root, len(rows) - len(usable), len(rows), " or ".join(wanted))
    return FolderData(options, [_entry(row, options, root) for row in usable])


def _entry(row: Record, options: FolderOptions, root: Path) -> _Entry:
    return _Entry(
        key=row.file,
        image=inside(root, row.file, row.source),
        text=row.text or "",
        hints={name: inside(root, row.columns[column], row.source) for name, column in options.hints.items()},
        reference=inside(root, row.columns[options.reference], row.source) if options.reference else None,
    )


def _with_sibling_hints(row: Record, hints: Mapping[str, str], root: Path) -> Record:
    """Add a column per hint folder: the file there that has the image's name, with any image suffix."""
    for place in hints.values():
        exact = inside(root, f"{place}/{row.file}", "data.hints")
        match = exact if exact.is_file() else next(iter(sorted(exact.parent.glob(f"{_escape(exact.stem)}.*"))), exact)
        row = row.with_column(place, match.relative_to(root).as_posix())
    return row


def _mismatch(entry: _Entry, name: str, hint: tuple[int, int], image: tuple[int, int]) -> str:
    return (
        f"hint {name!r} {entry.hints[name]} is {hint[0]}x{hint[1]}, its image {entry.image.name} is "
        f"{image[0]}x{image[1]} (w x h); both must be the same size: resize one, or drop the entry"
    )


def _escape(stem: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)


def _centred(pixels: Tensor, size: int) -> Tensor:
    height, width = pixels.shape[-2:]
    return Window((height - size) // 2, (width - size) // 2, size, False).cut(pixels)
