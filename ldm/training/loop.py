"""The training loop, one for every stage: batch -> loss -> step -> EMA -> log -> validate -> checkpoint."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm import config as config_module
from ldm import grid
from ldm.config import RunConfig
from ldm.data.images import ImageData, collate
from ldm.registry import ConfigError
from ldm.training import checkpoint, optim, stream
from ldm.training.distributed import Rank, wrap
from ldm.training.draws import Draws
from ldm.training.ema import EMA
from ldm.training.metrics import Metrics, describe_run, git_revision
from ldm.training.stage import Stage

log = logging.getLogger(__name__)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class State:
    """Everything that changes during training."""

    optimizers: dict[str, torch.optim.AdamW]
    parameters: dict[str, list[nn.Parameter]]
    ema: EMA | None
    scaler: torch.amp.GradScaler
    step: int = 0
    skipped: int = 0  # steps whose gradients were not finite
    skipped_in_a_row: int = 0
    window: list[dict[str, Tensor]] = field(default_factory=list)  # scalars since the last log line, on the device
    keys: list[list[str]] = field(default_factory=list)  # sample keys of the same steps


def train(config: RunConfig, stage: Stage, data: ImageData, held_out: ImageData | None, rank: Rank) -> Path:
    """Train until `train.steps`, continuing the newest complete checkpoint of the run folder if there is one.

    Args:
        config: the resolved config; `run.dir` receives everything.
        stage: what to train, on `rank.device`.
        data: training samples.
        held_out: validation samples, or None.
        rank: this process.

    Returns: the last checkpoint's folder.
    Raises: ConfigError on a config that does not fit, a full disk, or `train.max_nonfinite` bad steps in a row.
    """
    run = Path(config.run.dir)
    state = _start(config, stage, run, rank)
    wrapped = wrap(stage, rank, partial=stage.partial)
    source = stage.cached(data, rank.device)
    metrics = Metrics(run, config.log) if rank.main else None
    progress = tqdm(total=config.train.steps, initial=state.step, desc=run.name, disable=not rank.main, mininterval=1.0)
    clock = time.perf_counter()

    for micro_batches in stream.batches(source, config.train, rank, config.seed, state.step):
        stage.train()
        scalars = _step(wrapped, state, micro_batches, config, rank)
        state.step += 1
        state.window.append(scalars)
        state.keys.append([key for _, batch in micro_batches for key in batch.keys])
        progress.update()
        last = state.step == config.train.steps
        if state.step % config.log.every == 0 or last:
            values = _read_window(state, run, config, rank)
            elapsed, clock = time.perf_counter() - clock, time.perf_counter()
            values["images_per_s"] = config.train.batch * values.pop("steps") / elapsed
            if metrics:
                metrics.scalars(state.step, values)
                progress.set_postfix({k: f"{values[k]:.4g}" for k in ("loss", "images_per_s")})
        if held_out is not None and (state.step % config.validation.every == 0 or last):
            _validate(config, stage, state, held_out, metrics, run, rank)
            clock = time.perf_counter()
        if state.step % config.checkpoint.every == 0 or last:
            _save(config, stage, state, run, rank)
    progress.close()
    if metrics:
        metrics.close()
    done = checkpoint.latest(run)
    assert done is not None
    return done


def _start(config: RunConfig, stage: Stage, run: Path, rank: Rank) -> State:
    """Optimizers and EMA for the trainable parameters; resume if the run folder has a complete checkpoint."""
    if config.train.precision not in PRECISIONS:
        raise ConfigError(f"train.precision is {config.train.precision!r}; allowed: {', '.join(PRECISIONS)}")
    stream.split_batch(config.train, rank.world)  # refuse a batch that does not divide before anything is written
    folder = checkpoint.latest(run)
    if folder is None and config.train.init_from:
        checkpoint.load_weights(next(iter(stage.exports().values())), Path(config.train.init_from))
    stage.requires_grad_(False)
    parameters: dict[str, list[nn.Parameter]] = {}
    for player, module in stage.players.items():
        parameters[player] = optim.trainable(module, config.train.trainable if module is stage.trained else ["*"])
    fp16 = config.train.precision == "fp16"
    state = State(
        optimizers={player: optim.adamw(p, config.train) for player, p in parameters.items()},
        parameters=parameters,
        ema=EMA(stage.trained, config.train.ema) if config.train.ema else None,
        scaler=torch.amp.GradScaler(rank.device.type, enabled=fp16),
    )
    if folder is not None:
        _resume(state, stage, folder)
        log.info("continuing %s at step %d", folder, state.step)
    if rank.main:
        describe_run(config, run)
    rank.barrier()
    return state


def _step(
    wrapped: nn.Module, state: State, micro_batches: list[tuple[list[int], Any]], config: RunConfig, rank: Rank
) -> dict[str, Tensor]:
    """One optimizer step of every player on one global batch. Returns scalars on the device; no host sync."""
    scalars: dict[str, Tensor] = {}
    autocast = PRECISIONS[config.train.precision]
    n = len(micro_batches)
    for player, optimizer in state.optimizers.items():
        prefix = "" if player == "model" else f"{player}_"
        optimizer.param_groups[0]["lr"] = optim.lr_at(state.step, config.train)
        for each in state.optimizers.values():
            each.zero_grad(set_to_none=True)
        for i, (positions, batch) in enumerate(micro_batches):
            final = i == n - 1
            draws = Draws(config.seed, positions, rank.device)
            sync = nullcontext() if final or rank.world == 1 else wrapped.no_sync()  # pyright: ignore
            with sync:
                with torch.autocast(rank.device.type, dtype=autocast, enabled=autocast is not None):
                    loss = wrapped(batch, draws, player, state.step)
                state.scaler.scale(loss.total / n).backward()
            _accumulate(scalars, {f"{prefix}loss": loss.total, **loss.parts}, n)
        scalars[f"{prefix}grad_norm"] = _update(state, player, config)
    if state.ema is not None:
        state.ema.update()
    return scalars


def _update(state: State, player: str, config: RunConfig) -> Tensor:
    optimizer, parameters = state.optimizers[player], state.parameters[player]
    if not state.scaler.is_enabled():
        return optim.guarded_step(optimizer, parameters, config.train.clip)
    state.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.clip or math.inf)
    state.scaler.step(optimizer)
    state.scaler.update()
    return norm


def _accumulate(scalars: dict[str, Tensor], parts: Mapping[str, Tensor], n: int) -> None:
    for name, value in parts.items():
        scalars[name] = scalars.get(name, 0.0) + value.detach().float() / n  # pyright: ignore


def _read_window(state: State, run: Path, config: RunConfig, rank: Rank) -> dict[str, float]:
    """Bring the scalars since the last log line to the host (the only sync); average finite steps, note the rest."""
    names = [n for n in state.window[-1] if all(n in w for w in state.window)]  # parts may begin within a window
    rows = rank.mean(torch.stack([torch.stack([w[n] for n in names]) for w in state.window])).tolist()
    finite = [all(math.isfinite(v) for v in row) for row in rows]
    for offset, (row, good) in enumerate(zip(rows, finite, strict=True)):
        state.skipped_in_a_row = 0 if good else state.skipped_in_a_row + 1
        if good:
            continue
        state.skipped += 1
        step = state.step - len(rows) + offset
        _dump(run, rank, step, dict(zip(names, row, strict=True)), state.keys[offset])
        if state.skipped_in_a_row >= config.train.max_nonfinite:
            raise ConfigError(
                f"gradients were not finite for {state.skipped_in_a_row} steps in a row (last: step {step}); weights "
                f"are those before them. See {run / 'nonfinite'}; lower train.lr, or set train.precision=fp32"
            )
    kept = [row for row, good in zip(rows, finite, strict=True) if good]
    values = {n: sum(r[i] for r in kept) / len(kept) for i, n in enumerate(names)} if kept else {"loss": math.nan}
    values |= {"lr": optim.lr_at(state.step - 1, config.train)}
    values |= {"skipped": float(state.skipped), "steps": float(len(rows))}
    state.window.clear()
    state.keys.clear()
    return values


def _dump(run: Path, rank: Rank, step: int, scalars: dict[str, float], keys: list[str]) -> None:
    folder = run / "nonfinite"
    folder.mkdir(exist_ok=True)
    record = {"step": step, "scalars": {k: repr(v) for k, v in scalars.items()}, "samples": keys}
    (folder / f"step-{step:08d}-rank{rank.index}.json").write_text(json.dumps(record, indent=1))
    log.warning("step %d: gradients not finite, step skipped; samples in %s", step, folder)


def _validate(
    config: RunConfig, stage: Stage, state: State, held_out: ImageData, metrics: Metrics | None, run: Path, rank: Rank
) -> None:
    """Figures and pictures of the EMA weights, by rank 0."""
    if metrics is not None:
        stage.eval()
        autocast = PRECISIONS[config.train.precision]
        averaged = state.ema.swapped() if state.ema else nullcontext()
        with averaged, torch.autocast(rank.device.type, dtype=autocast, enabled=autocast is not None):
            batches = _held_out_batches(held_out, config, rank)
            report = stage.validate(batches, config.validation.images, config.seed)
        figures = {f"val_{k}": v for k, v in report.figures.items()}
        metrics.scalars(state.step, figures)
        log.info("step %d: %s", state.step, ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        if report.columns:
            grid.save(report.columns, run / "images" / f"step-{state.step:08d}.png")
    rank.barrier()


def _held_out_batches(held_out: Dataset[Any], config: RunConfig, rank: Rank) -> Iterator[Any]:
    n = min(config.validation.items, len(held_out))  # pyright: ignore[reportArgumentType]
    subset = torch.utils.data.Subset(held_out, range(n))
    for batch in DataLoader(subset, batch_size=min(32, config.train.batch), collate_fn=collate):
        yield batch.to(rank.device)


def _save(config: RunConfig, stage: Stage, state: State, run: Path, rank: Rank) -> None:
    """Write a checkpoint: shared weights are the averaged ones where there is an EMA."""
    if rank.main:
        averaged = state.ema.swapped() if state.ema else nullcontext()
        with averaged:
            weights = {stem: {k: v.clone() for k, v in m.state_dict().items()} for stem, m in stage.exports().items()}
        training = {
            "step": state.step,
            "skipped": state.skipped,
            "parameters": {player: [p.detach() for p in ps] for player, ps in state.parameters.items()},
            "buffers": {f"{player}.{n}": b for player, m in stage.players.items() for n, b in m.named_buffers()},
            "optimizers": {player: o.state_dict() for player, o in state.optimizers.items()},
            "ema": state.ema.state_dict() if state.ema else None,
            "scaler": state.scaler.state_dict(),
        }
        metadata = {"config": config_module.dump(config), "step": str(state.step), "git": git_revision()}
        checkpoint.save(run, state.step, weights, training, metadata, config.checkpoint.keep_last)
    rank.barrier()


def _resume(state: State, stage: Stage, folder: Path) -> None:
    """Put a checkpoint's training state back. Raises: ConfigError if its parameters are not this stage's."""
    saved = checkpoint.read_state(folder)
    for player, parameters in state.parameters.items():
        shapes = [tuple(p.shape) for p in parameters]
        theirs = [tuple(p.shape) for p in saved["parameters"].get(player, [])]
        if shapes != theirs:
            raise ConfigError(
                f"{folder} trains {len(theirs)} tensors of {player!r}, this config {len(shapes)} (or of other shapes); "
                "use the config of that run, or another run.dir"
            )
        with torch.no_grad():
            for p, value in zip(parameters, saved["parameters"][player], strict=True):
                p.copy_(value)
        state.optimizers[player].load_state_dict(saved["optimizers"][player])
    buffers = {f"{player}.{n}": b for player, m in stage.players.items() for n, b in m.named_buffers()}
    for name, value in saved["buffers"].items():
        buffers[name].copy_(value)
    if state.ema is not None and saved["ema"] is not None:
        state.ema.load_state_dict(saved["ema"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.skipped = saved["step"], saved["skipped"]
