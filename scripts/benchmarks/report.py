"""Measured figures as JSON that grows workload by workload, and as the table of docs/performance.md."""

import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = """# Performance

Written by `scripts/benchmark.py`; figures as JSON in `{json}`. Ours against diffusers and transformers as a user gets
them, on the same random weights and inputs, in one process, in turn (ours, theirs, ours, ...). Outputs are compared
first: a workload whose outputs differ by more than its tolerance is not timed.

- **time**: median of the ratios ours / theirs over the pairs (smallest to largest); below 1 is faster. **bar**: the
  largest ratio this project accepts.
- **peak**: highest memory in a call, of a process that holds one side only (resident set on a CPU, torch's allocator on
  a GPU); in brackets what was there before the call: weights and code.
- **TFLOP**, **ops**, **syncs** of one call. torch's FLOP counter leaves out attention on a CPU; here it is counted.
  ops: aten operations that compute or copy, without views. syncs: operations at which the host waits for a value.
- **kept**: memory that autograd keeps for backward, without parameters. **breaks**: places where torch.compile leaves
  the graph, counted at the tiny scale. Both only where they apply.
- Cross-attention keys and values of text and image prompt are made once per picture on our side, before the step that
  is timed; T2I-Adapter's features on both sides.
"""
COLUMNS = ("workload", "time", "bar", "s ours / theirs", "difference", "peak MB ours / theirs")
COLUMNS += ("TFLOP ours / theirs", "ops ours / theirs", "syncs", "kept MB", "breaks")


def machine(device: str, threads: int) -> dict[str, Any]:
    """Where and with what the figures are measured."""
    import diffusers
    import torch
    import transformers

    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
    return {"device": device, "processor": name, "threads": threads, "date": str(datetime.date.today()), **versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def merge(path: Path, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Put a workload's figures in the file, in place of earlier ones; the others stay. Returns all of them."""
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rows[name] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def table(rows: Mapping[str, Any], json_name: str) -> str:
    """The Markdown page."""
    lines = [HEAD.format(json=json_name), "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(name, row)) + " |" for name, row in rows.items()]
    misses = [f"- {name}: {row['why'] or 'not explained yet'}" for name, row in rows.items() if missed(row)]
    if misses:
        lines += ["", "## Where a bar is missed", "", *misses]
    lines += ["", "## How", ""]
    for command, where in dict.fromkeys((row["command"], json.dumps(row["machine"])) for row in rows.values()):
        facts = ", ".join(f"{key} {value}" for key, value in json.loads(where).items())
        lines.append(f"- `{command}`: {facts}")
    return "\n".join(lines) + "\n"


def missed(row: Mapping[str, Any]) -> bool:
    """Whether a timed workload is slower than its bar."""
    return "ratio" in row and row["ratio"]["median"] > row["bar"]


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    ratio, ours, theirs = row.get("ratio"), row["ours"], row["theirs"]

    def both(key: str, form: str, factor: float | None = None) -> str:
        if key not in ours or key not in theirs:
            return ""
        values = [side[key] if factor is None else factor * side[key] for side in (ours, theirs)]
        return " / ".join(f"{value:{form}}" for value in values)

    peaks = ""
    if "peak_mb" in ours and "peak_mb" in theirs:
        peaks = " / ".join(f"{side['peak_mb']:.0f} ({side['before_mb']:.0f})" for side in (ours, theirs))
    time = "" if ratio is None else f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
    return [
        name,
        f"**{time}** misses" if missed(row) else time,
        f"{row['bar']:.2f}",
        both("seconds", ".2f"),
        f"{row['difference']:.1e}",
        peaks,
        both("flops", ".3f", 1e-12),
        both("ops", "d"),
        both("syncs", "d"),
        both("saved", ".1f", 1e-6),
        both("breaks", "d"),
    ]
