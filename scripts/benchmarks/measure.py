"""Figures of one call: time, memory, FLOPs, operations, host syncs, bytes kept for backward, graph breaks."""

import contextlib
import ctypes
import gc
import math
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ldm import fast

Run = Callable[[], Tensor]
SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
VIEWS = ("view", "_unsafe_view", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes", "t")
VIEWS += ("unsqueeze", "squeeze", "detach", "alias", "unbind", "as_strided")


@dataclass(frozen=True)
class Counts:
    """What one call asks of torch.

    Attributes:
        ops: aten operations that compute or copy.
        views: aten operations that only look at memory differently, or set it aside.
        syncs: operations that make the host wait for a value.
        flops: torch's counter, with CPU attention counted too, which the counter leaves out by itself.
        by_op: how often each operation ran.
    """

    ops: int
    views: int
    syncs: int
    flops: int
    by_op: Counter[str]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _conv_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def counts(run: Run) -> Counts:
    """Count one call."""
    mapping: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    if fast.available():  # what prepacked layers call
        mapping |= {
            torch.ops.mkldnn._linear_pointwise: _linear_flops,
            torch.ops.mkldnn._convolution_pointwise: _conv_flops,
        }
    with _Recorder() as recorder:
        run()
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    seen = recorder.seen
    views = sum(n for name, n in seen.items() if name in (*VIEWS, *EMPTY))
    syncs = sum(n for name, n in seen.items() if name.rstrip("_") in SYNCS or name in SYNCS)
    return Counts(sum(seen.values()) - views, views, syncs, counter.get_total_flops(), seen)


@contextlib.contextmanager
def saved_bytes(*modules: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the memory that autograd keeps for backward within the block, each storage once.

    Args:
        modules: their parameters are there anyway and are left out.

    Yields: a function that returns the bytes so far.
    """
    known = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        owner = x if x._base is None else x._base  # linear maps keep a view of their weight
        if not isinstance(owner, nn.Parameter) and x.untyped_storage().data_ptr() not in known:
            kept.setdefault(x.untyped_storage().data_ptr(), x.detach())  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield lambda: sum(x.untyped_storage().nbytes() for x in kept.values())


def graph_breaks(run: Run) -> int:
    """How often torch.compile has to leave the graph within one call."""
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    found = torch._dynamo.explain(run)().graph_break_count  # pyright: ignore[reportPrivateImportUsage]
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value of theirs; infinite where either is not finite."""
    a, b = ours.double(), theirs.double()
    found = ((a - b).abs().max() / b.abs().max()).item()
    return found if found == found else float("inf")


def pairs(ours: Run, theirs: Run, n: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of n calls each, in turn (ours, theirs, ours, ...); both have been called before."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(n):
        for side, run in enumerate((ours, theirs)):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times[side].append(time.perf_counter() - start)
    return times


def ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median, smallest and largest of the pairs' time ratios."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(run: Run, device: torch.device) -> dict[str, float]:
    """MB at the highest point of one warm call, and how much of it was there before the call.

    On a GPU torch's allocator says it; on a CPU the resident set, of a process that should hold one side alone.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return {"peak_mb": torch.cuda.max_memory_allocated(device) / 1e6, "before_mb": before / 1e6}
    _trim()
    _reset_high_water()
    before = _resident("VmRSS")
    run()
    return {"peak_mb": _resident("VmHWM"), "before_mb": before}


def _trim() -> None:
    """Give back what building left over: glibc keeps freed memory, and it would count as the network's."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def _reset_high_water() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> float:
    """MB of a line of /proc/self/status. Raises: RuntimeError where there is none (not Linux)."""
    if sys.platform != "linux":
        raise RuntimeError(f"platform is {sys.platform}; peak memory is read from /proc on Linux: use --no-memory")
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6
