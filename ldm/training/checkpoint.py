"""Checkpoints: a shareable safetensors file, the training state apart from it, a completeness marker last.

A checkpoint is written under a temporary name, flushed to disk and renamed, so a crash or a full disk leaves the old
ones as they were.
"""

import errno
import json
import logging
import os
import pickle
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ldm.convert import files, slots
from ldm.convert.keymap import grouped, nearest
from ldm.convert.model import not_finite
from ldm.registry import ConfigError
from ldm.training import shards
from ldm.training.distributed import Rank, is_lost

log = logging.getLogger(__name__)
MARKER = "COMPLETE"
TEMPORARY, DAMAGED = ".tmp", ".damaged"  # endings of folders that are no checkpoints: not whole yet, or put aside
SHARDS = "shards"  # folder of the tensors in shards, where the run had any
NOTHING: Mapping[str, str] = MappingProxyType({})


def save(
    run: Path,
    step: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    metadata: Mapping[str, str],
    keep: "Keep",
    pieces: "Pieces | None" = None,
) -> Path:
    """Write `run/checkpoints/step-XXXXXXXX/` and then drop the complete ones before it that `keep` does not name.

    Called by one process; where there are pieces, by all ranks at once, of which rank 0 writes all else.

    Args:
        run: run folder.
        step: optimizer steps done.
        weights: file stem ("model", "adapter") -> state dict to share.
        state: optimizer, EMA and whatever else exact resume needs; tensors and plain Python only.
        metadata: strings for the safetensors header.
        keep: which complete checkpoints stay.
        pieces: tensors in shards, which each rank writes its own part of.

    Raises: ConfigError if the disk is too full or not writable; older checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step-{step:08d}"
    temporary = target.with_name(target.name + TEMPORARY)
    try:
        if pieces is None:
            _make_room(temporary, size([weights, state]))
        else:
            _make_room_for_all(temporary, size([weights, state, pieces.shards]), pieces.rank)
            shards.write(temporary / SHARDS, pieces.shards)
            if not pieces.rank.main:
                return target
        for stem, tensors in weights.items():
            files.write(temporary / f"{stem}.safetensors", tensors, metadata)
        with (temporary / "training.pt").open("wb") as file:  # a Python file, so that a full disk stays an OSError
            torch.save(dict(state), file)
        sums = {path.relative_to(temporary).as_posix(): _sum(path) for path in temporary.rglob("*") if path.is_file()}
        (temporary / MARKER).write_text(json.dumps({"step": step, "crc32": sums}))
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        flush(target.parent)
    except (OSError, RuntimeError) as error:
        if is_lost(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(
            f"checkpoint {target} could not be written ({reason(error)}); older ones are intact: make room and retry"
        ) from error
    for old in keep.dropped([folder for folder in complete(run) if _step(folder) <= step]):
        _drop(old)
    return target


@dataclass(frozen=True, slots=True)
class Pieces:
    """Tensors in shards, the same on every rank, and which rank this is."""

    rank: Rank
    shards: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Keep:
    """Which complete checkpoints stay: the newest `last`, and those of every `every` steps."""

    last: int = 2
    every: int | None = None

    def dropped(self, found: Sequence[Path]) -> list[Path]:
        """Those of `found`, oldest first, that do not stay."""
        return [old for old in found[: -self.last] if not self.every or _step(old) % self.every]


def _drop(folder: Path) -> None:
    """Remove a checkpoint, which is none from the first moment on; where that fails, the run has a new one and goes on.

    What is left of it goes when the run is started again: see `clear`.
    """
    temporary = folder.with_name(folder.name + TEMPORARY)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.replace(folder, temporary)
        shutil.rmtree(temporary)
    except OSError as error:
        log.warning("checkpoint %s, which is not kept, could not be removed (%s): remove it", folder, reason(error))


def clear(run: Path) -> None:
    """Remove what killed saves left of checkpoints; nobody else may be writing any."""
    for left in (run / "checkpoints").glob(f"step-*{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def size(tree: Any) -> int:
    """Bytes of all tensors in a tree; of shards, on all ranks together."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _make_room(folder: Path, needed: int) -> None:
    """Make an empty folder. Raises: OSError if it cannot be made, or the disk has less room than the tensors take."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    check_room(folder, needed)


def _make_room_for_all(folder: Path, needed: int, rank: Rank) -> None:
    """`_make_room` by rank 0, whose error all ranks raise: none of them waits for shards that it will not write."""
    failure: OSError | None = None
    if rank.main:
        try:
            _make_room(folder, needed)
        except OSError as error:
            failure = error
    if (told := rank.told(failure)) is not None:
        raise told


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError where a disk has less room than the tensors take."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")


def _sum(path: Path) -> int:
    """CRC-32 of a file: finds what a disk or a transfer did to it, not what an attacker did."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total = zlib.crc32(block, total)
    return total


