"""Bytes of the tensors that are alive, counted operation by operation, and their highest sum: also of fake tensors."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Tracker(TorchDispatchMode):
    """Inside its `with` block, every storage that an operation makes counts until it is freed.

    A storage is of one kind: `rest` until `assign` says otherwise. What kernels allocate for themselves is not seen.
    """

    def __init__(self, device: torch.device, rest: str) -> None:
        """Count storages on `device`; those of no other kind are of the kind `rest`."""
        super().__init__()
        self.device = device
        self.rest = rest
        self.alive: dict[str, int] = {}  # kind -> bytes
        self.peak: dict[str, int] = {}  # the same when their sum was highest
        self._kinds: dict[int, str] = {}  # address of a storage -> its kind
        self._refs: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0  # it has no number to give; a DataLoader draws one for its seed
        result = func(*args, **(kwargs or {}))
        for x in tensors(result):
            if x.device.type == self.device.type and x.untyped_storage()._cdata not in self._kinds:
                self._add(x.untyped_storage())
        return result

    def assign(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """The storages of these tensors are of this kind."""
        for x in tensors:
            storage = x.untyped_storage()
            if (old := self._kinds.get(storage._cdata)) is not None and old != kind:
                self._kinds[storage._cdata] = kind
                self._move(old, -storage.nbytes())
                self._move(kind, storage.nbytes())

    def start(self) -> None:
        """Forget the peak so far."""
        self.peak = dict(self.alive)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            del self._refs[key]
            self._move(self._kinds.pop(key), -size)

        self._kinds[key], self._refs[key] = self.rest, weakref.ref(storage, freed)
        self._move(self.rest, size)
        if sum(self.alive.values()) > sum(self.peak.values()):
            self.peak = dict(self.alive)

    def _move(self, kind: str, size: int) -> None:
        self.alive[kind] = self.alive.get(kind, 0) + size


@contextmanager
def gradients_as(tracker: Tracker, kind: str, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block, gradients are of this kind from when backward has put them at their parameter."""

    def found(p: Tensor) -> None:
        if p.grad is not None:
            tracker.assign(kind, [p.grad])

    handles = [p.register_post_accumulate_grad_hook(found) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors(tree: Any) -> list[Tensor]:
    """Those in nested lists, tuples, dicts and registered dataclasses."""
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
