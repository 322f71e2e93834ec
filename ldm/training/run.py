"""A training run from its config: build everything, then the loop."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ldm import build
from ldm.config import RunConfig
from ldm.data.images import collate
from ldm.data.subset import Part
from ldm.registry import ConfigError
from ldm.training import clip, diffusion, distributed, loop, metrics, signals, vae, workers  # noqa: F401  (stages)

log = logging.getLogger(__name__)


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """Only algorithms that give the same bits each time; those that cannot raise RuntimeError. Restored at the end."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(on or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _refuse_shards(config: RunConfig) -> None:
    """Gathering a block's weights is no part of its graph. Raises: ConfigError if they are in shards."""
    if config.train.shard != "none":
        raise ConfigError(f"train.compile is on, and train.shard is {config.train.shard!r}; set one of them off")


def _warn_unheard(config: RunConfig) -> None:
    """Say which keys of adapters are set and change nothing in what is trained."""
    for name, use in build.uses(config).items():
        if use.unheard:
            keys = ", ".join(f"adapters.{name}.{key}" for key in use.unheard)
            log.warning("the loss does not read %s, which is for drawing: set it for sample.py, or leave it", keys)


@signals.listening()  # until all is closed
def train(config: RunConfig) -> Path:
    """Train what the config says, on all ranks of the current process group. Returns the last checkpoint's folder.

    Raises: ConfigError on anything in the config that does not fit; DataError if the data or their workers are lost;
        signals.Stopped if it was asked to.
    """
    try:
        with (
            _deterministic(config.deterministic),
            distributed.session(config.device, config.train.threads, config.train.rank_timeout) as rank,
            metrics.held(Path(config.run.dir), rank),
        ):
            _warn_unheard(config)
            torch.manual_seed(config.seed)  # initial weights; everything later draws from (seed, purpose, position)
            data = build.data(config.data)
            if config.train.items is not None:
                data = Part(data, config.train.items)
            held_out = build.data(config.validation.data, "validation.data") if config.validation.data else None
            stage = build.stage(config).to(rank.device)
            stage.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)
            if config.train.compile:
                _refuse_shards(config)
                build.compile_blocks(stage)
            for part in (data, held_out):
                if part is not None and len(part):
                    for group in part.groups().values():
                        stage.check(collate([part[group[0]]]).to(rank.device))
            with workers.named(workers.Workers(config.train.workers, config.train.worker_timeout)):
                return loop.train(config, stage, data, held_out, rank)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the GPU's memory is full ({reason}); lower train.micro_batch (now {config.train.micro_batch}), "
            "or set train.checkpoint_activations=true"
        ) from error
