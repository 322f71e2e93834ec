"""Figures of an ablation's rows: kept one by one, read as a table, compared with what the paper says."""

import csv
import dataclasses
import io
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from ldm.ablation import plots
from ldm.ablation.result import BESIDE, Result, same
from ldm.ablation.table import Claim, Row, Table, parse_claim
from ldm.evaluation.arms import BASE, CEILING, CHANCE
from ldm.evaluation.intervals import Interval
from ldm.registry import ConfigError

STEEPEST: Final = "steepest_tenth"  # largest share of a curve's whole rise made within a tenth of training
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last one serves all further ones.
T: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
FIGURES: Final = ("mean", "low", "high")
COLUMNS: Final = ("row", "seed", "measure", "arm", *FIGURES, *BESIDE, "items", "config", "train_s", "measure_s")


def of(table: Table, row: str, seed: int, record: Mapping[str, Any], course: Sequence[tuple[int, float]]) -> Result:
    """The table's figures in an evaluation's record. Raises: ConfigError if one is not there."""
    places = [*record.get("measures", {}).values(), record.get("pictures", {}), *record.get("sets", {}).values()]
    flat = cast("dict[str, Mapping[str, Any]]", {name: rows for named in places for name, rows in named.items()})
    drawn = [name for rows in flat.values() for name in rows if name not in (CEILING, CHANCE)]
    arm = table.file.arm or (drawn[-1] if drawn else "")
    figures: dict[str, Interval] = {}
    beside = {n: {a: flat[n][a]["mean"] for a in BESIDE if a in flat[n]} for n in table.measures if n in flat}
    for name in table.measures:
        if name == STEEPEST and course:
            figures[name] = _point(steepest(course))
        elif arm in flat.get(name, {}):
            figures[name] = _interval(flat[name][arm])
        elif name in record["figures"]:
            figures[name] = _point(record["figures"][name])
        else:
            known = ", ".join([*record["figures"], *(f"{n} of {a}" for n, rows in flat.items() for a in rows)])
            raise ConfigError(f"{table.name}: row {row!r} has no figure {name!r} of arm {arm!r}; there are {known}")
    return Result(row, seed, arm, figures, int(record.get("items", 0)), course=course, beside=beside)


def _interval(node: Mapping[str, float | None]) -> Interval:
    """As a record has it; a value without an interval is a point."""
    mean, low, high = node["mean"], node["low"], node["high"]
    assert mean is not None
    return Interval(mean, mean if low is None else low, mean if high is None else high)


def _point(value: float) -> Interval:
    return Interval(value, value, value)


def steepest(course: Sequence[tuple[int, float]]) -> float:
    """Share of the whole rise that the steepest tenth of the steps made; 0.1 is a straight line, 1 a jump.

    A tenth counts as long as the distance of two points where these lie further apart.
    """
    steps, values = zip(*course, strict=True)
    span = max(0.1 * (steps[-1] - steps[0]), *(b - a for a, b in itertools.pairwise(steps)), 1)
    rise = values[-1] - values[0]
    best = max((y - v for s, v in course for x, y in course if 0 < x - s <= span), default=0.0)
    return min(best / rise, 1.0) if rise > 0 else 0.0


def read(file: Path, table: Table, row: Row, seed: int) -> Result | None:
    """What the table asks for, of the evaluation that is kept; None if it is missing or of another run."""
    try:
        node = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if node["config"] != row.key(seed) or node.get("curve") != table.file.curve:
        return None
    course = tuple((int(step), float(value)) for step, value in node["course"])
    try:
        result = of(table, row.name, seed, node["evaluation"], course)
    except ConfigError:  # it measured something else
        return None
    return dataclasses.replace(result, config=node["config"], seconds=node["seconds"])


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean with the 95 % interval of Student's t; without bounds (infinite) for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    t = T[min(len(values) - 2, len(T) - 1)]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def verdict(claim: Claim, found: Sequence[Result]) -> tuple[str, Interval | None]:
    """Does A > B hold? By the differences of the runs of one seed: both saw the same data, noise and prompts.

    Returns: "agrees" or "does not" where the 95 % interval of their mean leaves out 0, else "too noisy", and the
        interval; "not run" and None where no seed has both.
    """
    measure, greater, smaller = claim

    def side(name: str | float) -> dict[int, float] | float:
        if not isinstance(name, str):
            return name
        rows = {r.seed: r.figures[measure].mean for r in found if r.row == name and measure in r.figures}
        return rows or (same(found, measure, BASE) if name == BASE else rows)

    a, b = side(greater), side(smaller)
    seeds = sorted({r.seed for r in found})
    pairs = [(a[s] if isinstance(a, dict) else a, b[s] if isinstance(b, dict) else b)
             for s in seeds if (not isinstance(a, dict) or s in a) and (not isinstance(b, dict) or s in b)]  # fmt: skip
    if not pairs:
        return "not run", None
    interval = over_seeds([x - y for x, y in pairs])
    if interval.low > 0:
        return "agrees", interval
    return ("does not" if interval.high < 0 else "too noisy"), interval


