"""The training loop, one for every stage: batch -> loss -> step -> EMA -> log -> checkpoint -> validate."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ldm import grid
from ldm.config import RunConfig
from ldm.control import Adapter
from ldm.data import subset
from ldm.data.images import ImageData
from ldm.evaluation.adherence import Judges, adherence, judges
from ldm.precision import DTYPES, autocast
from ldm.registry import ConfigError
from ldm.training import cache_key, checkpoint, optim, shards, signals, stream
from ldm.training import state as state_module
from ldm.training.distributed import Rank, in_shards, whole, wrap
from ldm.training.draws import Draws, generator
from ldm.training.ema import EMA
from ldm.training.learning import step_figures
from ldm.training.metrics import Metrics, describe_run
from ldm.training.moments import BFloat16AdamW
from ldm.training.stage import Stage, choose_trainable, networks, store_frozen
from ldm.training.state import State
from ldm.training.workers import Workers

log = logging.getLogger(__name__)


def train(config: RunConfig, stage: Stage, data: ImageData, held_out: ImageData | None, rank: Rank) -> Path:
    """Train until `train.steps`, continuing the newest complete checkpoint of the run folder if there is one.

    Args:
        config: the resolved config; `run.dir` receives everything.
        stage: what to train, on `rank.device`.
        data: training samples.
        held_out: validation samples, or None.
        rank: this process.

    Returns: the last checkpoint's folder.
    Raises: ConfigError on a config that does not fit, a full disk, or `train.max_nonfinite` bad steps in a row;
        signals.Stopped behind a checkpoint, or ahead of the first step, if any rank was asked to stop.
    """
    folder = Path(config.run.dir)
    state = _start(config, stage, data, folder, rank)
    if state.step >= config.train.steps and (done := checkpoint.latest(folder)):
        return done  # nothing to encode either
    _refuse_full(stage, state, folder, rank)
    wrapped = wrap(stage, rank, partial=stage.partial or config.deterministic)
    with autocast(config.train.precision, rank.device):
        source = stage.cached(data, rank, Workers(config.train.workers, config.train.worker_timeout))
    signals.heed(rank, "before its first step; what was complete is kept")
    measures = judges(config, stage.trained) if rank.main and held_out is not None else {}
    if rank.main and state.step < config.train.steps:
        describe_run(config, folder)  # after all that may refuse the config
    metrics = Metrics(folder, config.log, state.step) if rank.main else None
    bar = tqdm(total=config.train.steps, initial=state.step, desc=folder.name, disable=not rank.main, mininterval=1.0)
    clock = time.perf_counter()
    arriving = stream.Timed(stream.batches(source, config.train, rank, config.seed, state.step))
    with closing(metrics) if metrics else nullcontext(), bar as progress, closing(arriving):
        for micro_batches in arriving:
            stage.train()
            scalars = _step(wrapped, state, micro_batches, config, rank)
            state.step += 1
            state.window.append(scalars)
            state.keys.append([key for _, batch in micro_batches for key in batch.keys])
            progress.update()
            if _due(state, config.log.every, config):
                values = _read_window(state, folder, config, rank) | step_figures(state.optimizers, stage.trained, rank)
                elapsed, clock = time.perf_counter() - clock, time.perf_counter()
                values["images_per_s"] = config.train.batch * values.pop("steps") / elapsed
                values["data_wait"] = arriving.waited() / elapsed
                if metrics:
                    metrics.scalars(state.step, values)
                    progress.set_postfix({k: f"{values[k]:.4g}" for k in ("loss", "images_per_s") if k in values})
            paused = time.perf_counter()
            stopping = rank.any(bool(signals.asked())) and state.step < config.train.steps
            if stopping and state.window:
                _read_window(state, folder, config, rank)  # bad steps are counted and noted before the state is kept
            if stopping or _due(state, config.checkpoint.every, config):
                state_module.save(config, stage, state, folder, rank)
            if stopping:
                raise signals.stopped(f"at step {state.step} of {config.train.steps}; the checkpoint is written")
            if held_out is not None and _due(state, config.validation.every, config):  # after the checkpoint: may fail
                _validate(config, stage, state, held_out, measures, metrics, rank)
            clock += time.perf_counter() - paused
    done = checkpoint.latest(folder)
    assert done is not None
    return done


def _due(state: State, every: int, config: RunConfig) -> bool:
    """Whether something done every so many steps, and after the last one, is done now."""
    return state.step % every == 0 or state.step == config.train.steps


def _start(config: RunConfig, stage: Stage, data: ImageData, run: Path, rank: Rank) -> State:
    """Optimizers and EMA for the trainable parameters; resume if the run folder has a complete checkpoint."""
    _, accumulation = stream.split_batch(config.train, rank.world)  # refused before anything is written
    if accumulation > 1 and stage.whole_batch:
        raise ConfigError(
            f"train.micro_batch is {config.train.micro_batch}, which splits the batch into {accumulation} parts; "
            "this stage contrasts the samples of a batch: drop micro_batch, lower train.batch or use more ranks"
        )
    folder = rank.told(checkpoint.latest_sound(run) if rank.main else None)
    choose_trainable(stage, config.train.trainable)
    log.info("%s", optim.table(nn.ModuleDict(networks(stage))))
    if folder is None and config.train.init_from:
        _init_from(stage, Path(config.train.init_from))
    inputs = rank.told(_inputs(stage, data) if rank.main else {})
    store_frozen(stage, DTYPES[config.train.precision])
    shards.shard(stage, config.train.shard, rank)
    parameters = {
        player: {name: p for name, p in module.named_parameters() if p.requires_grad}
        for player, module in stage.players.items()
    }
    fp16 = config.train.precision == "fp16"
    state = State(
        optimizers={player: optim.adamw(p.values(), config.train) for player, p in parameters.items()},
        parameters=parameters,
        ema=EMA(stage.trained, config.train.ema) if config.train.ema else None,
        scaler=torch.amp.GradScaler(rank.device.type, enabled=fp16),
        samples={size: len(indices) for size, indices in stream.groups(data).items()},
        inputs=inputs,
    )
    if folder is not None:
        state_module.restore(state, stage, config, folder)
        log.info("continuing %s at step %d", folder, state.step)
    if state.step >= config.train.steps:
        log.info("%s is at step %d of %d: nothing is left to train", run, state.step, config.train.steps)
    return state


def _inputs(stage: Stage, data: ImageData) -> dict[str, str]:
    """Sums that tell whether a resumed run has the frozen weights and the data that it had."""
    return {f"the frozen {name}": total for name, total in cache_key.frozen(networks(stage)).items()} | {
        "the data (captions, names and sizes of files)": cache_key.outline(data)
    }


def _refuse_full(stage: Stage, state: State, run: Path, rank: Rank) -> None:
    """Refuse, before hours of encoding, a disk without room for what any checkpoint has; moments come on top."""
    failure: OSError | None = None
    if rank.main:
        shared = [module.state_dict() for module in stage.exports().values()]
        try:
            checkpoint.check_room(run, checkpoint.size([shared, state.parameters, state.ema and state.ema.weights]))
        except OSError as error:
            failure = error
    if failure := rank.told(failure):
        raise ConfigError(
            f"run.dir {run} has no room for a checkpoint ({failure.strerror}); make room, or name another"
        )


def _init_from(stage: Stage, path: Path) -> None:
    """Load what the stage exports: each part from its own file of a run folder, or the only part from a file."""
    exports = stage.exports()
    if len(exports) > 1 and not path.is_dir():
        raise ConfigError(
            f"train.init_from is {path}, but this stage trains {', '.join(exports)}; name a run folder that has them"
        )
    for stem, module in exports.items():
        may_lack = module.silent_parts if isinstance(module, Adapter) else ()
        checkpoint.load_weights(module, path, stems=(stem,), may_lack=may_lack)


@contextmanager
def _playing(state: State, player: str) -> Iterator[None]:
    """The other players' parameters take no gradient within: nobody would read it. DDP sees them as unused."""
    others = [p for name, ps in state.parameters.items() if name != player for p in ps.values()]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def _step(
    wrapped: nn.Module, state: State, micro_batches: list[tuple[list[int], Any]], config: RunConfig, rank: Rank
) -> dict[str, Tensor]:
    """One optimizer step of every player on one global batch. Returns scalars on the device; no host sync."""
    stage = cast("Stage", wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped)
    scalars: dict[str, Tensor] = {}
    n = len(micro_batches)
    if state.scaler.is_enabled():
        scalars["loss_scale"] = state.scaler.scale(torch.ones((), device=rank.device))  # pyright: ignore
    for player, optimizer in state.optimizers.items():
        prefix = "" if player == "model" else f"{player}_"
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(state.step, config.train)
        if isinstance(optimizer, BFloat16AdamW):
            optimizer.noise = generator(config.seed, f"rounding.{player}", state.step, rank.device)
        for each in state.optimizers.values():
            each.zero_grad(set_to_none=True)
        parts = [(batch, Draws(config.seed, positions, rank.device)) for positions, batch in micro_batches]
        if n > 1:
            with autocast(config.train.precision, rank.device), _playing(state, player):
                stage.survey(parts, player, state.step)
        for i, (batch, draws) in enumerate(parts):
            final = i == n - 1
            waits = isinstance(wrapped, DistributedDataParallel) and not final  # gradients in shards are never whole
            sync = cast("DistributedDataParallel", wrapped).no_sync() if waits else nullcontext()
            with sync, _playing(state, player):
                with autocast(config.train.precision, rank.device):
                    loss = wrapped(batch, draws, player, state.step)
                state.scaler.scale(loss.total / n).backward()
            _accumulate(scalars, {f"{prefix}loss": loss.total, **loss.parts}, n)
        scalars[f"{prefix}grad_norm"] = _update(state, player, config)
    if state.ema is not None:
        state.ema.update()
    return scalars


