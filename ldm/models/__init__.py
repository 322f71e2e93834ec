"""The networks. Importing this package registers them under their config names."""

from ldm.models import clip, text, unet, vae

__all__ = ["clip", "text", "unet", "vae"]
