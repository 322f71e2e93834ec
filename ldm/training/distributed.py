"""Ranks: the same code alone and under torchrun."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.registry import ConfigError

T = TypeVar("T")
PATIENCE: Final = 1800.0  # seconds for a rank that hangs: longer than most validations by rank 0 alone


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among its peers."""

    index: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.index == 0

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a tensor over all ranks."""
        if self.world == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x / self.world

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks must ask. On the host: the device does not wait."""
        if self.world == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def told(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank; tensors must be on the CPU."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def part(self, count: int) -> range:
        """This rank's share of `count` things: consecutive ones, in order of rank."""
        return range(self.index * count // self.world, (self.index + 1) * count // self.world)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


ALONE = Rank(0, 1, torch.device("cpu"))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of `auto`, `cpu` or `cuda`. Raises: ConfigError if it is none of them or is absent."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; allowed: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch sees no GPU; use device=auto or device=cpu")
    use_cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")


@contextmanager
def session(device: str = "auto", threads: int | None = None, patience: float = PATIENCE) -> Iterator[Rank]:
    """Join the process group that torchrun's environment describes, or run alone; leave it at the end.

    A group that this process is in already serves as it is, and stays: several runs may follow each other in one.

    Args:
        device: auto | cpu | cuda.
        threads: torch CPU threads of this process; None keeps torch's default.
        patience: seconds that a rank waits for another one in a group that is joined here.

    Raises: ConfigError if the ranks do not find each other, another one has ended, or has not answered for `patience`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = Rank(int(os.environ.get("RANK", "0")), world, pick_device(device, int(os.environ.get("LOCAL_RANK", "0"))))
    logging.basicConfig(level=logging.INFO if rank.main else logging.ERROR, format="%(message)s")
    if rank.device.type == "cuda":
        torch.cuda.set_device(rank.device)
    joins = world > 1 and not dist.is_initialized()
    if joins:
        _join(rank, timedelta(seconds=patience))
    try:
        yield rank
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ConfigError(_loss(rank, str(error).splitlines()[0], patience)) from error
    finally:
        if joins:
            dist.destroy_process_group()


def _loss(rank: Rank, said: str, patience: float) -> str:
    """One line about a collective call that failed with what torch said."""
    continues = "the same command continues at the newest checkpoint"
    if "Timed out" in said:
        return (
            f"rank {rank.index} of {rank.world} has waited {patience:g} s for another rank (train.rank_timeout), which "
            f"hangs, or does what takes longer: raise it then, or else look at that rank's machine; {continues}"
        )
    return (
        f"rank {rank.index} of {rank.world} has lost another rank ({said}): its own message says why, if it could give "
        f"one; {continues}"
    )


def _join(rank: Rank, patience: timedelta) -> None:
    """Meet the other ranks. Raises: ConfigError if the environment lacks where, the port is taken, or one is absent."""
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if rank.device.type == "cuda" else "gloo", timeout=patience)
    except (RuntimeError, ValueError) as error:
        address, port = (os.environ.get(f"MASTER_{what}", "unset") for what in ("ADDR", "PORT"))
        raise ConfigError(
            f"rank {rank.index} of {rank.world} could not join the others (MASTER_ADDR {address}, MASTER_PORT {port}: "
            f"{str(error).splitlines()[0]}); choose a free MASTER_PORT, the same on all ranks, and see that all started"
        ) from error


def is_lost(error: BaseException) -> bool:
    """Whether a collective call failed because another rank is gone or does not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def wrap(module: nn.Module, rank: Rank, *, partial: bool = False) -> nn.Module:
    """DistributedDataParallel where there are peers, for a module that is not in shards.

    `partial`: some parameters get no gradient in some steps. Buckets keep their layout then; else they are laid anew
    behind a process's first step, and with it the order in which three ranks or more add up, so that a resumed run is
    equal to rounding only.
    """
    if rank.world == 1 or in_shards(module):
        return module
    ids = [rank.device.index] if rank.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=ids,
        find_unused_parameters=partial,
        gradient_as_bucket_view=True,  # no second copy of the gradients, where a step is not split
    )


def is_shard(x: Any) -> bool:
    """Whether it is a tensor in shards (DTensor); asked without importing that class, which takes seconds."""
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


def in_shards(module: nn.Module) -> bool:
    """Whether ranks hold shards of its parameters, all or some."""
    return any(is_shard(p) for p in module.parameters())


def local(x: Any) -> Tensor:
    """This rank's shard, in place, of a tensor in shards; another tensor as it is. No gradient goes through."""
    with torch.no_grad():
        return x.to_local() if is_shard(x) else x


def whole(x: Any) -> Tensor:
    """All of a tensor in shards, on every rank, which all must ask; another tensor as it is."""
    return x.full_tensor() if is_shard(x) else x


def fit(x: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has whole, in shards as `like` is; itself where that is whole, or a lone number."""
    if not is_shard(like) or is_shard(x) or not x.ndim:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
