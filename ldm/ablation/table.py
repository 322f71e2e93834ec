"""An ablation's file: its rows as run configs, at one of three budgets.

    paper: ControlNet, arXiv:2302.05543, section 4.4
    question: do zero convolutions matter?
    says: with Gaussian ones the quality drops to about that of ControlNet-lite
    measure: edge_f1
    expect: [zero > gaussian]
    budgets: {smoke: base/controlnet_smoke.yaml, short: base/controlnet_short.yaml, paper: base/controlnet_paper.yaml}
    rows:
      zero: {}
      gaussian: {adapters.*.zero_conv: gaussian}

A row is a mapping of dotted config keys; `adapters.*` is every adapter of the budget's config. `grid:` (key -> values)
makes a row of every combination, of each of `rows:` where both are there. What only drawing reads (`sample`,
`evaluation`, an adapter's scale, start, ...) does not part trainings: rows that differ in nothing else share one. Any
other key that training shall not see stands under `draw:` in its row.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

from ldm import config as config_module
from ldm import config_yaml, registry, sweep
from ldm.config import Node, RunConfig
from ldm.denoiser import AdapterUse
from ldm.evaluation import arms
from ldm.evaluation import run as evaluation
from ldm.registry import ConfigError, suggest
from ldm.training import estimate

BUDGETS: Final = ("smoke", "short", "paper")
SEEDS: Final = {"smoke": 1, "short": 3, "paper": 1}
STRIDE: Final = 1000  # between the seeds of a row: item i is drawn with seed + i
DRAWING: Final = ("run", "sample", "evaluation", "out", "log", "device", "grid")  # nothing that training depends on
HEARD: Final = ("hint", "extractor")  # keys of AdapterUse that training reads too


@dataclass(frozen=True)
class TableFile:
    """Keys of an ablation's file.

    Attributes:
        paper: where the claim stands.
        question: what is asked, in a sentence.
        says: the paper's answer, in a sentence.
        measure: a figure of the evaluation by its name, or a list of them; the first is what `expect` is about.
        budgets: budget -> config file, or {config: file} with rows, grid, seeds, arm, measure or expect in place of the
            table's.
        rows: name -> dotted key -> value.
        grid: dotted key -> values.
        expect: what the paper's answer means for the figures: "A > B", where A and B are rows, numbers or "base" (no
            adapter), with "measure: " before it where that is not the first.
        arm: which arm of the evaluation is read; null = the last.
        curve: a measure that validation draws while training; its course is kept, and its steepest part a figure.
    """

    paper: str
    question: str
    says: str
    measure: str | Sequence[str]
    budgets: Mapping[str, Any]
    rows: Mapping[str, Any] = field(default_factory=dict[str, Any])
    grid: Mapping[str, Any] = field(default_factory=dict[str, Any])
    expect: Sequence[str] = ()
    arm: str | None = None
    curve: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: of the line.
        base: the budget's config.
        values: dotted key -> value, for training and drawing.
        draw: the same, for drawing alone.
    """

    name: str
    base: RunConfig
    values: Mapping[str, Any]
    draw: Mapping[str, Any]

    def config(self, seed: int, *, drawing: bool = True) -> RunConfig:
        """The row's run. Raises: ConfigError on a key or value that the config does not take."""
        values = {**self.values, **(self.draw if drawing else {}), "seed": seed}
        try:
            return config_module.override(self.base, _kept(self.base, _spread(self.base, values)), f"row {self.name!r}")
        except ConfigError as error:
            raise ConfigError(f"row {self.name!r}: {str(error).removeprefix(f'row {self.name!r}: ')}") from error

    def key(self, seed: int) -> str:
        """Letters that tell the run from any other that is trained or drawn otherwise."""
        drawn = digest(self.config(seed))
        return f"{digest(self.config(seed, drawing=False), DRAWING)}-{drawn}" if self.draw else drawn

    @cached_property
    def slug(self) -> str:
        """The name as a part of file names."""
        return sweep.slug(self.name).strip("-")


@dataclass(frozen=True)
class Table:
    """A table at one budget.

    Attributes:
        name: paper and table, e.g. controlnet/zero_conv.
        budget: smoke, short or paper.
        file: its texts, with what the budget changes.
        measures: figures, the first is what is compared.
        rows: in order.
        seeds: of the runs of each row.
    """

    name: str
    budget: str
    file: TableFile
    measures: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]