def _update(state: State, player: str, config: RunConfig) -> Tensor:
    optimizer, parameters = state.optimizers[player], list(state.parameters[player].values())
    if not state.scaler.is_enabled():
        return optim.guarded_step(optimizer, parameters, config.train.clip)
    state.scaler.unscale_(optimizer)
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.train.clip or math.inf))
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
        if not good and _searching(dict(zip(names, row, strict=True))):
            continue
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
    values = {n: sum(r[i] for r in kept) / len(kept) for i, n in enumerate(names)} if kept else {}
    values |= {"lr": optim.lr_at(state.step - 1, config.train)}
    values |= {"skipped": float(state.skipped), "steps": float(len(rows))}
    state.window.clear()
    state.keys.clear()
    return values


def _searching(scalars: Mapping[str, float]) -> bool:
    """Whether a step was skipped because fp16's loss scale is still coming down to where gradients fit: no fault."""
    bad = [name for name, value in scalars.items() if not math.isfinite(value)]
    return scalars.get("loss_scale", 0.0) > 1.0 and all(name.endswith("grad_norm") for name in bad)


def _dump(run: Path, rank: Rank, step: int, scalars: dict[str, float], keys: list[str]) -> None:
    folder = run / "nonfinite"
    folder.mkdir(exist_ok=True)
    record = {"step": step, "scalars": {k: repr(v) for k, v in scalars.items()}, "samples": keys}
    (folder / f"step-{step:08d}-rank{rank.index}.json").write_text(json.dumps(record, indent=1))
    log.warning("step %d: gradients not finite, step skipped; samples in %s", step, folder)


