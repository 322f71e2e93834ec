"""Train and measure every row of a table on every seed; what is done already is not done again."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ldm.ablation import results
from ldm.ablation.result import Result
from ldm.ablation.table import Row, Table, run_name, trains
from ldm.config import RunConfig, RunDir
from ldm.evaluation.run import evaluate
from ldm.sampling.output import write_file
from ldm.training import checkpoint, run, signals
from ldm.training.distributed import Rank

log = logging.getLogger(__name__)
RUNS: Final = "runs"  # of all tables of a budget: they share trainings
INPUTS: Final = "inputs"  # and the encoded data sets, where `stage.cache` is on


def plan(table: Table, out: Path) -> str:
    """What running the table would do: a line per row and seed, and what is done already."""
    lines: list[str] = []
    named: set[str] = set()
    for row in table.rows:
        for seed in table.seeds:
            config, folder = row.config(seed, drawing=False), run_name(row, seed)
            if results.read(_file(table, row, seed, out), table, row, seed):
                what = "done"
            elif not trains(config):
                what = "measure the weights that the config names"
            elif folder in named or _trained(out / table.budget / RUNS / folder, config):
                what = f"measure {folder}"
            else:
                what = f"train {folder}, {config.train.steps:,} steps of {config.train.batch}, and measure it"
            named.add(folder)
            lines.append(f"{table.name} | {row.name} | seed {seed} | {what}")
    return "\n".join(lines)


def execute(table: Table, out: Path, rank: Rank) -> list[Result]:
    """Run the table, within a session of ranks (`ldm.training.distributed.session`).

    A row's training is a run folder below `<out>/<budget>/runs`, which goes on where it stopped; its figures are a file
    of `<out>/<budget>/<table>/`, which is not made again unless the config has changed. The table itself is written
    there by rank 0 after every row, so that what is there is always the table of what is done.

    The table should have been looked at before (`ldm.ablation.table.check`).

    Raises: signals.Stopped if any rank was asked to stop, behind the step or picture that it is at, or ahead of a run.
    """
    found: list[Result] = []
    total = len(table.rows) * len(table.seeds)
    for row in table.rows:
        for seed in table.seeds:
            signals.heed(rank, f"with {len(found)} of {total} runs of {table.name} done, which are kept")
            result = _measured(table, row, seed, out, rank)
            found.append(result)
            figures = ", ".join(f"{name} {figure.mean:.4g}" for name, figure in result.figures.items())
            log.info("%d of %d: %s, %s, seed %d: %s", len(found), total, table.name, row.name, seed, figures)
            if rank.main:
                results.write(table, found, folder(table, out))
    return found


def folder(table: Table, out: Path) -> Path:
    """Where a table and its figures are."""
    return out / table.budget / table.name


def _file(table: Table, row: Row, seed: int, out: Path) -> Path:
    return folder(table, out) / "rows" / f"{row.slug}-seed{seed}.json"


def _trained(run_dir: Path, config: RunConfig) -> bool:
    """Whether the run has made all of its steps."""
    last = checkpoint.latest(run_dir)
    return last is not None and int(last.name.removeprefix("step-")) >= config.train.steps


def _measured(table: Table, row: Row, seed: int, out: Path, rank: Rank) -> Result:
    """The row's figures: those that are there, or new ones."""
    file, drawn = _file(table, row, seed, out), row.config(seed)
    if known := rank.told(results.read(file, table, row, seed) if rank.main else None):
        return known
    trained, where = row.config(seed, drawing=False), file.with_suffix("")
    clock = time.perf_counter()
    if trains(trained):
        where = out / table.budget / RUNS / run_name(row, seed)
        if not rank.told(_trained(where, trained)):
            run.train(replace(_sharing(trained, out / table.budget / INPUTS), run=RunDir(str(where))))
    signals.heed(rank, f"before measuring {row.name} of {table.name}; its training is kept")
    middle = time.perf_counter()
    record = evaluate(replace(drawn, run=RunDir(str(where)))).record()
    seconds = {"train": round(middle - clock, 1), "measure": round(time.perf_counter() - middle, 1)}
    course = _course(where, table.file.curve) if table.file.curve else ()
    result = results.of(table, row.name, seed, record, course)
    result = replace(result, config=row.key(seed), seconds=seconds)
    if rank.main:
        _keep(result, record, table.file.curve, where, file)
    return result


def _sharing(config: RunConfig, inputs: Path) -> RunConfig:
    """The config with a folder for its encoded data, that of all runs which encode the same."""
    stage = config.stage or {}
    if not stage.get("cache") or stage.get("cache_dir"):
        return config
    prompted = {name: node for name, node in config.adapters.items() if "encoder" in node}
    keys = ("name", "variant", "encoder", "levels")
    heard = {name: [node.get(key) for key in keys] for name, node in prompted.items()}
    read = [config.data, config.train.items, config.train.precision, config.model.vae, config.model.text, heard]
    key = hashlib.sha256(json.dumps(read, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return replace(config, stage={**stage, "cache_dir": str(inputs / key)})


def _keep(result: Result, record: Mapping[str, Any], curve: str | None, where: Path, file: Path) -> None:
    """Write a row's figures, whole or not at all, and its pictures."""
    grid = where / "eval" / "grid.png"
    if grid.exists():
        write_file(file.with_suffix(".png"), grid.read_bytes())
    write_file(file, json.dumps({**result.record(), "curve": curve, "evaluation": record}, indent=1).encode())


def _course(where: Path, measure: str) -> tuple[tuple[int, float], ...]:
    """Step and value of a measure that validation logged, of the first adapter that has it; none without a training."""
    file = where / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    name = next((key for line in lines for key in line if key.partition(".")[2] == measure), None)
    return tuple((line["step"], line[name]) for line in lines if name in line)
