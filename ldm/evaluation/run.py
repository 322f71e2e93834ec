"""Held-out figures of a trained stage, and how well its adapters obey their hints."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import build, generate, grid, registry
from ldm import config as config_module
from ldm.config import RunConfig
from ldm.data.images import ImageData
from ldm.data.subset import held_out
from ldm.evaluation.edges import edge_map
from ldm.evaluation.fidelity import edge_f1
from ldm.guidance import GuidanceConfig
from ldm.registry import ConfigError
from ldm.training import checkpoint, distributed
from ldm.training.diffusion import DiffusionStage
from ldm.training.loop import PRECISIONS
from ldm.training.stage import Stage, choose_trainable

PICTURES = 8


def evaluate(config: RunConfig) -> dict[str, float]:
    """Figures on `validation.data` (at most `validation.items`), written with a grid to `<run.dir>/eval/`.

    What is measured: the `weights:` of the trained part where the config names them, else the newest complete
    checkpoint of `run.dir`. Protocol: the stage's own held-out figures; and, where there are adapters, edge F1 (1 pixel
    tolerance) between the edges of the samples and the edges of the first adapter's hint, for samples with and without
    the adapters on the same seeds, drawn as `sample.sampler` and `sample.guidance` say, for the ground truth (ceiling),
    and for ground truth paired with another item's hint (chance).

    Raises: ConfigError if the config has no stage, no held-out data or no weights.
    """
    with distributed.session(config.device, config.train.threads) as rank:
        if rank.world > 1:
            raise ConfigError(f"evaluation runs on one rank, torchrun started {rank.world}; use plain python")
        stage = build.stage(config)
        choose_trainable(stage, config.train.trainable)  # what the run exported
        _load_trained(stage, config)
        build.frozen(stage).to(rank.device)
        stage.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)
        data = build.data(config.validation.data, "validation.data")
        autocast = PRECISIONS[config.train.precision]
        with torch.autocast(rank.device.type, dtype=autocast, enabled=True) if autocast else nullcontext():
            report = stage.validate(
                held_out(data, config.validation.items, config.sample.batch, rank.device), PICTURES, config.seed
            )
            figures = dict(report.figures)
            if isinstance(stage, DiffusionStage) and stage.uses:
                figures |= obedience(stage, data, config, rank.device)
    out = Path(config.run.dir) / "eval"
    out.mkdir(parents=True, exist_ok=True)
    record = {"figures": figures, "config": config_module.dump(config), "torch": torch.__version__}
    (out / "eval.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    if report.columns:
        grid.save(dict(report.columns), out / "grid.png")
    return figures


def _load_trained(stage: Stage, config: RunConfig) -> None:
    """Load the run's newest weights into what the stage trains, unless the config already named weights for it."""
    slots = {"vae": config.model.vae, "clip": config.model.clip, "model": config.model.unet} | config.adapters
    trained = config.adapters or [name for name, module in stage.named_children() if module is stage.trained]
    nodes = [slots["model" if name == "denoiser" else name] for name in trained]
    if all((node or {}).get("weights") for node in nodes):
        return
    folder = checkpoint.latest(Path(config.run.dir))
    if folder is None:
        raise ConfigError(f"no weights: for {', '.join(trained)} and no checkpoint in {config.run.dir}: train first")
    for stem, module in stage.exports().items():
        checkpoint.load_weights(module, folder / f"{stem}.safetensors")


def obedience(stage: DiffusionStage, data: ImageData, config: RunConfig, device: torch.device) -> dict[str, float]:
    """Mean edge F1 against the (first) adapter's hint, seeds `config.seed + i` for item i."""
    name = next(iter(stage.uses))
    models = generate.Models(stage.denoiser, stage.vae, stage.text, stage.schedule, stage.objective)
    sampler = registry.build("sampler", config.sample.sampler, schedule=stage.schedule)
    g = config.sample.guidance
    guidance = GuidanceConfig(g.scale, g.rescale, g.start, g.end)
    maps: dict[str, list[Tensor]] = {"hint": [], "ground_truth": [], "adapter": [], "base": []}
    seen = 0
    for batch in tqdm(held_out(data, config.validation.items, config.sample.batch, device), desc="obedience"):
        hints = stage.hints(batch)
        seeds = [config.seed + seen + i for i in range(len(batch.keys))]
        size = (batch.image.shape[-2], batch.image.shape[-1])
        request = generate.Request(batch.text, seeds, size, guidance=guidance)
        maps["hint"].append(edge_map(hints[name]))
        maps["ground_truth"].append(edge_map(batch.image.float() * 0.5 + 0.5))
        for label, heard in (("adapter", hints), ("base", {})):
            drawn = generate.images(models, dataclasses.replace(request, hints=heard, uses=stage.uses), sampler)
            maps[label].append(edge_map(drawn))
        seen += len(batch.keys)
    edges = {label: torch.cat(parts) for label, parts in maps.items()}
    edges["chance"] = edges["ground_truth"].roll(1, 0)  # each beside the hint of its neighbour
    means = {
        f"edge_f1_{label}": edge_f1(e, edges["hint"]).mean().item() for label, e in edges.items() if label != "hint"
    }
    return means | {"edge_f1_ratio": means["edge_f1_adapter"] / means["edge_f1_base"], "edge_f1_items": float(seen)}
