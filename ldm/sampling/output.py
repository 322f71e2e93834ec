"""The output folder of a sampling run: PNGs that say how they were made, a grid, records, the resolved config.

A folder belongs to one set of settings: the first line of its `config.yaml` holds a digest of all that decides the
pictures: models and the content of their weights, adapters, `sample:` without what changes rounding alone
(`INDIFFERENT`), `grid:`, prompts, seeds and the content of the image files. The same settings write the same files
again; a folder of other settings, or with files of another origin, is refused before anything is written.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ldm import config as configs
from ldm import grid
from ldm.conditioning import TextUse
from ldm.config import RunConfig
from ldm.config_yaml import flat
from ldm.convert import files
from ldm.data import transforms
from ldm.data.reading import DECODE_ERRORS, image_size, read_image
from ldm.prompts import Prompt
from ldm.registry import ConfigError
from ldm.sampling.plan import Item, Plan, load_image, load_mask
from ldm.sampling.sweep import Sweep

CHUNK: Final = "parameters"  # keyword of the PNG text chunk
SHEET: Final = "grid.png"
HEADER: Final = "# sampling digest: "
INDIFFERENT: Final = ("batch", "prepack", "sliced")  # keys of `sample:` for speed and memory
GRID_ROWS, GRID_COLUMNS = 32, 16  # a grid shows at most this many
GRID_SIDE: Final = 256  # larger pictures are shrunk to this height or width in the grid

log = logging.getLogger(__name__)


class Output:
    """Writes one run's files. Every rank may make one; `begin` and `finish` are for rank 0."""

    def __init__(self, sweep: Sweep) -> None:
        """Read the content of weights and image files (not yet the folder).

        Raises: ConfigError if one of the weights does not exist or cannot be read.
        """
        self.folder = Path(sweep.config.out.dir)
        self._sweep, first = sweep, sweep.plans[0]
        self._file_digest = cache(file_digest)  # slots may share a file, and many prompts an image
        self._weights = {slot: {"file": str(p), "sha256": self._file_digest(p)} for slot, p in first.weights.items()}
        content = [[self._file_digest(path) for path in prompt.files] for prompt in first.prompts]
        content += [[self._file_digest(path)] for path in sweep.masks]
        self._digest = _digest(_decisive(sweep.config), [_record(p) for p in first.prompts], content, self._weights)

    def check(self) -> None:
        """Refuse a folder that holds something else. Raises: ConfigError, naming what differs."""
        file = self.folder / "config.yaml"
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"out.dir is {self.folder}, a file; name a folder")
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else [""]
        if not lines[0].startswith(HEADER):
            raise ConfigError(
                f"out.dir {self.folder} holds files that sampling did not write; choose another, e.g. "
                f"out.dir={_free(self.folder)}"
            )
        if lines[0] != HEADER + self._digest:
            raise ConfigError(
                f"out.dir {self.folder} holds images of other settings ({self._difference(file)}); "
                f"nothing was overwritten: choose another, e.g. out.dir={_free(self.folder)}, or delete that folder"
            )

    def begin(self) -> None:
        """Make the folder and write `config.yaml`. Raises: ConfigError if it cannot be written."""
        text = f"{HEADER}{self._digest}\n{configs.dump(self._sweep.config)}"
        write_file(self.folder / "config.yaml", text.encode())

    def write(self, job: Plan, items: Sequence[Item], images: Tensor) -> None:
        """Write one batch of PNGs; images: b 3 h w in [0, 1]. Raises: ConfigError if a file cannot be written."""
        for row, (item, image) in enumerate(zip(items, images, strict=True)):
            write_file(self.folder / item.file, self.png(job, items, row, image))

    def png(self, job: Plan, items: Sequence[Item], row: int, image: Tensor) -> bytes:
        """The file of picture `row` of a batch, with all that made it in its text chunk; image: 3 h w in [0, 1]."""
        return encode(image, json.dumps(self._parameters(job, items, row)))

    def finish(self, cuts: Mapping[TextUse, Mapping[str, int]]) -> None:
        """Write `samples.jsonl` and `grid.png` from the PNGs of all ranks.

        Args:
            cuts: how texts are read -> text -> tokens of it that the text encoder did not read.

        Raises: ConfigError if a file cannot be written.
        """
        records = [
            {"file": item.file, "seed": item.seed}
            | _record(item.prompt)
            | {"tokens_cut": cuts.get(job.text, {}).get(item.prompt.text, 0)}
            | self._combination(job, item)
            for job, item in self._sweep.items()
        ]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_file(self.folder / "samples.jsonl", lines.encode())
        data = io.BytesIO()
        self._grid().save(data, "PNG")
        write_file(self.folder / SHEET, data.getvalue())

    def _combination(self, job: Plan, item: Item) -> dict[str, Any]:
        """What tells an image of a sweep from the others; nothing where there is no grid."""
        return {"combination": self._sweep.combination(job, item)} if self._sweep.config.grid else {}

    def _parameters(self, job: Plan, items: Sequence[Item], row: int) -> dict[str, Any]:
        """All that made one image; its `config`, saved as a file, draws this image again, but for rounding.

        For the same bits it takes the same batch: shapes of matrices decide the order of additions.
        """
        item = items[row]
        s, prompt = job.config.sample, item.prompt
        uses = {name: dataclasses.asdict(job.uses[name]) for name in prompt.hints}
        alone = dataclasses.replace(s, prompts=[_record(prompt)], seeds=str(item.seed), hints={}, image=None, mask=None)
        return {
            "prompt": prompt.text,
            "negative": prompt.negative,
            "seed": item.seed,
            "size": list(job.size),
            "sampler": s.sampler,
            "guidance": dataclasses.asdict(s.guidance),
            "adapters": {n: use | dict.fromkeys(("hint", "image"), str(prompt.hints[n])) for n, use in uses.items()},
            "source": _source(prompt) | {"strength": job.strength},
            "weights": self._weights,
            "config": configs.plain(dataclasses.replace(job.config, sample=alone)),
            "batch": [_record(each.prompt) | {"seed": each.seed} for each in items],
            "row": row,
            "files": {str(path): self._file_digest(path) for path in needed(job, [each.prompt for each in items])},
        } | self._combination(job, item)

    def _difference(self, file: Path) -> str:
        """What the folder's config has otherwise than this one."""
        try:
            theirs = flat(_decisive(configs.load(file)))
        except ConfigError:
            return "its config.yaml cannot be read"
        ours = flat(_decisive(self._sweep.config))
        keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        return f"other {', '.join(keys[:3])}" if keys else "the content of its prompts, hints or weights has changed"

    def _grid(self) -> Image.Image:
        """The sweep's rows and columns; ahead of them hints, image and mask of a row, if its pictures share them."""
        items, labels = self._sweep.items(), self._sweep.columns
        rows = [items[i : i + len(labels)] for i in range(0, len(items), len(labels))][:GRID_ROWS]
        if len(rows) * len(labels) < len(items) or len(labels) > GRID_COLUMNS:
            log.info("grid.png shows the first %d rows and %d columns", GRID_ROWS, GRID_COLUMNS)
        columns = _conditions([row[0] for row in rows]) if self._sweep.same_conditions else {}
        for i, label in enumerate(labels[:GRID_COLUMNS]):
            unique = label if label not in columns else f"{label} ({i})"
            columns[unique] = _column([_read_png(self.folder / row[i][1].file) for row in rows])
        tile = next(iter(columns.values()))
        return grid.compose(columns, max(1, 128 // max(tile.shape[-2:])), self._sweep.rows[:GRID_ROWS])


def _free(folder: Path) -> Path:
    """A name like that of the folder which nothing has: a-2, a-3, ..."""
    names = (Path(f"{folder}-{n}") for n in itertools.count(2))
    return next(name for name in names if not name.exists())


def needed(job: Plan, prompts: Sequence[Prompt]) -> list[Path]:
    """Every image file that pictures of these prompts are drawn after, once."""
    masks = [Path(use.mask) for use in job.uses.values() if use.mask]
    return list(dict.fromkeys([*(path for prompt in prompts for path in prompt.files), *masks]))


def encode(image: Tensor, text: str) -> bytes:
    """A PNG with that text chunk; image: 3 h w in [0, 1]."""
    info, data = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text(CHUNK, text, zip=True)
    grid.to_pil(image).save(data, "PNG", pnginfo=info)
    return data.getvalue()


def read_png(path: Path) -> tuple[str, Image.Image]:
    """The text chunk that `encode` wrote, and the pixels; of up to MAX_PIXELS. Raises: ConfigError if it has none."""
    try:
        image_size(path)  # refuses what is too large before anything is unpacked
        with Image.open(path, formats=["PNG"]) as image:
            if getattr(image, "is_animated", False):
                raise ValueError("it is animated")
            text = cast("PngImagePlugin.PngImageFile", image).text[CHUNK]
            return str(text), image.copy()
    except (*DECODE_ERRORS, KeyError) as error:
        if path.name == SHEET and isinstance(error, KeyError):
            beside = sorted(file.name for file in path.parent.glob("*_s*.png"))
            example = f", e.g. {beside[0]}" if beside else ""
            raise ConfigError(f"{path} is a sheet; name one of the pictures beside it{example}") from error
        why = f" ({error})" if not isinstance(error, KeyError) else ""
        raise ConfigError(
            f"{path} is not a PNG with a {CHUNK!r} text chunk{why}; name a picture that sampling wrote"
        ) from error


def read_parameters(path: Path) -> dict[str, Any]:
    """What `Output` wrote into a PNG. Raises: ConfigError if it is no such file."""
    return parse_parameters(read_png(path)[0], path)


def parse_parameters(text: str, path: Path) -> dict[str, Any]:
    """The text chunk of a file as a mapping. Raises: ConfigError if it is none."""
    try:
        made = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the {CHUNK!r} text of {path} is not JSON ({error}); name a picture that sampling wrote"
        ) from error
    if not isinstance(made, dict):
        raise ConfigError(f"the {CHUNK!r} text of {path} is no mapping; name a picture that sampling wrote")
    return made


def file_digest(path: Path) -> str:
    """Sha256 of a file; of the files' sha256 where they are several. Raises: ConfigError if one cannot be read."""
    paths = files.every(path)
    if paths != [path]:
        return _digest(*(file_digest(file) for file in paths))
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); train or download it, or correct the path"
        ) from error


