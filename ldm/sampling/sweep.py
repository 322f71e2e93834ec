"""A sampling run's `grid:`: one checked plan per combination of settings, all drawn with the same models.

Prompts and seeds are axes too: the grid's `prompt` and `seed`, or else those of `sample:`, ahead of its other axes. The
last axis is the columns of the picture, all others together its rows; a run without grid has a row per prompt and a
column per seed. The axis `adapters` has lists of the adapters that speak; the others have scale 0.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ldm import config as configs
from ldm import sweep
from ldm.config import GuidanceNode, RunConfig
from ldm.denoiser import AdapterUse
from ldm.registry import ConfigError, suggest
from ldm.sampling.plan import Item, Plan, pin_weights, plan

SPEAKING: Final = "adapters"
ITEMS: Final = {"prompt": "sample.prompts", "seed": "sample.seeds"}  # axis -> the key that it is a value of
FIXED: Final = ("hint", "image", "weights")  # keys of an adapter that are the same in all combinations
USE_KEYS: Final = tuple(f.name for f in dataclasses.fields(AdapterUse) if f.name not in FIXED)
GUIDANCE_KEYS: Final = tuple(f.name for f in dataclasses.fields(GuidanceNode))
SAMPLE_KEYS: Final = ("negative", "strength", "clip_skip", "prompt_weights", "long_prompts", "sampler")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All that one run draws.

    Attributes:
        config: as given, with every `weights:` naming its file.
        plans: one per combination of settings, in the grid's order; all have as many prompts and the same seeds.
        axes: axis -> label of each of its values, of prompts and seeds too; the last is the columns.
    """

    config: RunConfig
    plans: tuple[Plan, ...]
    axes: Mapping[str, tuple[str, ...]]

    @property
    def masks(self) -> list[Path]:
        """Mask files of adapters, each once."""
        return list(dict.fromkeys(Path(use.mask) for job in self.plans for use in job.uses.values() if use.mask))

    def items(self) -> list[tuple[Plan, Item]]:
        """Every picture with its plan, row by row of the grid."""
        settings = [range(len(labels)) for axis, labels in self.axes.items() if axis not in ITEMS]
        number = {at: i for i, at in enumerate(itertools.product(*settings))}
        found: list[tuple[Plan, Item]] = []
        for at in itertools.product(*(range(len(labels)) for labels in self.axes.values())):
            where = dict(zip(self.axes, at, strict=True))
            row, column = where.pop("prompt"), where.pop("seed")
            job = self.plans[number[tuple(where.values())]]
            found.append((job, job.item(row, job.seeds[column])))
        return found

    @property
    def same_conditions(self) -> bool:
        """Whether the pictures of a row have the same prompt and hints."""
        last = list(self.axes)[-1]
        return last != "prompt" and not last.endswith(".extractor")

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels of the columns."""
        return tuple(self.axes.values())[-1]

    @property
    def rows(self) -> list[str]:
        """Labels of the rows; what does not vary is left out, but for the prompt, which stands last."""
        shown = {a: s for a, s in list(self.axes.items())[:-1] if len(s) > 1 or a in self.config.grid or a == "prompt"}
        last = sorted(shown, key=lambda axis: axis == "prompt")
        labels = [dict(zip(shown, each, strict=True)) for each in itertools.product(*shown.values())]
        return ["\n".join(label[axis] for axis in last) for label in labels]

    def combination(self, job: Plan, item: Item) -> dict[str, Any]:
        """Grid key -> its value in one picture; nothing where there is no grid."""
        known = dict(job.combination) | {"prompt": item.prompt.text, "seed": item.seed}
        return {key: known[key] for key in self.config.grid}

    def describe(self) -> str:
        """Counts of everything: "3 combinations of scale x 2 prompts x 4 seeds = 24 images"."""
        prompts, seeds = len(self.axes["prompt"]), len(self.axes["seed"])
        settings = list(sweep.short_names([key for key in self.config.grid if key not in ITEMS]).values())
        of = f"{len(self.plans)} combinations of {', '.join(settings)} x " if settings else ""
        return f"{of}{prompts} prompts x {seeds} seeds = {len(self.plans) * prompts * seeds} images"


def expand(config: RunConfig) -> Sweep:
    """Plan every combination of the config's grid, or the config alone where it has none.

    Raises: ConfigError, naming the combination, on a key that cannot be swept and as `plan`.
    """
    _check_keys(config)
    settings = {key: values for key, values in config.grid.items() if key not in ITEMS}
    items = {key: values for key, values in config.grid.items() if key in ITEMS}
    combinations, _ = sweep.combinations(settings), sweep.combinations(items)
    config, weights = pin_weights(config)
    base = _base(config)
    plans: list[Plan] = []
    for combination, tag in zip(combinations, sweep.file_names(combinations), strict=True):
        with naming(combination):
            job = plan(_combined(base, combination), weights)
        plans.append(dataclasses.replace(job, combination=combination, tag=tag))
        images = len(combinations) * len(job.prompts) * len(job.seeds)
        if config.grid and images > sweep.MAX:
            raise ConfigError(f"grid asks for {images:,} images, allowed: up to {sweep.MAX:,}; drop values or an axis")
    return Sweep(config, tuple(plans), _axes(config, plans[0]))


def _base(config: RunConfig) -> RunConfig:
    """What all combinations share: the grid's prompts and seeds, and nothing that they set of adapters.

    A mapping (`blocks`) of the grid would else be merged with the config's own.
    """
    if not config.grid:
        return config
    values: dict[str, Any] = {key: None for key in config.grid if key.startswith("adapters.")}
    if "prompt" in config.grid:
        values["sample.prompts"] = config.grid["prompt"]
    if "seed" in config.grid:
        values["sample.seeds"] = ",".join(map(str, config.grid["seed"]))
    return configs.override(dataclasses.replace(config, grid={}), values, "grid")


def _combined(base: RunConfig, combination: Mapping[str, Any]) -> RunConfig:
    """The config with one combination set; a sampler takes as many steps as the config's own, unless it sets them."""
    if not combination:
        return base
    steps, values = base.sample.sampler.get("steps"), dict(combination)
    kept = {} if steps is None else {"sample.sampler.steps": steps}
    speaking = values.pop(SPEAKING, base.adapters)
    silent = {f"adapters.{name}.scale": 0.0 for name in base.adapters if name not in speaking}
    return configs.override(base, kept | silent | values, "sampling")


