"""What an evaluation found, as a record to keep and as tables to read."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ldm import build
from ldm import config as config_module
from ldm.config import Node, RunConfig
from ldm.evaluation.arms import PICTURES, Plan, shared_text
from ldm.evaluation.intervals import Interval
from ldm.evaluation.obedience import Obedience
from ldm.evaluation.sets import METRICS, Scores
from ldm.sampling.output import file_digest

PROTOCOL = 3  # raised when the same weights and config would give other figures, or figures by other names
PACKAGES = ("ldm-adapters", "torch", "torchvision", "open_clip_torch", "timm", "torch-fidelity", "pillow")
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pth")


@dataclass(frozen=True)
class Compared:
    """Scores of a set.

    Attributes:
        scores: metric -> arm -> value.
        reference: what they are against: hashes of data and extractor, resize filter, size, number of items, file.
        marks: what a reader must know of them.
    """

    scores: Scores
    reference: Mapping[str, Any]
    marks: Sequence[str]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation.

    Attributes:
        config: what was evaluated.
        figures: the stage's own held-out figures.
        plan: arms and measures, None where nothing is drawn.
        obedience: their scores, likewise.
        trained: weight files taken from the run, not named in the config.
        compared: set -> scores of its metrics.
        folder: where the pictures lay; None where they were drawn.
    """

    config: RunConfig
    figures: Mapping[str, float]
    plan: Plan | None
    obedience: Obedience | None
    trained: Sequence[Path]
    compared: Mapping[str, Compared] = field(default_factory=dict[str, Compared])
    folder: Path | None = None

    @property
    def marks(self) -> list[str]:
        """What a reader must know of the figures."""
        of_sets = [mark for found in self.compared.values() for mark in found.marks]
        return of_sets + (shared_text(self.plan, self.config) if self.plan else [])

    def record(self) -> dict[str, Any]:
        """Everything that says what was measured and how, as plain values; figures first."""
        c = self.config
        found: dict[str, Any] = {}
        if self.plan and self.obedience:
            arms = {arm: {n: use.scale for n, use in uses.items()} for arm, uses in self.plan.arms.items()}
            rows = {a: {n: _plain(rows) for n, rows in named.items()} for a, named in self.obedience.rows.items()}
            how = {
                "seeds": [c.seed, c.seed + self.obedience.items - 1],
                "arms": arms,
                "sampler": c.sample.sampler,
                "guidance": dataclasses.asdict(c.sample.guidance),
            }
            found = {
                "measures": {adapter: named for adapter, named in rows.items() if adapter != PICTURES},
                "pictures": rows.get(PICTURES, {}),
                "sets": {n: {m: _plain(v) for m, v in found.scores.items()} for n, found in self.compared.items()},
                "references": {name: dict(found.reference) for name, found in self.compared.items()},
                "marks": self.marks,
                "items": self.obedience.items,
                **({"images": str(self.folder)} if self.folder else how),
            }
        read = weight_hashes(c, self.trained, models=self.folder is None)
        kept = {"weights": read, "config": config_module.dump(c), "torch": torch.__version__}
        return {"protocol": PROTOCOL, "figures": dict(self.figures), **found, **kept, "versions": versions()}

    def markdown(self) -> str:
        """Tables of the same."""
        text = _table(["held out", ""], [[name, f"{value:.4g}"] for name, value in self.figures.items()])
        if not (self.plan and self.obedience):
            return text
        heads: list[str] = []
        columns: list[dict[str, str]] = []
        for (adapter, name), measure in self.plan.columns.items():
            heads.append(f"{adapter or 'pictures'}: {name} ({_better(measure.more_is_better)})")
            columns.append({row: str(i) for row, i in self.obedience.rows[adapter][name].items()})
        for name, found in self.compared.items():
            for metric, scores in found.scores.items():
                heads.append(f"{name}: {metric} ({_better(METRICS[metric])})")
                columns.append({row: _cell(i) for row, i in scores.items()})
        names = dict.fromkeys(row for column in columns for row in column)
        body = [[row.replace("_", " "), *(column.get(row, "") for column in columns)] for row in names]
        parts = ([text] if self.figures else []) + [_table(["", *heads], body), self._note(), *self.marks]
        return "\n\n".join(parts)

    def _note(self) -> str:
        g, s, first = self.config.sample.guidance, self.config.sample.sampler, self.config.seed
        how = " ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in s.items())
        assert self.obedience is not None
        drawn = f"pictures of {self.folder}" if self.folder else f"seeds from {first}, {how}, guidance {g.scale:g}"
        note = (
            f"{self.obedience.items} items, {drawn}; mean [95 % interval, bootstrap over items]; (more) or (less) is "
            "better"
        )
        return note + ("; of sets the interval is by halves of the pictures" if self.compared else "")


def _better(more: bool) -> str:
    return "more" if more else "less"


def _cell(i: Interval) -> str:
    """Four digits, whatever the unit; without bounds where there are none."""
    return f"{i.mean:.4g}" if math.isnan(i.low) else f"{i.mean:.4g} [{i.low:.4g}, {i.high:.4g}]"


def _plain(rows: Mapping[str, Interval]) -> dict[str, Any]:
    """Row -> mean, low, high; null where there is no interval."""
    values = {row: dataclasses.asdict(interval) for row, interval in rows.items()}
    return {row: {k: None if math.isnan(v) else v for k, v in interval.items()} for row, interval in values.items()}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def versions() -> dict[str, str]:
    """Package -> version, of those that decide numbers; those that are not installed are left out."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def weight_hashes(config: RunConfig, trained: Sequence[Path], *, models: bool = True) -> dict[str, str]:
    """File -> sha256 of all weights that an evaluation read.

    Args:
        config: names some; of a folder of models every weight file counts.
        trained: the others.
        models: those that draw too, not only those that judge.
    """
    nodes = [*(_nodes(config) if models else ()), *_weighed(dataclasses.asdict(config.evaluation), "evaluation")]
    named = [build.weights_file(kind, node, slot) for kind, node, slot in nodes]
    files: dict[Path, None] = {}
    for path in (*trained, *(path for path in named if path is not None)):
        inside = sorted(p for p in path.rglob("*") if p.suffix in WEIGHTS) if path.is_dir() else [path]
        files |= dict.fromkeys(inside)
    return {str(path): file_digest(path) for path in files}


def _nodes(config: RunConfig) -> Iterator[tuple[str, Node, str]]:
    """Kind, node and place of all that may name weights."""
    for kind in ("unet", "vae", "text", "clip"):
        if (node := getattr(config.model, kind)) is not None:
            yield kind, node, f"model.{kind}"
    for name, node in config.adapters.items():
        yield "adapter", node, f"adapters.{name}"
        if (encoder := build.encoder_node(name, node)) is not None:
            yield "image", encoder, f"adapters.{name}.encoder"
    if config.fuser is not None:
        yield "fuser", config.fuser, "fuser"


def _weighed(node: Any, where: str, key: str = "") -> Iterator[tuple[str, Node, str]]:
    """The same of a part of `evaluation:`: every mapping there that names weights, by its key."""
    inside: Iterator[tuple[str, Any]] = iter(())
    if isinstance(node, Mapping):
        if isinstance(node.get("weights"), str):
            yield {"encoder": "image"}.get(key, key), dict(node), where
        if isinstance(node.get("predictor"), str):
            yield key, {"weights": node["predictor"]}, where
        inside = ((str(name), value) for name, value in node.items())
    elif isinstance(node, list | tuple):
        inside = ((key, value) for value in node)
    for name, value in inside:
        yield from _weighed(value, f"{where}.{name}", name)