def files(path: Path) -> list[Path]:
    """The table at a path, or all below a folder of them. Raises: ConfigError if there is none."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*.yaml") if p.parent.name != "base")
    if not found:
        raise ConfigError(
            f"{path} is no ablation file and has none; name e.g. configs/ablation/controlnet/zero_conv.yaml"
        )
    return found


def load(path: Path, budget: str, overrides: Sequence[str] = (), seeds: int | None = None) -> Table:
    """Read a table.

    Args:
        path: of its file.
        budget: one of BUDGETS.
        overrides: dotted key=value, over the budget's config and under the rows.
        seeds: how many runs of each row; None is the budget's own number.

    Raises: ConfigError, before anything is trained, on whatever does not fit: keys, rows, expectations.
    """
    if budget not in BUDGETS:
        raise ConfigError(f"budget is {budget!r}; allowed: {', '.join(BUDGETS)}{suggest(budget, BUDGETS)}")
    node = config_yaml.parse(path.read_bytes(), str(path))
    if not isinstance(node, dict):
        raise ConfigError(f"{path}: an ablation is a mapping of keys, this is a {type(node).__name__}")
    whole: TableFile = registry.checked(TableFile, cast("Node", node), str(path))
    if budget not in whole.budgets:
        raise ConfigError(f"{path} has no budget {budget!r}; it has {', '.join(whole.budgets)}")
    own = whole.budgets[budget]
    options: Node = dict(cast("Node", own)) if isinstance(own, Mapping) else {"config": own}
    base_file, count = path.parent / str(options.pop("config", "")), options.pop("seeds", SEEDS[budget])
    where = f"{path}: budgets.{budget}"
    if unknown := sorted(options.keys() - {"rows", "grid", "expect", "arm", "measure"}):
        raise ConfigError(f"{where} has {unknown[0]!r}; keys: config, seeds, rows, grid, expect, arm, measure")
    file = dataclasses.replace(whole, **options)
    base = config_module.load(base_file, overrides)
    measures = (file.measure,) if isinstance(file.measure, str) else tuple(file.measure)
    seeds = count if seeds is None else seeds
    if not isinstance(seeds, int) or seeds < 1:
        raise ConfigError(f"{where}: seeds is {seeds!r}, must be a whole number of at least 1")
    numbers = tuple(base.seed + STRIDE * k for k in range(seeds))
    table = Table(f"{path.parent.name}/{path.stem}", budget, file, measures, _rows(file, base, where), numbers)
    for text in file.expect:
        parse_claim(text, table)
    return table


def check(table: Table, *, measuring: bool = True) -> None:
    """Build every row without memory, and what measures it.

    Args:
        table: all of whose rows are looked at.
        measuring: look for the held-out data and the weights of metrics too, which a dry run does without.

    Raises: ConfigError on what would fail only when its turn has come.
    """
    trained: set[str] = set()
    measured: set[str] = set()
    for row in table.rows:
        first, drawn = row.config(table.seeds[0], drawing=False), row.config(table.seeds[0])
        try:
            if _new(digest(first, DRAWING), trained):
                estimate.meta_stage(first)
            if measuring and _new(digest(drawn, ("run", "out", "log", "device", "train", "data", "seed")), measured):
                evaluation.check(drawn)
        except ConfigError as error:
            raise ConfigError(f"{table.name}, row {row.name!r}: {error}") from error


def _new(key: str, seen: set[str]) -> bool:
    """Whether it was not seen yet; it is from now on."""
    before = len(seen)
    seen.add(key)
    return len(seen) > before


Claim = tuple[str, str | float, str | float]  # measure, the greater, the smaller


def parse_claim(text: str, table: Table) -> Claim:
    """Parts of "edge_f1: A > B". Raises: ConfigError if it names what the table does not have."""
    head, colon, tail = text.rpartition(": ")
    measure = head if colon else table.measures[0]
    sides = [side.strip() for side in tail.split(" > ")]
    known = [row.name for row in table.rows]
    if len(sides) != 2 or measure not in table.measures:
        raise ConfigError(
            f"{table.name}: expect has {text!r}, must be 'A > B' or 'measure: A > B' with a row at each side"
        )
    return measure, *(_side(side, known, table.name) for side in sides)  # pyright: ignore[reportReturnType]


def _side(side: str, known: Sequence[str], table: str) -> str | float:
    if side in (*known, arms.BASE):
        return side
    try:
        return float(side)
    except ValueError as error:
        raise ConfigError(f"{table}: expect names {side!r}, which is no row; rows: {', '.join(known)}") from error


def trains(config: RunConfig) -> bool:
    """Whether a run of this config would be trained first: something that it measures names no weights."""
    stage = (config.stage or {}).get("name")
    slot = {"vae": config.model.vae, "clip": config.model.clip}.get(str(stage), config.model.unet)
    nodes = [*config.adapters.values()] or [slot]
    fuser = [config.fuser] if config.fuser is not None else []
    return any(not (node or {}).get("weights") for node in [*nodes, *fuser])


def run_name(row: Row, seed: int) -> str:
    """Folder of a row's training: the same for all rows, of all tables, that train the same."""
    config = row.config(seed, drawing=False)
    what = "-".join(str(node.get("name")) for node in config.adapters.values()) or str((config.stage or {}).get("name"))
    return f"{what}-{digest(config, DRAWING)}-seed{seed}"


