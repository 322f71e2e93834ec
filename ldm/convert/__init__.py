"""Weights in and out: key maps, what a file holds, readers that execute nothing, and the commands of convert.py."""

from ldm.convert.keymap import KeyMap, Pair
from ldm.convert.tables import (
    diffusers_controlnet,
    diffusers_unet,
    diffusers_vae,
    open_clip_text,
    original_controlnet,
    original_unet,
    original_vae,
    transformers_text,
)

__all__ = [
    "KeyMap",
    "Pair",
    "diffusers_controlnet",
    "diffusers_unet",
    "diffusers_vae",
    "open_clip_text",
    "original_controlnet",
    "original_unet",
    "original_vae",
    "transformers_text",
]
