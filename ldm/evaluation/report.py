"""What an evaluation found, as a record to keep and as tables to read."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm import build
from ldm import config as config_module
from ldm.config import Node, RunConfig
from ldm.evaluation.arms import Plan
from ldm.evaluation.obedience import Obedience

PROTOCOL = 3  # raised when the same weights and config would give other figures, or figures by other names
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pth")


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation.

    Attributes:
        config: what was evaluated.
        figures: the stage's own held-out figures.
        plan: arms and measures, None where there are no adapters to measure.
        obedience: their scores, likewise.
        trained: weight files taken from the run, not named in the config.
    """

    config: RunConfig
    figures: Mapping[str, float]
    plan: Plan | None
    obedience: Obedience | None
    trained: Sequence[Path]

    def record(self) -> dict[str, Any]:
        """Everything that says what was measured and how, as plain values; figures first."""
        c = self.config
        drawn: dict[str, Any] = {}
        if self.plan and self.obedience:
            arms = {arm: {n: use.scale for n, use in uses.items()} for arm, uses in self.plan.arms.items()}
            drawn = {
                "measures": {
                    adapter: {n: {row: dataclasses.asdict(i) for row, i in rows.items()} for n, rows in named.items()}
                    for adapter, named in self.obedience.rows.items()
                },
                "items": self.obedience.items,
                "seeds": [c.seed, c.seed + self.obedience.items - 1],
                "arms": arms,
                "sampler": c.sample.sampler,
                "guidance": dataclasses.asdict(c.sample.guidance),
            }
        kept = {"weights": weight_hashes(c, self.trained), "config": config_module.dump(c), "torch": torch.__version__}
        return {"protocol": PROTOCOL, "figures": dict(self.figures), **drawn, **kept}

    def markdown(self) -> str:
        """Tables of the same."""
        text = _table(["held out", ""], [[name, f"{value:.4g}"] for name, value in self.figures.items()])
        if not (self.plan and self.obedience):
            return text
        columns = [(a, name) for a, measures in self.plan.measures.items() for name in measures]
        heads = [f"{a}: {n} ({'more' if self.plan.measures[a][n].more_is_better else 'less'})" for a, n in columns]
        cells = [self.obedience.rows[a][n] for a, n in columns]
        body = [[row.replace("_", " "), *(str(rows[row]) for rows in cells)] for row in cells[0]]
        g, s, first = self.config.sample.guidance, self.config.sample.sampler, self.config.seed
        how = " ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in s.items())
        note = (
            f"{self.obedience.items} items, seeds from {first}, {how}, guidance {g.scale:g}; mean [95 % interval, "
            "bootstrap over items]; (more) or (less) is better"
        )
        return f"{text}\n\n{_table(['', *heads], body)}\n\n{note}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def weight_hashes(config: RunConfig, trained: Sequence[Path]) -> dict[str, str]:
    """File -> sha256 of all weights that an evaluation read.

    Args:
        config: names some; of a folder of models every weight file counts.
        trained: the others.
    """
    named = [build.weights_file(kind, node, slot) for kind, node, slot in _nodes(config)]
    files: dict[Path, None] = {}
    for path in (*trained, *(path for path in named if path is not None)):
        inside = sorted(p for p in path.rglob("*") if p.suffix in WEIGHTS) if path.is_dir() else [path]
        files |= dict.fromkeys(inside)
    return {str(path): _sha256(path) for path in files}


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
    for name, given in config.evaluation.measures.items():
        for node in given if isinstance(given, list) else [given]:
            if isinstance(node, dict) and isinstance(encoder := node.get("encoder"), dict):
                yield "image", encoder, f"evaluation.measures.{name}.encoder"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
