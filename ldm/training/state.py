"""Everything that changes during training, and its way into a checkpoint and back."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import config as config_module
from ldm.config import RunConfig
from ldm.config_yaml import flat
from ldm.registry import ConfigError
from ldm.training import checkpoint, shards
from ldm.training.distributed import Rank, fit, whole
from ldm.training.ema import EMA
from ldm.training.metrics import git_revision
from ldm.training.stage import Stage

log = logging.getLogger(__name__)
UNREAD = ("run", "sample", "grid", "out", "train.allow_changes")  # training does not read them
FREE = (  # in these a run may differ when it goes on, and says so: what is computed stays the same but for rounding
    *("checkpoint", "log", "validation", "evaluation", "device", "deterministic", "train.steps", "train.init_from"),
    *("train.micro_batch", "train.shard", "train.checkpoint_activations", "train.workers", "train.worker_timeout"),
    *("train.rank_timeout", "train.threads", "train.max_nonfinite", "train.compile"),
    *("stage.preview_steps", "stage.preview_guidance", "stage.cache_dir"),
    *("data.memory", "data.max_bad"),
)
SAVED = {"step", "skipped", "config", "names", "parameters", "buffers", "optimizers", "ema", "scaler"}
WAY_OUT = "use the config of that run, or another run.dir (train.init_from takes over its weights)"
ALLOW = "to go on with the change, train.allow_changes=true"


@dataclass
class State:
    """Everything that changes during training."""

    optimizers: dict[str, torch.optim.AdamW]
    parameters: dict[str, dict[str, nn.Parameter]]  # player -> name in its module -> trainable parameter
    ema: EMA | None
    scaler: torch.amp.GradScaler
    step: int = 0
    skipped: int = 0  # steps whose gradients were not finite
    skipped_in_a_row: int = 0
    samples: dict[str, int] = field(default_factory=dict)  # of the data set: how many of each size
    inputs: dict[str, str] = field(default_factory=dict)  # frozen networks and data: sums that tell others
    window: list[dict[str, Tensor]] = field(default_factory=list)  # scalars since the last log line, on the device
    keys: list[list[str]] = field(default_factory=list)  # sample keys of the same steps


def save(config: RunConfig, stage: Stage, state: State, run: Path, rank: Rank) -> None:
    """Write a checkpoint: shared weights are the averaged ones where there is an EMA. All ranks call and wait for it.

    Raises: as `checkpoint.save`, on all ranks.
    """
    failure: ConfigError | None = None
    try:
        _save(config, stage, state, run, rank)
    except ConfigError as error:
        failure = error
    if (told := rank.told(failure) or failure) is not None:
        raise told


def _save(config: RunConfig, stage: Stage, state: State, run: Path, rank: Rank) -> None:
    training, parts = shards.take(_training(config, stage, state))
    if not (rank.main or parts):
        return
    with state.ema.swapped() if state.ema else nullcontext():
        weights = {stem: _shared(module, rank) for stem, module in stage.exports().items()}
    metadata = {"config": config_module.dump(config), "step": str(state.step), "git": git_revision()}
    keep = checkpoint.Keep(config.checkpoint.keep_last, config.checkpoint.keep_every)
    pieces = checkpoint.Pieces(rank, parts) if parts else None
    checkpoint.save(run, state.step, weights, training, metadata, keep, pieces)


def _shared(module: nn.Module, rank: Rank) -> dict[str, Tensor]:
    """Copies of a module's weights, whole, for rank 0 to write; the other ranks only give their shards."""
    copies: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        gathered = whole(value)
        if rank.main:
            copies[name] = gathered.clone() if gathered is value else gathered.cpu()
    return copies


def _training(config: RunConfig, stage: Stage, state: State) -> dict[str, Any]:
    """What exact resume needs; no copies. `SAVED` names its keys."""
    return {
        "step": state.step,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "config": config_module.plain(config),
        "cwd": os.getcwd(),  # of the config's paths
        "samples": state.samples,
        "inputs": state.inputs,
        "names": {player: list(ps) for player, ps in state.parameters.items()},
        "parameters": {player: [p.detach() for p in ps.values()] for player, ps in state.parameters.items()},
        "buffers": _buffers(stage),
        "optimizers": {player: o.state_dict() for player, o in state.optimizers.items()},
        "ema": state.ema.state_dict() if state.ema else None,
        "scaler": state.scaler.state_dict(),
    }


def restore(state: State, stage: Stage, config: RunConfig, folder: Path) -> None:
    """Put a checkpoint's training state back.

    Raises: ConfigError if it is of another run than this config's, or damaged.
    """
    saved = checkpoint.read_state(folder)
    if missing := sorted(SAVED - saved.keys()):
        raise ConfigError(f"{folder} has no {', '.join(missing)} in its training state; {WAY_OUT}")
    _check_config(saved, state, config, folder)
    _check(saved, state, stage, folder)
    saved = shards.fill(saved, folder / checkpoint.SHARDS, next(iter(state.parameters["model"].values())))
    with torch.no_grad():
        for player, parameters in state.parameters.items():
            for p, value in zip(parameters.values(), saved["parameters"][player], strict=True):
                p.copy_(fit(value, p))
            _load_optimizer(state.optimizers[player], saved["optimizers"][player])
        for name, buffer in _buffers(stage).items():
            buffer.copy_(saved["buffers"][name])
    if state.ema is not None:
        state.ema = EMA(stage.trained, state.ema.decay)  # anew: the first one averages the initial weights
        if saved["ema"] is None:
            log.warning("train.ema is new to %s: averages start from its weights at step %d", folder, saved["step"])
        else:
            fitted = {name: fit(saved["ema"]["weights"][name], mean) for name, mean in state.ema.weights.items()}
            state.ema.load_state_dict(saved["ema"] | {"weights": fitted})
    if saved["scaler"]:  # empty unless that run was fp16
        state.scaler.load_state_dict(saved["scaler"])
    state.step, state.skipped = saved["step"], saved["skipped"]
    state.skipped_in_a_row = saved.get("skipped_in_a_row", 0)