def _validate(
    config: RunConfig,
    stage: Stage,
    state: State,
    held_out: ImageData,
    measures: Judges,
    metrics: Metrics | None,
    rank: Rank,
) -> None:
    """Figures and pictures of the EMA weights, by rank 0; where they are in shards, all ranks run the same."""
    if metrics is not None or in_shards(stage):
        stage.eval()
        averaged = state.ema.swapped() if state.ema else nullcontext()
        gathered = shards.gathered(stage, config.train.shard) if in_shards(stage) else nullcontext()
        plain = (
            torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()
        )  # sizes of all kinds
        with averaged, gathered, plain, autocast(config.train.precision, rank.device):
            micro, _ = stream.split_batch(config.train, rank.world)  # what fits in memory
            batches = subset.held_out(held_out, config.validation.items, min(32, micro), rank.device)
            report = stage.validate(batches, config.validation.images, config.seed)
            scores = adherence(measures, report.drawn) if report.drawn else {}
        if metrics is None:
            return rank.barrier()
        figures = {f"val_{k}": v for k, v in (report.figures | scores).items()}
        metrics.scalars(state.step, figures)
        log.info("step %d: %s", state.step, ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        if report.columns:
            file = Path(config.run.dir) / "images" / f"step-{state.step:08d}.png"
            grid.save(report.columns, file)
            metrics.picture(state.step, file)
        metrics.curves()
    rank.barrier()
