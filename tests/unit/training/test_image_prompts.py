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
        self.options, self.uses = options, {"prompt": None, "map": None}  # pyright: ignore[reportAttributeAccessIssue]


def test_text_image_and_both_are_dropped_apart_as_often_as_they_should() -> None:
    stage, n = Rates(DiffusionOptions(drop_text=0.05, drop_hint=0.05, drop_both=0.05)), 20_000
    text, hints = stage._dropped(Draws(0, range(n)))
    image = hints["prompt"]
    shares = {0.05: (text & image, text & ~image, image & ~text), 0.1: (text, image), 0.85: (~text & ~image,)}
    for p, events in shares.items():
        for dropped in events:  # within 4 standard deviations of a binomial share
            assert dropped.float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)


def test_without_drop_both_they_are_independent() -> None:
    stage = Rates(DiffusionOptions(drop_text=0.5, drop_hint=0.5))
    text, hints = stage._dropped(Draws(0, range(4_000)))
    assert (text & hints["prompt"]).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_rates_that_exceed_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="sum must be at most 1"):
        DiffusionOptions(drop_text=0.5, drop_hint=0.4, drop_both=0.2)


def test_some_samples_keep_every_hint_and_some_none() -> None:
    stage = Rates(DiffusionOptions(drop_hint=0.5, all_or_none=(0.1, 0.2)))
    _, hints = stage._dropped(Draws(0, range(10_000)))
    one, two = hints["prompt"], hints["map"]
    assert (one & two).float().mean().item() == pytest.approx(0.2 + 0.7 / 4, abs=0.015)
    assert (~one & ~two).float().mean().item() == pytest.approx(0.1 + 0.7 / 4, abs=0.015)
    assert (one & ~two).float().mean().item() == pytest.approx(0.7 / 4, abs=0.015)


@pytest.mark.parametrize(("shares", "both"), [((0.6, 0.5), None), ((-0.1, 0.5), None), ((0.1, 0.1), 0.05)])
def test_shares_that_make_no_sense_are_refused(shares: tuple[float, float], both: float | None) -> None:
    with pytest.raises(ConfigError, match=r"stage\.all_or_none is .*; must be two shares"):
        DiffusionOptions(all_or_none=shares, drop_both=both)
