"""Run folder records: metrics.jsonl, pictures, wandb when switched on."""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ldm import config as config_module
from ldm.config import LogConfig, RunConfig
from ldm.registry import ConfigError


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


def describe_run(config: RunConfig, run: Path) -> None:
    """Write `config.yaml` (resolved) and append command, git revision and environment to `starts.jsonl`."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config_module.dump(config), encoding="utf-8")
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
    _append(run / "starts.jsonl", start)


class Metrics:
    """Scalars of one run to `metrics.jsonl` and, when `log.wandb` says so, to wandb."""

    def __init__(self, run: Path, log: LogConfig) -> None:
        self.file = run / "metrics.jsonl"
        self.wandb: Any = None
        if log.wandb not in ("disabled", "offline", "online"):
            raise ConfigError(f"log.wandb is {log.wandb!r}; allowed: disabled, offline, online")
        if log.wandb != "disabled":
            import wandb  # only when switched on: the import takes seconds

            self.wandb = wandb.init(
                project=log.project, name=run.name, id=run.name, dir=str(run), mode=log.wandb, resume="allow"
            )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line: {"step": ..., **values}."""
        _append(self.file, {"step": step, **values})
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        """Finish the wandb run, if any."""
        if self.wandb is not None:
            self.wandb.finish()


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
