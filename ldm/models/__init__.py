"""The networks. Importing this package registers them under their config names."""

from ldm.models import clip, dino, sdxl_text, swin, text, unet, vae, vision

__all__ = ["clip", "dino", "sdxl_text", "swin", "text", "unet", "vae", "vision"]
