"""What one run of one row found."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ldm.evaluation.arms import BASE, CEILING
from ldm.evaluation.intervals import Interval

BESIDE: Final = {BASE: "base, no adapter", CEILING: "ground truth"}  # arms that all rows are read against


@dataclass(frozen=True)
class Result:
    """One run of one row.

    Attributes:
        row: its name.
        seed: of the run.
        arm: which arm of the evaluation was read; "" where figures are the stage's own.
        figures: measure -> mean and 95 % interval over items (a point where there is none).
        items: how many pictures.
        config: digest of the run's config.
        seconds: "train" and "measure".
        course: step and value of the table's `curve`.
        beside: measure -> arm -> mean, of the arms that every row is read against: base and ground_truth.
    """

    row: str
    seed: int
    arm: str
    figures: Mapping[str, Interval]
    items: int
    config: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    course: Sequence[tuple[int, float]] = ()
    beside: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


def same(found: Sequence[Result], measure: str, arm: str) -> dict[int, float]:
    """Seed -> an arm's figure, where it is the same beside all rows; else nothing."""
    values: dict[int, set[str]] = {}
    for r in found:
        if (value := r.beside.get(measure, {}).get(arm)) is not None:
            values.setdefault(r.seed, set()).add(f"{value:.6g}")
    agree = all(len(each) == 1 for each in values.values())
    return {seed: float(min(each)) for seed, each in values.items()} if agree else {}
