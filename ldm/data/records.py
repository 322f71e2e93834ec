"""The three on-disk layouts as one table: a row per image with columns of text, before anything is decoded.

folder: `metadata.jsonl`, one object per line with `file` (or `file_name`), `text` and any further columns.
sidecar: every image with a `.txt` of the same name; columns `file`, `text`, `split`.
fill50k: `prompt.json`, one object per line with `source`, `target`, `prompt` (Zhang et al. 2023, arXiv:2302.05543,
the released toy set; JSON lines in spite of the name); columns `file` (= target), `source`, `text`, `split`.

Where a layout has no split of its own, `split` is "heldout" for a fixed 2 % by hash and "train" otherwise.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ldm.data.errors import DataError
from ldm.data.reading import SUFFIXES
from ldm.registry import suggest

logger = logging.getLogger(__name__)
METADATA: Final = "metadata.jsonl"
PROMPTS: Final = "prompt.json"
_HELDOUT_SHARE: Final = 0.02
_SHOWN: Final = 8  # values of a column that a message lists


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a set.

    Attributes:
        source: where it was read, for messages, e.g. "metadata.jsonl line 3".
        file: image, relative to the root.
        text: caption; None only from `sidecar_rows`.
        columns: everything known about it, `file` and `text` among it.
    """

    source: str
    file: str
    text: str | None
    columns: dict[str, Any]

    def with_column(self, name: str, value: str) -> "Record":
        """A copy with one column added or replaced."""
        return dataclasses.replace(self, columns={**self.columns, name: value})


@dataclass(frozen=True)
class Pairing:
    """Image prompts taken from the set itself, e.g. {same: concept, where: {style: noto}}.

    Attributes:
        same: column whose value reference and image share; "file" makes every image its own (with `itself`).
        where: column -> wanted value or values of the reference; other columns are wanted as for the image, so a
            reference never comes from another split unless this says so.
        itself: an image may be its own reference.
        flip: mirror half of the references in training, whether the image is mirrored or not.
        crop: in training, cut a random square out of the reference: the least part of its side, in (0, 1].
        size: side of the references in pixels; 0 is that of the images.
    """

    same: str
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    itself: bool = False
    flip: bool = False
    crop: float = 1.0
    size: int = 0

    @property
    def augments(self) -> bool:
        """Whether references are changed in training."""
        return self.flip or self.crop < 1

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise DataError(f"data.reference.crop is {self.crop}, must be in (0, 1], 1 keeps the whole reference")
        if self.size < 0:
            raise DataError(f"data.reference.size is {self.size}, must be at least 1, or 0 for the size of the images")


def layout_of(root: Path) -> str:
    """Which layout a folder has: "folder", "fill50k" or "sidecar".

    Raises: DataError when root is not a folder.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the root of a data set (scripts/prepare_data.py makes one)")
    if (root / METADATA).is_file():
        return "folder"
    return "fill50k" if (root / PROMPTS).is_file() else "sidecar"


def read_records(root: Path, layout: str, skip: tuple[str, ...] = ()) -> list[Record]:
    """All rows of a data folder, in file order (sidecar: in path order).

    Args:
        root: data folder.
        layout: "folder", "sidecar" or "fill50k".
        skip: sidecar only: subfolders that hold hints, not images.

    Raises: DataError when root or its list is missing, a line is not an object, or a column is missing.
    """
    if not root.is_dir():
        raise DataError(f"data root {root} is not a folder; set data.root, or make it with scripts/prepare_data.py")
    rows = {"folder": _folder, "sidecar": lambda r: _sidecar(r, skip), "fill50k": _fill50k}[layout](root)
    if not rows:
        raise DataError(f"{root} has no images for the {layout} layout; check data.root and data.name")
    return rows


class Filter:
    """Says of one row after another whether its columns have the wanted value, or one of the wanted values."""

    def __init__(self, where: Mapping[str, Any], key: str = "data.where") -> None:
        """Args: where: column -> wanted value, or list of them. key: where that stands in a config, for messages."""
        self.where = where
        self._key = key
        self._wanted = {name: v if isinstance(v, tuple | list) else (v,) for name, v in where.items()}
        self._columns: set[str] = set()
        self._seen: dict[str, set[str]] = {name: set() for name in where}
        self.rows = self._kept = 0

    def __call__(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row with these columns is wanted."""
        self.rows += 1
        self._columns.update(columns)
        for name, seen in self._seen.items():
            if len(seen) < _SHOWN:
                seen.add(str(columns.get(name)))
        keep = all(columns.get(name) in values for name, values in self._wanted.items())
        self._kept += keep
        return keep

    def check(self, root: object) -> None:
        """After the last row. Raises: DataError if a column was in none of them, or none was wanted."""
        columns = sorted(self._columns)
        for name in self.where:
            if name not in columns:
                then = suggest(name, columns) or f"; give its entries that column, or drop it from {self._key}"
                raise DataError(f"{self._key} has column {name!r}; {root} has {', '.join(columns)}{then}")
        if not self._kept:
            seen = "; ".join(f"{name}: {', '.join(sorted(values))}" for name, values in self._seen.items())
            raise DataError(
                f"{self._key} {dict(self.where)} matches none of the {self.rows} images of {root}; it has {seen}"
            )