def write(table: Table, found: Sequence[Result], out: Path) -> None:
    """`table.csv`, `table.md` and, where matplotlib is installed, `plot.png`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.csv").write_text(as_csv(found), encoding="utf-8")
    (out / "table.md").write_text(markdown(table, found) + "\n", encoding="utf-8")
    plots.draw(table, found, out / "plot.png")


def as_csv(found: Sequence[Result]) -> str:
    """One line per run and measure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in found:
        times = (r.seconds.get("train", 0.0), r.seconds.get("measure", 0.0))
        for name, f in r.figures.items():
            numbers = (f"{x:.6g}" for x in (f.mean, f.low, f.high))
            others = (f"{x:.6g}" if (x := r.beside.get(name, {}).get(arm)) is not None else "" for arm in BESIDE)
            writer.writerow((r.row, r.seed, name, r.arm, *numbers, *others, r.items, r.config, *times))
    return text.getvalue()


def from_csv(text: str) -> list[Result]:
    """What `as_csv` wrote, but for the courses."""
    found: dict[tuple[str, int], Result] = {}
    for line in csv.DictReader(io.StringIO(text)):
        key = line["row"], int(line["seed"])
        seconds = {"train": float(line["train_s"]), "measure": float(line["measure_s"])}
        before = found.get(key) or Result(*key, line["arm"], {}, int(line["items"]), line["config"], seconds)
        figure = Interval(*(float(line[name]) for name in FIGURES))
        others = {arm: float(line[arm]) for arm in BESIDE if line[arm]}
        beside = {**before.beside, line["measure"]: others} if others else before.beside
        found[key] = dataclasses.replace(before, figures={**before.figures, line["measure"]: figure}, beside=beside)
    return list(found.values())


def markdown(table: Table, found: Sequence[Result]) -> str:
    """The rows, mean over seeds with interval, and what becomes of the paper's claims."""
    head = ["", *(name.replace("_", " ") for name in table.measures), "seeds"]
    lines = [head, ["---"] * len(head)]
    for row in table.rows:
        runs = [r for r in found if r.row == row.name]
        if runs:
            cells = [_cell([r.figures[name] for r in runs]) for name in table.measures]
            lines.append([row.name, *cells, str(len(runs))])
    for arm, title in BESIDE.items():
        values = [same(found, name, arm) for name in table.measures]
        if any(values):
            cells = [_cell([_point(x) for x in each.values()]) if each else "" for each in values]
            lines.append([f"*{title}*", *cells, str(max(len(each) for each in values))])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    claims = "\n".join(f"- {line}" for line in _claims(table, found))
    return f"{text}\n\n{claims}" if claims else text


def _cell(figures: Sequence[Interval]) -> str:
    """Mean over seeds and its interval; of one seed, the interval over its items."""
    if len(figures) == 1:
        one = figures[0]
        return f"{one.mean:.4g}" if one.low == one.high else f"{one.mean:.4g} [{one.low:.4g}, {one.high:.4g}]"
    all_ = over_seeds([f.mean for f in figures])
    if all_.low == all_.high:
        return f"{all_.mean:.4g}"
    return f"{all_.mean:.4g} ± {all_.high - all_.mean:.2g}"


def _claims(table: Table, found: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    for text in table.file.expect:
        word, interval = verdict(parse_claim(text, table), found)
        if interval is None:
            size = ""
        elif math.isinf(interval.low):
            size = f" (difference {interval.mean:+.3g}, one seed)"
        else:
            size = f" (difference {interval.mean:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}])"
        lines.append(f"`{text}`: **{word}**{size}")
    return lines
