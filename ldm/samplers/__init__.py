"""Samplers; importing this package registers every one of them."""

from ldm.samplers.base import Draw, ImageNoise, OnStep, Predict, Prediction, Sampler, Trajectory
from ldm.samplers.ddim import DDIM
from ldm.samplers.ddpm import DDPM

__all__ = ["DDIM", "DDPM", "Draw", "ImageNoise", "OnStep", "Predict", "Prediction", "Sampler", "Trajectory"]
