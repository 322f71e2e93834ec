"""Held-out figures of a trained stage, and how well its adapters obey their hints."""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import build, grid, registry
from ldm.config import RunConfig
from ldm.data.images import Batch, ImageData
from ldm.data.subset import held_out, spread
from ldm.denoiser import AdapterUse
from ldm.evaluation import sets
from ldm.evaluation.arms import CEILING, Plan, plan, plan_without
from ldm.evaluation.obedience import Obedience, drawer, obedience
from ldm.evaluation.report import Compared, Evaluation
from ldm.evaluation.sets import Truth
from ldm.guidance import GuidanceConfig
from ldm.precision import autocast
from ldm.registry import ConfigError
from ldm.training import checkpoint, distributed, signals
from ldm.training.diffusion import DiffusionStage
from ldm.training.distributed import Rank
from ldm.training.stage import Stage, choose_trainable
from ldm.training.vae import VAEStage

PICTURES = 8
RECONSTRUCTION = "reconstruction"


def evaluate(config: RunConfig) -> Evaluation:
    """Figures on `validation.data` (at most `validation.items`), written with a grid to `<run.dir>/eval/`.

    What is measured: the `weights:` of the trained part where the config names them (of several adapters, each its
    own), else the newest complete checkpoint of `run.dir`. Protocol: the stage's own held-out figures; and, where there
    are adapters, the measures of every adapter's hint (`ldm.evaluation.measures`) on every arm
    (`ldm.evaluation.arms`): the same captions and seeds, drawn as `sample.sampler` and `sample.guidance` say. With
    `evaluation.pictures` and `evaluation.sets` the pictures themselves are measured too, of a VAE its reconstructions.

    Under torchrun the items are shared out; every rank returns the same, the first one writes.

    Raises: ConfigError if the config has no stage, no held-out data, no weights or a `grid:`, `evaluation:` does not
        fit, a metric needs more pictures, or the folder cannot be written; signals.Stopped where the caller listens to
        signals and any rank was asked to stop.
    """
    if config.grid:
        raise ConfigError(f"grid has {', '.join(config.grid)}, but only sample.py sweeps; drop it for evaluation.arms")
    with distributed.session(config.device, config.train.threads, config.train.rank_timeout) as rank:
        torch.manual_seed(config.seed)  # of what has no weights, an untrained backbone say: as it was in training
        stage = build.stage(config)
        choose_trainable(stage, config.train.trainable)  # what the run exported
        trained = _load_trained(stage, config)
        measured = _plan(stage, config)
        build.frozen(stage).to(rank.device)
        stage.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)
        data = build.data(config.validation.data, "validation.data")
        _check_items(measured, data, config)
        out = output(Path(config.run.dir) / "eval")
        truths = real_features(measured, data, config, rank) if measured else {}
        with autocast(config.train.precision, rank.device):
            batches = held_out(data, config.validation.items, config.sample.batch, rank.device)
            report = stage.validate(batches, 0 if measured else PICTURES, config.seed) if rank.main else None
            report = rank.told(report)
            assert report is not None
            found = _obedience(stage, measured, data, config, rank) if measured else None
        compared = compare(measured, found, truths, rank) if measured and found else {}
        columns = found.columns if found else report.columns
        result = Evaluation(config, report.figures, measured, found, trained, compared)
        if rank.main:
            write(result, columns, out)
        rank.barrier()
    return result


def check(config: RunConfig) -> None:
    """What `evaluate` would refuse of `evaluation:`, without the weights of the run, which may not be trained yet.

    Models of metrics are built with their weights, the others without memory.

    Raises: ConfigError.
    """
    with torch.device("meta"):
        stage = build.stage(config)
    _check_items(_plan(stage, config), build.data(config.validation.data, "validation.data"), config)


def _plan(stage: Stage, config: RunConfig) -> Plan | None:
    if isinstance(stage, DiffusionStage):
        return plan(config, stage.denoiser)
    if isinstance(stage, VAEStage):
        return plan_without(RECONSTRUCTION, config)
    if config.evaluation.pictures or config.evaluation.sets:
        name = (config.stage or {}).get("name")
        raise ConfigError(f"evaluation.pictures or sets is set, but stage {name} makes no pictures; drop them")
    return None


def _check_items(measured: Plan | None, data: ImageData, config: RunConfig) -> None:
    items, batch = len(spread(data, config.validation.items)), config.sample.batch
    for measure in measured.sets.values() if measured else ():
        measure.check(items, "validation.data (at most validation.items)")
    if config.evaluation.captions == "next" and 1 in (batch, items % batch):
        raise ConfigError(
            f"evaluation.captions is next, but of {items} items in batches of sample.batch={batch} one has no next; "
            "change validation.items or the batch"
        )