def damage(folder: Path) -> str:
    """What is wrong with a complete checkpoint's files, read whole; empty if nothing is.

    Checkpoints from before sums were kept count as sound.
    """
    try:
        sums = json.loads((folder / MARKER).read_text()).get("crc32", {})
        wrong = [name for name, value in sums.items() if _sum(folder / name) != value]
    except (OSError, ValueError, AttributeError) as error:
        return str(error).splitlines()[0]
    return f"{wrong[0]} is not what was written" if wrong else ""


def reason(error: BaseException) -> str:
    """Why writing failed; safetensors and torch wrap the system's error in their own."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in str(cause):
            needs = str(cause).partition("needs ")[2]
            return f"disk is full: needs {needs}" if needs else "disk is full"
        cause = cause.__context__
    return str(error).splitlines()[0]


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises: OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path.parent for path in (run / "checkpoints").glob(f"step-*/{MARKER}")]
    return sorted((folder for folder in found if folder.name.removeprefix("step-").isdecimal()), key=_step)


def latest(run: Path) -> Path | None:
    """Newest complete checkpoint, or None."""
    found = complete(run)
    return found[-1] if found else None


def latest_sound(run: Path) -> Path | None:
    """Newest complete checkpoint whose files are as they were written, or None; those after it are put aside.

    Only for a training that goes on there: a damaged one is renamed, so that it never counts as one to keep.

    Raises: ConfigError if there are checkpoints and all are damaged, which stay as they are.
    """
    passed: dict[Path, str] = {}
    for folder in reversed(complete(run)):
        if not (wrong := damage(folder)):
            for old, why in passed.items():
                _put_aside(old, why)
            return folder
        passed[folder] = wrong
    for folder, wrong in passed.items():
        log.warning("%s is damaged (%s)", folder, wrong)
    if passed:
        raise ConfigError(f"all {len(passed)} checkpoints of {run} are damaged; restore one, or use another run.dir")
    return None


def _put_aside(folder: Path, wrong: str) -> None:
    """Rename a damaged checkpoint, in place of what was put aside of the same step before."""
    aside = folder.with_name(folder.name + DAMAGED)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        done = f"is put aside as {aside.name}"
    except OSError as error:
        done = f"could not be put aside as {aside.name} ({reason(error)})"
    log.warning("%s is damaged (%s) and passed over; it %s", folder, wrong, done)


def read_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint, read without executing pickled code. Raises: ConfigError if damaged."""
    path = folder / "training.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{path} is not readable ({reason}); move {folder} away to continue from the checkpoint before it"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The header strings of a safetensors file (config, step, ...)."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def find_weights(path: Path, stems: Sequence[str], parts: Mapping[str, str] = NOTHING) -> Path:
    """What to read: a file itself; for a run folder, the first of `stems` in its newest complete checkpoint.

    Args:
        path: file, run folder, or (with `parts`) a folder of models such as diffusers'.
        stems: names of the file within a run's checkpoint, in order of preference.
        parts: the networks wanted of published files, as `ldm.convert.slots.parts` gives.

    Returns: a file; a folder of models only where the slot needs several of them.
    Raises: ConfigError if the run has no complete checkpoint, or none of the files.
    """
    if not path.is_dir():
        return path
    folder = latest(path)
    if folder is None and parts and not (path / "checkpoints").is_dir():
        return slots.locate(path, parts)
    if folder is None:
        raise ConfigError(f"weights {path} is a folder without a complete checkpoint; train it first, or name a file")
    for stem in stems:
        if (file := folder / f"{stem}.safetensors").is_file():
            return file
    there = ", ".join(p.name for p in sorted(folder.glob("*.safetensors")))
    raise ConfigError(f"weights {folder} has {there}; wanted {' or '.join(stems)}.safetensors")


