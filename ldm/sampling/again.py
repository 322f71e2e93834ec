"""A picture drawn again, bit for bit, from the text chunk of its own PNG (`sample.py --from`).

Anybody may have written that chunk, so little of it is believed. It cannot name what to write, or make anything be
imported; models, adapters and settings are those that configs may name. A file that it names is hashed, and read
only if its sha256 is the recorded one. The picture's size must be that of the PNG itself.
"""

import dataclasses
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

from PIL import Image

from ldm import config as configs
from ldm import grid
from ldm.config import RunConfig
from ldm.convert import files
from ldm.prompts import MAX_SEED
from ldm.registry import ConfigError
from ldm.sampling import output, run
from ldm.sampling.plan import Item, Plan
from ldm.sampling.sweep import expand
from ldm.training import distributed

FOLDER: Final = "outputs/again"  # where pictures go without `out.dir`
READ: Final = ("model", "adapters", "fuser", "sample", "device")  # keys of the chunk's config that are looked at
MAX_ROWS: Final = 256
MAX_NUMBER: Final = 100_000  # no size, count or length of a model or a setting is larger
MAX_DEPTH: Final = 16

log = logging.getLogger(__name__)


def answer(args: Namespace, picture: Path) -> str:
    """What `sample.py --from` is asked: draw, or say what `--print-config` or `--dry-run` want to know.

    Raises: ConfigError as `draw_again`, and on `--explain`: no file sets the values.
    """
    if args.explain:
        raise ConfigError("--explain names the lines of config files, and a picture has none; use --print-config")
    if args.print_config:
        return configs.dump(picture_config(picture, args.overrides))
    if args.dry_run:
        return run.dry_run(picture_config(picture, args.overrides)) + "\n"
    draw_again(picture, args.overrides)
    return ""


