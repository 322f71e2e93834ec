"""Pictures of an ablation's table, where matplotlib is installed (extra `plots`)."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm.ablation.result import Result, same
from ldm.ablation.table import Table
from ldm.evaluation.arms import BASE


def draw(table: Table, found: Sequence[Result], file: Path) -> None:
    """One panel per measure: every run a dot, the means of the rows joined where rows are steps of one number.

    A dashed line is the base without adapters. A table with a `curve` gets a panel of its course. Does nothing
    without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [r for r in found if r.course]
    count = len(table.measures) + bool(curves)
    figure = Figure(figsize=(4.6 * count, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel, name in zip(panels, table.measures, strict=False):
        _dots(panel, table, found, name)
    for r in curves:
        panels[-1].plot(*zip(*r.course, strict=True), label=f"{r.row}, seed {r.seed}", linewidth=1)
        panels[-1].set(xlabel="step", ylabel=table.file.curve)
        panels[-1].legend(fontsize=6)
    figure.suptitle(f"{table.name}, {table.budget}", fontsize=9)
    figure.savefig(file, dpi=110)


def _dots(panel: Any, table: Table, found: Sequence[Result], measure: str) -> None:
    rows = [row.name for row in table.rows if any(r.row == row.name for r in found)]
    axis = next(iter(table.file.grid.values())) if len(table.file.grid) == 1 and not table.file.rows else None
    numbers = axis if axis and all(isinstance(x, int | float) for x in axis) else None
    places = dict(zip((row.name for row in table.rows), numbers or range(len(table.rows)), strict=True))
    means: list[float] = []
    for row in rows:
        values = [r.figures[measure].mean for r in found if r.row == row]
        means.append(sum(values) / len(values))
        panel.plot([places[row]] * len(values), values, "o", color="C0", markersize=4, alpha=0.6)
    if base := same(found, measure, BASE):
        panel.axhline(sum(base.values()) / len(base), color="0.6", linewidth=1, linestyle="--")
    panel.plot([places[row] for row in rows], means, "-" if numbers else "_", color="C1", markersize=18)
    panel.set_ylabel(measure.replace("_", " "))
    if numbers:
        panel.set_xlabel(next(iter(table.file.grid)))
    else:
        panel.set_xticks([places[row] for row in rows], rows, rotation=30, ha="right", fontsize=7)
