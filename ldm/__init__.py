"""Latent diffusion core: models, diffusion maths, samplers, data, training. Knows nothing of any adapter."""