def load_weights(
    module: nn.Module,
    path: Path,
    prefix: str = "",
    stems: Sequence[str] = ("model",),
    parts: Mapping[str, str] = NOTHING,
    may_lack: tuple[str, ...] = (),
) -> None:
    """Load weights into a module, strictly.

    Args:
        module: receives the weights; its dtype stays.
        path: file or folder, as `find_weights` takes it.
        prefix: only keys that start with it are used, without it (e.g. "text." of a CLIP file).
        stems: as `find_weights`.
        parts: as `find_weights`; with them, files in published layouts are read as well.
        may_lack: prefixes of tensors that stay as they are where the file has none of them.

    Raises: ConfigError with the missing, unexpected and mis-shaped keys, grouped.
    """
    file = find_weights(path, stems, parts)
    tensors = slots.state(file, module, prefix, parts)
    try:
        own = {k: v for k, v in module.state_dict().items() if k.startswith(may_lack)}
        load_tensors(module, tensors if own.keys() & tensors.keys() else own | tensors, str(path))
    except ConfigError as error:
        if found := slots.found(file, parts):
            wanted = slots.wanted(module, parts)
            raise ConfigError(f"{error}; found: {found}{wanted and f'; wanted: {wanted}'}") from error
        raise


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Strict `load_state_dict` with a one-line report. Raises: ConfigError as `load_weights`."""
    own = module.state_dict()
    both = own.keys() & tensors.keys()
    missing, unexpected = sorted(own.keys() - both), sorted(tensors.keys() - both)
    wrong = sorted(key for key in both if own[key].shape != tensors[key].shape)
    said: list[str] = []
    if missing:
        said.append(f"{len(missing)} missing: {grouped(missing, nearest(missing, unexpected))}")
    if unexpected:
        said.append(f"{len(unexpected)} unexpected: {grouped(unexpected, nearest(unexpected, missing))}")
    if wrong:
        key = wrong[0]
        shapes = f"{tuple(tensors[key].shape)} (expected {tuple(own[key].shape)})"
        said.append(f"{len(wrong)} mis-shaped: {key} {shapes}")
    if said:
        raise ConfigError(
            f"weights {source} are of another architecture than {type(module).__name__} ({'; '.join(said)}); "
            "change the config to theirs, or name other weights"
        )
    module.load_state_dict(dict(tensors))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def share(run: Path, out: Path, *, stem: str | None = None, dtype: str = "fp16", only: str = "") -> int:
    """Write the newest weights of a run as one safetensors file, with their config and step in the header.

    Args:
        run: run folder.
        out: .safetensors file to write, which must not exist.
        stem: which file of the checkpoint; None takes the only one.
        dtype: fp32 | bf16 | fp16 for floating-point tensors.
        only: write the tensors whose names begin so, under their whole names, e.g. "image.".

    Returns: bytes written.
    Raises: ConfigError if `out` exists or ends otherwise, there is no complete checkpoint, `stem` is needed, nothing
        is named `only`..., or values overflow the dtype.
    """
    if out.suffix != ".safetensors" or out.exists():
        found = "exists already" if out.exists() else "is no .safetensors file"
        raise ConfigError(f"{out} {found}; give the shared file a new name that ends in .safetensors")
    folder = latest(run)
    if folder is None:
        raise ConfigError(f"{run} has no complete checkpoint; train it first")
    stems = [p.stem for p in sorted(folder.glob("*.safetensors"))]
    if (stem is None and len(stems) != 1) or (stem is not None and stem not in stems):
        raise ConfigError(f"stem is {stem!r}; {folder} has {', '.join(stems)}: name one with --stem")
    source = folder / f"{stem or stems[0]}.safetensors"
    chosen = {k: v for k, v in files.read(source).items() if k.startswith(only)}
    if not chosen:
        raise ConfigError(f"only is {only!r}, but no tensor of {source} begins so; see convert.py inspect")
    tensors = {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in chosen.items()}
    if bad := not_finite(tensors):
        raise ConfigError(f"{source} as {dtype} is not finite in {grouped(bad)}; use --dtype bf16 or fp32")
    try:
        return files.write(out, tensors, read_metadata(source))
    except OSError as error:
        raise ConfigError(f"{out} could not be written ({reason(error)}); make room and retry") from error
