"""Readers of image folders: `folder` (metadata.jsonl), `sidecar` (image + .txt) and `fill50k` (prompt.json)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.errors import DataError
from ldm.data.images import ImageData, Sample, choose
from ldm.data.reading import image_size, inside, read_image
from ldm.data.records import Pairing, Record, pairs, read_records, select
from ldm.data.transforms import CROPS, Window, draw_window, extracted, resize, to_hint, to_image, varied
from ldm.registry import build, checked, register, suggest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderOptions:
    """What the three folder readers share.

    Attributes:
        root: data folder.
        size: side of the square samples in pixels.
        hints: hint name -> column with its file (sidecar: -> folder with files of the same names), or an extractor
            that makes it of the image, e.g. {name: color, cell: 8} (adapters/hints.py).
        where: column -> wanted value or list of values, e.g. {split: train, style: [flat, noto]}.
        reference: column with the image prompt's file ("file" is the image itself), or the keys of `Pairing` to take
            other images of the set, or None; augmented by `Pairing.flip` and `crop` alone.
        crop: "center" or "random" (shorter side to `size`, then a square), or "none" (squeezed to a square).
        oversize: the shorter side is first resized to oversize * size, which gives random crops room; at least 1.
        flip: mirror half of the samples when augmenting; mind captions that say left or right.
        max_bad: share of unreadable images that is skipped and counted; more than that is an error.
        memory: keep the resized images in memory as 8 bit after the first read.
    """

    root: str
    size: int
    hints: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    reference: str | Mapping[str, Any] | None = None
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

    @property
    def pairing(self) -> Pairing | None:
        """Where image prompts come from, unless a column names them. Raises: ConfigError on a wrong key."""
        return checked(Pairing, self.reference, "data.reference") if isinstance(self.reference, Mapping) else None

    @property
    def columns(self) -> dict[str, str]:
        """Hint name -> column, of the hints that are files."""
        return {name: str(source) for name, source in self.hints.items() if not isinstance(source, Mapping)}

    @property
    def extractors(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Hint name -> what makes it of the image, of the others. Raises: ConfigError on a wrong node."""
        nodes = {name: node for name, node in self.hints.items() if isinstance(node, Mapping)}
        return {name: build("hint", node) for name, node in nodes.items()}


class HintSizeError(DataError):
    """A hint and its image differ in size: a mistake in the set, never skipped."""


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    image: Path
    text: str
    hints: dict[str, Path]
    references: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class _Pixels:
    """One decoded entry: 3 h w uint8, all the same size."""

    image: Tensor
    hints: dict[str, Tensor]


class FolderData(ImageData):
    """Images from a list of files. Headers are checked when it is built, pixels are decoded when first asked for."""

    def __init__(self, options: FolderOptions, entries: list[_Entry]) -> None:
        self.options = options
        self._extractors = options.extractors
        self._pairing = options.pairing
        self._side = (self._pairing.size if self._pairing else 0) or options.size  # of references
        self._total = len(entries)
        self._kept: dict[int, _Pixels] = {}
        self._prompts: dict[str, Tensor] = {}
        self._checked: set[Path] = set()  # references whose headers are sound
        self._damaged: set[str] = set()  # what was wrong with references
        self.bad: dict[Path, str] = {}
        self._entries = [entry for entry in entries if self._readable(entry)]
        self._references = {entry.key: entry.references for entry in self._entries}
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
            if (pixels := self._pixels(position)) and (sample := self._sample(position, pixels, generator)):
                return sample
        raise DataError(f"none of the {self._total} images in {self.options.root} can be decoded")

    def _sample(self, index: int, pixels: _Pixels, generator: torch.Generator | None) -> Sample | None:
        """None if the image prompt that it would get is damaged: what a draw gives never depends on earlier ones."""
        o, entry = self.options, self._entries[index]
        try:
            reference = self._prompt(entry, pixels, generator)
        except DataError as error:
            self._leave_out(str(error))
            return None
        height, width = pixels.image.shape[-2:]
        window = draw_window(height, width, o.size, crop=o.crop, flip=o.flip, generator=generator)
        image = window.cut(pixels.image)
        made = {name: extracted(extract, image) for name, extract in self._extractors.items()}
        return Sample(
            key=entry.key,
            image=to_image(image),
            text=entry.text,
            hints={name: to_hint(window.cut(hint)) for name, hint in pixels.hints.items()} | made,
            reference=reference,
        )

    def _prompt(self, entry: _Entry, pixels: _Pixels, generator: torch.Generator | None) -> Tensor | None:
        if not entry.references:
            return None
        path = entry.references[choose(len(entry.references), entry.key, generator)]
        o = self.options
        known = path == entry.image and o.oversize == 1 and o.size == self._side  # decoded already
        whole = to_image(_centred(pixels.image, self._side)) if known else self.reference(str(path))
        if generator is None or self._pairing is None or not self._pairing.augments:
            return whole
        return varied(whole, self._pairing.crop, self._pairing.flip, generator)

    def _leave_out(self, error: str) -> None:
        if error in self._damaged:
            return
        self._damaged.add(error)
        logger.warning("reference left out: %s", error)
        count = len({path for entry in self._entries for path in entry.references})
        if len(self._damaged) > self.options.max_bad * count:
            raise DataError(
                f"{len(self._damaged)} of {count} references cannot be read, data.max_bad is {self.options.max_bad:g}; "
                f"last: {error}"
            )

    def references(self, key: str) -> tuple[str, ...]:
        """See ImageData.references: their paths."""
        return tuple(str(path) for path in self._references[key])

    def reference(self, name: str) -> Tensor:
        """See ImageData.reference. Raises: DataError if it cannot be read."""
        if (pixels := self._prompts.get(name)) is None:
            pixels = resize(read_image(Path(name)), self._side, crop=self.options.crop, hint=False)
            pixels = _centred(pixels, self._side)
            if self.options.memory:
                self._prompts[name] = pixels
        return to_image(pixels)

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
        hints = {name: resize(hint, size, crop=crop, hint=True) for name, hint in drawn.items()}
        return _Pixels(image, hints)

    def _readable(self, entry: _Entry) -> bool:
        """Check an entry's headers: unreadable files are skipped, a hint of another size is an error."""
        try:
            size = image_size(entry.image)
            sizes = {name: image_size(path) for name, path in entry.hints.items()}
            for path in entry.references:
                if path not in self._checked:
                    image_size(path)
                    self._checked.add(path)
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
    rows = read_records(root, layout, skip=tuple(options.columns.values()))
    if layout == "sidecar":
        rows = [_with_sibling_hints(row, options.columns, root) for row in rows]
    every, rows = rows, select(rows, options.where, root)
    wanted = [*options.columns.values(), *([options.reference] if isinstance(options.reference, str) else [])]
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
    if (pairing := options.pairing) is None:
        column = str(options.reference)  # a name: mappings are pairings
        prompts = {row.file: (row.columns[column],) for row in usable} if options.reference else {}
    else:
        prompts = pairs(every, usable, options.where, pairing, root)
        usable = [row for row in usable if prompts[row.file]]
    return FolderData(options, [_entry(row, options, root, prompts.get(row.file, ())) for row in usable])


def _entry(row: Record, options: FolderOptions, root: Path, prompts: Sequence[str]) -> _Entry:
    return _Entry(
        key=row.file,
        image=inside(root, row.file, row.source),
        text=row.text or "",
        hints={name: inside(root, row.columns[column], row.source) for name, column in options.columns.items()},
        references=tuple(inside(root, file, row.source) for file in prompts),
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