def picture_config(picture: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a PNG carries, of that picture alone, below `key=value` arguments.

    Raises: ConfigError if the file is no picture of ours, or what it says does not fit.
    """
    return _config(output.read_parameters(picture), picture, overrides)


def draw_again(picture: Path, overrides: Sequence[str] = ()) -> Path:
    """Draw the picture in the batch that it was drawn in, compare, and write it under its name to `out.dir`.

    Args:
        picture: a PNG that `Output` wrote.
        overrides: `out.dir`, `device`, and the `weights` of slots whose files have moved.

    Returns: the new file. What differs from the old one is logged.
    Raises: ConfigError on a chunk that is not ours or incomplete, files that are gone or have changed, other
        arguments, and where the new file would replace another.
    """
    for word in overrides:
        key = word.partition("=")[0]
        if key not in ("out.dir", "device") and not key.endswith(".weights"):
            raise ConfigError(
                f"--from draws the very same picture, so {word!r:.60} cannot count; allowed: out.dir, device, "
                "<slot>.weights; for other settings: --from PNG --print-config > FILE, then --config FILE"
            )
    text, old = output.read_png(picture)
    made = output.parse_parameters(text, picture)
    rows, row = _rows(made, picture)
    config = _config(made, picture, overrides, rows)
    sweep = expand(config)
    job = sweep.plans[0]
    _check_files(job, made, picture)
    run.check_images(sweep)
    (sampler,) = run.build_samplers(sweep)
    with distributed.session(config.device) as rank:
        if rank.world > 1:
            raise ConfigError("--from draws one picture; start it without torchrun")
        target = _target(Path(config.out.dir) / picture.name, picture, text)
        models = run.ready_models(sweep, rank.device)
        items = [Item(i, prompt, each["seed"]) for i, (prompt, each) in enumerate(zip(job.prompts, rows, strict=True))]
        image = run.draw(job, models, sampler, items)[row]
        output.write_file(target, output.encode(image, text))
        _compare(grid.to_pil(image), old, picture, target)
    return target


def _config(
    made: dict[str, Any], picture: Path, overrides: Sequence[str], rows: Sequence[dict[str, Any]] = ()
) -> RunConfig:
    """The chunk's config, checked for sizes; with rows, of all of its batch."""
    found = made.get("config")
    whole = {key: found[key] for key in READ if key in found} if isinstance(found, dict) else {}
    settings = whole.get("sample")
    if not isinstance(settings, dict):
        raise ConfigError(f"{picture} carries no config; name a picture that sampling wrote")
    _check_sizes(whole, picture)
    if rows:
        prompts = [{key: value for key, value in each.items() if key != "seed"} for each in rows]
        alone = {"prompts": prompts, "seeds": "0", "batch": len(rows), "hints": {}, "image": None, "mask": None}
        whole["sample"] = cast("dict[str, Any]", settings) | alone
    node = configs.overridden(whole | {"out": {"dir": FOLDER}}, overrides)
    config = configs.from_mapping(node, str(picture))
    _check_sizes(dataclasses.asdict(config.sample), picture)  # as typed: text may have become a number
    size = (config.sample.width, config.sample.height)
    if size != (actual := output.image_size(picture)):
        raise ConfigError(f"{picture} is {actual} (w h) pixels, but says that it was drawn at {size}; it was changed")
    return config


def _check_sizes(node: Any, picture: Path, depth: int = 0) -> None:
    """Refuse what would fill memory, or nests without end. Raises: ConfigError."""
    if depth > MAX_DEPTH or (isinstance(node, int | float) and abs(node) > MAX_NUMBER):
        what = f"the number {node}" if depth <= MAX_DEPTH else "nested mappings"
        raise ConfigError(f"{picture} carries {what}; allowed: up to {MAX_NUMBER:,}, {MAX_DEPTH} deep; it was changed")
    if isinstance(node, str) and "${" in node:  # what is written is resolved; references may grow without end
        raise ConfigError(f"{picture} carries the reference {node[:40]!r}, allowed: values only; it was changed")
    below = [*node, *node.values()] if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in cast("Sequence[Any]", below):
        _check_sizes(value, picture, depth + 1)


def _rows(made: dict[str, Any], picture: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of the picture's batch, and which of them it is."""
    rows, row = made.get("batch"), made.get("row")
    if rows is None or not isinstance(made.get("files"), dict):
        raise ConfigError(
            f"{picture} does not say what its batch and files were (an older version drew it); draw it from its "
            "settings: --from PNG --print-config > FILE, then --config FILE"
        )
    sound = isinstance(rows, list) and 0 < len(rows) <= MAX_ROWS and isinstance(row, int) and 0 <= row < len(rows)
    if not sound or not all(isinstance(each, dict) and _is_seed(each.get("seed")) for each in rows):
        raise ConfigError(f"{picture}: batch and row must be 1 to {MAX_ROWS} records and one's place; it was changed")
    return cast("list[dict[str, Any]]", rows), cast("int", row)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SEED


def _check_files(job: Plan, made: dict[str, Any], picture: Path) -> None:
    """Every file that would be read is the one that the picture was drawn with. Raises: ConfigError, naming one."""
    weights = made.get("weights")
    recorded: dict[str, Any] = weights if isinstance(weights, dict) else {}
    for slot, path in job.weights.items():
        entry = recorded.get(slot)
        then = entry.get("sha256") if isinstance(entry, dict) else None
        _check_same(path, then, picture, f"{slot}.weights", f"; restore it, or name that file: {slot}.weights=FILE")
    for path in output.needed(job, job.prompts):
        _check_same(path, made["files"].get(str(path)), picture, "its image", "; restore it")


def _check_same(path: Path, then: Any, picture: Path, what: str, hint: str) -> None:
    if not isinstance(then, str):
        raise ConfigError(f"{picture} does not say the sha256 of {what} {path}, so nothing is read; it was changed")
    for file in files.every(path):
        if not file.is_file():
            raise ConfigError(f"{what} {file} of {picture} is no file{hint}")
    if (now := output.file_digest(path)) != then:
        raise ConfigError(
            f"{what} {path} is not the file that {picture} was drawn with (sha256 {now[:12]}..., then {then[:12]}...)"
            f"{hint}"
        )


def _target(target: Path, picture: Path, text: str) -> Path:
    """Where to write. Raises: ConfigError if another picture is there, or the old one itself."""
    if target.exists():
        if target.samefile(picture):
            raise ConfigError(f"{target} is the picture itself, which would be written over; choose another out.dir")
        if output.read_png(target)[0] != text:
            raise ConfigError(f"{target} is another picture; choose another out.dir, or move that file")
    return target


def _compare(new: Image.Image, old: Image.Image, picture: Path, target: Path) -> None:
    if old.mode == new.mode and old.tobytes() == new.tobytes():
        log.info("%s is the same as %s, bit for bit", target, picture)
        return
    pairs = list(zip(new.tobytes(), old.convert("RGB").tobytes(), strict=True))
    different = [abs(a - b) for a, b in pairs if a != b]
    log.warning(
        "%s differs from %s in %d of %d values, by up to %d of 255: another processor, torch or number of threads adds "
        "in another order, and a picture that was edited never comes back",
        *(target, picture, len(different), len(pairs), max(different, default=0)),
    )
