"""Set metrics: all pictures of an arm together against a set of real ones, on features of one extractor."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ldm import build, registry
from ldm.data.images import ImageData
from ldm.data.subset import held_out, spread
from ldm.data.transforms import to_pixels
from ldm.evaluation import distances, references
from ldm.evaluation.features import Features
from ldm.evaluation.intervals import Interval
from ldm.evaluation.references import Pixels, Reference
from ldm.registry import ConfigError, suggest
from ldm.training.distributed import Rank

METRICS: Final = {"frechet": False, "kid": False, "precision": True, "recall": True}  # name -> whether more is better
Scores = dict[str, dict[str, Interval]]  # metric -> arm -> value with interval


@dataclass(frozen=True)
class SetOptions:
    """One entry of `evaluation.sets`.

    Attributes:
        features: kind "features": inception, or tower with an encoder that nothing here is conditioned on.
        metrics: of frechet, kid, precision, recall.
        reference: the real pictures: null for the held-out items themselves, a folder of images, a data node, or a
            .safetensors file of features from `evaluation.cache`.
        kid_subset: items per subset; fewer drawn or real pictures are refused.
        kid_subsets: how many subsets the kernel distance is the mean of.
        neighbours: k of precision and recall; as many pictures or fewer are refused.
        halves: halves of the drawn pictures that tell the interval; 0 for none.
    """

    features: Mapping[str, Any]
    metrics: tuple[str, ...] = tuple(METRICS)
    reference: str | Mapping[str, Any] | None = None
    kid_subset: int = 1000
    kid_subsets: int = 100
    neighbours: int = 3
    halves: int = 50

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError(f"metrics is empty; allowed: {', '.join(METRICS)}")
        if unknown := [m for m in self.metrics if m not in METRICS]:
            known = f"allowed: {', '.join(METRICS)}{suggest(unknown[0], METRICS)}"
            raise ConfigError(f"metrics has {unknown[0]!r}; {known}")
        for name, least in (("kid_subset", 2), ("kid_subsets", 1), ("neighbours", 1), ("halves", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least {least}")


@dataclass(frozen=True, eq=False)
class SetMeasure:
    """What to measure and with what; `where` is its place in the config."""

    options: SetOptions
    features: Features
    where: str

    def check(self, items: int, whose: str) -> None:
        """Refuse fewer pictures than a metric needs. Raises: ConfigError."""
        o = self.options
        needs = {"frechet": 2, "kid": o.kid_subset, "precision": o.neighbours + 1, "recall": o.neighbours + 1}
        keys = {"kid": f"set {self.where}.kid_subset to at most {items}"}
        for metric in o.metrics:
            if items < needs[metric]:
                then = keys.get(metric, f"drop {metric} from {self.where}.metrics")
                raise ConfigError(
                    f"{self.where}: {metric} needs {needs[metric]} pictures, {whose} has {items}; take more, or {then}"
                )

    def marks(self, drawn: int, real: int) -> list[str]:
        """What a reader must know of figures of so few pictures."""
        fewer, width = min(drawn, real), self.features.width
        if "frechet" not in self.options.metrics or fewer > width:
            return []
        return [
            f"{self.where}: frechet of {fewer} pictures in {width} dimensions is far too high (singular covariance): "
            f"compare it only with figures of as many pictures"
        ]


@dataclass(frozen=True, eq=False)
class Truth:
    """What an arm's pictures are measured against; `own`: features of the held-out items where those are others."""

    reference: Reference
    own: Tensor | None


def set_measure(name: str, node: Any) -> SetMeasure:
    """Read one entry of `evaluation.sets`. Raises: ConfigError, about missing weights too."""
    where = f"evaluation.sets.{name}"
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where} is {node!r}, must be a mapping, e.g. {{features: {{name: tower, encoder: ...}}}}")
    options = registry.checked(SetOptions, node, where)
    return SetMeasure(options, registry.build("features", options.features), where)


