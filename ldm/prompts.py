"""What to draw: prompts from the config or a file, and the seeds syntax."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from ldm.data.reading import pictures
from ldm.registry import ConfigError, suggest

SUFFIXES: Final = (".txt", ".jsonl", ".yaml", ".yml")
KEYS: Final = ("prompt", "negative", "hints", "image", "mask")
MAX_SEED: Final = 2**63 - 1  # what torch.Generator.manual_seed takes
MAX_SEEDS: Final = 1_000_000
_RANGE: Final = re.compile(r"([0-9]{1,19})(?:\s*-\s*([0-9]{1,19}))?")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the grid.

    Attributes:
        text: what to draw; "" is the unconditional model.
        negative: text of the unconditional branch; None means `sample.negative`.
        hints: adapter name -> image file, or folder of several references for one image; they win over `sample.hints`.
        image: file to start from; wins over `sample.image`.
        mask: file of what to draw anew in it; wins over `sample.mask`.
    """

    text: str
    negative: str | None = None
    hints: Mapping[str, Path] = field(default_factory=dict)
    image: Path | None = None
    mask: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All image files it names."""
        hints = [file for path in self.hints.values() for file in pictures(path)]
        return *hints, *(path for path in (self.image, self.mask) if path is not None)


def read_prompts(value: Any) -> tuple[Prompt, ...]:
    """Prompts from the value of `sample.prompts`.

    A text that ends in .txt (one prompt a line), .jsonl (one text or record a line), .yaml or .yml (a list of them)
    is a file; any other text is one prompt; a list holds texts and records. A record is
    `{prompt, negative?, hints?: {adapter: image file}, image?, mask?}`; its files are relative to the file that names
    them (in the config itself: to the working directory). Blank lines are skipped, and those that begin with "# ".

    Raises: ConfigError, in one line, if nothing is there or something is of another form.
    """
    if value is None:
        raise ConfigError(
            "sample.prompts is not set; e.g. sample.prompts='a red apple' or a .txt, .jsonl or .yaml file"
        )
    if isinstance(value, str) and value.lower().endswith(SUFFIXES):
        return _from_file(Path(value))
    values = value if isinstance(value, list | tuple) else [value]
    return _parse_all([(f"sample.prompts[{i}]", item) for i, item in enumerate(values)], Path(), "sample.prompts")


def read_seeds(value: Any) -> tuple[int, ...]:
    """Seeds from numbers and ranges: "0-15", "3,7,11", "0-3,8", or a list of these.

    Raises: ConfigError, in one line, on anything else: negative numbers, reversed ranges, duplicates, too many.
    """
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    where, help_text = f"sample.seeds is {text!r}", "write numbers and ranges like 0-15 or 3,7,11"
    seeds: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"{where}: {part.strip()!r} is neither a number from 0 nor a range; {help_text}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ConfigError(f"{where}: range {part.strip()!r} runs backwards; write {last}-{first}")
        if last > MAX_SEED:
            raise ConfigError(f"{where}: {last} is too large; allowed: 0..{MAX_SEED}")
        if last - first + 1 + len(seeds) > MAX_SEEDS:
            raise ConfigError(f"{where}: more than {MAX_SEEDS} seeds; split the run")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed, count in Counter(seeds).items() if count > 1)
        raise ConfigError(f"{where}: seed {twice} is given twice; each seed may appear once")
    return tuple(seeds)


def _from_file(path: Path) -> tuple[Prompt, ...]:
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        raise ConfigError(f"sample.prompts: file {path} does not exist{suggest(path.name, near)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sample.prompts: {path} cannot be read as UTF-8 text ({error}); save it as UTF-8") from error
    if path.suffix.lower() in (".yaml", ".yml"):
        return _parse_all(_yaml_items(text, path), path.parent, str(path))
    every = [(f"{path} line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1)]
    lines = [(where, line) for where, line in every if line and not f"{line} ".startswith("# ")]
    if path.suffix.lower() == ".txt":
        return _parse_all(lines, path.parent, str(path))
    return _parse_all([(where, _json(line, where)) for where, line in lines], path.parent, str(path))


def _yaml_items(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        items = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(items, list):
        raise ConfigError(f"{path}: top level is {type(items).__name__}, must be a list of prompts")
    return [(f"{path} item {n}", item) for n, item in enumerate(items, 1)]


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON ({error}); one text or record a line") from error


def _parse_all(items: list[tuple[str, Any]], base: Path, source: str) -> tuple[Prompt, ...]:
    if not items:
        raise ConfigError(f"{source} has no prompts; give at least one")
    return tuple(_parse(item, where, base) for where, item in items)


def _parse(item: Any, where: str, base: Path) -> Prompt:
    if isinstance(item, str):
        return Prompt(item)
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where} is {item!r:.60}, must be a text or a record {{{', '.join(KEYS)}}}")
    if unknown := [key for key in item if key not in KEYS]:
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}; keys: {', '.join(KEYS)}{suggest(str(unknown[0]), KEYS)}"
        )
    text, negative, hints = item.get("prompt"), item.get("negative"), item.get("hints") or {}
    if not isinstance(text, str) or not isinstance(negative, str | None):
        raise ConfigError(f"{where}: prompt is {text!r:.60} and negative {negative!r:.60}; both must be text")
    if not isinstance(hints, Mapping) or not all(isinstance(x, str) for pair in hints.items() for x in pair):
        raise ConfigError(f"{where}: hints is {hints!r:.60}, must map adapter names to image files")
    image, mask = (_path(item.get(key), f"{where}: {key}", base) for key in ("image", "mask"))
    return Prompt(text, negative, {name: base / file for name, file in hints.items()}, image, mask)


def _path(value: Any, where: str, base: Path) -> Path | None:
    if not isinstance(value, str | None):
        raise ConfigError(f"{where} is {value!r:.60}, must be an image file")
    return None if value is None else base / value
