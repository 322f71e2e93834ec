"""Pieces that two or more adapters share."""

from torch import nn


def init_gaussian(module: nn.Conv2d | nn.Linear) -> None:
    """Gaussian weights of variance 1 / fan_in, zero bias: the ablation of zero convolutions (section 4.4)."""
    nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    if module.bias is not None:
        nn.init.zeros_(module.bias)
