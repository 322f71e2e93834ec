"""A sampling run before anything is built: its prompts, seeds, hints and weights, resolved and checked."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm import build
from ldm import config as configs
from ldm.conditioning import TextUse
from ldm.config import Node, RunConfig
from ldm.data import transforms
from ldm.data.reading import SUFFIXES, pictures, read_image
from ldm.denoiser import AdapterUse
from ldm.guidance import GuidanceConfig
from ldm.prompts import Prompt, read_prompts, read_seeds
from ldm.registry import ConfigError, suggest
from ldm.training import checkpoint

log = logging.getLogger(__name__)
STRENGTH: Final = 0.8  # what published image-to-image pipelines start from, and 1 where there is a mask
LONGEST: Final = 1536  # pixels along the longer side of a reference that is read at its own size
PRECISIONS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image to draw: prompt number `row` (negative and files resolved) with one seed, and its plan's `tag`."""

    row: int
    prompt: Prompt
    seed: int
    tag: str = ""

    @property
    def file(self) -> str:
        """Name of its PNG."""
        return f"{self.row:05d}_s{self.seed}{self.tag and '_'}{self.tag}.png"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run.

    Attributes:
        config: with every `weights:` naming its file.
        prompts: rows of the grid, negative and files resolved; all have hints for the same adapters, and all or none
            an image, all or none a mask.
        seeds: columns of the grid.
        guidance: classifier-free guidance.
        uses: adapter name -> its use.
        weights: slot ("model.unet", "adapters.canny", "fuser") -> weights file.
        combination: settings that make this plan one of a sweep, by dotted key.
        tag: their part of file names.
    """

    config: RunConfig
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    guidance: GuidanceConfig
    uses: Mapping[str, AdapterUse]
    weights: Mapping[str, Path]
    combination: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    tag: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.config.sample.height, self.config.sample.width

    @property
    def strength(self) -> float | None:
        """Part of the steps that is run from an image; None without images."""
        first, strength = self.prompts[0], self.config.sample.strength
        if first.image is None or strength is not None:
            return strength
        return STRENGTH if first.mask is None else 1.0

    @property
    def text(self) -> TextUse:
        """How prompts are read."""
        s = self.config.sample
        return TextUse(s.clip_skip, s.prompt_weights, s.long_prompts)

    def hint(self, prompt: Prompt, name: str) -> Tensor:
        """The hint of one adapter in [0, 1]: 3 h w, extracted if its use says so; an image prompt's references m 3 h w.

        Raises: as `load_hint`; ConfigError if a folder of references is empty.
        """
        if (side := build.reference_size(name, self.config.adapters[name])) is not None:
            files = pictures(prompt.hints[name])
            if not files:
                raise ConfigError(f"hint {prompt.hints[name]} has no images; put the references of {name!r} there")
            return self._references(name, {file: load_reference(file, side) for file in files})
        if prompt.hints[name].is_dir():
            raise ConfigError(f"hint {prompt.hints[name]} is a folder; only image prompts take several files")
        return load_hint(prompt.hints[name], self.size, self.uses[name].extract())

    def _references(self, name: str, found: Mapping[Path, Tensor]) -> Tensor:
        """One adapter's references of a picture, m 3 h w. Raises: ConfigError on different sizes, or too small ones."""
        sizes = {file: (x.shape[-1], x.shape[-2]) for file, x in found.items()}
        least = build.least_reference(name, self.config.adapters[name])
        if small := [file for file, size in sizes.items() if min(size) < least]:
            w, h = sizes[small[0]]
            raise ConfigError(
                f"reference {small[0]} is {w}x{h} pixels as {name!r} reads it (the longer side up to {LONGEST}); must "
                f"be at least {least}x{least}: enlarge or crop it"
            )
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{file.name} {w}x{h}" for file, (w, h) in [*sizes.items()][:4])
            raise ConfigError(f"references of {name!r} for one picture are {told} pixels; give them one size")
        return torch.stack([*found.values()])

    def shown(self, prompt: Prompt, name: str) -> Tensor:
        """The hint of one adapter as a picture of the size to draw, 3 h w; of an image prompt the first reference."""
        hint = self.hint(prompt, name)
        prompted = build.reference_size(name, self.config.adapters[name]) is not None
        return F.interpolate(hint[:1], self.size, mode="area")[0] if prompted else hint

    def masks(self) -> dict[str, Tensor]:
        """Adapter name -> where it counts, 1 h w of 0 and 1. Raises: as `load_mask`."""
        files = {name: use.mask for name, use in self.uses.items() if use.mask is not None}
        return {name: load_mask(Path(file), self.size, f"adapters.{name}") for name, file in files.items()}

    def item(self, row: int, seed: int) -> Item:
        """Prompt number `row` with one seed."""
        return Item(row, self.prompts[row], seed, self.tag)

    def batches(self) -> list[list[Item]]:
        """Every prompt with every seed, in batches of at most `sample.batch`, each with hints of one size."""
        out: list[list[Item]] = []
        items = [self.item(row, seed) for row in range(len(self.prompts)) for seed in self.seeds]
        for _, alike in itertools.groupby(items, lambda item: self._sizes(item.prompt)):
            same = list(alike)
            out += [same[i : i + self.config.sample.batch] for i in range(0, len(same), self.config.sample.batch)]
        return out

    def _sizes(self, prompt: Prompt) -> list[tuple[int, ...]]:
        """Sizes of the hints that come as they are; the others have one."""
        free = [n for n in prompt.hints if build.reference_size(n, self.config.adapters[n]) == 0]
        return [self.hint(prompt, name).shape for name in free]


def plan(config: RunConfig, weights: Mapping[str, Path] | None = None) -> Plan:
    """Check what can be checked without models, and resolve prompts, seeds, image files and weights.

    Args:
        config: as given, or as `pin_weights` gives it.
        weights: what `pin_weights` gave with it; None if it was not called.

    Raises: ConfigError.
    """
    s = config.sample
    for name in ("height", "width", "batch"):
        if getattr(s, name) < 1:
            raise ConfigError(f"sample.{name} is {getattr(s, name)}, must be at least 1")
    if s.precision not in PRECISIONS:
        raise ConfigError(f"sample.precision is {s.precision!r}; allowed: {', '.join(PRECISIONS)}")
    if s.tile is not None and s.tile < 4:
        raise ConfigError(f"sample.tile is {s.tile} latent pixels, must be at least 4, or null for the whole image")
    if weights is None:
        config, weights = pin_weights(config)
    given = "" if s.prompts is None and config.model.text is None else s.prompts  # nothing would read a text
    prompts = _resolved(config, read_prompts(given))
    if s.strength is not None and prompts[0].image is None:
        raise ConfigError(f"sample.strength is {s.strength} without an image; set sample.image, or drop strength")
    guidance = GuidanceConfig(**dataclasses.asdict(s.guidance))
    prompted = [name for name, node in config.adapters.items() if build.reference_size(name, node) is not None]
    if guidance.image is not None and not prompts[0].hints.keys() & prompted:
        raise ConfigError(
            f"sample.guidance.image is {guidance.image:g}, but no prompt has an image prompt; allowed: with an "
            "ip_adapter that has a hint; add one (adapters, sample.hints), or drop the key"
        )
    return Plan(config, prompts, read_seeds(s.seeds), guidance, build.uses(config), weights)


