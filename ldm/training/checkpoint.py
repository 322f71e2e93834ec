"""Checkpoints: a shareable safetensors file, the training state apart from it, a completeness marker last.

A checkpoint is written under a temporary name, flushed to disk and renamed, so a crash or a full disk leaves the old
ones as they were.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.registry import ConfigError, suggest

log = logging.getLogger(__name__)
MARKER = "COMPLETE"


def save(
    run: Path,
    step: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    metadata: Mapping[str, str],
    keep: int,
) -> Path:
    """Write `run/checkpoints/step-XXXXXXXX/` and then drop all but the newest `keep` complete ones.

    Args:
        run: run folder.
        step: optimizer steps done.
        weights: file stem ("model", "adapter") -> state dict to share.
        state: optimizer, EMA and whatever else exact resume needs; tensors and plain Python only.
        metadata: strings for the safetensors header.
        keep: how many complete checkpoints stay.

    Raises: ConfigError if the disk is full or not writable; older checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step-{step:08d}"
    temporary = target.with_name(target.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for stem, tensors in weights.items():
            contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            save_file(contiguous, temporary / f"{stem}.safetensors", metadata=dict(metadata))
        torch.save(dict(state), temporary / "training.pt")
        (temporary / MARKER).write_text(json.dumps({"step": step}))
        for file in temporary.iterdir():
            _flush(file)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _flush(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = "disk is full" if getattr(error, "errno", None) == errno.ENOSPC else str(error).splitlines()[0]
        raise ConfigError(
            f"checkpoint {target} could not be written ({reason}); older ones are intact: free space and start again"
        ) from error
    for old in complete(run)[:-keep] if keep else []:
        shutil.rmtree(old)
    return target


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (run / "checkpoints").glob(f"step-????????/{MARKER}"))


def latest(run: Path) -> Path | None:
    """Newest complete checkpoint, or None."""
    found = complete(run)
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint, read without executing pickled code."""
    return torch.load(folder / "training.pt", map_location="cpu", weights_only=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises: ConfigError if it is missing, truncated or of another format."""
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
        raise ConfigError(f"weights {path} do not exist{suggest(path.name, near)}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"weights {path} are not readable safetensors ({error}); download or train again") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The header strings of a safetensors file (config, step, ...)."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def find_weights(path: Path, stems: Sequence[str]) -> Path:
    """A safetensors file itself; for a run folder, the first of `stems` in its newest complete checkpoint.

    Raises: ConfigError if the run has no complete checkpoint, or none of the files.
    """
    if not path.is_dir():
        return path
    folder = latest(path)
    if folder is None:
        raise ConfigError(f"weights {path} is a folder without a complete checkpoint; train it first, or name a file")
    for stem in stems:
        if (file := folder / f"{stem}.safetensors").is_file():
            return file
    there = ", ".join(p.name for p in sorted(folder.glob("*.safetensors")))
    raise ConfigError(f"weights {folder} has {there}; wanted {' or '.join(stems)}.safetensors")


def load_weights(module: nn.Module, path: Path, prefix: str = "", stems: Sequence[str] = ("model",)) -> None:
    """Load weights into a module, strictly.

    Args:
        module: receives the weights; its dtype stays.
        path: safetensors file, or a run folder, whose newest complete checkpoint is meant.
        prefix: only keys that start with it are used, without it (e.g. "text." of a CLIP file).
        stems: names of the file within a run's checkpoint, in order of preference.

    Raises: ConfigError with the missing, unexpected and mis-shaped keys, grouped.
    """
    tensors = read_weights(find_weights(path, stems))
    load_tensors(module, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}, str(path))


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Strict `load_state_dict` with a one-line report. Raises: ConfigError as `load_weights`."""
    own = module.state_dict()
    shapes = {
        f"{k} {tuple(tensors[k].shape)} (expected {tuple(own[k].shape)})"
        for k in own.keys() & tensors.keys()
        if own[k].shape != tensors[k].shape
    }
    groups = {"missing": own.keys() - tensors.keys(), "unexpected": tensors.keys() - own.keys(), "mis-shaped": shapes}
    if any(groups.values()):
        said = "; ".join(f"{len(keys)} {kind}: {_few(keys)}" for kind, keys in groups.items() if keys)
        raise ConfigError(f"weights {source} are of another architecture than {type(module).__name__} ({said})")
    module.load_state_dict(dict(tensors))


def _few(keys: set[str] | Any, n: int = 3) -> str:
    listed = sorted(keys)
    return ", ".join(listed[:n]) + (f", ... {len(listed) - n} more" if len(listed) > n else "")
