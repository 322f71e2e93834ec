"""Drop rates and cached features of image prompts in the diffusion stage."""

import pytest
import torch

from ldm.registry import ConfigError
from ldm.training.diffusion import DiffusionOptions, DiffusionStage
from ldm.training.draws import Draws


class Rates(DiffusionStage):
    """Only what `_dropped` reads."""

    def __init__(self, options: DiffusionOptions) -> None:
        torch.nn.Module.__init__(self)
        self.options, self.uses = options, {"prompt": None}  # pyright: ignore[reportAttributeAccessIssue]


def test_text_image_and_both_are_dropped_apart_as_often_as_they_should() -> None:
    stage = Rates(DiffusionOptions(drop_text=0.05, drop_hint=0.05, drop_both=0.05))
    text, hints = stage._dropped(Draws(0, range(20_000)))
    image = hints["prompt"]
    for dropped in (text & image, text & ~image, image & ~text):
        assert dropped.float().mean().item() == pytest.approx(0.05, abs=0.005)


def test_without_drop_both_they_are_independent() -> None:
    stage = Rates(DiffusionOptions(drop_text=0.5, drop_hint=0.5))
    text, hints = stage._dropped(Draws(0, range(4_000)))
    assert (text & hints["prompt"]).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_rates_that_exceed_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="sum must be at most 1"):
        DiffusionOptions(drop_text=0.5, drop_hint=0.4, drop_both=0.2)