def _check_config(saved: Mapping[str, Any], state: State, config: RunConfig, folder: Path) -> None:
    """Refuse a config, or a data set, that makes another run of it, unless that is allowed; name what changed."""
    changes = _differences(saved["config"], config, saved.get("cwd", "."))
    had = saved.get("samples", state.samples)  # runs before they were counted
    for size in sorted({size for size, _ in had.items() ^ state.samples.items()}):
        what = f"data with samples of {size}" if size else "data with samples"
        changes[f"data {size}"] = f"{what}={had.get(size, 0)}, not {state.samples.get(size, 0)}"
    known = saved.get("inputs", {})
    for name, now in state.inputs.items():
        if (then := known.get(name, now)) != now:
            changes[f"content {name}"] = f"another content of {name} ({then[:12]}, not {now[:12]})"
    free = [key for key in FREE if key != "train.steps" or config.train.decay == "constant"]  # decay goes by the steps
    refused = [change for key, change in changes.items() if not _within(key, free)]
    if refused and not config.train.allow_changes:
        raise ConfigError(f"{folder} is of a run with {'; '.join(refused)}; {WAY_OUT}; {ALLOW}")
    for change in changes.values():
        log.info("changed since %s: %s", folder.name, change)


def _check(saved: Mapping[str, Any], state: State, stage: Stage, folder: Path) -> None:
    """Refuse another run's state before anything is changed."""
    if saved["parameters"].keys() != state.parameters.keys():
        theirs, ours = (", ".join(x["parameters"]) for x in (saved, vars(state)))
        raise ConfigError(f"{folder} trains {theirs}, this config {ours}; {WAY_OUT}")
    for player, parameters in state.parameters.items():
        names = saved["names"][player]
        if other := sorted(set(names) ^ set(parameters)):
            raise ConfigError(f"{folder} and this config do not both train {other[0]!r} of {player!r}; {WAY_OUT}")
        shapes = [tuple(p.shape) for p in saved["parameters"][player]]
        if names != list(parameters) or shapes != [tuple(p.shape) for p in parameters.values()]:
            raise ConfigError(
                f"{folder} trains {len(shapes)} tensors of {player!r}, this config {len(parameters)} (or of other "
                f"shapes or order); {WAY_OUT}"
            )
    ours, theirs = ({n: tuple(b.shape) for n, b in bs.items()} for bs in (_buffers(stage), saved["buffers"]))
    if other := sorted(dict(ours.items() ^ theirs.items())):
        raise ConfigError(f"{folder} has another buffer {other[0]!r} than this config; {WAY_OUT}")
    if saved["ema"] is not None and state.ema is None:
        raise ConfigError(f"{folder} has EMA weights that train.ema=null would drop; set train.ema, or another run.dir")


def _differences(theirs: Mapping[str, Any], config: RunConfig, cwd: str) -> dict[str, str]:
    """Keys that the config has otherwise than a saved one, with both values. `cwd`: where that one's paths are from."""
    old = flat(config_module.plain(RunConfig())) | flat(theirs)
    new = flat(config_module.plain(config))
    keys = [k for k in sorted(old.keys() | new.keys()) if not _within(k, UNREAD)]
    return {k: f"{k}={old.get(k)!r}, not {new.get(k)!r}" for k in keys if not _same(old.get(k), new.get(k), cwd)}


def _within(key: str, among: Sequence[str]) -> bool:
    return f"{key}.".startswith(tuple(f"{group}." for group in among))


def _same(old: Any, new: Any, cwd: str) -> bool:
    """Whether two values are equal, or texts that are the same file: the old one as seen from `cwd`."""
    if old == new or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    return os.path.realpath(os.path.join(cwd, old)) == os.path.realpath(new)


def _buffers(stage: Stage) -> dict[str, Tensor]:
    return {f"{player}.{n}": b for player, module in stage.players.items() for n, b in module.named_buffers()}


def _load_optimizer(optimizer: torch.optim.AdamW, saved: Mapping[str, Any]) -> None:
    """Moments from the checkpoint, settings (betas, weight decay) from the config."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    moments: dict[int, dict[str, Tensor]] = {}
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for i, p in zip(group["params"], own["params"], strict=True):
            moments[i] = {name: _laid_out(x, p) for name, x in saved["state"].get(i, {}).items()}
    optimizer.load_state_dict({**saved, "state": {i: m for i, m in moments.items() if m}})
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _laid_out(moment: Tensor, p: Tensor) -> Tensor:
    """A moment in the memory format of its parameter, in shards as that is: fused AdamW goes through both in step.

    They differ where a run goes on with shards, which are not channels-last, or without.
    """
    return torch.empty_like(p, dtype=moment.dtype).copy_(fit(moment, p)) if moment.ndim else moment
