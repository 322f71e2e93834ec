"""What a run would need, before it needs it: parameter counts and training memory, without allocating either.

Models are built on the meta device. Then the run is replayed on fake tensors, which have shapes, types and devices but
no data: the data set is encoded, one optimizer step taken and a checkpoint copied, by the code that does so in a run,
and the storages that are alive are added up all along. docs/memory.md says what that leaves out.
"""

import contextlib
import copy
import dataclasses
import io
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import Dataset

from ldm import build, registry
from ldm.config import RunConfig
from ldm.data.images import ImageData, Sample, collate
from ldm.precision import DTYPES, autocast
from ldm.registry import ConfigError
from ldm.training import cache, clip, diffusion, loop, optim, shards, stream, vae  # noqa: F401  (stages register on import)
from ldm.training.cache_folder import PART, ranges
from ldm.training.distributed import Rank, pick_device
from ldm.training.ema import EMA
from ldm.training.stage import Stage, choose_trainable, networks, store_frozen
from ldm.training.state import State
from ldm.training.tracking import Tracker, gradients_as, tensors

MIB = 2**20
CAPTION = "a photo"  # text encoders pad, so every caption costs the same
FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes alive on one device at one moment."""

    weights: int = 0  # trained and frozen as the run stores them; buffers too
    gradients: int = 0  # those that are there at that moment
    optimizer: int = 0  # AdamW: two moments of the trained weights
    ema: int = 0  # averaged copy of the trained weights
    data: int = 0  # batches of the step; encoded data set (stage.cache) in memory, if the device is the CPU
    activations: int = 0  # everything else: kept for backward, passing through, casts of weights under autocast

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))


def dry_run(config: RunConfig) -> str:
    """Build the run's stage without memory; say what it holds and what training it takes.

    Neither data nor weight files need to exist.

    Returns: a table of parameters per model and an estimate of training memory, as text.
    Raises: ConfigError on anything in the config that does not fit.
    """
    stage = meta_stage(config)
    micro, accumulation = stream.split_batch(config.train, 1)
    title = f"memory of one device, {config.train.precision}, {micro} images per forward, accumulation {accumulation}"
    peaks = estimate(config, stage)
    rows = [("MiB at the peak of", *peaks)]
    for name in (*(f.name for f in dataclasses.fields(Memory)), "total"):
        rows.append((name, *(f"{getattr(m, name) / MIB:,.0f}" for m in peaks.values())))
    lines = [f"{name:<24}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in rows]
    lines.append("on top: python and its libraries, workspace of the kernels, the allocator's reserve, validation")
    if peaks["encoding"].total and _length(config) is None:
        lines.append("and the encoded data set (stage.cache), whose size is not known: the data is not there")
    lines += _in_shards(config, stage)
    return "\n".join([optim.table(nn.ModuleDict(networks(stage))), "", title, *lines])


def _in_shards(config: RunConfig, stage: Stage) -> list[str]:
    """What of the table several ranks share out."""
    if config.train.shard == "none":
        return []
    shared, unit, rest = (f"{size / MIB:,.0f}" for size in shards.sizes(stage, config.train.shard))
    whole = "all of them" if config.train.shard == "optimizer" else f"{rest} MiB of them and one unit of at most {unit}"
    return [
        f"the table is one rank that holds all; with train.shard={config.train.shard} each of N ranks has 1/N of "
        f"{shared} MiB of weights, and of gradients, optimizer and ema; whole during a step are {whole}"
    ]


def meta_stage(config: RunConfig) -> Stage:
    """The stage on the meta device, with `requires_grad` as the loop sets it. Raises: ConfigError as `build.stage`."""
    with torch.device("meta"):
        stage = build.stage(config)
    choose_trainable(stage, config.train.trainable)
    store_frozen(stage, DTYPES[config.train.precision])
    return stage


def estimate(config: RunConfig, stage: Stage, world: int = 1) -> dict[str, Memory]:
    """Memory of a meta stage at the peaks of a run's parts: loading, encoding (if it caches), step, checkpoint.

    Args:
        config: of the run.
        stage: of `meta_stage`; it is left as it is.
        world: number of ranks that share the batch.

    Raises: ConfigError if the data does not fit the models.
    """
    device = pick_device(config.device if torch.cuda.is_available() else "cpu")
    micro, accumulation = stream.split_batch(config.train, world)
    length = _length(config) or 0
    data = Blanks(config, min(length or cache.ENCODE_BATCH, cache.ENCODE_BATCH))
    loading = Memory(weights=sum(FLOAT * t.numel() for t in _held(stage)))
    stage = copy.deepcopy(stage)
    stage.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (as ldm.training.run does)
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker(device, "activations") as tracker:  # tables are real
        replay = _Replay(config, stage.to_empty(device=device).train(), tracker)
        try:
            source, encoded, encoding = replay.encode(data, length)
            step = replay.step(source, micro, accumulation)
        except ConfigError:
            raise
        except ValueError as error:  # a model's own check of its input
            raise ConfigError(f"data and models of this config do not fit: {error}") from error
        kept = [dataclasses.replace(m, data=m.data + encoded) for m in (step, replay.checkpoint())]
    return {"loading": loading, "encoding": encoding, "step": kept[0], "checkpoint": kept[1]}


class Blanks(ImageData):
    """Black pictures with the hints and options of a config's data, which need not exist, and the largest of its sizes.

    No caption twice.
    """

    def __init__(self, config: RunConfig, length: int) -> None:
        """Raises: ConfigError if the data node is missing or wrong."""
        if config.data is None:
            raise ConfigError("data is not set; include one of configs/data/*.yaml")
        self.options: Any = registry.options("data", config.data)
        shapes = getattr(self.options, "shapes", ((self.options.size, self.options.size),))
        zeros = torch.zeros(3, *max(shapes, key=math.prod))
        pairing = getattr(self.options, "pairing", None)
        side = (pairing.size if pairing else 0) or self.options.size
        reference = torch.zeros(3, side, side) if self.options.reference else None
        hints = dict.fromkeys(self.options.hints, zeros)
        self.samples = [Sample(str(i), zeros, f"{CAPTION} {i}", hints, reference) for i in range(length)]

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """See ImageData.load."""
        return self.samples[index]

    def references(self, key: str) -> tuple[str, ...]:
        """See ImageData.references: each is its own."""
        return (key,) if self.options.reference else ()

    def reference(self, name: str) -> Tensor:
        """See ImageData.reference."""
        return self.samples[int(name)].image


def _length(config: RunConfig) -> int | None:
    """Of the data; None if it is not there."""
    try:
        length = len(build.data(config.data))
    except ConfigError:
        return None
    return min(length, config.train.items or length)


class _Replay:
    """A run on fake tensors, part by part."""

    def __init__(self, config: RunConfig, stage: Stage, tracker: Tracker) -> None:
        self.config = config
        self.stage = stage
        self.tracker = tracker
        self.rank = Rank(0, 1, tracker.device)
        self.on_disk = isinstance(stage, diffusion.DiffusionStage) and bool(stage.options.cache_dir)
        if isinstance(stage, diffusion.DiffusionStage):  # nothing is read or written
            stage.options = dataclasses.replace(stage.options, cache_dir=None)
        tracker.assign("weights", _held(stage))
        parameters = {
            player: {name: p for name, p in module.named_parameters() if p.requires_grad}
            for player, module in stage.players.items()
        }
        self.state = State(
            optimizers={player: optim.adamw(ps.values(), config.train) for player, ps in parameters.items()},
            parameters=parameters,
            ema=EMA(stage.trained, config.train.ema) if config.train.ema else None,
            scaler=torch.amp.GradScaler(tracker.device.type, enabled=False),
            step=config.train.steps - 1,  # the last, when every term of the loss is in play
        )
        tracker.assign("ema", [] if self.state.ema is None else self.state.ema.weights.values())

    def encode(self, data: ImageData, length: int) -> tuple[Dataset[Any], int, Memory]:
        """The stage's input, encoded if it asks for that; bytes of an encoded set of `length`; the peak of encoding."""
        rows: dict[str, float] = {}  # section -> bytes of a row
        peaks = [Memory()]

        def keep(name: str, count: int, make: cache.Make) -> cache.Rows:
            self.tracker.start()
            with contextlib.closing(make(ranges(count))) as made:
                parts = list(made)
            making = self._peak()
            rows[name] = sum(x.untyped_storage().nbytes() for x in tensors(parts)) / count
            part = int(rows[name] * min(PART, length))
            joining = dataclasses.replace(making, activations=part)  # a part's batches and the whole of it
            peak = max(making, joining, key=lambda memory: memory.total)
            kept = part if self.on_disk else int(sum(rows.values()) * length)  # with the sections before it
            peaks.append(dataclasses.replace(peak, data=kept))
            self.tracker.assign("data", tensors(parts))
            return parts

        self.stage.check(collate([data.load(0)]).to(self.rank.device))
        with autocast(self.config.train.precision, self.rank.device), contextlib.redirect_stderr(io.StringIO()):
            source = self.stage.cached(data, self.rank, keep=keep)  # stderr: its progress bar
        every = 0 if self.on_disk else int(sum(rows.values()) * length)
        return source, every, max(peaks, key=lambda memory: memory.total)

    def step(self, source: Any, micro: int, accumulation: int) -> Memory:
        """Peak of an optimizer step, not the first: the optimizer's moments are there."""
        for optimizer in self.state.optimizers.values():
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
            self.tracker.assign("optimizer", tensors([*optimizer.state.values()]))
        gather, n = getattr(source, "collate", collate), len(source)
        micro_batches: list[tuple[list[int], Any]] = []
        for first in range(min(2, accumulation)):  # from the second on, each finds the gradients of those before it
            rows = list(range(first * micro, (first + 1) * micro))
            micro_batches.append((rows, gather([source.load(i % n) for i in rows]).to(self.rank.device)))
        before = self.tracker.alive.get("data", 0)
        self.tracker.assign("data", tensors([_fields(batch) for _, batch in micro_batches]))
        read = self.tracker.alive.get("data", 0) - before
        self.tracker.start()
        parameters = [p for ps in self.state.parameters.values() for p in ps.values()]
        with gradients_as(self.tracker, "gradients", parameters):
            loop._step(self.stage, self.state, micro_batches, self.config, self.rank)
        peak = self._peak()
        return dataclasses.replace(peak, data=read * accumulation // len(micro_batches))

    def checkpoint(self) -> Memory:
        """Peak of copying what a checkpoint holds, behind a step: its gradients are there."""
        self.tracker.start()
        with self.state.ema.swapped() if self.state.ema else contextlib.nullcontext():
            copies = [v.clone() for m in self.stage.exports().values() for v in m.state_dict().values()]
        del copies
        return dataclasses.replace(self._peak(), data=0)

    def _peak(self) -> Memory:
        return Memory(**self.tracker.peak)


def _held(stage: Stage) -> list[Tensor]:
    """Parameters and buffers of all its models; what several adapters share is there once."""
    held = nn.ModuleDict(networks(stage))
    return [*held.parameters(), *held.buffers()]


def _fields(batch: Any) -> list[Any]:
    return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
