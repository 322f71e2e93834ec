"""Samples of a list of entries, wherever their files are: decoding, cropping, skipping and counting what is damaged."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.buckets import Buckets, Shape, Shelves
from ldm.data.errors import DataError
from ldm.data.images import ImageData, Sample, choose
from ldm.data.reading import Source, check_share, image_size, read_image
from ldm.data.records import Pairing
from ldm.data.transforms import CROPS, centred, draw_window, extracted, resize, to_hint, to_image, varied
from ldm.registry import build, checked, suggest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EntryOptions:
    """What all readers of files share.

    Attributes:
        root: data folder; for shards and tables also a file or a pattern, e.g. data/train-*.parquet.
        size: side of the square samples in pixels.
        buckets: keys of `Buckets`, {} for the usual ones: samples get the size among several that is nearest to their
            shape, and every batch is of one size; null = squares. Image prompts are squares all the same.
        hints: hint name -> column with its file (sidecar: -> folder with files of the same names; webdataset: ->
            ending of the member, e.g. canny.png; parquet: -> column of images), or an extractor that makes it of the
            image, e.g. {name: color, cell: 8} (adapters/hints.py).
        where: column -> wanted value or list of values, e.g. {split: train, style: [flat, noto]}.
        reference: column with the image prompt's file ("file" is the image itself), or the keys of `Pairing` to take
            other images of the set, or None; augmented by `Pairing.flip` and `crop` alone.
        crop: "center" or "random" (shorter side to `size`, then a square), or "none" (squeezed to a square); of a
            bucket likewise: as small as covers it, then cut.
        oversize: the shorter side is first resized to oversize * size, which gives random crops room; at least 1.
        flip: mirror half of the samples when augmenting; mind captions that say left or right.
        max_bad: share of unreadable images that is skipped and counted (each data worker counts those it met); more
            than that is an error.
        memory: keep the resized images as 8 bit after the first read; not with stage.cache, which reads them once.
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
    buckets: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 8:
            raise DataError(f"data.size is {self.size!r}; must be a whole number of at least 8")
        if not self.oversize >= 1.0:
            raise DataError(f"data.oversize is {self.oversize}; must be at least 1")
        if self.crop not in CROPS:
            raise DataError(f"data.crop is {self.crop!r}; allowed: {', '.join(CROPS)}{suggest(str(self.crop), CROPS)}")
        if not isinstance(self.max_bad, float | int) or not 0.0 <= self.max_bad <= 1.0:
            raise DataError(f"data.max_bad is {self.max_bad!r}; must be a share in [0, 1]")
        assert self.shapes  # refuses wrong keys

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """(height, width) of the samples: the square, or all buckets. Raises: ConfigError on a wrong key."""
        if self.buckets is None:
            return ((self.size, self.size),)
        return checked(Buckets, self.buckets, "data.buckets").shapes(self.size)

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


@dataclass(frozen=True)
class PackedOptions(EntryOptions):
    """Options of sets too large to keep in memory or to pair by columns: an image prompt is the image itself."""

    memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        pairing = self.pairing
        own = pairing is not None and pairing == replace(pairing, same="file", itself=True, where={})
        if not own and self.reference not in (None, "file"):
            raise DataError(
                f"data.reference is {self.reference!r}; of shards and tables it is file, the image itself, or "
                "{same: file, itself: true} with flip, crop or size; for other pairs use the folder layout"
            )


class HintSizeError(DataError):
    """A hint and its image differ in size: a mistake in the set, never skipped."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample before it is read.

    Attributes:
        key: unique and stable within its data set.
        image: its file.
        text: caption, or what reads it (raises DataError).
        hints: name -> file, of the hints that are files.
        references: files of which one is its image prompt.
        size: (width, height), or of that shape, where a list says so; else the image's header is read for it.
    """

    key: str
    image: Source
    text: str | Callable[[], str]
    hints: dict[str, Source]
    references: tuple[Source, ...] = ()
    size: tuple[int, int] | None = None


