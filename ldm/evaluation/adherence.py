"""Do pictures obey their hints while training goes on? The measures of evaluate.py on what validation draws anyway."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from ldm import build
from ldm.config import RunConfig
from ldm.denoiser import Denoiser
from ldm.evaluation.arms import measures_of
from ldm.evaluation.measures import Measure
from ldm.registry import ConfigError
from ldm.training.stage import Drawn

Judges = Mapping[str, Mapping[str, Measure]]  # adapter -> name -> measure
log = logging.getLogger(__name__)


def judges(config: RunConfig, trained: nn.Module) -> Judges:
    """Adapter -> name -> measure: those of `evaluation.measures`, else those of its hint, as evaluate.py takes them.

    Adapters for which neither has one are left out, with a line in the log; so is all that is no denoiser.

    Raises: ConfigError on measures that the config names and that cannot be.
    """
    found: dict[str, dict[str, Measure]] = {}
    if not isinstance(trained, Denoiser):
        return found
    for name, use in build.uses(config).items():
        try:
            found[name] = measures_of(name, use, config, trained)
        except ConfigError as error:
            if name in config.evaluation.measures:
                raise
            log.warning("no adherence of %s will be logged, and evaluate.py will refuse: %s", name, error)
    return found


@torch.no_grad()
def adherence(measures: Judges, drawn: Drawn) -> dict[str, float]:
    """Mean scores of what was drawn: ADAPTER.MEASURE with all adapters, ADAPTER.MEASURE.base without any.

    A measure that cannot read a hint or the pictures has no figure, and a line in the log.
    """
    arms = {name: images for name, images in (("", drawn.adapted), (".base", drawn.base)) if images is not None}
    figures: dict[str, float] = {}
    for adapter, name, measure in ((a, n, m) for a, named in measures.items() for n, m in named.items()):
        try:
            wanted = measure.hint(drawn.hints[adapter])
            scores = {arm: measure.score(measure.picture(images), wanted) for arm, images in arms.items()}
        except ValueError as error:
            log.warning("no figure %s.%s: %s", adapter, name, error)
            continue
        figures |= {f"{adapter}.{name}{arm}": score.mean().item() for arm, score in scores.items()}
    return figures