def real_features(measured: Plan, data: ImageData, config: RunConfig, rank: Rank) -> dict[str, Truth]:
    """Set -> the features that its pictures are measured against; before anything is drawn.

    Raises: ConfigError as `sets.reference`.
    """
    how = (data, config.validation.items, config.sample.batch, Path(config.evaluation.cache), rank)
    found: dict[str, Truth] = {}
    for name, measure in measured.sets.items():
        other = measured.paired and measure.options.reference is not None
        own = dataclasses.replace(measure, options=dataclasses.replace(measure.options, reference=None))
        found[name] = Truth(sets.reference(measure, *how), sets.reference(own, *how).features if other else None)
    return found


def compare(measured: Plan, found: Obedience, truths: Mapping[str, Truth], rank: Rank) -> dict[str, Compared]:
    """Set -> its scores of every arm, worked out by the first rank."""
    result: dict[str, Compared] = {}
    for name, measure in measured.sets.items() if rank.main else ():
        truth, arms = truths[name], dict(found.vectors[name])
        if truth.own is not None:
            arms[CEILING] = truth.own
        real = truth.reference.features.to(rank.device)
        scores = sets.scores(measure.options, {arm: x.to(rank.device) for arm, x in arms.items()}, real)
        marks = measure.marks(found.items, len(real))
        result[name] = Compared(
            scores, truth.reference.told | {"items": len(real), "file": str(truth.reference.file)}, marks
        )
    return rank.told(result)


def output(out: Path) -> Path:
    """The folder, made and tried out. Raises: ConfigError if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}); choose another folder") from error


def write(result: Evaluation, columns: dict[str, Tensor], out: Path) -> None:
    """The record, and a grid of the columns if there are any."""
    (out / "eval.json").write_text(json.dumps(result.record(), indent=1), encoding="utf-8")
    if columns:
        grid.save(columns, out / "grid.png")


def _load_trained(stage: Stage, config: RunConfig) -> list[Path]:
    """Load the run's newest weights into what the stage trains, except where the config names weights for it.

    Returns: the files read.
    """
    slots = {"vae": config.model.vae, "clip": config.model.clip, "model": config.model.unet} | config.adapters
    trained = [*config.adapters] or [name for name, module in stage.named_children() if module is stage.trained]
    nodes = {name: slots["model" if name == "denoiser" else name] or {} for name in trained}
    without = [name for name, node in nodes.items() if not node.get("weights")]
    unfused = config.fuser is not None and not config.fuser.get("weights")
    if not without and not unfused:
        return []
    folder = checkpoint.latest(Path(config.run.dir))
    if folder is None:
        named = {"denoiser": "model.unet", "vae": "model.vae", "clip": "model.clip", "fuser": "fuser"}
        needy = [f"adapters.{n}" if n in config.adapters else named[n] for n in without + ["fuser"] * unfused]
        keys = ", ".join(f"{slot}.weights=FILE" for slot in needy)
        raise ConfigError(f"run.dir {config.run.dir} has no complete checkpoint; train it first, or set {keys}")
    given = {f"adapter.{name}" for name in config.adapters if name not in without}
    given |= (set() if unfused else {"fuser"}) | (set() if without else {"adapter"})
    files = {folder / f"{stem}.safetensors": module for stem, module in stage.exports().items() if stem not in given}
    for file, module in files.items():
        checkpoint.load_weights(module, file)
    return list(files)


def _reworded(batch: Batch, captions: str) -> Batch:
    """The batch with the captions that `evaluation.captions` asks for."""
    words = {"own": batch.text, "next": batch.text[1:] + batch.text[:1]}
    return dataclasses.replace(batch, text=words.get(captions, [captions] * len(batch.text)))


def _obedience(stage: Stage, measured: Plan, data: ImageData, config: RunConfig, rank: Rank) -> Obedience:
    """Draw this rank's share of the held-out items, in whole batches, and score all of them."""
    items, batch = config.validation.items, config.sample.batch
    batches = held_out(data, items, batch, rank.device, rank.part)
    shown = (_reworded(b, config.evaluation.captions) for b in tqdm(batches, desc="obedience", disable=not rank.main))
    shown = signals.heeding(shown, rank, "while measuring, of which nothing is kept")
    first = rank.part(-(-len(spread(data, items)) // batch)).start * batch
    if isinstance(stage, VAEStage):
        how = (lambda batch: {}), functools.partial(_reconstruction, stage)
    else:
        assert isinstance(stage, DiffusionStage)
        sampler = registry.build("sampler", config.sample.sampler, schedule=stage.schedule)
        how = stage.hints, drawer(stage, sampler, GuidanceConfig(**dataclasses.asdict(config.sample.guidance)))
    return obedience(measured, shown, *how, seed=config.seed, pictures=PICTURES, rank=rank, first=first)


def _reconstruction(
    stage: VAEStage, batch: Batch, hints: Mapping[str, Tensor], uses: Mapping[str, AdapterUse], seed: int
) -> Tensor:
    """What the VAE makes of the real pictures, without noise, b 3 h w in [0, 1]."""
    del hints, uses, seed
    return (stage.vae(batch.image)[0].float() * 0.5 + 0.5).clamp(0, 1)