@contextlib.contextmanager
def naming(combination: Mapping[str, Any]) -> Iterator[None]:
    """Put the combination that is at fault in front of an error."""
    try:
        yield
    except ValueError as error:
        if not combination:
            raise
        said = ", ".join(f"{key}={sweep.text(value)}" for key, value in combination.items())
        raise ConfigError(f"grid {said}: {error}") from error


def _axes(config: RunConfig, job: Plan) -> dict[str, tuple[str, ...]]:
    grid = config.grid
    items = {"prompt": tuple(p.text or '""' for p in job.prompts), "seed": tuple(f"seed={seed}" for seed in job.seeds)}
    implied = {axis: labels for axis, labels in items.items() if axis not in grid}
    short = sweep.short_names([*implied, *grid])
    named = {key: tuple(f"{short[key]}={sweep.text(value)}" for value in values) for key, values in grid.items()}
    named |= {SPEAKING: tuple(_speaking(each, config) for each in grid[SPEAKING])} if SPEAKING in grid else {}
    return implied | named | {axis: labels for axis, labels in items.items() if axis in grid}


def _speaking(names: Sequence[str], config: RunConfig) -> str:
    """Label of the adapters that speak."""
    return " + ".join(f"{config.adapters[name]['name']}: {name}" for name in names) or "prompt alone"


def _check_keys(config: RunConfig) -> None:
    """Refuse what would need other models, and what is no key. Raises: ConfigError."""
    asked = config.grid.get(SPEAKING, [])
    for names in asked if isinstance(asked, list) else []:  # `sweep.combinations` refuses the others
        if not isinstance(names, list) or any(name not in config.adapters for name in names):
            raise ConfigError(
                f"grid.{SPEAKING} has {names!r}, must be lists of adapters that speak, [] for none; adapters: "
                f"{', '.join(config.adapters) or 'none'}"
            )
    known = [*ITEMS, SPEAKING, *(f"sample.{key}" for key in SAMPLE_KEYS)]
    known += [f"sample.guidance.{key}" for key in GUIDANCE_KEYS]
    known += [f"adapters.{name}.{key}" for name in config.adapters for key in USE_KEYS]
    for key in map(str, config.grid):
        if key not in known and not (key.startswith("sample.sampler.") and key.count(".") == 2):
            near = suggest(key, [*known, *(f"sample.sampler.{option}" for option in ("name", "steps", "eta"))])
            raise ConfigError(
                f"grid has {key!r}, which no sweep can change; allowed: {', '.join(ITEMS)}, {SPEAKING}, "
                f"adapters.<name>.{{{','.join(USE_KEYS)}}}, sample.{{{','.join(SAMPLE_KEYS)}}}, "
                f"sample.sampler.<option>, sample.guidance.{{{','.join(GUIDANCE_KEYS)}}}{near}"
            )
