"""Run configs: the dataclass tree, and load (include, command line), validate, freeze, dump.

YAML names registered classes only (`ldm.registry`); nothing is imported, evaluated or read from the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from ldm import config_yaml
from ldm.config_files import Node, Parse, nested, over, overridden, read
from ldm.registry import ConfigError, fits, in_yaml, suggest


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Where a training run lives."""

    dir: str = "runs/run"  # folder of the run; the same command again continues it


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The models. A slot that a stage does not need stays null."""

    weights: str | None = None  # file or folder of a whole model; a slot takes its part: weights: ${model.weights}
    unet: Node | None = None  # kind "unet"
    vae: Node | None = None  # kind "vae"
    text: Node | None = None  # kind "text"
    clip: Node | None = None  # kind "clip"
    schedule: Node = dataclasses.field(default_factory=dict[str, Any])  # ldm.schedule.ScheduleConfig
    objective: str = "eps"  # what the UNet predicts: eps | v | x0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 1000  # optimizer steps
    batch: int = 32  # images per optimizer step, over all ranks and accumulation
    items: int | None = None  # train on at most this many images of the set, spread over it; null = all
    micro_batch: int | None = None  # at most this many images per rank and forward; accumulation is derived
    lr: float = 1e-4  # peak learning rate
    warmup: int = 0  # optimizer steps of linear warm-up
    decay: str = "constant"  # constant | cosine (to zero at `steps`) | step (a tenth from half of `steps` on)
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    weight_decay: float = 0.01  # AdamW; of matrices and kernels only
    clip: float | None = 1.0  # gradient norm; null = off
    precision: str = "bf16"  # fp32 | bf16 | fp16 (autocast)
    moments: str = "fp32"  # fp32 | bf16: how AdamW's two moments are kept; bf16 is half the memory, rounded at random
    ema: float | None = None  # EMA decay of the exported weights; null = off
    trainable: tuple[str, ...] = ("*",)  # patterns over parameter names, which --dry-run groups (adapters.*, unet.*)
    shard: str = "none"  # none | optimizer | full: what ranks share out (FSDP2), docs/training-at-scale.md
    checkpoint_activations: bool = False  # recompute UNet blocks in backward: less memory, more time
    compile: bool = False  # torch.compile each UNet block: faster steps, minutes of compiling at the first
    workers: int = 0  # data-loading processes per rank
    worker_timeout: float = 600.0  # seconds to wait for a batch of theirs before the run ends; 0 waits for ever
    rank_timeout: float = 1800.0  # seconds to wait for another rank before the run ends; rank 0 validates alone
    threads: int | None = None  # torch CPU threads per rank; null = torch's default
    max_nonfinite: int = 10  # abort after this many steps in a row whose gradients were not finite
    init_from: str | None = None  # weights to start from (safetensors of the trained part); never a resume
    allow_changes: bool = False  # go on with a run though the config, or the data set, is another than it began with


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under `run.dir/checkpoints/step-XXXXXXXX/`."""

    every: int = 1000  # optimizer steps
    keep_last: int = 2  # newest complete checkpoints kept
    keep_every: int | None = None  # and those of every so many steps, for good


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Scalars."""

    every: int = 20  # optimizer steps between lines of metrics.jsonl
    wandb: str = "disabled"  # disabled | offline | online
    project: str = "ldm-adapters"  # wandb project


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Held-out figures and pictures during training."""

    data: Node | None = None  # kind "data"; null = no validation
    every: int = 1000  # optimizer steps
    items: int = 256  # at most this many held-out items for figures
    images: int = 8  # pictures in the grid, on fixed seeds


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What evaluate.py draws and measures (ldm.evaluation.arms, docs/evaluation.md)."""

    measures: dict[str, Any] = dataclasses.field(
        default_factory=dict[str, Any]
    )  # adapter -> measure, or list; empty = by hint
    pictures: Any = None  # measures of every arm's pictures beside the item's caption or own picture: one, or a list
    sets: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # name -> ldm.evaluation.sets.SetOptions
    cache: str = "runs/features"  # folder of features of reference pictures, kept by content
    arms: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # name -> adapters, or {adapter: scale}
    captions: str = "own"  # own | next (each item gets its neighbour's, a conflict) | any other text, for all items


@dataclasses.dataclass(frozen=True)
class GuidanceNode:
    """Classifier-free guidance (ldm.guidance.GuidanceConfig)."""

    scale: float = 7.5  # 1 = off
    rescale: float = 0.0  # phi in [0, 1], arXiv:2305.08891 section 3.4
    start: float = 0.0  # guided interval, fractions of sampling
    end: float = 1.0  # see start; 1 includes the last step
    image: float | None = None  # of image prompts, apart from that of the text (scale); null = together


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What to draw."""

    prompts: Any = None  # one prompt, a list of them, or a .txt / .jsonl / .yaml file, where "# ..." is a comment
    negative: str = ""  # text of the unconditional branch
    seeds: Any = "0-3"  # e.g. 0-15 or 3,7,11 or a list; image i depends on its own seed only
    hints: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # adapter name -> image file or folder
    image: str | None = None  # start from this image file, or folder with one per prompt; null = from noise
    mask: str | None = None  # with image: file or folder, white is drawn anew, black is kept
    strength: float | None = None  # with image: in (0, 1], part of the steps that is run; null = 0.8, with mask 1
    height: int = 64  # pixels
    width: int = 64  # pixels
    batch: int = 8  # images per forward
    sampler: Node = dataclasses.field(default_factory=lambda: {"name": "ddim", "steps": 50})  # kind "sampler"
    guidance: GuidanceNode = dataclasses.field(default_factory=GuidanceNode)
    precision: str = "bf16"  # fp32 | bf16 | fp16: dtype of the models' weights while sampling
    prepack: bool = True  # on a CPU, lay the weights out for oneDNN (ldm.fast): the same but for rounding, sooner
    tile: int | None = None  # VAE decoding in tiles of this many latent pixels; null = whole
    sliced: bool = False  # VAE decoding one image at a time: the same pictures, less memory
    clip_skip: int | None = None  # 1 = tokens behind the last block of the text encoder, 2 = one before; null = its own
    prompt_weights: bool = False  # read (word:1.3), (word) and [word] as weights
    long_prompts: str = "cut"  # cut | chunks: read what fits, or all of it in parts of 75 tokens


