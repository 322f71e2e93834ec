"""How well adapters make pictures obey their hints: every arm is drawn on the same prompts and seeds, then scored."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ldm import generate
from ldm.data.images import Batch
from ldm.denoiser import AdapterUse
from ldm.evaluation.arms import CEILING, CHANCE, Plan
from ldm.evaluation.features import in_8_bits
from ldm.evaluation.intervals import Interval, bootstrap
from ldm.evaluation.measures import Measure
from ldm.guidance import GuidanceConfig
from ldm.registry import ConfigError
from ldm.samplers import Sampler
from ldm.training.diffusion import DiffusionStage
from ldm.training.distributed import ALONE, Rank

Draw = Callable[[Batch, Mapping[str, Tensor], Mapping[str, AdapterUse], int], Tensor]
Rows = dict[str, Interval]  # arm, or ground_truth, or chance


@dataclass(frozen=True)
class Obedience:
    """Scores of every arm.

    Attributes:
        rows: adapter -> measure -> row -> mean score with interval. Rows are the arms and, where every picture has a
            real one, `ground_truth` (the real pictures beside their own hints) and, from two items on, `chance` (beside
            the hint of the next item). Measures of the pictures themselves stand under the adapter "".
        columns: pictures of the first items by label, n 3 h w or n 1 h w in [0, 1].
        items: how many were drawn per arm.
        vectors: set -> arm -> features n d of its pictures, in order.
    """

    rows: dict[str, dict[str, Rows]]
    columns: dict[str, Tensor]
    items: int
    vectors: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])


@dataclass
class _Scores:
    """What one rank scored for one measure; features of the two items at the ends of its share."""

    drawn: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    ceiling: list[Tensor] = field(default_factory=list[Tensor])
    chance: list[Tensor] = field(default_factory=list[Tensor])  # the first is a stand-in: its neighbour is elsewhere
    first: Tensor | None = None  # of the first item's hint
    last: Tensor | None = None  # of the newest real picture

    def to(self, device: torch.device | str) -> "_Scores":
        """The same on a device."""
        return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, self)


pytree.register_dataclass(_Scores)


class _Tally:
    """Scores of one measure of one adapter, batch by batch; what it keeps of the pictures is of two items."""

    def __init__(self, measure: Measure, paired: bool) -> None:
        self.measure = measure
        self.paired = paired
        self.scores = _Scores()
        self._wanted: Tensor  # features of this batch's hints

    def start(self, real: Tensor, hint: Any) -> None:
        """A batch's real pictures b 3 h w in [0, 1] and what to compare them with: they are scored, arms may follow."""
        pictures, wanted, own = self.measure.picture(real), self.measure.hint(hint), self.scores
        if own.first is None:
            own.first = wanted[:1].clone()
        before = pictures[-1:] if own.last is None else own.last
        if self.paired:
            own.ceiling.append(self.measure.score(pictures, wanted))
            own.chance.append(self.measure.score(torch.cat([before, pictures[:-1]]), wanted))
        own.last, self._wanted = pictures[-1:].clone(), wanted

    def add(self, arm: str, images: Tensor) -> None:
        """Pictures b 3 h w in [0, 1] that an arm drew for the batch."""
        score = self.measure.score(self.measure.picture(images), self._wanted)
        self.scores.drawn.setdefault(arm, []).append(score)

    def rows(self, ranks: Sequence[_Scores], device: torch.device) -> Rows:
        """Means and intervals of what the ranks scored, in order.

        No chance below two items, which have no neighbour; nothing without items.
        """
        shares = [share.to(device) for share in ranks if share.first is not None]
        if not shares:
            return {}
        scores = {arm: torch.cat([x for share in shares for x in share.drawn[arm]]) for arm in shares[0].drawn}
        if self.paired:
            scores[CEILING] = torch.cat([x for share in shares for x in share.ceiling])
        if self.paired and len(scores[CEILING]) > 1:
            parts: list[Tensor] = []
            for before, share in zip(
                [shares[-1], *shares], shares, strict=False
            ):  # the first item's neighbour is the last
                assert before.last is not None and share.first is not None
                parts += [self.measure.score(before.last, share.first), torch.cat(share.chance)[1:]]
            scores[CHANCE] = torch.cat(parts)
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
    rank: Rank = ALONE,
    first: int = 0,
) -> Obedience:
    """Draw and score every arm.

    Args:
        plan: what to draw and measure.
        batches: held-out items, this rank's share.
        hints: batch -> adapter -> hint, as `DiffusionStage.hints`.
        draw: see `drawer`.
        seed: of item 0; item i is drawn with seed + i in every arm.
        pictures: how many items to keep for a grid.
        rank: all ranks call this together, each with consecutive items, and get the same result.
        first: index of the first item of this rank.

    Raises: ConfigError, before anything is drawn, if a measure cannot read its adapter's hint.
    """
    tallies = {key: _Tally(measure, plan.paired) for key, measure in plan.columns.items()}
    columns: dict[str, list[Tensor]] = {}
    vectors: dict[str, dict[str, list[Tensor]]] = {name: {arm: [] for arm in plan.arms} for name in plan.sets}
    seen = first
    for batch in batches:
        given, real = hints(batch), batch.image.float() * 0.5 + 0.5
        for (adapter, name), tally in tallies.items():
            try:
                tally.start(real, _compared(tally.measure, adapter, given, real, batch))
            except ValueError as error:
                where = f"evaluation.measures.{adapter}" if adapter else "evaluation.pictures"
                where = f"{where}: {name} cannot read this hint or these pictures"
                raise ConfigError(f"{where}: {error}; name another measure") from error
        shown = {f"hint: {adapter}": hint for adapter, hint in given.items()} if seen < pictures else {}
        for arm, uses in plan.arms.items():
            images = draw(batch, given, uses, seed + seen)
            for tally in tallies.values():
                tally.add(arm, images)
            for name, measure in plan.sets.items():
                vectors[name][arm].append(measure.features(in_8_bits(images)).cpu())
            if seen < pictures:
                shown[arm] = images
        truth = {"ground truth": real} if plan.paired and shown else {}
        for label, images in (shown | truth).items():
            columns.setdefault(label, []).append(_tile(images[: pictures - seen], real))
        seen += len(batch.keys)
    mine = _Share({key: tally.scores.to("cpu") for key, tally in tallies.items()}, columns, vectors, seen - first)
    return _together(plan, tallies, rank.gathered(mine), rank.device)