def reference(measure: SetMeasure, real: ImageData, items: int, batch: int, cache: Path, rank: Rank) -> Reference:
    """The features that pictures like those of `real` are measured against; all ranks call this together.

    Args:
        measure: which set metric.
        real: the held-out items; their pictures are the reference where the options name none.
        items: how many of them count.
        batch: pictures of a forward.
        cache: folder of features that were made before.
        rank: shares out the work.

    Raises: ConfigError as `references.made`, or with fewer pictures than a metric needs.
    """
    given, where = measure.options.reference, f"{measure.where}.reference"
    size = _size(real)
    if isinstance(given, str) and given.endswith(".safetensors"):
        found = references.stored(Path(given), measure.features, size, where)
        measure.check(len(found.features), "the reference")
        return found
    if isinstance(given, str):
        pixels, count = references.folder(Path(given), size, rank.device, rank, where)
    else:
        data = real if given is None else build.data(dict(given), where)
        count = len(spread(data, items)) if given is None else len(data)
        pixels = _pixels(data, count, batch, rank)
        size = _size(data)
    measure.check(count, "the reference")
    return references.made(pixels, measure.features, size, cache, rank)


def _size(data: ImageData) -> tuple[int, int]:
    shape = data[0].image.shape
    return shape[-2], shape[-1]


def _pixels(data: ImageData, items: int, batch: int, rank: Rank) -> Pixels:
    return lambda: (to_pixels(part.image) for part in held_out(data, items, batch, rank.device, rank.part))


def scores(options: SetOptions, arms: Mapping[str, Tensor], real: Tensor) -> Scores:
    """Every metric of every arm.

    The interval is the value plus and minus 1.96 standard deviations of the values of random halves of the drawn
    pictures (the delete-half jackknife: a mean of half of n items varies about that of n as that of n does about the
    truth). The same halves are drawn for every arm. The reference counts as fixed.

    Args:
        options: see there.
        arms: arm -> features n d of its pictures.
        real: features m d.
    """
    real = real.double()
    makers = {"frechet": _frechet, "kid": _kid, "precision": _precision, "recall": _recall}
    found: Scores = {}
    for metric in options.metrics:
        value, of_half = makers[metric](real, options)
        found[metric] = {arm: _interval(x.double(), value, of_half, options) for arm, x in arms.items()}
    return found


Value = Callable[[Tensor], float]


def _interval(x: Tensor, value: Value, of_half: Value, options: SetOptions) -> Interval:
    """NaN bounds where none are asked for, or halves would be too small."""
    whole, half = value(x), len(x) // 2
    if options.halves < 2 or half <= max(options.neighbours, 2):
        return Interval(whole, math.nan, math.nan)
    g = torch.Generator().manual_seed(0)
    drawn = [of_half(x[torch.randperm(len(x), generator=g)[:half]]) for _ in range(options.halves)]
    spread_by = 1.96 * torch.tensor(drawn).double().std(correction=0).item()
    return Interval(whole, whole - spread_by, whole + spread_by)


def _frechet(real: Tensor, options: SetOptions) -> tuple[Value, Value]:
    fitted = distances.gaussian(real)
    return (value := lambda x: distances.frechet(distances.gaussian(x), fitted)), value


def _kid(real: Tensor, options: SetOptions) -> tuple[Value, Value]:
    """The value is the mean over subsets; halves, smaller than a subset maybe, are measured whole."""
    own = distances.within(real)
    whole = lambda x: distances.kid(x, real, options.kid_subset, options.kid_subsets)  # noqa: E731
    return whole, lambda x: distances.mmd(x, real, own)


def _precision(real: Tensor, options: SetOptions) -> tuple[Value, Value]:
    balls = distances.radii(real, options.neighbours)
    return (value := lambda x: distances.covered(x, real, balls)), value


def _recall(real: Tensor, options: SetOptions) -> tuple[Value, Value]:
    return (value := lambda x: distances.covered(real, x, distances.radii(x, options.neighbours))), value
