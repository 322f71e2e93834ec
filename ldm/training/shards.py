"""Training in shards (FSDP2): each rank keeps its part of the weights, gradients, moments and averages.

Rajbhandari et al. 2020 (arXiv:1910.02054), ZeRO stages 2 (`optimizer`) and 3 (`full`); Zhao et al. 2023
(arXiv:2304.11277). Frozen weights are whole on every rank, but for those of the trained network under `full`. torch's
own machinery is imported where it is used: that takes seconds, and most runs have no shards.
"""

import errno
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldm.models.unet import MidBlock
from ldm.registry import ConfigError
from ldm.training.distributed import Rank, is_shard
from ldm.training.stage import Stage

log = logging.getLogger(__name__)


def shard(stage: Stage, how: str, rank: Rank) -> None:
    """Share out the parameters, in place; `stage` is called as before. Optimizer and EMA come after.

    Args:
        stage: on its device, with `requires_grad` as it stays; rank 0's weights count, as in DDP.
        how: none | optimizer (whole weights during a step) | full (one block's weights at a time).
        rank: this process. A single one keeps everything.

    Raises: ConfigError on a stage that trains several networks in turn, or a lone number, which cannot be split.
    """
    if how == "none":
        return
    _refuse(stage, how)
    if rank.world == 1:
        log.info("train.shard is %s, but one rank has nobody to share with: it keeps everything", how)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ours = _ours(stage, how)
    for tensor in itertools.chain(stage.parameters(), stage.buffers()):
        same = tensor.detach().contiguous()
        dist.broadcast(same, src=0)
        tensor.data.copy_(same)
        if tensor in ours:
            tensor.data = same  # fully_shard takes no channels-last weights
    options: dict[str, Any] = {
        "mesh": init_device_mesh(rank.device.type, (rank.world,)),
        "ignored_params": set(stage.parameters()) - ours,
    }
    for unit in _units(stage.trained):
        if not ours.isdisjoint(unit.parameters()):
            fully_shard(unit, reshard_after_forward=how == "full", **options)
    fully_shard(stage, reshard_after_forward=False, **options)  # the rest is needed at once by the backward pass


def sizes(stage: Stage, how: str) -> tuple[int, int, int]:
    """Bytes of the weights that ranks share, of the largest unit that is gathered together, and of those in no unit.

    Raises: ConfigError as `shard`.
    """
    _refuse(stage, how)
    ours = _ours(stage, how)
    units = [sum(p.nbytes for p in unit.parameters() if p in ours) for unit in _units(stage.trained)]
    total = sum(p.nbytes for p in ours)
    return total, max(units, default=0), total - sum(units)


def _ours(stage: Stage, how: str) -> set[nn.Parameter]:
    return {p for p in stage.trained.parameters() if how == "full" or p.requires_grad}


def _refuse(stage: Stage, how: str) -> None:
    if len(stage.players) > 1:
        raise ConfigError(
            f"train.shard is {how!r}, but this stage trains {', '.join(stage.players)} in turn; set train.shard=none"
        )
    for name, parameter in stage.trained.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(
                f"train.shard is {how!r}, but {name} is one number, which cannot be split; set train.shard=none"
            )


def _units(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered together: the outermost modules in lists that have parts and are called; the middle block."""
    listed = isinstance(network, nn.ModuleList | nn.Sequential)
    for child in network.children():
        called = type(child).forward is not nn.Module.forward and any(True for _ in child.children())
        if isinstance(child, MidBlock) or (listed and called):
            yield child
        else:
            yield from _units(child)


@contextmanager
def gathered(stage: Stage, how: str) -> Iterator[None]:
    """Within, every weight is whole on every rank, so that any method may read it; all ranks enter and leave.

    Layers count their calls to foresee the next one, so all ranks also run the same within.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in stage.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(how == "full" and part is not stage, recurse=False)


def take(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree without its shards, for which tensors without data stand, and the shards by their place in it."""
    leaves, spec = pytree.tree_flatten_with_path(tree)
    shards = {_name(path): leaf for path, leaf in leaves if is_shard(leaf)}
    hollow = [torch.empty(x.shape, dtype=x.dtype, device="meta") if is_shard(x) else x for _, x in leaves]
    return pytree.tree_unflatten(hollow, spec), shards


def fill(tree: Any, folder: Path, like: Tensor) -> Any:
    """The tree that `take` emptied, from what `write` wrote; all ranks take part.

    Args:
        tree: with tensors without data where shards were.
        folder: of `write`, by any number of ranks.
        like: a parameter of this run: tensors come in shards if it is one, else whole; on its device.

    Raises: ConfigError if the folder cannot be read.
    """
    leaves, spec = pytree.tree_flatten_with_path(tree)
    found = {_name(path): _empty(x, like) for path, x in leaves if isinstance(x, Tensor) and x.is_meta}
    if not found:
        return tree
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        load(found, storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        reason = str(_first(error)).splitlines()[0]
        raise ConfigError(
            f"{folder} is not readable ({reason}); move {folder.parent} away to continue from the checkpoint before it"
        ) from error
    return pytree.tree_unflatten([found.get(_name(path), leaf) for path, leaf in leaves], spec)


def write(folder: Path, shards: Mapping[str, Tensor]) -> None:
    """Write every rank's shards into one folder that all see, one safetensors file per rank; returns when all have.

    Raises: OSError, on all ranks, if one could not.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(shards), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        first = _first(error)
        raise OSError(getattr(first, "errno", None) or errno.EIO, str(first)) from error


def _first(error: Any) -> BaseException:
    """What went wrong, of a CheckpointException: the first rank's error."""
    return next(iter(error.failures.values()))[0]


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(step, "key", getattr(step, "idx", ""))) for step in path)


def _empty(hollow: Tensor, like: Any) -> Tensor:
    if not is_shard(like):
        return torch.empty(hollow.shape, dtype=hollow.dtype, device=like.device)
    from torch.distributed.tensor import empty

    return empty(*hollow.shape, dtype=hollow.dtype, device_mesh=like.device_mesh, placements=like.placements)
