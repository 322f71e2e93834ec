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
from ldm.registry import ConfigError
from ldm.samplers import Sampler
from ldm.training.diffusion import DiffusionStage

Draw = Callable[[Batch, Mapping[str, Tensor], Mapping[str, AdapterUse], int], Tensor]
Rows = dict[str, Interval]  # arm, or ground_truth, or chance


@dataclass(frozen=True)
class Obedience:
    """Scores of every arm.

    Attributes:
        rows: adapter -> measure -> row -> mean score with interval. Rows are the arms, `ground_truth` (the real
            pictures beside their own hints) and, from two items on, `chance` (beside the hint of the next item).
        columns: pictures of the first items by label, n 3 h w or n 1 h w in [0, 1].
        items: how many were drawn per arm.
    """

    rows: dict[str, dict[str, Rows]]
    columns: dict[str, Tensor]
    items: int


class _Tally:
    """Scores of one measure of one adapter, batch by batch; what it keeps of the pictures is of two items."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self._drawn: dict[str, list[Tensor]] = {}
        self._ceiling: list[Tensor] = []
        self._chance: list[Tensor] = []
        self._wanted: Tensor  # features of this batch's hints
        self._first: Tensor  # of the first item's hint
        self._last: Tensor | None = None  # of the newest real picture

    def start(self, real: Tensor, hint: Tensor) -> None:
        """A batch's real pictures b 3 h w and the adapter's hint, in [0, 1]: they are scored, arms may follow."""
        pictures, wanted = self.measure.picture(real), self.measure.hint(hint)
        if self._last is None:
            self._first = wanted[:1].clone()
        before = pictures[-1:] if self._last is None else self._last  # the first item's neighbour is the last of all
        self._ceiling.append(self.measure.score(pictures, wanted))
        self._chance.append(self.measure.score(torch.cat([before, pictures[:-1]]), wanted))
        self._last, self._wanted = pictures[-1:].clone(), wanted

    def add(self, arm: str, images: Tensor) -> None:
        """Pictures b 3 h w in [0, 1] that an arm drew for the batch."""
        self._drawn.setdefault(arm, []).append(self.measure.score(self.measure.picture(images), self._wanted))

    def rows(self) -> Rows:
        """Means and intervals; no chance below two items, which have no neighbour, and nothing without items."""
        if self._last is None:
            return {}
        scores = {arm: torch.cat(parts) for arm, parts in self._drawn.items()} | {CEILING: torch.cat(self._ceiling)}
        if len(scores[CEILING]) > 1:
            first = self.measure.score(self._last, self._first)
            scores[CHANCE] = torch.cat([first, torch.cat(self._chance)[1:]])
        return {row: bootstrap(values) for row, values in scores.items()}


def drawer(stage: DiffusionStage, sampler: Sampler, guidance: GuidanceConfig) -> Draw:
    """A function that draws a batch's captions with some adapters; its last argument is the seed of item 0."""
    models = generate.Models(stage.denoiser, stage.vae, stage.text, stage.schedule, stage.objective)

    def draw(batch: Batch, hints: Mapping[str, Tensor], uses: Mapping[str, AdapterUse], seed: int) -> Tensor:
        seeds = range(seed, seed + len(batch.keys))
        size = (batch.image.shape[-2], batch.image.shape[-1])
        heard = {name: hints[name] for name in uses}
        request = generate.Request(stage.prompts(batch), seeds, size, guidance=guidance, hints=heard, uses=uses)
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

    Raises: ConfigError, before anything is drawn, if a measure cannot read its adapter's hint.
    """
    tallies = {(a, name): _Tally(m) for a, measures in plan.measures.items() for name, m in measures.items()}
    columns: dict[str, list[Tensor]] = {}
    seen = 0
    for batch in batches:
        given, real = hints(batch), batch.image.float() * 0.5 + 0.5
        for (adapter, name), tally in tallies.items():
            try:
                tally.start(real, given[adapter])
            except ValueError as error:
                where = f"evaluation.measures.{adapter}: {name} cannot read this hint or these pictures"
                raise ConfigError(f"{where}: {error}; name another measure") from error
        shown = {f"hint: {adapter}": hint for adapter, hint in given.items()} if seen < pictures else {}
        for arm, uses in plan.arms.items():
            images = draw(batch, given, uses, seed + seen)
            for tally in tallies.values():
                tally.add(arm, images)
            if seen < pictures:
                shown[arm] = images
        for label, images in (shown | {"ground truth": real} if shown else {}).items():
            columns.setdefault(label, []).append(_tile(images[: pictures - seen], real))
        seen += len(batch.keys)
    rows = {a: {name: tallies[a, name].rows() for name in measures} for a, measures in plan.measures.items()}
    return Obedience(rows, {label: torch.cat(parts) for label, parts in columns.items()}, seen)


def _tile(images: Tensor, like: Tensor) -> Tensor:
    """Pictures b c h w of one size for a grid, on the CPU; of several references the first."""
    images = (images[:, 0] if images.ndim == 5 else images).float()
    if images.shape[-2:] != like.shape[-2:]:
        images = F.interpolate(images, size=like.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
    return images.cpu()
