"""From a workload's name to its row of figures."""

import dataclasses
import gc
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.registry import ConfigError, suggest
from scripts.benchmarks import measure, report
from scripts.benchmarks.networks import SCALES
from scripts.benchmarks.setting import DTYPES, Setting
from scripts.benchmarks.workloads import WORKLOADS, Workload

SIDES = ("ours", "theirs")


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        scale: full | tiny.
        device: cpu | cuda.
        threads: CPU threads.
        pairs: timed calls of each side; 0 times nothing.
        memory: measure peak memory, each side in a process of its own.
        out: folder of performance.md and performance.json; None writes nothing.
    """

    scale: str
    device: str
    threads: int
    pairs: int
    memory: bool
    out: Path | None


def workload(name: str) -> Workload:
    """Look one up. Raises: ConfigError on an unknown name."""
    if name not in WORKLOADS:
        hint = suggest(name, WORKLOADS)
        raise ConfigError(f"workload is {name!r}; allowed: {', '.join(WORKLOADS)}{hint}")
    return WORKLOADS[name]


def setting(name: str, scale: str, device: str, sides: tuple[str, ...] = SIDES) -> Setting:
    """What the workload is built with."""
    return Setting(SCALES[scale], torch.device(device), DTYPES[workload(name).dtype], sides)


def row(name: str, options: Options) -> dict[str, Any]:
    """Build both sides, compare their outputs, then measure.

    Raises: ConfigError on an unknown name, or outputs that differ by more than the workload's tolerance.
    """
    work = workload(name)
    torch.manual_seed(0)
    runs = work.build(setting(name, options.scale, options.device))
    ours, theirs = (runs[side] for side in SIDES)
    difference = measure.difference(ours(), theirs())
    if not difference <= work.tolerance:
        raise ConfigError(
            f"{name}: outputs differ by {difference:.2e} of the largest value, allowed: {work.tolerance:.0e}; "
            "nothing was timed: one side computes something else"
        )
    out: dict[str, Any] = {"difference": difference, "tolerance": work.tolerance, "bar": work.bar, "why": work.why}
    if options.pairs:
        times = measure.pairs(ours, theirs, options.pairs, torch.device(options.device))
        out |= {"ratio": measure.ratios(*times), "seconds": dict(zip(SIDES, times, strict=True))}
    for side in SIDES:
        out[side] = figures(runs[side], work)
    del runs, ours, theirs
    gc.collect()
    for side, seconds in out.get("seconds", {}).items():
        out[side]["seconds"] = statistics.median(seconds)
    if work.steps and not work.trains:  # backward() itself ends a graph, on either side
        small = work.build(dataclasses.replace(setting(name, "tiny", options.device), prepack=False))
        for side in SIDES:
            out[side]["breaks"] = measure.graph_breaks(small[side])
    if options.memory:
        for side in SIDES:
            out[side] |= peak_apart(name, side, options)
    return out


def figures(run: measure.Run, work: Workload) -> dict[str, Any]:
    """Counts of one call of one side."""
    found = measure.counts(run)
    out: dict[str, Any] = {"flops": found.flops, "ops": found.ops, "views": found.views, "syncs": found.syncs}
    if work.trains:
        with measure.saved_bytes() as saved:
            run()
            out["saved"] = saved()
    return out


def peak_apart(name: str, side: str, options: Options) -> dict[str, float]:
    """Peak memory of one side in a fresh process."""
    script = Path(__file__).parents[1] / "benchmark.py"
    command = [sys.executable, str(script), name, "--scale", options.scale, "--device", options.device]
    command += ["--threads", str(options.threads), "--peak-of", side]
    if options.device == "cuda":
        torch.cuda.empty_cache()  # the other process needs the room
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"{name}: measuring {side} in a process of its own failed ({reason}); try --no-memory")
    return json.loads(done.stdout)


def peak_here(name: str, side: str, options: Options) -> dict[str, float]:
    """Peak memory of one side in this process, which should have done nothing else."""
    runs = workload(name).build(setting(name, options.scale, options.device, (side,)))
    return measure.peak(runs[side], torch.device(options.device))


def measured(name: str, options: Options, command: str) -> dict[str, Any]:
    """The row with how it was made, and the files written if `options.out` says where."""
    found = row(name, options) | {"command": command, "machine": report.machine(options.device, options.threads)}
    if options.out is not None:
        path = options.out / "performance.json"
        rows = report.merge(path, name, found)
        ordered = {key: rows[key] for key in WORKLOADS if key in rows}
        (options.out / "performance.md").write_text(report.table(ordered, path.name))
    return found