@dataclasses.dataclass(frozen=True)
class OutConfig:
    """Where sampling writes."""

    dir: str = "outputs/sample"  # folder of pictures, grid and records; nothing in it is overwritten


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything one run needs; the YAML file mirrors it."""

    seed: int = 0  # of training and evaluation; pictures have sample.seeds
    deterministic: bool = False  # train with algorithms that give the same bits each time, where that is slower
    device: str = "auto"  # auto | cpu | cuda; auto is cuda where there is a GPU
    run: RunDir = dataclasses.field(default_factory=RunDir)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    adapters: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # name -> adapter and AdapterUse keys
    fuser: Node | None = None  # kind "fuser": lets adapters see each other (CoAdapter)
    stage: Node | None = None  # kind "stage": what is trained
    data: Node | None = None  # kind "data": what it is trained on
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    grid: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # dotted key -> values, all combinations
    out: OutConfig = dataclasses.field(default_factory=OutConfig)


_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("train.steps", "train.batch", "train.items", "train.micro_batch", "train.threads", "train.max_nonfinite"),
        (1, math.inf),
    ),
    **dict.fromkeys(
        ("checkpoint.every", "log.every", "validation.every", "validation.items", "validation.images"), (1, math.inf)
    ),
    **{f"sample.{key}": (1, math.inf) for key in ("height", "width", "batch", "tile", "clip_skip")},
    **dict.fromkeys(("train.lr", "train.warmup", "train.weight_decay", "train.clip", "train.workers"), (0, math.inf)),
    **dict.fromkeys(("seed", "checkpoint.keep_last", "train.worker_timeout"), (0, math.inf)),
    "train.rank_timeout": (1, 1e9),
    **dict.fromkeys(("train.betas", "train.ema"), (0, 1)),
}  # key -> at least, below; null is allowed where the key allows it
_PRECISIONS = ("fp32", "bf16", "fp16")
_WORDS: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "train.precision": _PRECISIONS,
    "sample.precision": _PRECISIONS,
    "sample.long_prompts": ("cut", "chunks"),
    "train.decay": ("constant", "cosine", "step"),
    "train.moments": ("fp32", "bf16"),
    "train.shard": ("none", "optimizer", "full"),
    "log.wandb": ("disabled", "offline", "online"),
    "model.objective": ("eps", "v", "x0"),
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, its includes and `key=value` overrides, in that order of strength.

    Args:
        path: YAML file; its `include:` lists files relative to itself, later ones win, the file itself wins over all.
            Mappings merge key by key, except that naming another class starts its options afresh.
        overrides: dotted `key=value`, values in YAML syntax.

    Raises: ConfigError, in one line, on a missing file, bad YAML, an unknown key or a wrong type; it names the file, or
        argument at fault.
    """
    node = read(Path(path))
    try:
        return from_mapping(overridden(node, overrides), source=str(path))
    except ConfigError:
        source = _fault(node, overrides) or str(path)
    return from_mapping(overridden(node, overrides), source=source)


def _fault(node: Node, overrides: Sequence[str]) -> str:
    """The argument without which there is no error, or the first that is one by itself; empty if it is the file's."""

    def sound(arguments: Sequence[str]) -> bool:
        with contextlib.suppress(ConfigError):
            return bool(from_mapping(overridden(node, arguments)))
        return False

    found = [item for i, item in enumerate(overrides) if sound([*overrides[:i], *overrides[i + 1 :]])]
    if not found and sound(()):
        found = [item for item in overrides if not sound([item])]
    return f"argument {found[0]!r:.80}" if found else ""


def merged(path: str | Path, overrides: Sequence[str], parse: Parse) -> Node:
    """What `load` validates. `parse` makes values of a file's bytes or of an override's text."""
    return overridden(read(Path(path), parse), overrides, parse)