@dataclass(frozen=True)
class _Share:
    """What one rank has."""

    scores: dict[tuple[str, str], _Scores]
    columns: dict[str, list[Tensor]]
    vectors: dict[str, dict[str, list[Tensor]]]
    items: int


def _together(
    plan: Plan, tallies: Mapping[tuple[str, str], _Tally], shares: Sequence[_Share], device: torch.device
) -> Obedience:
    rows: dict[str, dict[str, Rows]] = {adapter: {} for adapter in plan.measures}
    for (adapter, name), tally in tallies.items():
        found = tally.rows([share.scores[adapter, name] for share in shares], device)
        rows.setdefault(adapter, {})[name] = found
    columns: dict[str, list[Tensor]] = {}
    for label, parts in ((label, parts) for share in shares for label, parts in share.columns.items()):
        columns.setdefault(label, []).extend(parts)
    vectors = {
        name: {arm: torch.cat([x for share in shares for x in share.vectors[name][arm]]) for arm in arms}
        for name, arms in shares[0].vectors.items()
    }
    whole = {label: torch.cat(parts) for label, parts in columns.items()}
    return Obedience(rows, whole, sum(share.items for share in shares), vectors)


def _compared(measure: Measure, adapter: str, hints: Mapping[str, Tensor], real: Tensor, batch: Batch) -> Any:
    """What a measure compares pictures with: the adapter's hint, or the item's caption or real picture."""
    if adapter:
        return hints[adapter]
    if measure.reads == "caption":
        return batch.text
    return real[:, None] if measure.image_prompt else real


def _tile(images: Tensor, like: Tensor) -> Tensor:
    """Pictures b c h w of one size for a grid, on the CPU; of several references the first."""
    images = (images[:, 0] if images.ndim == 5 else images).float()
    if images.shape[-2:] != like.shape[-2:]:
        images = F.interpolate(images, size=like.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
    return images.cpu()
