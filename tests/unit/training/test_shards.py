"""What of training in shards needs no second rank; the rest is in tests/integration/test_train_sharded.py."""

from pathlib import Path

import torch

from adapters.controlnet import ControlNet, ControlNetOptions
from ldm.denoiser import Denoiser
from ldm.models.unet import MidBlock, UNet, UNetBlock, UNetConfig
from ldm.training import shards

UNITED = 0.9  # of all weights; the rest is gathered for the whole step


def test_units_are_the_blocks_and_the_middle_of_every_network_and_hold_most_weights() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig())  # of SD1.5's size
        denoiser = Denoiser(unet, {"edge": ControlNet(ControlNetOptions(), unet=unet)})
    units = list(shards._units(denoiser))
    assert {type(unit) for unit in units} == {UNetBlock, MidBlock}
    assert len(units) == (8 + 1 + 12) + (8 + 1)
    inside = sum(p.numel() for unit in units for p in unit.parameters())
    assert UNITED < inside / sum(p.numel() for p in denoiser.parameters()) < 1


def test_a_tree_without_shards_stays_as_it_is() -> None:
    tree = {"step": 3, "ema": None, "parameters": {"model": [torch.ones(2)]}, "betas": (0.9, 0.999)}
    hollow, found = shards.take(tree)
    assert found == {}
    assert hollow["parameters"]["model"][0] is tree["parameters"]["model"][0]
    assert shards.fill(hollow, Path(), torch.ones(1))["betas"] == (0.9, 0.999)
