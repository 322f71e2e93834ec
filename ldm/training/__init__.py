"""Training: one loop for VAE, CLIP, latent diffusion and adapters."""
