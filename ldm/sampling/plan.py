"""A sampling run before anything is built: its prompts, seeds, hints and weights, resolved and checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ldm import build
from ldm import config as configs
from ldm.config import Node, RunConfig
from ldm.data import transforms
from ldm.data.reading import SUFFIXES, read_image
from ldm.denoiser import AdapterUse
from ldm.guidance import GuidanceConfig
from ldm.prompts import Prompt, read_prompts, read_seeds
from ldm.registry import ConfigError, suggest
from ldm.training import checkpoint

PRECISIONS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image to draw: prompt number `row` (negative and hints resolved) with one seed."""

    row: int
    prompt: Prompt
    seed: int

    @property
    def file(self) -> str:
        """Name of its PNG."""
        return f"{self.row:05d}_s{self.seed}.png"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run.

    Attributes:
        config: with every `weights:` naming its file.
        prompts: rows of the grid, negative and hints resolved; all have hints for the same adapters.
        seeds: columns of the grid.
        guidance: classifier-free guidance.
        uses: adapter name -> its use.
        weights: slot ("model.unet", "adapters.canny") -> weights file.
    """

    config: RunConfig
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    guidance: GuidanceConfig
    uses: Mapping[str, AdapterUse]
    weights: Mapping[str, Path]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.config.sample.height, self.config.sample.width

    def batches(self) -> list[list[Item]]:
        """Every prompt with every seed, in batches of `sample.batch`."""
        items = [Item(row, prompt, seed) for row, prompt in enumerate(self.prompts) for seed in self.seeds]
        return [items[i : i + self.config.sample.batch] for i in range(0, len(items), self.config.sample.batch)]


def plan(config: RunConfig) -> Plan:
    """Check what can be checked without models, and resolve prompts, seeds, hints and weights.

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
    build.uses(config)  # refuse a node that is no adapter before looking for its weights
    config, weights = _pin_weights(config)
    prompts = _resolved(config, read_prompts(s.prompts))
    guidance = GuidanceConfig(**dataclasses.asdict(s.guidance))
    return Plan(config, prompts, read_seeds(s.seeds), guidance, build.uses(config), weights)


@lru_cache(maxsize=64)
def load_hint(path: Path, size: tuple[int, int]) -> Tensor:
    """A hint image as 3 h w in [0, 1], resized (by area) to the picture's size where its shape is the same.

    Raises: DataError if it cannot be read; ConfigError if its aspect ratio is not that of `size` (height, width).
    """
    image = read_image(path, hint=True)
    pixels = transforms.resize(image, min(size), crop="center", hint=True)
    if pixels.shape[1:] != size:
        raise ConfigError(
            f"hint {path} is {image.height}x{image.width} (h w), the picture {size[0]}x{size[1]}: not the same shape; "
            "crop the hint, or change sample.height and sample.width"
        )
    return transforms.to_hint(pixels)


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


def _pin_weights(config: RunConfig) -> tuple[RunConfig, dict[str, Path]]:
    """The config with run folders replaced by the file of their newest checkpoint, and those files by slot."""
    weights: dict[str, Path] = {}

    def pinned(slot: str, node: Node | None, stems: Sequence[str]) -> Node | None:
        if node is None:
            return None
        file = build.weights_file(node, slot)
        if file is None:
            raise ConfigError(f"{slot}.weights is not set: random weights draw noise; name a safetensors file or a run")
        weights[slot] = checkpoint.find_weights(file, stems)
        return {**node, "weights": str(weights[slot])}

    nodes: dict[str, Any] = {
        kind: pinned(f"model.{kind}", getattr(config.model, kind), (kind, "model")) for kind in ("unet", "vae", "text")
    }
    adapters = {
        name: pinned(f"adapters.{name}", node, (f"adapter.{name}", "adapter")) for name, node in config.adapters.items()
    }
    model = dataclasses.replace(config.model, **nodes)
    return dataclasses.replace(config, model=model, adapters=adapters), weights


def _resolved(config: RunConfig, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Prompts with their negative text and their hint files; a prompt's own win over those of `sample:`."""
    shared = {name: _files(name, value, len(prompts)) for name, value in config.sample.hints.items()}
    result: list[Prompt] = []
    for row, prompt in enumerate(prompts):
        hints = {name: files[row] for name, files in shared.items()} | dict(prompt.hints)
        if unknown := sorted(hints.keys() - config.adapters.keys()):
            known = ", ".join(config.adapters) or "none"
            raise ConfigError(
                f"hint for {unknown[0]!r}, which is no adapter; adapters: {known}{suggest(unknown[0], config.adapters)}"
            )
        ordered = {name: hints[name] for name in config.adapters if name in hints}
        negative = config.sample.negative if prompt.negative is None else prompt.negative
        result.append(Prompt(prompt.text, negative, ordered))
    for row, prompt in enumerate(result):
        if prompt.hints.keys() != result[0].hints.keys():
            raise ConfigError(
                f"prompt {row} has hints for {sorted(prompt.hints)}, prompt 0 for {sorted(result[0].hints)}; "
                "give each adapter a hint for all prompts or for none"
            )
    return tuple(result)


def _files(name: str, value: Any, rows: int) -> list[Path]:
    """One image file per prompt: the same for all, or the images of a folder in order of their names."""
    if not isinstance(value, str):
        raise ConfigError(f"sample.hints.{name} is {value!r:.60}, must be an image file or a folder of images")
    path = Path(value)
    if not path.is_dir():
        return [path] * rows
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if len(files) != rows:
        raise ConfigError(
            f"sample.hints.{name}: folder {path} has {len(files)} images for {rows} prompts; "
            "give one image per prompt (they are matched in order of name), or one file for all"
        )
    return files
