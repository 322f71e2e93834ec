"""All tables that were run, as one document: what the papers say, what was found, and whether they agree."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Final

from ldm.ablation import results, table
from ldm.ablation.result import Result
from ldm.ablation.table import Table
from ldm.registry import ConfigError

ROOT: Final = Path("configs/ablation")
BUDGET: Final = "short"
HEAD: Final = """# Ablations of the papers, measured here

Written by `python scripts/ablate.py report RESULTS DOCUMENT` from the tables' CSV files; do not edit. Every table is
one file below `configs/ablation` and is run again by the command above it. Rows are means over runs that differ in the
seed of everything (weights, order of the data, noise, pictures), with the 95 % interval of Student's t. A claim `A > B`
is judged by the differences of the runs of one seed: **agrees** where their 95 % interval lies above 0, **does not**
where it lies below, else **too noisy**. The models are small and the trainings minutes long: a claim about Stable
Diffusion may well be true there and not show here, and the other way round.
"""


def write(folder: Path, document: Path) -> str:
    """Write the document and, beside it in a folder of its name, the tables' CSV files and plots.

    Args:
        folder: results, `<out>/short` of `ablate.py` or the document's own folder: `<paper>/<table>/table.csv`.
        document: Markdown file to write.

    Returns: a line that says what was written.
    Raises: ConfigError if there are no tables, or one whose rows are not those of its file.
    """
    texts, verdicts, kept = [HEAD], Counter[str](), document.with_suffix("")
    found = sorted(folder.glob("*/*/table.csv"))
    if not found:
        raise ConfigError(
            f"{folder} has no <paper>/<table>/table.csv; run ablate.py, and name its folder of one budget"
        )
    for file in found:
        name = f"{file.parent.parent.name}/{file.parent.name}"
        known = table.load(ROOT / f"{name}.yaml", BUDGET)
        rows = results.from_csv(file.read_text(encoding="utf-8"))
        if strange := {r.row for r in rows} - {row.name for row in known.rows}:
            raise ConfigError(f"{file} has row {sorted(strange)[0]!r}, which {known.name} has not; run the table again")
        texts.append(_section(known, rows, kept, file.parent))
        verdicts.update(results.verdict(table.parse_claim(text, known), rows)[0] for text in known.file.expect)
    summary = ", ".join(f"{count} {word}" for word, count in verdicts.most_common())
    texts.insert(1, f"{len(found)} tables, {sum(verdicts.values())} claims: {summary}.\n")
    document.write_text("\n".join(texts), encoding="utf-8")
    return f"{document}: {len(found)} tables; {summary}"


def _section(known: Table, rows: list[Result], kept: Path, source: Path) -> str:
    """One table's part of the document; its CSV and plot are copied into `kept`."""
    place = kept / known.name
    place.mkdir(parents=True, exist_ok=True)
    files = [name for name in ("table.csv", "plot.png") if (source / name).is_file()]
    for name in files:
        if (source / name).resolve() != (place / name).resolve():
            shutil.copyfile(source / name, place / name)
    seconds = sum(sum(r.seconds.values()) for r in rows)
    keys = {row.name: row for row in known.rows}
    stale = [r for r in rows if r.config != keys[r.row].key(r.seed)]
    parts = [
        f"## {known.name}\n",
        f"{known.file.question} {known.file.paper}: {known.file.says}\n",
        f"```\npython scripts/ablate.py --config {ROOT / known.name}.yaml budget={known.budget}\n```\n",
        results.markdown(known, rows) + "\n",
        f"{max(r.items for r in rows)} pictures per run; {seconds / 60:.0f} minutes of training and measuring. "
        f"[CSV]({kept.name}/{known.name}/table.csv)\n",
    ]
    if stale:
        parts.insert(3, f"**{len(stale)} of {len(rows)} runs had other settings than the file has now.**\n")
    if "plot.png" in files:
        parts.append(f"![{known.name}]({kept.name}/{known.name}/plot.png)\n")
    return "\n".join(parts)
