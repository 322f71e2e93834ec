"""Two runs side by side: the keys in which they differ, their figures, their pictures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image, write_png

from ldm import config_yaml
from ldm.registry import ConfigError

Figures = dict[str, str]
WITHOUT = ("run.dir", "out.dir")


def compare(a: Path, b: Path, out: Path | None = None) -> str:
    """Differing keys and figures as Markdown; with `out`, their pictures beside each other in `out/compare.png`.

    Args:
        a: folder with `config.yaml` and, as they were measured and drew, `metrics.jsonl`, `eval/` and `images/`.
        b: another.
        out: folder for the picture.

    Raises: ConfigError if one is no run.
    """
    left, right = _keys(a), _keys(b)
    keys = [k for k in dict.fromkeys([*left, *right]) if left.get(k) != right.get(k) and k not in WITHOUT]
    lines = [f"| | {a} | {b} |", "| --- | --- | --- |"]
    lines += [f"| {key} | {left.get(key, '-')} | {right.get(key, '-')} |" for key in keys] or ["| keys | the same | |"]
    ours, theirs = _figures(a), _figures(b)
    lines += ["", f"| figure | {a} | {b} |", "| --- | --- | --- |"]
    lines += [f"| {k} | {ours.get(k, '-')} | {theirs.get(k, '-')} |" for k in dict.fromkeys([*ours, *theirs])]
    if out is not None:
        lines += ["", _pictures(a, b, out)]
    return "\n".join(lines)


def _keys(run: Path) -> Figures:
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} has no config.yaml, so it is no run folder; name one that train.py wrote")
    node = config_yaml.parse(file.read_bytes(), str(file))
    return {key: json.dumps(value) for key, value in config_yaml.flat(cast("Mapping[str, Any]", node)).items()}


def _figures(run: Path) -> Figures:
    """Of the last evaluation, and the last line of every scalar of training."""
    found: dict[str, str] = {}
    if (file := run / "metrics.jsonl").is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            found |= {f"train: {k}": f"{v:.4g}" for k, v in json.loads(line).items()}
    if (file := run / "eval" / "eval.json").is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        found |= {f"eval: {k}": f"{v:.4g}" for k, v in record["figures"].items()}
        for adapter, named in record.get("measures", {}).items():
            for name, rows in named.items():
                for row, f in rows.items():
                    found[f"eval: {adapter} {name}, {row}"] = f"{f['mean']:.4g} [{f['low']:.4g}, {f['high']:.4g}]"
    return found


def _pictures(a: Path, b: Path, out: Path) -> str:
    """Write both runs' newest grids of one sort beside each other. Returns: a line about it."""
    for sort in ("eval/grid.png", "images/*.png"):
        newest = [max(run.glob(sort), default=None, key=lambda p: (len(p.name), p.name)) for run in (a, b)]
        if all(newest):
            break
    else:
        return "pictures: the runs have none of one sort; run evaluate.py on both"
    grids = [decode_image(str(path), ImageReadMode.RGB) for path in newest]
    height = max(grid.shape[1] for grid in grids)
    padded = [F.pad(grid, (0, 16, 0, height - grid.shape[1]), value=255) for grid in grids]
    out.mkdir(parents=True, exist_ok=True)
    write_png(torch.cat(padded, dim=2), str(out / "compare.png"))
    return f"pictures: {out / 'compare.png'}, {newest[0]} at the left, {newest[1]} at the right"
