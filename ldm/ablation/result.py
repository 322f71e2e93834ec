"""What one run of one row found."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.evaluation.intervals import Interval


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
    """

    row: str
    seed: int
    arm: str
    figures: Mapping[str, Interval]
    items: int
    config: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    course: Sequence[tuple[int, float]] = ()

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)
