"""Held-out figures of a trained stage, and how well its adapters obey their hints."""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import build, grid, registry
from ldm.config import RunConfig
from ldm.data.images import Batch, ImageData
from ldm.data.subset import held_out
from ldm.evaluation.arms import Plan, plan
from ldm.evaluation.obedience import Obedience, drawer, obedience
from ldm.evaluation.report import Evaluation
from ldm.guidance import GuidanceConfig
from ldm.precision import autocast
from ldm.registry import ConfigError
from ldm.training import checkpoint, distributed
from ldm.training.diffusion import DiffusionStage
from ldm.training.stage import Stage, choose_trainable

PICTURES = 8


def evaluate(config: RunConfig) -> Evaluation:
    """Figures on `validation.data` (at most `validation.items`), written with a grid to `<run.dir>/eval/`.

    What is measured: the `weights:` of the trained part where the config names them (of several adapters, each its
    own), else the newest complete checkpoint of `run.dir`. Protocol: the stage's own held-out figures; and, where there
    are adapters, the measures of every adapter's hint (`ldm.evaluation.measures`) on every arm
    (`ldm.evaluation.arms`): the same captions and seeds, drawn as `sample.sampler` and `sample.guidance` say.

    Raises: ConfigError if the config has no stage, no held-out data, no weights or a `grid:`, `evaluation:` does not
        fit, or the folder cannot be written.
    """
    if config.grid:
        raise ConfigError(f"grid has {', '.join(config.grid)}, but only sample.py sweeps; drop it for evaluation.arms")
    if config.evaluation.captions == "next" and min(config.sample.batch, config.validation.items) < 2:
        raise ConfigError(
            "evaluation.captions is next, but sample.batch or validation.items is 1: an item has no neighbour"
        )
    with distributed.session(config.device, config.train.threads) as rank:
        if rank.world > 1:
            raise ConfigError(f"evaluation runs on one rank, torchrun started {rank.world}; use plain python")
        torch.manual_seed(config.seed)  # of what has no weights, an untrained backbone say: as it was in training
        stage = build.stage(config)
        choose_trainable(stage, config.train.trainable)  # what the run exported
        trained = _load_trained(stage, config)
        adapted = stage if isinstance(stage, DiffusionStage) else None
        measured = plan(config, adapted.denoiser) if adapted else None
        build.frozen(stage).to(rank.device)
        stage.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)
        data = build.data(config.validation.data, "validation.data")
        out = _folder(Path(config.run.dir) / "eval")
        with autocast(config.train.precision, rank.device):
            batches = held_out(data, config.validation.items, config.sample.batch, rank.device)
            report = stage.validate(batches, 0 if measured else PICTURES, config.seed)
            found = _obedience(adapted, measured, data, config, rank.device) if adapted and measured else None
    columns = found.columns if found else report.columns
    result = Evaluation(config, report.figures, measured, found, trained)
    _write(result, columns, out)
    return result


def _folder(out: Path) -> Path:
    """The folder, made and tried out. Raises: ConfigError if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}); choose another run.dir") from error


def _write(result: Evaluation, columns: dict[str, Tensor], out: Path) -> None:
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
        needy = ", ".join(without + ["fuser"] * unfused)
        raise ConfigError(f"no weights: for {needy} and no checkpoint in {config.run.dir}: train first")
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


def _obedience(
    stage: DiffusionStage, measured: Plan, data: ImageData, config: RunConfig, device: torch.device
) -> Obedience:
    sampler = registry.build("sampler", config.sample.sampler, schedule=stage.schedule)
    draw = drawer(stage, sampler, GuidanceConfig(**dataclasses.asdict(config.sample.guidance)))
    batches = tqdm(held_out(data, config.validation.items, config.sample.batch, device), desc="obedience")
    spoken = (_reworded(batch, config.evaluation.captions) for batch in batches)
    return obedience(measured, spoken, stage.hints, draw, seed=config.seed, pictures=PICTURES)
