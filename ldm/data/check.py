"""Inspect a data folder, or what a config reads: which entries are missing, corrupt, mismatched or of an odd size."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from ldm import config, registry
from ldm.data.entries import EntryData, HintSizeError
from ldm.data.errors import DataError
from ldm.data.reading import SUFFIXES, inside, read_image
from ldm.data.records import METADATA, PROMPTS, Record, layout_of, read_records, sidecar_rows

PROBLEMS: Final = ("missing", "corrupt", "mismatched", "odd-sized")
_SMALLEST: Final = 16  # pixels; shorter sides hold no picture
_COMMON_SHARE: Final = 0.9  # if this share of the images has one size, the others are odd


@dataclass(slots=True)
class Report:
    """What `check` found.

    Attributes:
        layout: "folder", "sidecar" or "fill50k"; of a config the reader.
        images: number of entries.
        problems: problem (one of PROBLEMS) -> one line per affected file.
    """

    layout: str
    images: int = 0
    problems: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in PROBLEMS})

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not any(self.problems.values())

    def lines(self, most: int = 20) -> list[str]:
        """The report as text, at most `most` files per problem."""
        counts = ", ".join(f"{len(found)} {name}" for name, found in self.problems.items())
        result = [f"{self.layout} layout, {self.images} images: {counts}"]
        for name, found in self.problems.items():
            result += [f"{name}: {line}" for line in found[:most]]
            if len(found) > most:
                result.append(f"{name}: ... and {len(found) - most} more")
        return result


def check(root: Path) -> Report:
    """Decode every image of a data folder and every hint beside it.

    A YAML file in place of the folder is a config: the images, captions and hints that its `data` reads are decoded,
    whatever the reader (shards and tables too), and what cannot be read is "corrupt". Of a folder itself:

    In a folder layout each column with image paths is a hint. In a sidecar layout an image without a caption is a
    hint of the captioned one with the same path below another folder, or else lacks its caption.
    "odd-sized" is an image shorter than 16 pixels, or one unlike the size that at least 90 % of the images share.

    Raises: DataError when root is not a data folder at all, or the config's data cannot be opened.
    """
    if root.suffix == ".yaml":
        return _check_config(root)
    layout = layout_of(root)
    report = Report(layout)
    rows = _pair_sidecars(root, report) if layout == "sidecar" else read_records(root, layout)
    if not rows and report.ok:
        raise DataError(f"{root} has no images; a data set has {METADATA}, {PROMPTS}, or images with .txt beside them")
    report.images = len(rows)
    seen: dict[str, tuple[int, int] | None] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for row in rows:
        size = _measure(root, row, "file", seen, report, hint=False)
        if size is not None:
            sizes[row.file] = size
        for column in _hint_columns(row):
            other = _measure(root, row, column, seen, report, hint=True)
            if size and other and size != other:
                report.problems["mismatched"].append(
                    f"{row.columns[column]} is {_text(other)}, its image {row.file} is {_text(size)}"
                )
    report.problems["odd-sized"] += _odd(sizes)
    return report


def _check_config(file: Path) -> Report:
    node = config.load(file).data or {}
    if "max_bad" not in registry.keys("data", node.get("name")):
        raise DataError(f"{file} has no data node that reads files; add e.g. data: {{name: webdataset, ...}}")
    data: EntryData = registry.build("data", {**node, "max_bad": 1.0, "memory": False})
    report = Report(str(node["name"]), len(data))
    report.problems["corrupt"] += data.bad.values()
    for error in data.problems():
        report.problems["mismatched" if isinstance(error, HintSizeError) else "corrupt"].append(str(error))
    return report


def _pair_sidecars(root: Path, report: Report) -> list[Record]:
    """Captioned images, with a column for each hint folder that has a picture of the same name."""
    rows = sidecar_rows(root)
    captioned = {PurePosixPath(row.file).with_suffix(""): row for row in rows if row.text is not None}
    for row in rows:
        if row.text is None:
            path = PurePosixPath(row.file).with_suffix("")
            tails = [PurePosixPath(*path.parts[i:]) for i in range(1, len(path.parts))]
            owner = next((captioned[tail] for tail in tails if tail in captioned), None)
            if owner is None:
                report.problems["missing"].append(f"{row.source}, the caption of {row.file}")
            else:
                owner.columns[f"hint {path.parts[0]}"] = row.file
    return list(captioned.values())


def _hint_columns(row: Record) -> Iterable[str]:
    for column, value in row.columns.items():
        named = column in ("file", "file_name", "target", "text", "prompt")
        if not named and isinstance(value, str) and PurePosixPath(value).suffix.lower() in SUFFIXES:
            yield column


def _measure(
    root: Path, row: Record, column: str, seen: dict[str, tuple[int, int] | None], report: Report, *, hint: bool
) -> tuple[int, int] | None:
    """Size of one decoded file, once per file; None after reporting it as missing or corrupt."""
    name = row.columns[column]
    if name in seen:
        return seen[name]
    seen[name] = None
    try:
        path = inside(root, name, row.source)
    except DataError as error:
        report.problems["corrupt"].append(str(error))
        return None
    if not path.is_file():
        report.problems["missing"].append(f"{name} ({row.source})")
        return None
    try:
        seen[name] = read_image(path, hint=hint).size
    except DataError as error:
        report.problems["corrupt"].append(str(error))
    return seen[name]


def _odd(sizes: dict[str, tuple[int, int]]) -> list[str]:
    if not sizes:
        return []
    common, count = Counter(sizes.values()).most_common(1)[0]
    uniform = count >= _COMMON_SHARE * len(sizes)
    lines = []
    for name, size in sizes.items():
        if min(size) < _SMALLEST:
            lines.append(f"{name} is {_text(size)}, shorter than {_SMALLEST} pixels")
        elif uniform and size != common:
            lines.append(f"{name} is {_text(size)}, {count} of {len(sizes)} images are {_text(common)}")
    return lines


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