def digest(config: RunConfig, without: Sequence[str] = ("run", "out", "device")) -> str:
    """Eight letters that tell configs apart, some parts left out of account.

    Keys at their defaults do not count: a new key of a later version changes nothing.
    """
    node = {key: value for key, value in _changed(config, RunConfig()).items() if key not in without}
    if "evaluation" in without:
        unread = {f.name for f in dataclasses.fields(AdapterUse)} - set(HEARD)
        node["adapters"] = {n: {k: v for k, v in a.items() if k not in unread} for n, a in config.adapters.items()}
    text = json.dumps(node, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _changed(group: Any, default: Any) -> Node:
    """The keys of a group that are not at their defaults."""
    pairs = ((f.name, getattr(group, f.name), getattr(default, f.name)) for f in dataclasses.fields(group))
    return {n: _changed(v, d) if dataclasses.is_dataclass(v) else v for n, v, d in pairs if v != d}


def _rows(file: TableFile, base: RunConfig, where: str) -> tuple[Row, ...]:
    """Rows times grid. Raises: ConfigError if there are none, or two of one name."""
    found: list[Row] = []
    grid = sweep.combinations(file.grid)
    named = sweep.file_names(grid) if file.grid else [""]
    for row, node in (dict(file.rows) or {"": {}}).items():
        if not isinstance(node, Mapping):
            raise ConfigError(f"{where}: row {row!r} is {node!r}, must be a mapping of dotted keys, {{}} for none")
        values = dict(cast("Node", node))
        draw = values.pop("draw", {})
        if not isinstance(draw, Mapping):
            raise ConfigError(f"{where}: row {row!r} has draw: {draw!r}, must be a mapping of dotted keys")
        for name, more in zip(named, grid, strict=True):
            found.append(Row(" ".join(filter(None, (str(row), name))), base, {**values, **more}, dict(draw)))
    names = [row.slug for row in found]
    if twice := [row.name for i, row in enumerate(found) if names[i] in names[:i]]:
        raise ConfigError(f"{where}: two rows are called {twice[0]!r}; give each a name of its own")
    if found[0].name in ("", arms.CHANCE):
        raise ConfigError(f"{where} has no rows; add rows: or grid:")
    return tuple(found)


def _spread(base: RunConfig, values: Mapping[str, Any]) -> Node:
    """`adapters.*.key` as that of every adapter. Raises: ConfigError if there are none."""
    result: Node = {}
    for key, value in values.items():
        if not key.startswith("adapters.*."):
            result[key] = value
        elif base.adapters:
            result |= {f"adapters.{name}.{key.removeprefix('adapters.*.')}": value for name in base.adapters}
        else:
            raise ConfigError(f"key {key!r} means every adapter, but this config has none")
    return result


def _kept(base: RunConfig, values: Node) -> Node:
    """With the options that an adapter of another class has too: the same but for the class."""
    return {**dict(_common(base, values)), **values}


def _common(base: RunConfig, values: Node) -> Iterator[tuple[str, Any]]:
    for name, node in base.adapters.items():
        new = values.get(f"adapters.{name}.name", node.get("name"))
        if new != node.get("name"):
            both = {*registry.keys("adapter", new), *(f.name for f in dataclasses.fields(AdapterUse))}
            yield from ((f"adapters.{name}.{key}", value) for key, value in node.items() if key in both)
