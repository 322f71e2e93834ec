"""What a run would need, before it needs it: parameter counts and training memory, without allocating either.

Models are built on the meta device. Activations are counted by running the stage's own forward on fake tensors, which
have shapes, types and devices but no data, and adding up what autograd keeps for backward.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm import build, registry
from ldm.config import RunConfig
from ldm.data.images import Batch
from ldm.precision import DTYPES, autocast
from ldm.registry import ConfigError
from ldm.training import clip, diffusion, optim, stream, vae  # noqa: F401  (stages register on import)
from ldm.training.draws import Draws
from ldm.training.stage import Stage, choose_trainable, networks, store_frozen

MIB = 2**20
CAPTION = "a photo"  # text encoders pad, so every caption costs the same


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the end of a forward pass, when most of them are held at once."""

    weights: int  # trained and frozen as the run stores them; buffers too
    gradients: int  # of the trained weights
    adamw_state: int  # two moments of the trained weights
    ema: int  # averaged copy of the trained weights
    activations: int  # kept for backward, casts of weights under autocast included

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.gradients + self.adamw_state + self.ema + self.activations


def dry_run(config: RunConfig) -> str:
    """Build the run's stage without memory; say what it holds and what training it takes.

    Neither data nor weight files need to exist.

    Returns: a table of parameters per model and an estimate of training memory, as text.
    Raises: ConfigError on anything in the config that does not fit.
    """
    stage = meta_stage(config)
    micro, accumulation = stream.split_batch(config.train, 1)
    memory = estimate(config, stage)
    title = f"memory of one device, {config.train.precision}, {micro} images per forward, accumulation {accumulation}"
    rows = {name.replace("_", " "): getattr(memory, name) for name in (*Memory.__slots__, "total")}
    lines = [f"{name:<24}{size / MIB:>12,.0f} MiB" for name, size in rows.items()]
    note = "on top: workspace of the kernels, the block being recomputed, the allocator's reserve, validation"
    return "\n".join([optim.table(nn.ModuleDict(networks(stage))), "", title, *lines, note])


def meta_stage(config: RunConfig) -> Stage:
    """The stage on the meta device, with `requires_grad` as the loop sets it. Raises: ConfigError as `build.stage`."""
    with torch.device("meta"):
        stage = build.stage(config)
    choose_trainable(stage, config.train.trainable)
    store_frozen(stage, DTYPES[config.train.precision])
    return stage


def estimate(config: RunConfig, stage: Stage) -> Memory:
    """Training memory of a meta stage. Raises: ConfigError if the data does not fit the models."""
    held = nn.ModuleDict(networks(stage))  # counts what several adapters share once
    trained = _bytes(p for p in stage.parameters() if p.requires_grad)
    averaged = _bytes(p for p in stage.trained.parameters() if p.requires_grad)
    return Memory(
        weights=_bytes([*held.parameters(), *held.buffers()]),
        gradients=trained,
        adamw_state=2 * trained,
        ema=averaged if config.train.ema else 0,
        activations=fake_activations(config, stage),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def fake_activations(config: RunConfig, stage: Stage) -> int:
    """Bytes kept for backward by one forward of a meta stage: of the player that keeps most, if there are several.

    Counted for the CPU's kernels where there is no GPU. CUDA's autocast keeps the outputs of norms and softmax in
    float32, which adds some.
    """
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    stage = copy.deepcopy(stage)
    stage.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (as ldm.training.run does)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the noise schedule's tables are real
        stage = stage.to_empty(device=device).train()
        batch = blank_batch(config, device)
        try:
            return max(kept_for_backward(config, stage, batch, player) for player in stage.players)
        except ConfigError:
            raise
        except ValueError as error:  # a model's own check of its input
            raise ConfigError(f"data and models of this config do not fit: {error}") from error


def blank_batch(config: RunConfig, device: torch.device | str = "cpu") -> Batch:
    """A micro-batch of zeros with the sizes and hints of the config's data, which need not exist.

    Raises: ConfigError if the data node is missing or wrong.
    """
    if config.data is None:
        raise ConfigError("data is not set; include one of configs/data/*.yaml")
    options = registry.options("data", config.data)
    b, _ = stream.split_batch(config.train, 1)
    zeros = torch.zeros(b, 3, options.size, options.size, device=device)
    return Batch(
        keys=[str(i) for i in range(b)],
        image=zeros,
        text=[CAPTION] * b,
        hints={name: torch.zeros_like(zeros) for name in options.hints},
        reference=torch.zeros_like(zeros) if options.reference else None,
    )


def kept_for_backward(config: RunConfig, stage: Stage, batch: Batch, player: str = "model") -> int:
    """Bytes of distinct storages that autograd keeps after the stage's forward; parameters and buffers excepted.

    Works on fake and on real tensors. The step is the run's last, when every term of the loss is in play.
    """
    device = batch.image.device
    draws = Draws(config.seed, range(len(batch.keys)), device)
    with _saved_storages() as sizes, autocast(config.train.precision, device):
        loss = stage(batch, draws, player, config.train.steps - 1)
        own = {_address(t) for t in [*stage.parameters(), *stage.buffers()]}
        kept = sum(storage.nbytes() for address, storage in sizes.items() if address not in own)
    del loss  # until here its graph holds every storage, so no address is used twice
    return kept


@contextmanager
def _saved_storages() -> Iterator[dict[int, torch.UntypedStorage]]:
    """Storages of the tensors that operations inside the block save for backward, by address."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storages[_address(x)] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield storages


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata
