"""Held-out figures of a trained stage, and how well its adapters obey their hints."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ldm import build, generate, grid, registry
from ldm import config as config_module
from ldm.config import RunConfig
from ldm.data.images import Batch, ImageData, collate
from ldm.evaluation.edges import edge_map
from ldm.evaluation.fidelity import edge_f1
from ldm.guidance import GuidanceConfig
from ldm.training import distributed
from ldm.training.diffusion import DiffusionStage
from ldm.training.loop import PRECISIONS

PICTURES = 8


def evaluate(config: RunConfig) -> dict[str, float]:
    """Figures on `validation.data` (at most `validation.items`), written with a grid to `out.dir`.

    Protocol: the stage's own held-out figures; and, where there are adapters, edge F1 (1 pixel tolerance) between the
    edges of the samples and the edges of the hint, for samples with and without the adapter on the same seeds, for the
    ground truth (a ceiling), and for ground truth paired with another item's hint (chance).

    Raises: ConfigError if the config has no stage or no held-out data.
    """
    with distributed.session(config.device, config.train.threads) as rank:
        stage = build.stage(config).to(rank.device)
        stage.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)
        build.frozen(stage)
        data = build.data(config.validation.data, "validation.data")
        autocast = PRECISIONS[config.train.precision]
        with torch.autocast(rank.device.type, dtype=autocast, enabled=True) if autocast else nullcontext():
            report = stage.validate(batches(data, config, rank.device), PICTURES, config.seed)
            figures, columns = dict(report.figures), dict(report.columns)
            if isinstance(stage, DiffusionStage) and stage.uses:
                figures |= obedience(stage, data, config, rank.device)
    out = Path(config.out.dir)
    out.mkdir(parents=True, exist_ok=True)
    record = {"figures": figures, "config": config_module.dump(config), "torch": torch.__version__}
    (out / "eval.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    if columns:
        grid.save(columns, out / "grid.png")
    return figures


def batches(data: ImageData, config: RunConfig, device: torch.device) -> Iterator[Batch]:
    """The first `validation.items` held-out samples in batches of `sample.batch`."""
    subset = Subset(data, range(min(config.validation.items, len(data))))
    for batch in DataLoader(subset, batch_size=config.sample.batch, collate_fn=collate):
        yield batch.to(device)


def obedience(stage: DiffusionStage, data: ImageData, config: RunConfig, device: torch.device) -> dict[str, float]:
    """Mean edge F1 against the (first) adapter's hint, seeds `config.seed + i` for item i."""
    name, use = next(iter(stage.uses.items()))
    models = generate.Models(stage.denoiser, stage.vae, stage.text, stage.schedule, stage.objective)
    sampler = registry.build("sampler", config.sample.sampler, schedule=stage.schedule)
    g = config.sample.guidance
    guidance = GuidanceConfig(g.scale, g.rescale, g.start, g.end)
    scores: dict[str, list[Tensor]] = {"adapter": [], "base": [], "ground_truth": [], "chance": []}
    seen = 0
    for batch in tqdm(batches(data, config, device), desc="obedience"):
        hints = {n: batch.hints[u.hint or n] for n, u in stage.uses.items()}
        seeds = [config.seed + seen + i for i in range(len(batch.keys))]
        size = (batch.image.shape[-2], batch.image.shape[-1])
        drawn = {
            label: generate.images(
                models, batch.text, seeds, size=size, sampler=sampler, guidance=guidance, hints=h, uses=stage.uses
            )
            for label, h in (("adapter", hints), ("base", {}))
        }
        wanted = edge_map(batch.hints[use.hint or name])
        truth = edge_map(batch.image.float() * 0.5 + 0.5)
        for label, images in drawn.items():
            scores[label].append(edge_f1(edge_map(images), wanted))
        scores["ground_truth"].append(edge_f1(truth, wanted))
        scores["chance"].append(edge_f1(truth.roll(1, 0), wanted))
        seen += len(batch.keys)
    means = {f"edge_f1_{label}": torch.cat(values).mean().item() for label, values in scores.items()}
    return means | {"edge_f1_ratio": means["edge_f1_adapter"] / means["edge_f1_base"], "edge_f1_items": float(seen)}