def from_mapping(node: Node, source: str = "config") -> RunConfig:
    """Validate a plain mapping against `RunConfig`. Raises: ConfigError as `load`."""
    _check_groups(node, RunConfig(), f"{source}: ")
    try:
        config = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(node))
        config_yaml.refuse_resolvers(OmegaConf.to_container(config, resolve=False), source)
        result = cast("RunConfig", OmegaConf.to_object(config))
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(error, source)) from error
    except ValidationError as error:
        raise ConfigError(f"{source}: {_wrong_type(error, node)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {getattr(error, 'full_key', '')}: {_first_line(error)}") from error
    _check_values(result, source)
    return result


def override(config: RunConfig, values: Node, source: str) -> RunConfig:
    """The config with dotted keys set, together, as `load` sets those of a command line. Raises: ConfigError as `load`.

    Setting the `name` of a node starts its options afresh, but for those that are among the values too.
    """
    above = functools.reduce(over, (nested(key, value) for key, value in values.items()), {})
    return from_mapping(over(dataclasses.asdict(config), above), source)


def plain(config: RunConfig) -> Node:
    """The config as plain values, references followed."""
    return cast("Node", OmegaConf.to_container(OmegaConf.structured(config), resolve=True))


def dump(config: RunConfig) -> str:
    """The resolved config as YAML; `load` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def parser(description: str, *, dry_run: bool = True) -> argparse.ArgumentParser:
    """What every script takes: --config, key=value, --print-config, --explain; --dry-run where it makes sense."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--config", metavar="FILE", help="YAML file under configs/")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="override any key, e.g. train.steps=100")
    if dry_run:
        result.add_argument("--dry-run", action="store_true", help="build without memory, print counts, stop")
    result.add_argument("--print-config", action="store_true", help="print the resolved config, stop")
    result.add_argument("--explain", action="store_true", help="print where each value of the config is set, stop")
    return result


def _check_groups(node: Node, defaults: Any, where: str) -> None:
    """A value in place of a group of keys: omegaconf's own errors do not say where it is."""
    hints = get_type_hints(type(defaults))  # pyright: ignore[reportUnknownArgumentType]
    for field in dataclasses.fields(defaults):
        value, default = node.get(field.name, {}), getattr(defaults, field.name)
        group = dataclasses.is_dataclass(default)
        if isinstance(default, tuple) and field.name in node and not fits(_tuples(value), hints[field.name]):
            example = list(cast("tuple[Any, ...]", default))
            raise ConfigError(f"{where}{field.name} is {value!r}, must be a list like {example}")
        listed = hints[field.name] == Node | None and isinstance(value, list)  # a text may be a reference
        if listed or ((group or isinstance(default, dict)) and not isinstance(value, dict)):
            path = f"{where}{field.name}"
            example = f", e.g. {path.rpartition(': ')[2]}.name={value}" if isinstance(value, str) and not group else ""
            raise ConfigError(f"{path} is {value!r}, must be a mapping of keys{example}")
        if group:
            _check_groups(cast("Node", value), default, f"{where}{field.name}.")


def _tuples(value: Any) -> Any:
    """Lists as the tuples that they become."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _check_values(config: RunConfig, source: str) -> None:
    """Numbers and words that would fail late, or quietly do nothing."""
    for key, (low, high) in _RANGES.items():
        value = _get(config, key)
        values = () if value is None else cast("tuple[float, ...]", value if isinstance(value, tuple) else (value,))
        if not all(low <= v < high for v in values):
            upper = "finite" if high == math.inf else f"below {high:g}"
            raise ConfigError(f"{source}: {key} is {value}, must be at least {low:g} and {upper}")
    if config.train.clip == 0:
        raise ConfigError(f"{source}: train.clip is 0, which stops all training; must be positive, or null for none")
    for key, words in _WORDS.items():
        if (word := _get(config, key)) not in words:
            raise ConfigError(f"{source}: {key} is {word!r}; allowed: {', '.join(words)}{suggest(word, words)}")


def _get(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _wrong_type(error: ValidationError, node: Node) -> str:
    """`train.lr is 'fast', must be float, e.g. 0.0001`; omegaconf's own words below a node, whose types it knows."""
    key = str(error.full_key)
    *groups, name = key.split(".")
    try:
        default = _get(RunConfig(), key)
        value = functools.reduce(operator.getitem, key.split("."), node)
        owner = _get(RunConfig(), ".".join(groups)) if groups else RunConfig()
        hint = get_type_hints(type(owner))[name]  # pyright: ignore[reportUnknownArgumentType]
    except (AttributeError, KeyError, TypeError):
        return f"{key}: {_first_line(error)}"
    example = "" if default is None else f", e.g. {config_yaml.inline(default)}"
    return f"{key} is {value!r:.60}, must be {in_yaml(hint)}{example}"


def _unknown_key(error: ConfigKeyError, source: str) -> str:
    full = str(error.full_key or error.key)
    owner = error.object_type if dataclasses.is_dataclass(error.object_type) else RunConfig
    known = [f.name for f in dataclasses.fields(owner)]  # pyright: ignore[reportArgumentType]
    return f"{source}: unknown key {full!r}; keys here: {', '.join(known)}{suggest(full.rpartition('.')[2], known)}"