@lru_cache(maxsize=64)
def load_hint(path: Path, size: tuple[int, int], extract: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A hint image as 3 h w in [0, 1], resized (by area) to the picture's size where its shape is the same.

    Args:
        path: image file.
        size: (height, width).
        extract: makes the hint of an ordinary picture (`AdapterUse.extract`); None if the file is the hint.

    Raises: DataError if it cannot be read; ConfigError if its aspect ratio is not that of `size` (height, width).
    """
    if extract is not None:
        return transforms.extracted(extract, _fitted("image", path, size))
    return transforms.to_hint(_fitted("hint", path, size))


@lru_cache(maxsize=64)
def load_reference(path: Path, side: int) -> Tensor:
    """An image prompt as 3 side side in [0, 1]: shorter side resized (bicubic), then the centre, as CLIP is trained.

    A side of 0 keeps the image's own size, up to LONGEST: a longer one is shrunk as a whole.

    Raises: DataError if it cannot be read; ConfigError if it is one pixel wide or high.
    """
    image = _shown(read_image(path), "reference", path)
    if side == 0:
        shortest = round(min(image.size) * min(LONGEST / max(image.size), 1))
        return transforms.to_hint(transforms.resize(image, max(shortest, 1), crop="center", hint=False, source=path))
    pixels = transforms.resize(image, side, crop="center", hint=False, source=path)
    return transforms.to_hint(transforms.centred(pixels, side))


@lru_cache(maxsize=64)
def load_image(path: Path, size: tuple[int, int]) -> Tensor:
    """A source image as 3 h w in [-1, 1], resized (bicubic) as a hint is. Raises: as `load_hint`."""
    return transforms.to_image(_fitted("image", path, size))


@lru_cache(maxsize=64)
def load_mask(path: Path, size: tuple[int, int], adapter: str | None = None) -> Tensor:
    """A mask as 1 h w of 0 and 1, resized (by area) as a hint is; grey from one half on counts as white.

    Args:
        path: image file.
        size: (height, width).
        adapter: whose mask it is, for messages; None for one of what to draw anew.

    Raises: as `load_hint`; ConfigError if nothing in it is white.
    """
    grey = transforms.to_hint(_fitted("mask", path, size)).mean(0, keepdim=True)
    mask = (grey >= 0.5).float()
    if not mask.any():
        then = "nothing would be drawn; make white what is to be redrawn"
        if adapter is not None:
            then = f"{adapter} would count nowhere; make white where it counts, or set its scale to 0"
        raise ConfigError(f"mask {path} has no white pixel, so {then}")
    return mask


def _fitted(what: str, path: Path, size: tuple[int, int]) -> Tensor:
    """The pixels of an image file, 3 h w uint8 of that size."""
    hint = what != "image"
    image = _shown(read_image(path, hint=hint), what, path)
    pixels = transforms.resize(image, min(size), crop="center", hint=hint, source=path)
    if pixels.shape[1:] != size:
        raise ConfigError(
            f"{what} {path} is {image.height}x{image.width} (h w), the picture {size[0]}x{size[1]}: not the same "
            f"shape; crop the {what}, or change sample.height and sample.width"
        )
    return pixels


def _shown(image: Image.Image, what: str, path: Path) -> Image.Image:
    """The same image. Raises: ConfigError if there is nothing to see in it."""
    if min(image.size) < 2:
        raise ConfigError(f"{what} {path} is {image.height}x{image.width} (h w), which shows nothing; give a picture")
    return image


def check_pair(image: Path, mask: Path) -> None:
    """Refuse a mask of another size than its image. Raises: ConfigError; DataError if one cannot be read."""
    a, b = read_image(image), read_image(mask, hint=True)
    if a.size != b.size:
        raise ConfigError(
            f"mask {mask} is {b.height}x{b.width} (h w), its image {image} {a.height}x{a.width}; they must be of one "
            "size: draw the mask over that image"
        )


def run_overrides(run: Path) -> list[str]:
    """What turns a run's own config into one that samples from its newest checkpoint, as `key=value` arguments.

    Pictures get the size of the training data, and go to `RUN/samples/<checkpoint>`.

    Raises: ConfigError if there is no complete checkpoint, or the run trained neither a UNet nor adapters.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run {run} has no config.yaml; --run wants a training run's folder, e.g. runs/tiny/ldm")
    folder = checkpoint.latest(run)
    if folder is None:
        raise ConfigError(f"run {run} has no complete checkpoint yet; let it train until checkpoint.every steps")
    config = configs.load(run / "config.yaml")
    files = {"model": "model.unet", "unet": "model.unet"}
    files |= {f"adapter.{name}": f"adapters.{name}" for name in config.adapters}
    files |= {"fuser": "fuser"} if config.fuser is not None else {}
    if len(config.adapters) == 1:
        files["adapter"] = f"adapters.{next(iter(config.adapters))}"
    found = {slot: path for stem, slot in files.items() if (path := folder / f"{stem}.safetensors").is_file()}
    if config.model.unet is None or not found or (config.stage or {}).get("name") in ("vae", "clip"):
        name = (config.stage or {}).get("name")
        raise ConfigError(
            f"run {run} is of stage {name!r}, which draws nothing; allowed: runs of a UNet or of adapters"
        )
    paths = {f"{slot}.weights": path for slot, path in found.items()} | {"out.dir": run / "samples" / folder.name}
    size = (config.data or {}).get("size")
    sides = [f"sample.height={size}", f"sample.width={size}"] if size else []
    return [*sides, *(f"{key}={_yaml_text(path)}" for key, path in paths.items())]


def _yaml_text(path: Path) -> str:
    """A path as YAML that always reads back as this text."""
    quoted = str(path).replace("'", "''")
    return f"'{quoted}'"


def pin_weights(config: RunConfig) -> tuple[RunConfig, dict[str, Path]]:
    """The config with folders (of runs, of models) replaced by the file that counts in them, and those by slot.

    Raises: ConfigError as `build.uses` and `build.weights_file`, and on a slot without weights.
    """
    build.uses(config)  # refuse a node that is no adapter before looking for its weights
    weights: dict[str, Path] = {}

    def pinned(slot: str, node: Node | None, kind: str) -> Node | None:
        if node is None:
            return None
        file = build.weights_file(kind, node, slot)
        if file is None:
            raise ConfigError(f"{slot}.weights is not set: random weights draw noise; name a safetensors file or a run")
        weights[slot] = file
        encoder = build.encoder_node(slot.partition(".")[2], node) if kind == "adapter" else None
        inner = {"encoder": pinned(f"{slot}.encoder", encoder, "image")} if encoder else {}
        if tokens := node.get("unconditional"):  # of SeeCoder: a second file, beside the weights
            weights[f"{slot}.unconditional"] = Path(str(tokens))
        return {**node, **inner, "weights": str(file)}

    kinds = ("unet", "vae", "text")
    nodes: dict[str, Any] = {kind: pinned(f"model.{kind}", getattr(config.model, kind), kind) for kind in kinds}
    adapters = {name: pinned(f"adapters.{name}", node, "adapter") for name, node in config.adapters.items()}
    model = dataclasses.replace(config.model, **nodes)
    fuser = pinned("fuser", config.fuser, "fuser")
    return dataclasses.replace(config, model=model, adapters=adapters, fuser=fuser), weights


def _resolved(config: RunConfig, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Prompts with their negative text and their files; a prompt's own win over `sample:`, that over an adapter's."""
    s, rows = config.sample, len(prompts)
    own = {name: [Path(use.image)] * rows for name, use in build.uses(config).items() if use.image is not None}
    shared = own | {name: _files(f"sample.hints.{name}", value, rows) for name, value in s.hints.items()}
    images, masks = (
        [None] * rows if value is None else _files(f"sample.{name}", value, rows)
        for name, value in (("image", s.image), ("mask", s.mask))
    )
    result: list[Prompt] = []
    for row, prompt in enumerate(prompts):
        hints = {name: files[row] for name, files in shared.items()} | dict(prompt.hints)
        if unknown := sorted(hints.keys() - config.adapters.keys()):
            known = ", ".join(config.adapters) or "none"
            raise ConfigError(
                f"hint for {unknown[0]!r}, which is no adapter; adapters: {known}{suggest(unknown[0], config.adapters)}"
            )
        ordered = {name: hints[name] for name in config.adapters if name in hints}
        negative = s.negative if prompt.negative is None else prompt.negative
        image, mask = prompt.image or images[row], prompt.mask or masks[row]
        result.append(Prompt(prompt.text, negative, ordered, image, mask))
    for name, files in shared.items():
        if all(prompt.hints[name] != file for prompt, file in zip(result, files, strict=True)):
            log.warning("hint %s of %s is heard by no prompt: all %d have their own", files[0], name, rows)
    _check_alike(result)
    return tuple(result)


def _check_alike(prompts: Sequence[Prompt]) -> None:
    """A batch holds any prompts, so all must bring the same kinds of files. Raises: ConfigError."""
    first = prompts[0]
    for row, prompt in enumerate(prompts):
        if prompt.mask is not None and prompt.image is None:
            raise ConfigError(f"prompt {row} has mask {prompt.mask} and no image; set sample.image, or drop the mask")
        for name in ("image", "mask"):
            if (getattr(prompt, name) is None) != (getattr(first, name) is None):
                has, lacks = (0, row) if getattr(prompt, name) is None else (row, 0)
                raise ConfigError(f"prompt {has} has {name}, prompt {lacks} none; give one to all prompts or to none")
        if prompt.hints.keys() != first.hints.keys():
            raise ConfigError(
                f"prompt {row} has hints for {sorted(prompt.hints)}, prompt 0 for {sorted(first.hints)}; "
                "give each adapter a hint for all prompts or for none"
            )


def _files(key: str, value: Any, rows: int) -> list[Path]:
    """One image file per prompt: the same for all, or the images of a folder in order of their names."""
    if not isinstance(value, str):
        raise ConfigError(f"{key} is {value!r:.60}, must be an image file or a folder of images")
    path = Path(value)
    if not path.is_dir():
        return [path] * rows
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if len(files) != rows:
        raise ConfigError(
            f"{key}: folder {path} has {len(files)} images for {rows} prompts; "
            "give one image per prompt (they are matched in order of name), or one file for all"
        )
    return files
