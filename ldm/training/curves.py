"""Training curves: a run's `metrics.jsonl` as `curves.png`, where matplotlib is installed (extra `plots`)."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

FILE: Final = "curves.png"
COLUMNS: Final = 3
LEAST: Final = 3  # points of a line; fewer are no curve, and metrics.jsonl says as much
RANGE: Final = 50  # positive figures that spread over more than this factor get a logarithmic axis
PART: Final = re.compile(r"(?<=_t)\d+$|\.base$")  # what tells the lines of one panel apart

Lines = dict[str, list[tuple[int, float]]]  # figure -> (step, value)


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_curves(run: Path) -> Path | None:
    """Draw every figure of a run over its steps.

    A panel has a figure with its held-out twin (`loss`, `val_loss`), the quarters of a schedule (`loss_t0` ...), or a
    measure with that of the base (`val_edge.edge_f1`, `val_edge.edge_f1.base`).

    Returns: the picture; None if there is nothing to draw yet.
    Raises: ImportError without matplotlib, see `available`.
    """
    panels = read_panels(run / "metrics.jsonl")
    if not panels:
        return None
    from matplotlib.figure import Figure  # not pyplot: no windows, no global state

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure: Any = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
        _draw(axes, title, lines)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(run / FILE, dpi=90)
    return run / FILE


def read_panels(file: Path) -> dict[str, Lines]:
    """Title -> its lines, of what the file has so far; figures with fewer than LEAST finite values are left out."""
    panels: dict[str, Lines] = {}
    if not file.is_file():
        return panels
    for text in file.read_text(encoding="utf-8").splitlines():
        record: Mapping[str, float] = json.loads(text)
        for name, value in record.items():
            if name != "step" and math.isfinite(value):
                title = PART.sub("", name.removeprefix("val_"))
                panels.setdefault(title, {}).setdefault(name, []).append((int(record["step"]), value))
    long = {
        title: {n: points for n, points in lines.items() if len(points) >= LEAST} for title, lines in panels.items()
    }
    return {title: lines for title, lines in long.items() if lines}


def _draw(axes: Any, title: str, lines: Lines) -> None:
    for name, points in lines.items():
        held_out = name.startswith("val_")
        steps, values = zip(*points, strict=True)
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if held_out or len(points) < 20 else {}
        axes.plot(steps, values, label=name, linewidth=1.6 if held_out else 0.9, **style)
    if _wide([value for points in lines.values() for _, value in points]):
        axes.set_yscale("log")
    axes.set_title(title.removesuffix("_t") + (" by quarter of the schedule" if title.endswith("_t") else ""), size=10)
    axes.set_xlabel("step", size=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=7)


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > RANGE * min(values)