def _record(prompt: Prompt) -> dict[str, Any]:
    """As `ldm.prompts` reads it back."""
    hints = {name: str(path) for name, path in prompt.hints.items()}
    return {"prompt": prompt.text, "negative": prompt.negative, "hints": hints} | _source(prompt)


def _source(prompt: Prompt) -> dict[str, str | None]:
    """Its image and mask."""
    return {
        name: None if path is None else str(path) for name, path in (("image", prompt.image), ("mask", prompt.mask))
    }


def _decisive(config: RunConfig) -> dict[str, Any]:
    """The part of a config that decides the pictures. Prompts and image files are paths in it: see `Output`."""
    whole = configs.plain(config)
    kept = {key: whole[key] for key in ("model", "adapters", "grid")}
    kept |= {"fuser": whole["fuser"]} if whole["fuser"] else {}  # folders from before there were fusers stay the same
    return kept | {"sample": whole["sample"] | dict.fromkeys(INDIFFERENT)}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file or leave the old one as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); free space or choose another out.dir"
        ) from error


def _read_png(path: Path) -> Tensor:
    image = read_image(path)
    return transforms.to_hint(transforms.resize(image, min(image.size), crop="center", hint=True))  # unchanged, [0, 1]


def _conditions(firsts: Sequence[tuple[Plan, Item]]) -> dict[str, Tensor]:
    """Columns of what the pictures were drawn after, one picture for each row: hints, image, mask."""
    job, item = firsts[0]
    prompts = [item.prompt for _, item in firsts]
    columns = {f"hint: {n}": _column([j.shown(i.prompt, n) for j, i in firsts]) for n in item.prompt.hints}
    if images := [load_image(p.image, job.size) for p in prompts if p.image is not None]:
        columns["image"] = _column(images).add(1).div(2)
    if masks := [load_mask(p.mask, job.size) for p in prompts if p.mask is not None]:
        columns["mask"] = _column(masks).expand(-1, 3, -1, -1)
    return columns


def _column(images: Sequence[Tensor]) -> Tensor:
    """Stacked, b 3 h w, shrunk to the grid's largest side."""
    column = torch.stack(list(images))
    longest = max(column.shape[-2:])
    if longest <= GRID_SIDE:
        return column
    size = [max(1, round(side * GRID_SIDE / longest)) for side in column.shape[-2:]]
    return torch.nn.functional.interpolate(column, size=size, mode="area")