class Packed(Protocol):
    """Entries of a packed set, each made when it is asked for. Its references are its images."""

    @property
    def files(self) -> Sequence[Path]:
        """All that it is read from."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Entry: ...


@dataclass(frozen=True, slots=True)
class _Decoded:
    """One entry that has been read; pictures are 3 h w uint8, all the same size. `file`: (height, width) of its file."""

    image: Tensor
    text: str
    hints: dict[str, Tensor]
    file: tuple[int, int]


class EntryData(ImageData):
    """Samples of entries; pixels are decoded when they are asked for."""

    def __init__(self, options: EntryOptions, entries: list[Entry] | Packed, *, check: bool = False) -> None:
        """Take the entries.

        Args:
            options: how samples are made.
            entries: all of the set, at least one.
            check: look at every file's header now; what is unreadable is left out.
        """
        self.options = options
        self._extractors = options.extractors
        self._pairing = options.pairing
        self._side = (self._pairing.size if self._pairing else 0) or options.size  # of references
        self._total = len(entries)
        self._keep = options.memory
        self._kept: dict[int, _Decoded] = {}
        self._prompts: dict[Source, Tensor] = {}
        self._checked: set[Source] = set()  # references whose headers are sound
        self._damaged: set[str] = set()  # what was wrong with references
        self.bad: dict[Source, str] = {}
        self._entries = entries
        sizes: Sequence[tuple[int, int] | None] = ()
        if check:
            sized = [(entry, size) for entry in self._looked_at() if (size := self._headers(entry))]
            self._entries, sizes = [entry for entry, _ in sized], [size for _, size in sized]
        elif options.buckets is not None:
            sizes = [entry.size or self._size(entry) for entry in self._looked_at()]
        if not (any(sizes) if sizes else self._entries):
            first = next(iter(self.bad.values()))
            raise DataError(f"none of the {self._total} images in {options.root} can be read; first: {first}")
        self._shelves = None if options.buckets is None else Shelves(options.shapes, sizes)
        if self._shelves:
            counts = ", ".join(f"{name}: {len(group)}" for name, group in self._shelves.groups.items())
            logger.info("%s: images by bucket (w x h): %s", options.root, counts)

    def __len__(self) -> int:
        return len(self._entries)

    def groups(self) -> Mapping[str, Sequence[int]]:
        """See ImageData.groups: by bucket."""
        return super().groups() if self._shelves is None else self._shelves.groups

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """Sample `index`, or the next readable one (of its bucket) if its file is damaged. See ImageData.load."""
        n = len(self)
        if not 0 <= index < n:
            raise IndexError(f"index is {index}; the set has {n} samples")
        order = self._shelves.alike(index) if self._shelves else ((index + step) % n for step in range(n))
        for position in order:
            entry = self._entries[position]
            if (decoded := self._read(position, entry)) and (
                sample := self._sample(entry, decoded, self._shape(position), generator)
            ):
                return sample
        which = f"the bucket of image {index}" if self._shelves else f"the {self._total} images"
        raise DataError(f"none of {which} in {self.options.root} can be decoded")

    def _shape(self, index: int) -> Shape:
        return self._shelves.shape(index) if self._shelves else (self.options.size, self.options.size)

    def _sample(
        self, entry: Entry, decoded: _Decoded, shape: Shape, generator: torch.Generator | None
    ) -> Sample | None:
        """None if the image prompt that it would get is damaged: what a draw gives never depends on earlier ones."""
        o = self.options
        try:
            reference = self._prompt(entry, decoded, generator)
        except DataError as error:
            self._leave_out(str(error))
            return None
        height, width = decoded.image.shape[-2:]
        window = draw_window(height, width, shape, crop=o.crop, flip=o.flip, generator=generator)
        image = window.cut(decoded.image)
        left = width - window.left - window.width if window.flip else window.left
        made = {name: extracted(extract, image) for name, extract in self._extractors.items()}
        return Sample(
            key=entry.key,
            image=to_image(image),
            text=decoded.text,
            hints={name: to_hint(window.cut(hint)) for name, hint in decoded.hints.items()} | made,
            reference=reference,
            origin=(*decoded.file, window.top, left),
        )

    def _prompt(self, entry: Entry, decoded: _Decoded, generator: torch.Generator | None) -> Tensor | None:
        if not entry.references:
            return None
        source = entry.references[choose(len(entry.references), entry.key, generator)]
        o = self.options
        known = source == entry.image and o.oversize == 1 and o.size == self._side and not self._shelves  # decoded
        whole = to_image(centred(decoded.image, self._side) if known else self._reference(source))
        if generator is None or self._pairing is None or not self._pairing.augments:
            return whole
        return varied(whole, self._pairing.crop, self._pairing.flip, generator)

    def _leave_out(self, error: str) -> None:
        if error in self._damaged:
            return
        self._damaged.add(error)
        logger.warning("reference left out: %s", error)
        count = len(self._named) if isinstance(self._entries, list) else len(self)  # listing a packed set takes long
        if len(self._damaged) > self.options.max_bad * count:
            raise DataError(
                f"{len(self._damaged)} of {count} references cannot be read, data.max_bad is {self.options.max_bad:g}; "
                f"last: {error}"
            )

    @cached_property
    def _references(self) -> dict[str, tuple[Source, ...]]:
        return {entry.key: entry.references for entry in (self._entries[i] for i in range(len(self)))}

    @cached_property
    def _named(self) -> dict[str, Source]:
        return {str(source): source for sources in self._references.values() for source in sources}

    def files(self) -> Sequence[Path]:
        """See ImageData.files."""
        if not isinstance(self._entries, list):
            return self._entries.files
        every = (s for e in self._entries for s in (e.image, *e.hints.values(), *e.references) if isinstance(s, Path))
        return list(dict.fromkeys(every))

    def table(self) -> Iterator[str]:
        """See ImageData.table: captions and which files belong together; of a packed set its files say that."""
        for e in self._entries if isinstance(self._entries, list) else ():
            every = (e.image, *e.hints.values(), *e.references)
            yield repr((e.key, e.text, [*e.hints], [os.path.relpath(str(s), self.options.root) for s in every]))

    def references(self, key: str) -> tuple[str, ...]:
        """See ImageData.references: their paths."""
        return tuple(str(source) for source in self._references[key])

    def reference(self, name: str) -> Tensor:
        """See ImageData.reference. Raises: DataError if it cannot be read."""
        return to_image(self._reference(self._named[name]))

    def once(self) -> None:
        """See ImageData.once."""
        self._keep, self._kept, self._prompts = False, {}, {}

    def _reference(self, source: Source) -> Tensor:
        if (pixels := self._prompts.get(source)) is None:
            pixels = resize(read_image(source), self._side, crop=self.options.crop, hint=False, source=source)
            pixels = centred(pixels, self._side)
            if self._keep:
                self._prompts[source] = pixels
        return pixels

    def _read(self, index: int, entry: Entry) -> _Decoded | None:
        if entry.image in self.bad:
            return None
        if (kept := self._kept.get(index)) is not None:
            return kept
        try:
            decoded = self._decode(entry, self._shape(index))
        except HintSizeError:
            raise
        except DataError as error:
            self._skip(entry.image, str(error))
            return None
        if self._keep:
            self._kept[index] = decoded
        return decoded

    def _decode(self, entry: Entry, shape: Shape) -> _Decoded:
        crop, size = self.options.crop, (round(self.options.oversize * shape[0]), round(self.options.oversize * shape[1]))
        text = entry.text if isinstance(entry.text, str) else entry.text()
        if text.encode(errors="ignore").decode() != text:
            raise DataError(f"{entry.image}: caption {text[:40]!a} has half a surrogate pair; mend the text")
        picture = read_image(entry.image)
        drawn = {name: read_image(source, hint=True) for name, source in entry.hints.items()}
        for name, hint in drawn.items():
            if hint.size != picture.size:
                raise HintSizeError(_mismatch(entry, name, hint.size, picture.size))
        image = resize(picture, size, crop=crop, hint=False, source=entry.image)
        hints = {
            name: resize(hint, size, crop=crop, hint=True, source=entry.hints[name]) for name, hint in drawn.items()
        }
        return _Decoded(image, text, hints, (picture.height, picture.width))

    def problems(self) -> Iterator[DataError]:
        """What is wrong with every sample that cannot be read; decodes all of them, and counts none."""
        for index in range(len(self)):
            try:
                self._decode(self._entries[index], self._shape(index))
            except DataError as error:
                yield error

    def _looked_at(self) -> Iterable[Entry]:
        """All entries; a bar if it takes long."""
        every = (self._entries[i] for i in range(self._total))
        shown = logger.isEnabledFor(logging.INFO)  # by one rank
        return tqdm(every, "looking at headers", self._total, mininterval=1.0, delay=2.0, disable=not shown)

    def _size(self, entry: Entry) -> tuple[int, int] | None:
        """(width, height) by the header; None of an unreadable file, which is counted."""
        try:
            return image_size(entry.image)
        except DataError as error:
            self._skip(entry.image, str(error))
            return None

    def _headers(self, entry: Entry) -> tuple[int, int] | None:
        """Check an entry's headers: unreadable files are skipped (None), a hint of another size is an error."""
        try:
            size = image_size(entry.image)
            sizes = {name: image_size(source) for name, source in entry.hints.items()}
            for source in entry.references:
                if source not in self._checked:
                    image_size(source)
                    self._checked.add(source)
        except DataError as error:
            self._skip(entry.image, str(error))
            return None
        for name, seen in sizes.items():
            if sorted(seen) != sorted(size):  # EXIF may turn either; the decoded sizes are compared exactly
                raise HintSizeError(_mismatch(entry, name, seen, size))
        return size

    def _skip(self, source: Source, error: str) -> None:
        self.bad[source] = error
        logger.warning("skipped (%d of %d): %s", len(self.bad), self._total, error)
        check_share(self.bad, self._total, self.options.max_bad)


def _mismatch(entry: Entry, name: str, hint: tuple[int, int], image: tuple[int, int]) -> str:
    return (
        f"hint {name!r} {entry.hints[name]} is {hint[0]}x{hint[1]}, its image {entry.image.name} is "
        f"{image[0]}x{image[1]} (w x h); both must be the same size: resize one, or drop the entry"
    )
