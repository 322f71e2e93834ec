"""How well adapters make pictures obey their hints: every arm is drawn on the same prompts and seeds, then scored."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import generate
from ldm.data.images import Batch
from ldm.denoiser import AdapterUse
from ldm.evaluation.arms import CEILING, CHANCE, Plan
from ldm.evaluation.intervals import Interval, bootstrap
from ldm.evaluation.measures import Measure
from ldm.guidance import GuidanceConfig
from ldm.samplers import Sampler
from ldm.training.diffusion import DiffusionStage

Draw = Callable[[Batch, Mapping[str, Tensor], Mapping[str, AdapterUse], int], Tensor]
Rows = dict[str, Interval]  # arm, or ground_truth, or chance


@dataclass(frozen=True)
class Obedience:
    """Scores of every arm.

    Attributes:
        rows: adapter -> measure -> row -> mean score with interval. Rows are the arms, `ground_truth` (the real
            pictures beside their own hints) and `chance` (beside the hint of the next item).
        columns: pictures of the first items by label, n 3 h w or n 1 h w in [0, 1].
        items: how many were drawn per arm.
    """

    rows: dict[str, dict[str, Rows]]
    columns: dict[str, Tensor]
    items: int


class _Tally:
    """Scores of one measure of one adapter, batch by batch."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self._scores: dict[str, list[Tensor]] = {}
        self._real: list[Tensor] = []  # features of all real pictures and hints: chance pairs neighbours
        self._wanted: list[Tensor] = []

    def add(self, drawn: Mapping[str, Tensor], real: Tensor, hint: Tensor) -> None:
        """One batch: arm -> pictures b 3 h w, the real ones, and the adapter's hint, all in [0, 1]."""
        wanted = self.measure.hint(hint)
        for arm, images in drawn.items():
            self._scores.setdefault(arm, []).append(self.measure.score(self.measure.picture(images), wanted))
        self._real.append(self.measure.picture(real))
        self._wanted.append(wanted)

    def rows(self) -> Rows:
        real, wanted = torch.cat(self._real), torch.cat(self._wanted)
        scores = {arm: torch.cat(parts) for arm, parts in self._scores.items()}
        scores[CEILING] = self.measure.score(real, wanted)
        scores[CHANCE] = self.measure.score(real.roll(1, 0), wanted)
        return {row: bootstrap(values) for row, values in scores.items()}


def drawer(stage: DiffusionStage, sampler: Sampler, guidance: GuidanceConfig) -> Draw:
    """A function that draws a batch's captions with some adapters; its last argument is the seed of item 0."""
    models = generate.Models(stage.denoiser, stage.vae, stage.text, stage.schedule, stage.objective)

    def draw(batch: Batch, hints: Mapping[str, Tensor], uses: Mapping[str, AdapterUse], seed: int) -> Tensor:
        seeds = range(seed, seed + len(batch.keys))
        size = (batch.image.shape[-2], batch.image.shape[-1])
        heard = {name: hints[name] for name in uses}
        request = generate.Request(batch.text, seeds, size, guidance=guidance, hints=heard, uses=uses)
        return generate.images(models, request, sampler)

    return draw


@torch.no_grad()
def obedience(
    plan: Plan,
    batches: Iterable[Batch],
    hints: Callable[[Batch], Mapping[str, Tensor]],
    draw: Draw,
    *,
    seed: int,
    pictures: int,
) -> Obedience:
    """Draw and score every arm.

    Args:
        plan: what to draw and measure.
        batches: held-out items.
        hints: batch -> adapter -> hint, as `DiffusionStage.hints`.
        draw: see `drawer`.
        seed: of item 0; item i is drawn with seed + i in every arm.
        pictures: how many items to keep for a grid.
    """
    tallies = {a: {name: _Tally(m) for name, m in measures.items()} for a, measures in plan.measures.items()}
    columns: dict[str, list[Tensor]] = {}
    seen = 0
    for batch in batches:
        given = hints(batch)
        drawn = {arm: draw(batch, given, uses, seed + seen) for arm, uses in plan.arms.items()}
        real = batch.image.float() * 0.5 + 0.5
        for adapter, measures in tallies.items():
            for tally in measures.values():
                tally.add(drawn, real, given[adapter])
        if seen < pictures:
            shown = {f"hint: {adapter}": hint for adapter, hint in given.items()} | drawn | {"ground truth": real}
            for label, images in shown.items():
                columns.setdefault(label, []).append(_tile(images[: pictures - seen], real))
        seen += len(batch.keys)
    rows = {adapter: {name: tally.rows() for name, tally in ts.items()} for adapter, ts in tallies.items()}
    return Obedience(rows, {label: torch.cat(parts) for label, parts in columns.items()}, seen)


def _tile(images: Tensor, like: Tensor) -> Tensor:
    """Pictures b c h w of one size for a grid, on the CPU; of several references the first."""
    images = (images[:, 0] if images.ndim == 5 else images).float()
    if images.shape[-2:] != like.shape[-2:]:
        images = F.interpolate(images, size=like.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
    return images.cpu()
