"""The run folder: who has it, and its records: metrics.jsonl, its curves, pictures, wandb when switched on."""

import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ldm import config as config_module
from ldm.config import LogConfig, RunConfig
from ldm.registry import ConfigError
from ldm.training import checkpoint, curves, lock
from ldm.training.distributed import Rank

STARTS = "starts.jsonl"

log = logging.getLogger(__name__)


def git_revision() -> str:
    """Commit of the source tree (with "+" if modified), or "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        rev = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
        status = ["git", "status", "--porcelain", "-uno"]
        dirty = subprocess.run(status, cwd=root, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return rev.strip() + ("+" if dirty.strip() else "")


def refuse_foreign(run: Path) -> None:
    """Raises: ConfigError if the run folder is a file, or has files but is no run: they could be written over.

    `eval/` alone is welcome: evaluating shipped weights writes it before any training.
    """
    if run.exists() and not run.is_dir():
        raise ConfigError(f"run.dir is {run}, which is a file; name a folder")
    if run.is_dir() and not (run / STARTS).exists() and any(p.name not in ("eval", lock.NAME) for p in run.iterdir()):
        raise ConfigError(f"run.dir is {run}, which has files but no {STARTS}, so it is no run; name a new folder")


@contextmanager
def held(run: Path, rank: Rank) -> Iterator[None]:
    """Within, the run folder is this training's alone; what killed saves left in it is removed. All ranks call it.

    A folder that was made for it and in which no run began is removed at the end.

    Raises: ConfigError, on all ranks, if another training has it, it is no run, or it cannot be written.
    """
    refused, new, file = "", False, None
    if rank.main:
        try:
            refuse_foreign(run)
            new = not run.exists()
            run.mkdir(parents=True, exist_ok=True)
            end = "wait until that has ended, or name another run.dir"
            file = lock.take(run, lambda by: f"run.dir {run} is in use by another training (process {by}); {end}")
            checkpoint.clear(run)
        except ConfigError as error:
            refused = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
            refused = f"run.dir {run} could not be written ({reason}): make room, or name a folder that you may write"
    try:
        if refused := rank.told(refused):
            raise ConfigError(refused)
        yield
    finally:
        if file is not None:
            _leave(run, new)
            file.close()


def _leave(run: Path, new: bool) -> None:
    """Remove the traces of a training that was refused, while it still has the lock."""
    with suppress(OSError):
        if not (run / STARTS).exists():
            (run / lock.NAME).unlink()
            if new:
                run.rmdir()


def describe_run(config: RunConfig, run: Path) -> None:
    """Write `config.yaml` (resolved) and append command, git revision and environment to `starts.jsonl`."""
    run.mkdir(parents=True, exist_ok=True)
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }
    _append(run / STARTS, start)  # first: it marks the folder as a run
    (run / "config.yaml").write_text(config_module.dump(config), encoding="utf-8")


class Metrics:
    """Scalars of one run to `metrics.jsonl` and, when `log.wandb` says so, to wandb."""

    def __init__(self, run: Path, log: LogConfig, step: int = 0) -> None:
        """Open the records of a run that goes on after `step`; lines of later steps are dropped: they come again.

        Raises: ConfigError if `log.wandb` is unknown, or wandb is absent or refuses to start.
        """
        self.file = run / "metrics.jsonl"
        self.wandb: Any = None
        self._drawn = True  # whether the curves have every line
        if log.wandb not in ("disabled", "offline", "online"):
            raise ConfigError(f"log.wandb is {log.wandb!r}; allowed: disabled, offline, online")
        _forget_after(self.file, step)
        if log.wandb != "disabled":
            self.wandb = _start_wandb(run, log)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line: {"step": ..., **values}."""
        _append(self.file, {"step": step, **values})
        self._drawn = False
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def curves(self) -> None:
        """Draw what the file has so far, if there is anything new and something to draw with."""
        if not self._drawn and curves.available():
            curves.draw_curves(self.file.parent)
            self._drawn = True

    def picture(self, step: int, file: Path) -> None:
        """Show a validation picture in wandb, where it is on; the file itself stays in the run folder."""
        if self.wandb is not None:
            import wandb

            self.wandb.log({"validation": wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        """Draw the curves, and finish the wandb run, if any."""
        self.curves()
        if not curves.available():
            log.info("no %s in the run folder: matplotlib is not installed (extra plots)", curves.FILE)
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(run: Path, log: LogConfig) -> Any:
    """A wandb run under an id of its own, kept in the run folder: folders of the same name stay apart."""
    try:
        import wandb  # only when switched on: the import takes seconds
    except ImportError as error:
        raise ConfigError(
            f"log.wandb is {log.wandb!r}, but wandb is not installed; install it or disable it"
        ) from error
    file = run / "wandb-id.txt"
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    mode: Any = log.wandb
    own_id = file.read_text().strip()
    try:
        return wandb.init(project=log.project, name=run.name, id=own_id, dir=str(run), mode=mode, resume="allow")
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"wandb did not start ({reason}); log in, or set log.wandb=offline or disabled") from error


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and what a crash left of a line. The file is replaced whole or not at all."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
    if len(kept) < len(lines):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)


def _step(line: bytes) -> float:
    """Which step a line is of; of one that a power cut garbled, no step that comes."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
