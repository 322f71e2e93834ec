"""Samplers; importing this package registers every one of them."""

from ldm.samplers.base import Draw, ImageNoise, OnStep, Predict, Prediction, Sampler, Trajectory
from ldm.samplers.ddim import DDIM
from ldm.samplers.ddpm import DDPM
from ldm.samplers.dpmpp import DPMpp2M, DPMpp2MSDE
from ldm.samplers.euler import Euler
from ldm.samplers.euler_ancestral import EulerAncestral
from ldm.samplers.heun import Heun
from ldm.samplers.inversion import ddim_inversion
from ldm.samplers.lcm import LCM
from ldm.samplers.plms import PLMS
from ldm.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "LCM",
    "PLMS",
    "DPMpp2M",
    "DPMpp2MSDE",
    "Draw",
    "Euler",
    "EulerAncestral",
    "Heun",
    "ImageNoise",
    "OnStep",
    "Predict",
    "Prediction",
    "Sampler",
    "Trajectory",
    "UniPC",
    "ddim_inversion",
]
