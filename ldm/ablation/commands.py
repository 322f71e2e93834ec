"""What scripts/ablate.py does."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from ldm.ablation import compare, report, run
from ldm.ablation import table as table_module
from ldm.registry import ConfigError
from ldm.training import distributed, estimate, signals

log = logging.getLogger(__name__)


def tables(path: Path, overrides: Sequence[str], out: Path, seeds: int | None, *, dry_run: bool) -> str:
    """Run the tables at a path, or say what that would do.

    Args:
        path: an ablation's file, or a folder of them.
        overrides: `budget=...` and dotted key=value for all rows.
        out: folder of runs and tables.
        seeds: runs of each row; None = the budget's own number.
        dry_run: build every row without memory, list what there is to do, and estimate each training's memory.

    Returns: the tables, as Markdown, or the list.
    Raises: ConfigError before anything is trained if any table does not fit; signals.Stopped if it was asked to stop
        before the last run was done.
    """
    budget = next((item.partition("=")[2] for item in reversed(overrides) if item.startswith("budget=")), "short")
    keys = [item for item in overrides if not item.startswith("budget=")]
    found = [table_module.load(file, budget, keys, seeds) for file in table_module.files(path)]
    if dry_run:
        return "\n\n".join(_dry_run(table, out) for table in found)
    for table in found:
        table_module.check(table)
    texts: list[str] = []
    base = found[0].rows[0].base
    with (
        signals.listening(),
        distributed.session(base.device, base.train.threads, base.train.rank_timeout) as rank,
    ):
        for table in found:
            run.execute(table, out, rank)
            if rank.main:
                texts.append(f"{table.name}\n\n{(run.folder(table, out) / 'table.md').read_text(encoding='utf-8')}")
    return "\n".join(texts)


def _dry_run(table: table_module.Table, out: Path) -> str:
    """The plan, and the memory of each training that has a shape of its own."""
    table_module.check(table, measuring=False)
    lines, seed = [run.plan(table, out)], table.seeds[0]
    first = table.rows[0].config(seed, drawing=False)
    if table_module.trains(first):
        lines.append(f"{table.rows[0].name}:\n{estimate.dry_run(first)}")
    return "\n".join(lines)


def _report(words: Sequence[str]) -> str:
    if len(words) != 2:
        raise ConfigError("report takes two paths: the folder of results, and the document to write")
    return report.write(Path(words[0]), Path(words[1]))


def _compare(words: Sequence[str]) -> str:
    if len(words) not in (2, 3):
        raise ConfigError("compare takes two run folders and, if you like, a folder for the picture")
    return compare.compare(Path(words[0]), Path(words[1]), Path(words[2]) if len(words) == 3 else None)


COMMANDS: Final[Mapping[str, Callable[[Sequence[str]], str]]] = {"report": _report, "compare": _compare}