def select(rows: list[Record], where: Mapping[str, Any], root: Path, key: str = "data.where") -> list[Record]:
    """Rows whose columns have the wanted value, or one of the wanted values; `key` is that of `where` in a config.

    Raises: DataError on an unknown column, or when nothing is left.
    """
    keep = Filter(where, key)
    left = [row for row in rows if keep(row.columns)]
    keep.check(root)
    return left


def pairs(
    every: list[Record], rows: list[Record], where: Mapping[str, Any], pairing: Pairing, root: Path
) -> dict[str, tuple[str, ...]]:
    """Files that may be the image prompt of each row's image, in file order.

    Args:
        every: all rows of the set.
        rows: those that are samples.
        where: how they were selected; it holds for references too, except in columns that `pairing.where` names.
        pairing: what may be a reference.
        root: for messages.

    Returns: file -> files; empty where there are none.
    Raises: DataError on an unknown column, or when no row has a reference.
    """
    same = {pairing.same: [rows[0].columns.get(pairing.same)]}
    select(every, same, root, "data.reference")  # refuses an unknown column
    found: dict[Any, list[str]] = {}
    for row in select(every, {**where, **pairing.where}, root, "data.reference.where"):
        found.setdefault(row.columns.get(pairing.same), []).append(row.file)
    out = {
        row.file: tuple(f for f in found.get(row.columns.get(pairing.same), ()) if pairing.itself or f != row.file)
        for row in rows
    }
    lone = sum(not files for files in out.values())
    if lone == len(rows):
        raise DataError(f"data.reference: none of the {len(rows)} images of {root} has another of its {pairing.same!r}")
    if lone:
        logger.info("%s: %d of %d images have no reference of their %s", root, lone, len(rows), pairing.same)
    return out


def _folder(root: Path) -> list[Record]:
    rows = []
    for source, row in _json_lines(root / METADATA):
        file = "file" if "file" in row else "file_name"
        rows.append(_record(root, source, row, file=file, text="text"))
    return rows


def _fill50k(root: Path) -> list[Record]:
    rows = [_record(root, source, row, file="target", text="prompt") for source, row in _json_lines(root / PROMPTS)]
    return [row.with_column("split", split_by_hash(row.file)) for row in rows]


def _record(root: Path, source: str, row: dict[str, Any], *, file: str, text: str) -> Record:
    for column in (file, text):
        if not isinstance(row.get(column), str):
            raise DataError(f"{root}: {source} has {column} = {row.get(column)!r}, must be text")
    return Record(source, row[file], row[text], {**row, "file": row[file], "text": row[text]})


def _sidecar(root: Path, skip: tuple[str, ...]) -> list[Record]:
    rows = [row for row in sidecar_rows(root) if not _under(row.file, skip)]
    for row in rows:
        if row.text is None:
            raise DataError(
                f"{root / row.file} has no caption; write one to {row.source} beside it, or move the image away"
            )
    return rows


def sidecar_rows(root: Path) -> list[Record]:
    """Every image under root in path order; `text` is None where there is no .txt of the same name."""
    rows: list[Record] = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
        file = path.relative_to(root).as_posix()
        sidecar = path.with_suffix(".txt")
        text = _read_text(sidecar).strip() if sidecar.is_file() else None
        rows.append(Record(sidecar.name, file, text, {"file": file, "text": text, "split": split_by_hash(file)}))
    return rows


def _under(file: str, folders: tuple[str, ...]) -> bool:
    return any(PurePosixPath(file).is_relative_to(folder) for folder in folders)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(): it also cuts at U+2028, U+0085 and others, which JSON allows inside a caption.
    for number, text in enumerate(_read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path} line {number} is not JSON ({error}); the file holds one object per line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is a {type(row).__name__}, must be an object")
        yield f"{path.name} line {number}", row


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing; check data.root and data.name") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from error


def split_by_hash(file: str) -> str:
    """Give a fixed 2 % of all names the split "heldout", the others "train"."""
    share = int.from_bytes(hashlib.sha256(f"file:{file}".encode()).digest()[:8], "big") / 2.0**64
    return "heldout" if share < _HELDOUT_SHARE else "train"
